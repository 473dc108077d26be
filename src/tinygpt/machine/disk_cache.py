"""The kernel cache: compiled and lowered kernels in one SQLite file, which can be made again.

It takes the place of tinygrad's ``diskcache_get`` and ``diskcache_put``, whose errors stop the
program, or are taken for a missing device. Here a damaged file is set aside and made anew, and one
that cannot be used is done without, with one line that gives the reason. Each entry carries a hash:
SQLite has none, and a changed byte would be run as machine code. The entries that have not been
used for longest are deleted when the file reaches its limit.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import sqlite3
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from tinygpt.files.folders import cache_limit, too_many

log = logging.getLogger(__name__)

PATTERN = "kernels-*.db"
"""The names of our own files. One that the user chose, by CACHEDB, is never moved or deleted."""
ASIDE = "damaged-"
"""Before the name of a file that was set aside."""
SHARE = 10
"""Kernels may take one part in this many of ``cache_limit``."""
PATIENCE = 10
"""Seconds to wait for another process that is writing."""
DAY = 86_400
DIGEST = hashlib.sha256().digest_size
DAMAGED = {
    sqlite3.SQLITE_ERROR,  # a table of another shape
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_FORMAT,
    sqlite3.SQLITE_NOTADB,
}
"""What SQLite calls damage. It also raises for locks, full disks and permissions."""

SCHEMA = """
CREATE TABLE IF NOT EXISTS kernels (
    name BLOB PRIMARY KEY,  -- SHA-256 of tinygrad's table and key
    used INTEGER NOT NULL,  -- the day, counted from 1970
    value BLOB NOT NULL     -- SHA-256 of the pickle, then the pickle
)
"""


def install(helpers: ModuleType, fits: str) -> None:
    """Let tinygrad keep its kernels in a KernelCache; ``helpers`` is ``tinygrad.helpers``.

    ``fits`` names the processor and the compiler that entries are for: the file may be one that
    the user chose, and shares between machines.
    """
    if helpers.diskcache_get.__module__ == __name__:
        return
    cache = KernelCache(Path(helpers.CACHEDB), f"{helpers.VERSION} {fits}")

    def get(table: str, key: Any) -> Any:
        return cache.get(table, key) if helpers.CACHELEVEL >= 1 else None

    def put(table: str, key: Any, value: Any, prepickled: bool = False) -> Any:
        if helpers.CACHELEVEL >= 1:
            cache.put(table, key, value, prepickled)
        return value

    ours = {"diskcache_get": get, "diskcache_put": put, "diskcache_clear": cache.clear}
    own = {name: getattr(helpers, name) for name in ours}
    for module in [m for name, m in sys.modules.items() if name.startswith("tinygrad")]:
        for name, function in ours.items():
            if getattr(module, name, None) is own[name]:  # it may be imported by name already
                setattr(module, name, function)
    _caches.append(cache)


_caches: list[KernelCache] = []


def disconnect() -> None:
    """Close this thread's connection to the cache: for threads that end before the process."""
    for cache in _caches:
        cache.disconnect()


class KernelCache:
    """A dictionary on disk. Its methods can be called in any thread and never raise."""

    def __init__(self, path: Path, version: str = "") -> None:
        self.path, self.version = path, version
        self.readable = self.writable = True
        self._lock = threading.RLock()
        self._mine = threading.local()
        self._generation = 0  # of the file: one that was set aside has connections still
        self._aside = self._said = False
        self._room_made = False

    def get(self, table: str, key: object) -> Any:
        """What was put there, or None; None also where it is damaged."""
        if not self.readable:
            return None
        try:
            return self._get(self._name(table, key))
        except (sqlite3.Error, OSError) as error:
            self._failed(error, reading=True)
        except Exception as error:  # whatever pickle raises for classes that have changed
            log.info("An entry of the kernel cache cannot be used: %s", error)
        return None

    def put(self, table: str, key: object, value: Any, prepickled: bool = False) -> None:
        """Keep a value, if it can be."""
        if not self.writable:
            return
        try:
            self._put(self._name(table, key), value if prepickled else pickle.dumps(value))
        except (sqlite3.Error, OSError) as error:
            self._failed(error, reading=False)
        except Exception as error:  # whatever pickle raises
            log.info("A kernel cannot be kept: %s", error)

    def clear(self) -> None:
        """Forget everything."""
        try:
            self._connection().execute("DELETE FROM kernels")
        except (sqlite3.Error, OSError) as error:
            self._failed(error, reading=False)

    def disconnect(self) -> None:
        """Close this thread's connection."""
        if (mine := self._mine.__dict__.pop("connection", None)) is not None:
            mine.close()

    def _name(self, table: str, key: object) -> bytes:
        if isinstance(key, dict):
            key = sorted(key.items())
        return hashlib.sha256(f"{self.version} {table} {key!r}".encode()).digest()

    def _get(self, name: bytes) -> Any:
        connection = self._connection()
        query = "SELECT used, CAST(value AS BLOB) FROM kernels WHERE name = ?"
        used, value = connection.execute(query, (name,)).fetchone() or (0, b"")
        digest, pickled = value[:DIGEST], value[DIGEST:]
        if hashlib.sha256(pickled).digest() != digest:  # also where there is none
            return None
        if self.writable and used < _today():
            with suppress(sqlite3.OperationalError):
                row = _today(), name
                connection.execute("UPDATE kernels SET used = ? WHERE name = ?", row)
        return pickle.loads(pickled)

    def _put(self, name: bytes, value: bytes) -> None:
        connection = self._connection()
        row = name, _today(), hashlib.sha256(value).digest() + value
        connection.execute("INSERT OR REPLACE INTO kernels VALUES (?, ?, ?)", row)
        if not self._room_made:
            self._room_made = True
            limit = cache_limit() // SHARE
            make_room(connection, limit)
            remove_others(self.path, limit)

    def _connection(self) -> sqlite3.Connection:
        """This thread's connection to the file as it is now: SQLite wants one for each thread."""
        mine = self._mine.__dict__
        if mine.get("generation") != self._generation:
            self.disconnect()
        if "connection" not in mine:
            with self._lock:
                mine["generation"] = self._generation
                mine["connection"] = self._open()
        connection: sqlite3.Connection = mine["connection"]
        return connection

    def _open(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._is_ours() and not _is_writable(self.path) and self._set_aside():
            self._say("was not writable, and is set aside")
        try:
            return open_database(self.path)
        except sqlite3.OperationalError as error:
            with suppress(sqlite3.Error):  # perhaps it can be read
                connection = open_database(self.path, immutable=True)
                connection.execute("SELECT used FROM kernels LIMIT 1")
                return connection
            raise error

    def _failed(self, error: Exception, reading: bool) -> None:
        """Set a damaged file aside, once; otherwise do without the cache, and say so, once."""
        with self._lock:
            if self._mine.__dict__.get("generation") != self._generation:
                return  # another thread has set that file aside
            self.disconnect()
            if _code(error) in DAMAGED and self._is_ours() and self._set_aside():
                self._say(f"was damaged ({error}), and is set aside as {ASIDE}{self.path.name}")
                return
            self.writable = False
            self.readable = self.readable and not reading and self.path.is_file()
            self._say(
                f"cannot be {'used' if not self.readable else 'written'} ({error}), so this run "
                f"goes on {'without' if not self.readable else 'with what is in'} it"
            )

    def _is_ours(self) -> bool:
        return self.path.is_file() and self.path.match(PATTERN)

    def _set_aside(self) -> bool:
        """Give the file another name, so that a new one is made; False if that is impossible."""
        if self._aside:
            return False
        self._aside = True
        try:
            self.path.replace(self.path.with_name(ASIDE + self.path.name))
            for path in parts(self.path)[1:]:
                path.unlink(missing_ok=True)
        except OSError:
            return False
        self._generation += 1
        return True

    def _say(self, what: str) -> None:
        if not self._said:
            self._said = True
            log.warning(
                "The kernel cache %s %s. Kernels that are missing are compiled again; "
                "`tinygpt doctor` looks at the cache, TINYGPT_CACHE puts it elsewhere.",
                self.path,
                what,
            )


def open_database(path: Path, immutable: bool = False) -> sqlite3.Connection:
    """Open, or make, the file. Raises sqlite3.Error.

    An ``immutable`` one is only read, and no lock is asked for.
    """
    if immutable:
        uri = f"{path.absolute().as_uri()}?immutable=1"
        return sqlite3.connect(uri, uri=True, isolation_level=None)
    connection = sqlite3.connect(path, timeout=PATIENCE, isolation_level=None)
    try:
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")  # counts in a new file only
        with suppress(sqlite3.OperationalError):  # another process is just doing it
            connection.execute("PRAGMA journal_mode = WAL").fetchone()
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute(SCHEMA)
    except BaseException:
        connection.close()
        raise
    return connection


def make_room(connection: sqlite3.Connection, limit: int) -> None:
    """Delete what has not been used for longest, if the entries take more than ``limit`` bytes."""
    rows = connection.execute(
        "SELECT name, length(value) FROM kernels ORDER BY used, rowid"
    ).fetchall()
    excess = sum(size for _, size in rows) - limit
    if excess <= 0:
        return
    excess += limit // 4  # not at every start
    for name, size in rows:
        if excess <= 0:
            break
        connection.execute("DELETE FROM kernels WHERE name = ?", (name,))
        excess -= size
    connection.executescript("PRAGMA incremental_vacuum")  # execute() would free one page


def remove_others(path: Path, limit: int) -> None:
    """Delete files for other processors and compilers, oldest first, while all exceed ``limit``."""
    others = [p for p in databases(path.parent) if p.name != path.name]
    found = [(_last_change(p), size_of(p), p) for p in others]
    for other in too_many(found, limit - size_of(path)):
        remove(other)


def databases(folder: Path) -> list[Path]:
    """Our files in a folder, those that were set aside included."""
    return [*folder.glob(PATTERN), *folder.glob(ASIDE + PATTERN)]


def parts(path: Path) -> list[Path]:
    """A database, and what SQLite keeps beside it."""
    return [path, *(path.with_name(path.name + suffix) for suffix in ("-wal", "-shm", "-journal"))]


def size_of(path: Path) -> int:
    """Bytes of a database with all its parts."""
    return sum(p.stat().st_size for p in parts(path) if p.is_file())


def remove(path: Path) -> None:
    """Delete a database; what another process has open of it stays there for that process."""
    for part in parts(path):
        with suppress(OSError):
            part.unlink(missing_ok=True)


def trouble(path: Path) -> str | None:
    """What keeps the cache from being used, or None; it is not changed."""
    if not path.exists():
        return None
    if not path.is_file():
        return "is no file"
    if not _is_writable(path) or not os.access(path.parent, os.W_OK):
        return "cannot be written"
    try:
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=1)
        try:
            (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        finally:
            connection.close()
    except sqlite3.Error as error:
        return f"cannot be used: {error}"
    return None if found == "ok" else f"is damaged: {found}"


def _code(error: Exception) -> int:
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF


def _is_writable(path: Path) -> bool:
    return all(os.access(part, os.R_OK | os.W_OK) for part in parts(path) if part.exists())


def _last_change(path: Path) -> float:
    return max((p.stat().st_mtime for p in parts(path) if p.exists()), default=0.0)


def _today() -> int:
    return int(time.time()) // DAY
