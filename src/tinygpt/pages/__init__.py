"""What a browser runs: scripts, styles and markup.

``shared`` has the parts of every page; ``playground`` and ``dashboard`` are the pages; ``local`` is
the engine of a page that holds its own model; ``run_card`` describes a model to them.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

FOLDER = Path(__file__).parent
SERVED = ("shared", "playground", "dashboard")
"""Folders of which a server shows the files."""

_COMMENT = re.compile(r"^ *(?://[^\n]*|/\*\*(?:[^*]|\*(?!/))*\*/)\n", re.MULTILINE)
_INDENT = re.compile(r"^ +", re.MULTILINE)
_IMPORT = re.compile(r"^import (?:\* as (\w+)|\{([^}]*)\}) from \"([^\"]+)\";\n", re.MULTILINE)
_EXPORT = re.compile(
    r"^export ((?:async )?function\*?|class|const|let) (\w+)", re.MULTILINE
)  # the forms that our modules use


def text(name: str) -> str:
    """The content of a file, by its name below ``pages``: ``text("shared/style.css")``."""
    return (FOLDER / name).read_text(encoding="utf-8")


def served() -> dict[str, bytes]:
    """The files that a server shows, by their names below ``pages``."""
    return {
        f"{folder}/{path.name}": path.read_bytes()
        for folder in SERVED
        for path in sorted((FOLDER / folder).iterdir())
        if path.is_file()
    }


def bundle(entry: str) -> str:
    """A module and all that it imports as one script, in the order in which a browser runs them.

    Each becomes a function of its own, so that two modules may use the same name. Comments and
    indentation are left out: no string of ours goes over several lines.
    """
    done: set[str] = set()
    parts: list[str] = ["const modules = {};\n"]

    def add(name: str) -> None:
        if name in done:
            return
        done.add(name)
        source = _INDENT.sub("", _COMMENT.sub("", text(name)))
        for found in _IMPORT.finditer(source):
            add(_beside(name, found[3]))
        exports = ", ".join(export[2] for export in _EXPORT.finditer(source))
        body = _IMPORT.sub(lambda found: _constant(name, *found.groups()), source)
        body = _EXPORT.sub(r"\1 \2", body)
        parts.append(f'modules["{name}"] = (() => {{\n{body}return {{ {exports} }};\n}})();\n')

    add(entry)
    return "".join(parts)


def _beside(name: str, reference: str) -> str:
    """The name of the module that ``./other.js`` or ``../shared/dom.js`` refers to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(name), reference))


def _constant(name: str, whole: str | None, names: str, reference: str) -> str:
    """The statement in the place of an import."""
    target = whole or f"{{{names.replace(' as ', ': ')}}}"
    return f'const {target} = modules["{_beside(name, reference)}"];\n'
