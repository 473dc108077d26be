"""A word that may be a name or a path: one rule for texts, tokenizers and models.

What is known by a name wins over a file or folder that is called the same, so that a command means
the same in every folder, and a run that wrote a name down still means it later. ``./NAME`` is the
file or folder, as is a ``Path``.
"""

from __future__ import annotations

import logging
from collections.abc import Container
from pathlib import Path

from tinygpt.files.atomic import user_path

log = logging.getLogger("tinygpt")


def is_name(given: str | Path, known: Container[str]) -> bool:
    """Whether a word is meant by name; where there is such a path as well, a log line says so."""
    if not _is_known(given, known):
        return False
    if exists(Path(given)):
        kind = "folder" if Path(given).is_dir() else "file"
        log.warning("'%s' is taken as the name. The %s called so is './%s'.", given, kind, given)
    return True


def lasting(given: str | Path, known: Container[str]) -> str:
    """What to write down: a name as it is, and a path so that it holds in any folder."""
    path = user_path(given)
    return str(path.resolve()) if not _is_known(given, known) and exists(path) else str(given)


def exists(path: Path) -> bool:
    """Whether there is such a path; a name that no file can have is none."""
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, a link to itself, or a zero byte in it
        return False


def _is_known(given: str | Path, known: Container[str]) -> bool:
    return isinstance(given, str) and given in known
