"""The kernel cache: compiled and lowered kernels, each in a file of its own, made again if missing.

It takes the place of tinygrad's ``diskcache_get`` and ``diskcache_put``, which keep an SQLite file
and whose errors stop the program, or are taken for a missing device. Here a file is replaced as a
whole, so that threads, forks and other processes need no locks. It begins with a hash of the rest:
what was damaged is not found, since a changed byte would be run as machine code. Where the folder
cannot be used, kernels are compiled again, and one line of the log gives the reason. The entries
that have not been used for longest are deleted when all of them reach the limit.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from tinygpt.files.folders import cache_limit, put, too_many

log = logging.getLogger(__name__)

PATTERN = "*kernels-*"
"""The names of our own caches: folders, and files of tinygrad and of earlier versions."""
ENDING = ".kernel"
"""How the name of an entry ends; nothing else is ever deleted from a folder that the user chose."""
SHARE = 10
"""Kernels may take one part in this many of ``cache_limit``."""
DAY = 86_400
"""Seconds after which a use of an entry is noted again, as the time of its file."""
DIGEST = hashlib.sha256().digest_size


def install(helpers: ModuleType, fits: str) -> None:
    """Let tinygrad keep its kernels in a KernelCache; ``helpers`` is ``tinygrad.helpers``.

    ``fits`` names the processor and the compiler that entries are for: the folder may be one that
    the user chose, and shares between machines.
    """
    if helpers.diskcache_get.__module__ == __name__:
        return
    cache = KernelCache(folder_of(helpers.CACHEDB), f"{helpers.VERSION} {fits}")

    def get(table: str, key: Any) -> Any:
        return cache.get(table, key) if helpers.CACHELEVEL >= 1 else None

    def keep(table: str, key: Any, value: Any, prepickled: bool = False) -> Any:
        if helpers.CACHELEVEL >= 1:
            cache.put(table, key, value, prepickled)
        return value

    ours = {"diskcache_get": get, "diskcache_put": keep, "diskcache_clear": cache.clear}
    own = {name: getattr(helpers, name) for name in ours}
    for module in [m for name, m in sys.modules.items() if name.startswith("tinygrad")]:
        for name, function in ours.items():
            if getattr(module, name, None) is own[name]:  # it may be imported by name already
                setattr(module, name, function)


def folder_of(database: str | Path) -> Path:
    """Our folder beside the file that CACHEDB names, which stays tinygrad's own.

    A program that uses tinygrad without tinygpt may inherit the variable.
    """
    return Path(f"{database}.d")


class KernelCache:
    """A dictionary on disk. Its methods can be called in any thread and never raise."""

    def __init__(self, folder: Path, version: str = "") -> None:
        self.folder, self.version = folder, version
        self._said = self._room_made = False

    def get(self, table: str, key: object) -> Any:
        """What was put there, or None; None also where it is damaged."""
        try:
            path = self._path(table, key)
            content = path.read_bytes()
            digest, pickled = content[:DIGEST], content[DIGEST:]
            if hashlib.sha256(pickled).digest() != digest:
                return None
            if time.time() - path.stat().st_mtime > DAY:
                with suppress(PermissionError):  # the folder is another user's
                    os.utime(path)
            return pickle.loads(pickled)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._say(error)
        except Exception as error:  # whatever pickle raises for classes that have changed
            log.info("An entry of the kernel cache cannot be used: %s", error)
        return None

    def put(self, table: str, key: object, value: Any, prepickled: bool = False) -> None:
        """Keep a value, if it can be."""
        try:
            pickled = value if prepickled else pickle.dumps(value)
            self.folder.mkdir(parents=True, exist_ok=True)
            put(self._path(table, key), hashlib.sha256(pickled).digest() + pickled)
            if not self._room_made:
                self._room_made = True
                make_room(self.folder, cache_limit() // SHARE)
        except OSError as error:
            self._say(error)
        except Exception as error:  # whatever pickle raises
            log.info("A kernel cannot be kept: %s", error)

    def clear(self) -> None:
        """Forget everything."""
        remove(entries(self.folder))

    def _path(self, table: str, key: object) -> Path:
        if isinstance(key, dict):
            key = sorted(key.items())
        name = hashlib.sha256(f"{self.version} {table} {key!r}".encode()).hexdigest()
        return self.folder / (name + ENDING)

    def _say(self, error: OSError) -> None:
        if not self._said:
            self._said = True
            log.warning(
                "The kernel cache %s cannot be used as it should be (%s). Kernels that are missing "
                "are compiled again; `tinygpt doctor` looks at the cache, TINYGPT_CACHE puts it "
                "elsewhere.",
                self.folder,
                error,
            )


def make_room(folder: Path, limit: int) -> None:
    """Delete what has not been used for longest if the kernels take more than ``limit`` bytes.

    Those for other processors and compilers, in the folders beside this one, count too.
    """
    beside = folder.parent.glob(PATTERN) if folder.match(PATTERN) else ()
    places = {folder, *beside}
    with suppress(OSError):  # another process may do the same
        if sum(map(taken, places)) <= limit:  # as nearly always: the files need not be listed
            return
        files = [path for place in places for path in entries(place)]
        found = [(s.st_mtime, s.st_size, path) for path in files if (s := path.stat())]
        remove(too_many(found, limit - limit // 4))  # not at every start


def taken(place: Path) -> int:
    """Bytes of a cache, of which there may be many thousands of files; 0 if there is none."""
    if not place.is_dir():
        return place.stat().st_size if place.is_file() else 0
    with os.scandir(place) as found:
        return sum(entry.stat().st_size for entry in found if entry.name.endswith(ENDING))


def entries(place: Path) -> list[Path]:
    """The files of a cache, which is a folder, or itself a file."""
    return list(place.glob(f"*{ENDING}")) if place.is_dir() else [place][: place.is_file()]


def size_of(files: Iterable[Path]) -> int:
    """Bytes of the files that there are."""
    return sum(path.stat().st_size for path in files if path.is_file())


def remove(files: Iterable[Path]) -> None:
    """Delete the files of a cache, and their folders with the last; a process that has one open
    keeps it."""
    for path in files:
        with suppress(OSError):
            path.unlink(missing_ok=True)
            if path.parent.match(PATTERN):
                path.parent.rmdir()  # fails while it holds others


def trouble(folder: Path) -> str | None:
    """What keeps the cache from being used, or None; it is not changed."""
    if not folder.exists():
        return None
    if not folder.is_dir():
        return "is no folder"
    return None if os.access(folder, os.W_OK | os.X_OK) else "cannot be written"
