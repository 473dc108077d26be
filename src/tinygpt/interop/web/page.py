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
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tinygpt import pages
from tinygpt.files.strict_json import to_json
from tinygpt.interop.web.payload import Chunk

WORKER = [f"local/{name}.mjs" for name in ("model", "webgpu", "sampling", "tokenizer", "worker")]
UI = [f"local/{name}.mjs" for name in ("curve", "history", "ui")]
"""The scripts of each side, in the order in which they need one another."""


def render(
    *,
    title: str,
    description: str,
    about: Mapping[str, Any],
    module: bytes,
    chunks: Iterable[Chunk],
) -> Iterator[bytes]:
    """The file, piece by piece. ``about`` is what the scripts know of the model, as JSON values."""
    worker, ui, style = pages.bundle(WORKER), pages.bundle(UI), pages.text("local/style.css")
    policy = "; ".join(
        [
            "default-src 'none'",
            f"script-src {_hash(ui)} 'wasm-unsafe-eval'",
            f"style-src {_hash(style)}",
            "worker-src blob:",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    parts = {
        "policy": policy,
        "title": html.escape(title),
        "description": html.escape(description),
        "style": style,
        "about": _json(about),
        "module": _base64(module),
        "worker": _json(worker),
        "ui": ui,
    }
    head, tail = pages.text("local/template.html").split("{{weights}}")
    yield _fill(head, parts)
    for chunk in chunks:
        yield (
            f'<script type="text/plain" class="weights" data-kind="{chunk.kind}" '
            f'data-at="{chunk.at}" data-columns="{chunk.columns}">{_base64(chunk.data)}</script>\n'
        ).encode()
    yield _fill(tail, parts)


def _fill(template: str, parts: Mapping[str, str]) -> bytes:
    """In one pass, so that nothing that is filled in is taken for a name."""
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template).encode()


def _json(value: object) -> str:
    """JSON that an element of HTML can hold, whatever is in it."""
    text = to_json(value, unicode=True, compact=True, sort=True)
    return text.replace("<", "\\u003c")


def _hash(text: str) -> str:
    return f"'sha256-{_base64(hashlib.sha256(text.encode()).digest())}'"


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
