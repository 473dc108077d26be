"""One writer a folder: a lock that the operating system itself lets go when its holder dies.

The file ``run.lock`` says who trains there. The lock is not the file but the kernel's (``flock``)
on it, so what a killed process leaves behind blocks nobody. Where a file system has no such locks,
the word of the file counts, if the process that it names may still be alive. Readers take no lock.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import sys
import threading
import weakref
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Self

from tinygpt.errors import UsageError
from tinygpt.files.atomic import make_folder
from tinygpt.files.strict_json import to_json
from tinygpt.runs.folder import LOCK

UNSUPPORTED = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}
"""What file systems without locks answer: some of NFS, Lustre and FUSE."""
MAX_BYTES = 4096
"""A lock file that says more is not ours."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lock, in his own words."""

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

    def may_be_alive(self) -> bool:
        """False only where it is certain: a process of this machine that has gone."""
        if not self.is_here or sys.platform == "win32":
            return True
        try:
            os.kill(self.pid, 0)
        except (ProcessLookupError, OverflowError):
            return False
        except OSError:  # there, but somebody else's
            pass
        return self.birth is None or _birth(self.pid) in (self.birth, None)

    def __str__(self) -> str:
        where = "this machine" if self.is_here else self.host
        return f"process {self.pid} on {where}, since {self.since}"


class FolderLock:
    """The right to write to a folder, held by one object at a time, among all processes.

    It is let go by ``release``, when the object is no longer used, and when the process dies.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / LOCK
        self._release: weakref.finalize[[int, Path, str, int], FolderLock] | None = None

    @property
    def held(self) -> bool:
        return self._release is not None and self._release.alive

    def acquire(self) -> str | None:
        """Take the lock, unless it is held by this object; -> what the user should know, or None.

        Raises UsageError that names the holder, and OSError where the folder cannot be written.
        """
        if self.held:
            return None
        name, me = os.path.realpath(self.path), Holder.me()
        _reserve(name, self.folder, me)
        try:
            make_folder(self.folder)
            handle, before = _take(self.path)
        except BaseException:
            _ours.pop(name)
            raise
        _write(handle, me)
        self._release = weakref.finalize(self, _let_go, handle, self.path, name, me.pid)
        return _warning(self.folder, before)

    def release(self) -> None:
        """Let go; nothing happens if it is not held."""
        if self._release is not None:
            self._release()


def check_free(folder: Path) -> None:
    """UsageError that names the holder if somebody trains in a folder; nothing there changes."""
    path = folder / LOCK
    name = os.path.realpath(path)
    with _guard:
        if name in _ours:
            raise UsageError(_explain(folder, _ours[name]))
    no_link = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        handle = os.open(path, os.O_RDWR | no_link)
    except OSError:  # none is there; what else is wrong with it, ``acquire`` says
        return
    try:
        _check_taken(path, _lock(handle), _read(handle))
    except OSError:  # a pipe of that name
        return
    finally:
        os.close(handle)


def is_lock(path: Path) -> bool:
    """Whether a file of the name ``run.lock`` is one of ours: it names a holder, or is empty."""
    no_link = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        handle = os.open(path, os.O_RDONLY | no_link)
    except OSError:
        return False
    try:
        return not os.fstat(handle).st_size or _read(handle) is not None
    except OSError:
        return False
    finally:
        os.close(handle)


def holder(folder: Path) -> Holder | None:
    """Who trains in a folder, by the word of its lock file; takes no lock, and nobody notices."""
    no_link = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        handle = os.open(folder / LOCK, os.O_RDONLY | no_link)
    except OSError:
        return None
    try:
        found = _read(handle)
    except OSError:  # a folder of that name
        return None
    finally:
        os.close(handle)
    return found if found is not None and found.may_be_alive() else None


_ours: dict[str, Holder] = {}
"""Lock files of this process: on some file systems the kernel tells only processes apart."""
_guard = threading.Lock()


def _reserve(name: str, folder: Path, me: Holder) -> None:
    with _guard:
        if name in _ours:
            raise UsageError(_explain(folder, _ours[name]))
        _ours[name] = me


def _take(path: Path) -> tuple[int, Holder | None]:
    """-> the locked file, and who wrote into it last; UsageError if it is taken"""
    while True:
        # no link: a folder from elsewhere could have another file emptied and written to
        no_link = getattr(os, "O_NOFOLLOW", 0)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | no_link, 0o666)
        try:
            locked = _lock(handle)
            before = _read(handle)
            _check_taken(path, locked, before)
            if _is_at(handle, path):
                return handle, before
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its last holder has just removed it: once more


def _check_taken(path: Path, locked: bool | None, before: Holder | None) -> None:
    """UsageError if the answer of the kernel, or else the word of the file, says so."""
    if locked is None and before is not None and before.may_be_alive():
        raise UsageError(_explain(path.parent, before) + _doubt(path))
    if locked is False:
        raise UsageError(_explain(path.parent, before))


def _let_go(handle: int, path: Path, name: str, pid: int) -> None:
    if pid != os.getpid():  # a copy of the process, by fork, is not the holder
        return
    with contextlib.suppress(OSError):
        os.ftruncate(handle, 0)
        if _is_at(handle, path):
            path.unlink()
    with contextlib.suppress(OSError):
        os.close(handle)
    _ours.pop(name, None)


def _lock(handle: int) -> bool | None:
    """Ask the kernel; -> whether it agreed, None where it has no locks to give."""
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(handle, MAX_BYTES, os.SEEK_SET)  # what is locked there cannot be read
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return None if error.errno in UNSUPPORTED else False
    return True


def _is_at(handle: int, path: Path) -> bool:
    """Whether the open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except OSError:
        return False


def _read(handle: int) -> Holder | None:
    os.lseek(handle, 0, os.SEEK_SET)
    try:
        values = json.loads(os.read(handle, MAX_BYTES))
        birth = values.get("birth")
        pid = int(values["pid"])
        if pid < 1:  # to kill that would end more than one process
            return None
        return Holder(
            pid,
            str(values["host"])[:80],
            str(values["since"])[:80],
            None if birth is None else str(birth),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        return None  # empty, or just being written


def _write(handle: int, holder: Holder) -> None:
    with contextlib.suppress(OSError):  # on a full disk the lock holds without its words
        os.ftruncate(handle, 0)
        os.lseek(handle, 0, os.SEEK_SET)
        os.write(handle, to_json(asdict(holder)).encode())


def _explain(folder: Path, holder: Holder | None) -> str:
    """Why the folder is not ours, and what to do."""
    who = f"by {holder}" if holder else "by another process"
    other = holder is not None and holder.is_here and holder.pid != os.getpid()
    end = f"end it (kill {holder.pid})" if holder and other else "end it"
    return (
        f"{folder} is being trained already, {who}. Two writers would spoil the run: wait for that "
        f"one, {end}, or choose another folder."
    )


def _doubt(path: Path) -> str:
    return (
        f" This file system has no locks to tell whether it still runs; if it does not, delete "
        f"{path}."
    )


def _warning(folder: Path, before: Holder | None) -> str | None:
    if before is None or before.is_here:
        return None
    return (
        f"{folder} was last trained by {before}, which did not sign off. If it still runs there, "
        f"stop one of the two: not every network file system shares its locks."
    )


def _birth(pid: int) -> str | None:
    """The boot that a process belongs to and the tick that it began at; None if nobody tells."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        return f"{boot} {stat.rpartition(')')[2].split()[19]}"
    except (OSError, IndexError):
        return None
