"""Where tinygpt may write what can be made again."""

from __future__ import annotations

import functools
import os
import stat
import sys
import tempfile
from pathlib import Path


def cache_dir() -> Path:
    """The folder for what can be made again: kernels, downloads, token files. Made if missing.

    ``TINYGPT_CACHE``, else ``tinygpt`` in the system's cache folder for the user; where that cannot
    be written, a private folder among the temporary files. Raises OSError if there is none.
    """
    path = wanted_cache_dir()
    try:
        path.mkdir(parents=True, exist_ok=True)
        if os.access(path, os.W_OK | os.X_OK):
            return path
    except OSError:
        pass
    return private_temp()


def wanted_cache_dir() -> Path:
    """The cache folder by the rules, whether it can be written or not."""
    if chosen := os.environ.get("TINYGPT_CACHE"):
        return _absolute(chosen)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return _absolute(base) / "tinygpt"
    if base := os.environ.get("LOCALAPPDATA"):  # Windows
        return _absolute(base) / "tinygpt"
    return _absolute("~/Library/Caches" if sys.platform == "darwin" else "~/.cache") / "tinygpt"


def _absolute(path: str) -> Path:
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError:  # a user without a home folder
        return private_temp()


@functools.cache
def private_temp() -> Path:
    """A temporary folder of this user alone: what stands in it gets executed.

    The same one in every process if nobody else has a hand in it, else a fresh one.
    """
    owner = os.getuid() if hasattr(os, "getuid") else 0
    path = Path(tempfile.gettempdir()) / f"tinygpt-{owner}"
    try:
        path.mkdir(mode=stat.S_IRWXU, exist_ok=True)
        found = path.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == owner and not found.st_mode & 0o077:
            return path
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="tinygpt-"))
