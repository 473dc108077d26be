"""One writer a folder: a lock that the operating system releases when its holder dies.

``run.lock`` names the process that trains in the folder. The lock is not the file but the kernel's
(``flock``) on it, so a file that a killed process leaves behind blocks nobody. Where a file system
has no such locks, the holder that the file names counts, if that process may still be alive.
Readers take no lock.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import weakref
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Self

from tinygpt.errors import UsageError
from tinygpt.files import atomic
from tinygpt.files.strict_json import to_json
from tinygpt.runs.folder import LOCK

MAX_BYTES = 4096
"""A lock file that says more is not ours."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock, as the lock file describes it."""

    pid: int
    host: str
    since: str
    birth: str | None = None
    """What tells the process from a later one of the same number."""

    @classmethod
    def me(cls) -> Self:
        now = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        return cls(os.getpid(), socket.gethostname(), now, _birth(os.getpid()))

    @property
    def is_here(self) -> bool:
        return self.host == socket.gethostname()

    @property
    def is_me(self) -> bool:
        me = Holder.me()
        same = (self.pid, self.host, self.birth) == (me.pid, me.host, me.birth)
        return same and self.birth is not None  # else it may be an earlier one of this number

    def may_be_alive(self) -> bool:
        """False only where it is certain: a process of this machine that has ended."""
        if not self.is_here:
            return True
        try:
            os.kill(self.pid, 0)
        except (ProcessLookupError, OverflowError):
            return False
        except OSError:  # alive, but another user's
            pass
        return self.birth is None or _birth(self.pid) in (self.birth, None)

    def __str__(self) -> str:
        where = "this machine" if self.is_here else self.host
        return f"process {self.pid} on {where}, since {self.since}"


class FolderLock:
    """The right to write to a folder, held by one object at a time, among all processes.

    It ends with ``release``, when the object is no longer used, and when the process dies.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / LOCK
        self._release: weakref.finalize[[int, Path, int], FolderLock] | None = None

    @property
    def held(self) -> bool:
        return self._release is not None and self._release.alive

    def acquire(self) -> str | None:
        """Take the lock, unless this object holds it; -> a warning for the user, or None.

        Raises UsageError that names the holder, and OSError where the folder cannot be written.
        """
        if self.held:
            return None
        atomic.make_folder(self.folder)
        handle, before = _take(self.path)
        me = Holder.me()
        _write(handle, me)
        self._release = weakref.finalize(self, _unlock, handle, self.path, me.pid)
        return _warning(self.folder, before)

    def release(self) -> None:
        """Give the lock up; nothing happens if it is not held."""
        if self._release is not None:
            self._release()


def check_free(folder: Path) -> None:
    """UsageError that names the holder if somebody trains in a folder; nothing there changes."""
    path = folder / LOCK
    # no file, or a pipe of that name: what is wrong with it, ``acquire`` says
    with contextlib.suppress(OSError), _opened(path, os.O_RDWR) as handle:
        _check_taken(path, atomic.lock(handle), _read(handle))


def is_lock(path: Path) -> bool:
    """Whether a file of the name ``run.lock`` is one of ours: it names a holder, or is empty."""
    with contextlib.suppress(OSError), _opened(path) as handle:
        return not os.fstat(handle).st_size or _read(handle) is not None
    return False


def holder(folder: Path) -> Holder | None:
    """The process that trains in a folder, as its lock file says; takes no lock."""
    found = None
    with contextlib.suppress(OSError), _opened(folder / LOCK) as handle:
        found = _read(handle)
    return found if found is not None and found.may_be_alive() else None


@contextlib.contextmanager
def _opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    handle = _open(path, flags)
    try:
        yield handle
    finally:
        os.close(handle)


def _open(path: Path, flags: int) -> int:
    """Open no link, by which a folder from elsewhere could lead to any file, and wait for none."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def _take(path: Path) -> tuple[int, Holder | None]:
    """-> the locked file, and the holder it named before; UsageError if it is taken"""
    while True:
        handle = _open(path, os.O_RDWR | os.O_CREAT)
        try:
            locked = atomic.lock(handle)
            before = _read(handle)
            _check_taken(path, locked, before)
            if atomic.is_at(handle, path):
                return handle, before
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its last holder has just removed it: try again


def _check_taken(path: Path, locked: bool | None, before: Holder | None) -> None:
    """UsageError if the kernel says so or, where it has no locks, if the holder may be alive.

    Also if the file names this very process: some file systems tell only processes apart.
    """
    if locked is None and before is not None and before.may_be_alive():
        raise UsageError(
            f"{_explain(path.parent, before)} This file system has no locks to tell whether it "
            f"still runs; if it does not, delete {path}."
        )
    if locked is False or (before is not None and before.is_me):
        raise UsageError(_explain(path.parent, before))


def _unlock(handle: int, path: Path, pid: int) -> None:
    if pid != os.getpid():  # a copy of the process, by fork, is not the holder
        return
    with contextlib.suppress(OSError):
        os.ftruncate(handle, 0)
        if atomic.is_at(handle, path):
            path.unlink()
    with contextlib.suppress(OSError):
        os.close(handle)


def _read(handle: int) -> Holder | None:
    """The holder that a lock file names; None for one that is empty, just being written, or odd."""
    os.lseek(handle, 0, os.SEEK_SET)
    try:
        values = json.loads(os.read(handle, MAX_BYTES))
        birth, pid = values.get("birth"), int(values["pid"])
        if pid < 1:  # a signal to it would reach more than one process
            return None
        host, since = (str(values[name])[:80] for name in ("host", "since"))
        return Holder(pid, host, since, None if birth is None else str(birth))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        return None


def _write(handle: int, holder: Holder) -> None:
    with contextlib.suppress(OSError):  # on a full disk the lock holds without a name in it
        os.ftruncate(handle, 0)
        os.lseek(handle, 0, os.SEEK_SET)
        os.write(handle, to_json(asdict(holder)).encode())


def _explain(folder: Path, holder: Holder | None) -> str:
    """Why the folder cannot be taken, and what to do."""
    process = f"by {holder}" if holder else "by another process"
    other = holder is not None and holder.is_here and holder.pid != os.getpid()
    end = f"end it (kill {holder.pid})" if holder and other else "end it"
    return (
        f"{folder} is being trained already, {process}. Two writers would spoil the run: wait for "
        f"that one, {end}, or choose another folder."
    )


def _warning(folder: Path, before: Holder | None) -> str | None:
    if before is None or before.is_here:
        return None
    return (
        f"{folder} was last trained by {before}, which did not sign off. If it still runs there, "
        f"stop one of the two: not every network file system shares its locks."
    )


def _birth(pid: int) -> str | None:
    """The boot that a process belongs to and the tick that it began at; None if it is not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        return f"{boot} {stat.rpartition(')')[2].split()[19]}"
    except (OSError, IndexError):
        return None
