"""What a browser runs: scripts, styles and markup.

``shared`` serves every page; ``playground`` and ``dashboard`` are the pages; ``local`` is the page
that holds its own model, with the worker that runs it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

FOLDER = Path(__file__).parent
SERVED = ("shared", "playground", "dashboard")
"""Folders of which a server shows the files."""


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


def bundle(names: Iterable[str]) -> str:
    """Modules as one script: they know each other's names without imports."""
    joined = "\n".join(text(name) for name in names)
    joined = re.sub(r"^import .*?;\n", "", joined, flags=re.MULTILINE)
    return re.sub(r"^export ", "", joined, flags=re.MULTILINE)
