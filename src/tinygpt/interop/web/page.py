"""One HTML file out of a module, weights, a vocabulary, and the page's own scripts and style.

What the browser may do is written in the file: nothing but the scripts in it, each known by its
hash, and no request at all. Weights come last, in chunks, so that the page shows itself, and how
much of it there is, while a large one is still being read. All that a run says of itself, its name
included, is text in JSON, which the scripts show as text.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tinygpt import pages
from tinygpt.files.strict_json import to_json
from tinygpt.interop.web.payload import Chunk

_STYLE = re.compile(r'<link rel="stylesheet" href="page/([^"]+)">')
_SCRIPT = re.compile(r'<script src="page/([^"]+)"></script>')
_SERVED = re.compile(r' *(?:<script type="module".*?</script>|<nav.*?</nav>)\n', re.DOTALL)
"""The parts of a server's page that an exported one lacks: its script, and links to other pages."""


_CHANGES = {
    '<meta charset="utf-8">': pages.text("local/head.html").rstrip(),
    "<title>Playground · TinyGPT</title>": "<title>{{title}}</title>",
    "page/shared/icon.svg": "data:image/svg+xml;base64,{{icon}}",
    'href="./"': 'href="#text"',
    '    <h1 class="unseen">Playground</h1>\n': pages.text("local/start.html"),
    "</body>": pages.text("local/end.html") + "</body>",
}
"""Replacements that make an exported page of a server's."""


def render(
    *,
    title: str,
    description: str,
    about: Mapping[str, Any],
    module: bytes,
    chunks: Iterable[Chunk],
) -> Iterator[bytes]:
    """The file, piece by piece. ``about`` describes the model to the scripts, as JSON values."""
    ui, worker = pages.bundle("local/page.js"), pages.bundle("local/worker.mjs")
    template = _SERVED.sub("", pages.text("playground/index.html"))
    styles = [pages.text(name) for name in _STYLE.findall(template)]
    scripts = [pages.text(name) for name in _SCRIPT.findall(template)]
    policy = "; ".join(
        [
            "default-src 'none'",
            f"script-src {' '.join(map(_hash, [*scripts, ui]))} 'wasm-unsafe-eval'",
            f"style-src {' '.join(map(_hash, styles))}",
            "worker-src blob:",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    parts = {
        "policy": policy,
        "icon": _base64(pages.text("shared/icon.svg").encode()),
        "title": html.escape(title),
        "description": html.escape(description),
        "about": _json(about),
        "module": _base64(zlib.compress(module, 9)),
        "worker": _base64(zlib.compress(worker.encode(), 9)),
        "ui": ui,
    }
    template = _STYLE.sub(lambda found: f"<style>{pages.text(found[1])}</style>", template)
    template = _SCRIPT.sub(lambda found: f"<script>{pages.text(found[1])}</script>", template)
    for before, after in _CHANGES.items():
        assert before in template, before
        template = template.replace(before, after)
    head, tail = template.split("{{weights}}")
    yield _fill(head, parts)
    for chunk in chunks:
        yield (
            f'<script type="text/plain" class="weights" data-kind="{chunk.kind}" '
            f'data-at="{chunk.at}" data-columns="{chunk.columns}">{_base64(chunk.data)}</script>\n'
        ).encode()
    yield _fill(tail, parts)


def _fill(template: str, parts: Mapping[str, str]) -> bytes:
    """Fill in the parts in one pass, so that no part's own text is taken for a name."""
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template).encode()


def _json(value: object) -> str:
    """JSON that is safe inside a script element: ``<`` is escaped."""
    text = to_json(value, unicode=True, compact=True, sort=True)
    return text.replace("<", "\\u003c")


def _hash(text: str) -> str:
    return f"'sha256-{_base64(hashlib.sha256(text.encode()).digest())}'"


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
