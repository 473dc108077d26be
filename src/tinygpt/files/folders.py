"""Where tinygpt may write what can be made again."""

from __future__ import annotations

import functools
import os
import stat
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

CACHE_GB = 10.0
"""What ``cache_limit`` is where TINYGPT_CACHE_GB says nothing."""


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
    base = os.environ.get("XDG_CACHE_HOME", "")
    if Path(base).is_absolute():  # a relative one is to be ignored, says the specification
        return Path(base, "tinygpt")
    return _absolute("~/Library/Caches" if sys.platform == "darwin" else "~/.cache") / "tinygpt"


def token_folders() -> Iterator[Path]:
    """Where token files are kept, the best first; the next is made when it is asked for."""
    yield (first := cache_dir() / "tokens")
    if (second := private_temp() / "tokens") != first:
        yield second


def token_files() -> list[Path]:
    """The token files that are kept now."""
    return [p for folder in token_folders() for p in folder.glob("*.npy") if p.is_file()]


def too_many(found: Iterable[tuple[float, int, Path]], limit: int) -> list[Path]:
    """Of (time of last use, bytes, path) the paths used longest ago, whose loss keeps the limit."""
    ordered = sorted(found)
    excess = sum(size for _, size, _ in ordered) - limit
    gone = []
    for _, size, path in ordered:
        if excess <= 0:
            break
        excess -= size
        gone.append(path)
    return gone


def keep_limit(folder: Path, kept: Path) -> None:
    """Delete the token files used longest ago, but ``kept``, while all exceed ``cache_limit``."""
    with suppress(OSError):  # another process may do the same
        found = [(p.stat(), p) for p in folder.glob("*.npy") if p.is_file() and p != kept]
        room = cache_limit() - kept.stat().st_size
        for path in too_many([(s.st_atime, s.st_size, p) for s, p in found], room):
            path.unlink()


def put(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Write what can be made again: the file appears whole, and with its permissions, at once.

    Others may write the same file at the same time. It may be lost with the power. Raises OSError.
    """
    staging = path.with_name(f".{os.getpid()}-{threading.get_ident()}.{path.name}")
    try:
        staging.write_bytes(content)
        staging.chmod(mode)
        staging.replace(path)
    except OSError:
        staging.unlink(missing_ok=True)
        raise


def cache_limit() -> int:
    """Bytes that the token files of the cache may take: TINYGPT_CACHE_GB, by default 10."""
    try:
        limit = float(os.environ.get("TINYGPT_CACHE_GB") or CACHE_GB)
        return int(limit * 1e9) if limit >= 0 else int(CACHE_GB * 1e9)
    except (ValueError, OverflowError):  # no number, or none that is finite
        return int(CACHE_GB * 1e9)


def _absolute(path: str) -> Path:
    try:
        found = Path(path).expanduser()
    except RuntimeError:  # a user without a home folder
        return private_temp()
    if path.startswith("~") and not found.is_absolute():  # HOME is empty, or relative
        return private_temp()
    return found.absolute()


@functools.cache
def private_temp() -> Path:
    """A temporary folder of this user alone: what stands in it gets executed.

    The same one in every process if it is this user's alone, else a fresh one.
    """
    owner = os.getuid()
    path = Path(tempfile.gettempdir()) / f"tinygpt-{owner}"
    try:
        path.mkdir(mode=stat.S_IRWXU, exist_ok=True)
        found = path.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == owner and not found.st_mode & 0o077:
            return path
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="tinygpt-"))
