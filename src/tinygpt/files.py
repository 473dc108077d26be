"""Files that are there whole or not at all: atomic writes, and downloads that resume and verify."""

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
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from tinygpt import extras
from tinygpt.errors import DataError, UsageError

NAME_KEPT = 40
"""Characters of a file's name that the name of its temporary repeats, for people."""
TEMPORARY = re.compile(r"\..*\.tinygpt-[0-9a-f]{12}\.tmp", re.DOTALL)
"""Names of files and folders that are being written: nothing else is ever swept away."""
ABANDONED = 24 * 3600
"""Seconds after which a temporary counts as stale on a file system that has no locks."""
CHUNK = 2**26
"""Bytes that are handed to the system at once."""
WATCH = 0.1
"""Seconds between two looks at a download."""
ATTEMPTS = 4
"""How often a download that breaks off is taken up again."""


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write, which becomes ``path`` when the block ends without an error.

    Whoever reads ``path``, even after a crash or a power cut at any instant, finds the old content
    or the new one, never a part: the data goes to disk first, then the name, then the folder that
    holds the name. Missing folders are made. Raises OSError where the folder cannot be written, and
    if ``path`` is a device, a pipe or a folder. Until then the file is at ``file.name``, for
    programs that want to open it themselves.
    """
    _check_replaceable(path)
    make_folder(path.parent)
    temporary, file = _new_temporary(path)
    try:
        with file:
            yield file
            file.flush()
            sync(file.fileno())
            temporary.replace(path)  # before it is closed: the lock keeps sweepers away
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def _temporary_name(path: Path) -> Path:
    name = f".{path.name[:NAME_KEPT]}.tinygpt-{secrets.token_hex(6)}.tmp"
    return path.with_name(name)


def _new_temporary(path: Path) -> tuple[Path, BinaryIO]:
    """A new file beside ``path``, open and locked; one that a sweeper took first is left to it."""
    while True:
        temporary = _temporary_name(path)
        file = open(temporary, "xb", opener=_create)  # noqa: SIM115
        if _lock(file.fileno()) is not False and _is_at(file.fileno(), temporary):
            return temporary, file
        file.close()


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
    """A new name takes the place of anything: of /dev/null too, for who may do all things."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is no ordinary file", str(path))


def _create(path: str, flags: int) -> int:
    return os.open(path, flags, 0o666)


@contextmanager
def building(folder: Path) -> Iterator[Path]:
    """A new folder to fill, which becomes ``folder`` when the block ends without an error.

    It is made beside ``folder``, under a name that begins with a dot, and is removed if anything
    goes wrong; what a killed process left there of an earlier try is removed too. ``folder`` itself
    may be there if it is empty. Raises OSError, FileExistsError if something is in it.
    """
    folder = Path(os.path.abspath(folder))  # noqa: PTH100  # without any ..
    make_folder(folder.parent)
    check_free(folder)
    _sweep(folder.parent, folders_of=folder.name)
    temporary, handle = _new_temporary_folder(folder)
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


def _new_temporary_folder(folder: Path) -> tuple[Path, int]:
    while True:
        temporary = _temporary_name(folder)
        temporary.mkdir()
        with suppress(FileNotFoundError):  # a sweeper took it first
            handle = os.open(temporary, os.O_RDONLY)
            if _lock(handle) is not False and _is_at(handle, temporary):
                return temporary, handle
            os.close(handle)


def check_free(folder: Path) -> None:
    """FileExistsError if something is at ``folder`` already, but for a folder without content."""
    empty = folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir())
    if not empty and (folder.is_symlink() or folder.exists()):
        raise FileExistsError(errno.EEXIST, "it is there already", str(folder))


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


def free_space(folder: Path) -> int | None:
    """Bytes that can still be written where a folder is or will be; None if nobody knows."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return None
    return usage.free if usage.total else None


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
        locked = _lock(handle)
        old = time.time() - status.st_mtime > ABANDONED
        if _is_at(handle, path) and (locked or (locked is None and old)):
            if is_folder:
                shutil.rmtree(path)
            else:
                path.unlink()
    finally:
        os.close(handle)


def _lock(handle: int) -> bool | None:
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


def _is_at(handle: int, path: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(handle), path.lstat())
    except OSError:
        return False


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content, read in bounded memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(
    url: str,
    path: Path,
    sha256: str,
    *,
    deadline: float | None = None,
    size: int | None = None,
    watch: Callable[[int], None] | None = None,
) -> Path:
    """Fetch ``url`` to ``path`` and return ``path``, whose content then has the digest ``sha256``.

    What has arrived is kept beside it as ``.part``, and a later call goes on from there. With a
    ``deadline`` in seconds the call gives up in time whatever hangs, the name lookup included.
    More than ``size`` bytes are not taken; ``watch`` is told how many have arrived, time and again.
    Raises DataError that says what went wrong.
    """
    stop = threading.Event()
    failures: list[Exception] = []

    def work() -> None:
        try:
            _fetch(url, path, sha256, stop, size)
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=work, daemon=True, name="tinygpt-download")
    thread.start()
    try:
        if watch is None:
            thread.join(deadline)
        else:
            _watch(thread, path.with_name(path.name + ".part"), deadline, watch)
    finally:
        stop.set()
    if thread.is_alive():
        raise DataError(f"{url} did not arrive within {deadline:g} seconds.")
    if failures:
        raise _explain(url, path, failures[0]) from failures[0]
    return path


def _watch(
    thread: threading.Thread, part: Path, deadline: float | None, watch: Callable[[int], None]
) -> None:
    """Wait for the thread, and tell how much of the file is there meanwhile."""
    start = time.monotonic()
    while thread.is_alive() and (deadline is None or time.monotonic() - start < deadline):
        thread.join(WATCH)
        if count := _size(part):
            watch(count)


def _explain(url: str, path: Path, error: Exception) -> DataError:
    if isinstance(error, DataError):
        return error
    import requests

    if isinstance(error, requests.HTTPError):
        return DataError(f"{url} answered {error.response.status_code} {error.response.reason}.")
    if advice := network_advice(error):
        return DataError(
            f"{url} could not be downloaded. {advice} What has arrived is kept; try again to go on."
        )
    return DataError(f"{path} could not be written: {error}.")


def network_advice(error: Exception) -> str | None:
    """What keeps requests from reaching a server, and what to do; None for an error of the disk."""
    import requests

    if isinstance(error, OSError) and "CA certificate bundle" in str(error):
        bundle = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")
        return (
            f"There is no file of certificates at {bundle}, which REQUESTS_CA_BUNDLE or "
            f"CURL_CA_BUNDLE names: correct or unset it."
        )
    if not isinstance(error, requests.RequestException):
        return None
    if "SOCKS" in str(error):
        cure = extras.install_command("PySocks>=1.7")
        return f"The proxy of the environment is a SOCKS proxy, which needs PySocks: {cure}"
    if isinstance(error, requests.exceptions.ProxyError | requests.exceptions.InvalidProxyURL):
        return "The proxy does not answer: correct or unset HTTPS_PROXY, HTTP_PROXY or ALL_PROXY."
    if isinstance(error, requests.exceptions.SSLError):
        return (
            "Its certificate is not trusted. Behind a proxy that looks into connections, set "
            "REQUESTS_CA_BUNDLE to the file of certificates that your network uses."
        )
    kind = type(error).__name__
    return f"Is there a network ({kind})? Behind a proxy, set HTTPS_PROXY."


def _fetch(
    url: str, path: Path, sha256: str, stop: threading.Event, size: int | None = None
) -> None:
    """Transfer, resume what breaks off, verify, and only then give the file its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _claimed(path.with_name(path.name + ".part"), stop) as part:
        if part is None or (path.is_file() and sha256_of(path) == sha256):
            return  # given up while another download had the part, or that one has done it
        _complete(url, part, sha256, stop, size)
        if not stop.is_set():
            part.replace(path)


@contextmanager
def _claimed(part: Path, stop: threading.Event) -> Iterator[Path | None]:
    """The unfinished file of a download, for one writer at a time; None if ``stop`` comes first.

    Whoever is second waits for the first, in this process or another. The lock ends with its
    process, so that what a killed one left is resumed. On a disk without locks each download has
    a file of its own, and begins anew.
    """
    while True:
        with part.open("ab") as file:  # for writing, as network file systems want it for a lock
            try:
                fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if stop.wait(WATCH):
                    yield None
                    return
                continue
            except OSError:
                own = _temporary_name(part)
            else:
                own = part
            if not _is_at(
                file.fileno(), part
            ):  # it was finished, or thrown away, before it was locked
                continue
            try:
                yield own
            finally:
                if own != part:
                    own.unlink(missing_ok=True)
                if _is_at(file.fileno(), part) and not _size(part):
                    part.unlink()
            return


def _complete(url: str, part: Path, sha256: str, stop: threading.Event, size: int | None) -> None:
    """Fetch until the content is right; what is wrong is emptied, and the file itself stays."""
    import requests

    for _ in range(ATTEMPTS):
        before = _size(part)
        failure: Exception | None = None
        try:
            _transfer(url, part, before, stop, size)
        except requests.RequestException as error:
            failure = error
        if stop.is_set() or (part.exists() and sha256_of(part) == sha256):
            return
        if failure is not None and _size(part) <= before:
            raise failure
        if failure is None:  # all there, and wrong
            found = sha256_of(part)
            os.truncate(part, 0)
            if not before:  # not even a stale beginning to blame
                raise DataError(
                    f"{url} is not the file it should be: its SHA-256 is {found}, wanted {sha256}. "
                    f"Something on the way changed it; nothing was kept."
                )
    raise DataError(f"{url} broke off {ATTEMPTS} times. What has arrived is kept; try again.")


def _transfer(
    url: str, part: Path, start: int, stop: threading.Event, size: int | None = None
) -> None:
    """Append what is missing after byte ``start``; a server that cannot do that sends it all."""
    import requests

    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    with requests.get(url, headers=headers, stream=True, timeout=(5, 20)) as response:
        if start and response.status_code == 416:  # nothing lies after start
            return
        response.raise_for_status()
        if stop.is_set():
            return
        resumed = response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        with part.open("ab" if start and resumed else "wb") as file:
            for block in response.iter_content(1 << 13):
                if stop.is_set():
                    return
                if size is not None and file.tell() + len(block) > size:
                    file.truncate(0)
                    raise DataError(f"{url} sends more than the {size:,} bytes it should have.")
                file.write(block)
            file.flush()
            os.fsync(file.fileno())


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
