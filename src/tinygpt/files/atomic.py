"""Files that are there whole or not at all; a temporary is swept when its writer has gone."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from tinygpt.errors import UsageError

NAME_KEPT = 40
"""Characters of a file's name that the name of its temporary repeats, for people."""
TEMPORARY = re.compile(r"\..*\.tinygpt-[0-9a-f]{12}\.tmp", re.DOTALL)
"""Names of files and folders that are being written: nothing else is ever swept away."""
ABANDONED = 24 * 3600
"""Seconds after which a temporary counts as stale on a file system that has no locks."""
CHUNK = 2**26
"""Bytes that are handed to the system at once."""


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write, which becomes ``path`` when the block ends without an error.

    A reader of ``path``, even after a crash or a power cut at any instant, finds the old content
    or the new one, never a part: the data goes to disk first, then the name, then the folder that
    holds the name. Missing folders are made. Raises OSError where the folder cannot be written, and
    if ``path`` is a device, a pipe or a folder. Until then the file is at ``file.name``, for
    programs that want to open it themselves.
    """
    _check_replaceable(path)
    make_folder(path.parent)
    # Beside the target, since a rename is atomic only within one file system.
    temporary, handle = _new_temporary(path, _new_file)
    try:
        with open(temporary, "wb", opener=lambda *_: handle) as file:
            yield file
            file.flush()
            # The system writes data and names to the disk in any order it likes. Without fsync the
            # new name could be there first, and a power cut would leave it on an empty file.
            sync(file.fileno())
            # rename(2) exchanges what the name stands for in one step: opening the path gives the
            # old file or the new one, and a reader that has the old one open keeps it.
            temporary.replace(path)  # before it is closed: the lock keeps sweepers away
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    # The name is an entry of the folder, which is data too: until it is on the disk, a power cut
    # would bring back the old file.
    sync_folder(path.parent)


def temporary_name(path: Path) -> Path:
    name = f".{path.name[:NAME_KEPT]}.tinygpt-{secrets.token_hex(6)}.tmp"
    return path.with_name(name)


def _new_temporary(path: Path, make: Callable[[Path], int]) -> tuple[Path, int]:
    """A new file or folder beside ``path``, made by ``make``, and locked by the handle returned.

    One that a sweeper took between the two is left to it.
    """
    while True:
        temporary = temporary_name(path)
        handle = make(temporary)
        if lock(handle) is not False and is_at(handle, temporary):
            return temporary, handle
        os.close(handle)


def _new_file(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)


def _new_folder(path: Path) -> int:
    while True:
        path.mkdir()
        with suppress(FileNotFoundError):  # a sweeper took it first
            return os.open(path, os.O_RDONLY)


def user_path(path: str | Path) -> Path:
    """A path that a user gave; ~ and ~name at its beginning are home folders, as in a shell.

    What is really called so has to be given in full. Raises UsageError where there is no such home.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UsageError(
            f"{path} begins with a home folder that is not known here. Write the path in full; if "
            f"~ is a part of its name, it is in full {Path(path).absolute()}"
        ) from error


def _check_replaceable(path: Path) -> None:
    """A rename takes the place of anything, as root even of /dev/null: only files are replaced."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is no ordinary file", str(path))


@contextmanager
def building(folder: Path) -> Iterator[Path]:
    """A new folder to fill, which becomes ``folder`` when the block ends without an error.

    It is made beside ``folder``, under a name that begins with a dot, and is removed if anything
    goes wrong; what a killed process left there of an earlier try is removed too. ``folder`` itself
    may be there if it is empty. Raises UsageError if something is in it, and OSError.
    """
    check_free(folder)
    folder = Path(os.path.abspath(folder))  # noqa: PTH100  # without any ..
    make_folder(folder.parent)
    _sweep(folder.parent, folders_of=folder.name)
    temporary, handle = _new_temporary(folder, _new_folder)
    try:
        yield temporary
        sync_folder(temporary)
        temporary.replace(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        os.close(handle)
    sync_folder(folder.parent)


def check_free(folder: Path) -> None:
    """UsageError if something is at ``folder`` already, but for a folder without content."""
    empty = folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir())
    if not empty and (folder.is_symlink() or folder.exists()):
        raise UsageError(
            f"{folder} is there already, and nothing in it is overwritten. Choose another folder."
        )


def check_overwritable(path: Path, mark: bytes, kind: str) -> None:
    """UsageError if a file is at ``path`` that does not look like one of ours.

    Ours have ``mark`` in their first 64 KB; an empty file may be overwritten too. ``kind`` says
    what ours are, such as "a plot". Whatever is no ordinary file is left to ``replacing``.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder. Give the name of a file to write in it.")
    if not path.is_file():
        return
    try:
        with path.open("rb") as file:
            head = file.read(1 << 16)
    except OSError as error:
        raise UsageError(f"{path} is there already, and cannot be read: {error}.") from error
    if head and mark not in head:
        raise UsageError(
            f"{path} is there already and is not {kind} that TinyGPT wrote: it is not overwritten. "
            f"Choose another name, or delete it first."
        )


def write_all(handle: int, data: bytes | memoryview) -> None:
    """Write bytes to a file descriptor, in pieces that a signal can come between."""
    left = memoryview(data)
    while left:
        left = left[os.write(handle, left[:CHUNK]) :]


def make_folder(folder: Path) -> None:
    """Make a folder and those above it that are missing, so that they outlast a power cut."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def sync(handle: int) -> None:
    """Wait until what was written to a file descriptor is on the disk."""
    if sys.platform == "darwin":  # where fsync leaves it in the memory of the drive
        with suppress(OSError):
            fcntl.fcntl(handle, fcntl.F_FULLFSYNC)
            return
    os.fsync(handle)


def sync_folder(folder: Path) -> None:
    """The same for the names in a folder, on systems that can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except PermissionError:  # a folder may be writable and yet not readable
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EBADF):
            raise
    finally:
        os.close(handle)


def remove_stale(folder: Path) -> None:
    """Delete the files that killed processes left half written in a folder, and nothing else.

    Only names that ``replacing`` gives are looked at, and of these only ordinary files that no
    process holds.
    """
    _sweep(folder)


def _sweep(folder: Path, folders_of: str | None = None) -> None:
    """Remove stale temporaries: files, or the folders that were to become ``folders_of``."""
    beginning = "." if folders_of is None else f".{folders_of[:NAME_KEPT]}.tinygpt-"
    with suppress(OSError):
        for path in folder.iterdir():
            if path.name.startswith(beginning) and TEMPORARY.fullmatch(path.name):
                with suppress(OSError):
                    _remove_unless_held(path, is_folder=folders_of is not None)


def _remove_unless_held(path: Path, is_folder: bool) -> None:
    """The lock is held while it is removed, so that no writer can begin with it meanwhile."""
    status = path.lstat()
    if not (stat.S_ISDIR if is_folder else stat.S_ISREG)(status.st_mode):
        return
    handle = os.open(path, (os.O_RDONLY if is_folder else os.O_RDWR) | os.O_NOFOLLOW)
    try:
        locked = lock(handle)
        old = time.time() - status.st_mtime > ABANDONED
        if is_at(handle, path) and (locked or (locked is None and old)):
            if is_folder:
                shutil.rmtree(path)
            else:
                path.unlink()
    finally:
        os.close(handle)


def lock(handle: int) -> bool | None:
    """Hold a file as long as it is open: the sign that its process lives.

    -> False if another process holds it, None where the file system has no locks.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def is_at(handle: int, path: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(handle), path.lstat())
    except OSError:
        return False


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content, read in bounded memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
