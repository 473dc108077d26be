"""Files that are there whole or not at all: atomic writes, and downloads that resume and verify."""

from __future__ import annotations

import hashlib
import os
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from tinygpt.errors import DataError

STALE = ".tmp"
"""How the names of unfinished files end; they begin with a dot."""
ATTEMPTS = 4
"""How often a download that breaks off is taken up again."""


@contextmanager
def staging(path: Path) -> Iterator[Path]:
    """The name of a file to write, which becomes ``path`` when the block ends without an error.

    Whoever reads ``path``, even after a crash at any instant, finds the old content or the new one,
    never a part: the data goes to disk first, then the name, then the folder that holds the name.
    Missing folders are made. Raises OSError where the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}{STALE}")
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # some writers make private files
        _sync(temporary)
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    with suppress(OSError):  # not every system lets a folder be synced
        _sync(path.parent)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """``staging``, as a binary file that is open for writing."""
    with staging(path) as temporary, temporary.open("xb") as file:
        yield file
        file.flush()


def remove_stale(folder: Path) -> None:
    """Delete what a killed process left half written in a folder."""
    with suppress(OSError):
        for path in folder.glob(f".*{STALE}"):
            path.unlink()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content, read in bounded memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(url: str, path: Path, sha256: str, *, deadline: float | None = None) -> Path:
    """Fetch ``url`` to ``path`` and return ``path``, whose content then has the digest ``sha256``.

    What has arrived is kept beside it as ``.part``, and a later call goes on from there. With a
    ``deadline`` in seconds the call gives up in time whatever hangs, the name lookup included.
    Raises DataError that says what went wrong.
    """
    stop = threading.Event()
    failures: list[Exception] = []

    def work() -> None:
        try:
            _fetch(url, path, sha256, stop)
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=work, daemon=True, name="tinygpt-download")
    thread.start()
    try:
        thread.join(deadline)
    finally:
        stop.set()
    if thread.is_alive():
        raise DataError(f"{url} did not arrive within {deadline:g} seconds.")
    if failures:
        raise _explain(url, path, failures[0]) from failures[0]
    return path


def _explain(url: str, path: Path, error: Exception) -> DataError:
    if isinstance(error, DataError):
        return error
    import requests

    if isinstance(error, requests.HTTPError):
        return DataError(f"{url} answered {error.response.status_code} {error.response.reason}.")
    if isinstance(error, requests.RequestException):
        return DataError(
            f"{url} could not be downloaded ({type(error).__name__}). Is there a network? "
            f"Behind a proxy, set HTTPS_PROXY. What has arrived is kept; try again to go on."
        )
    return DataError(f"{path} could not be written: {error}.")


def _fetch(url: str, path: Path, sha256: str, stop: threading.Event) -> None:
    """Transfer, resume what breaks off, verify, and only then give the file its name."""
    import requests

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    for _ in range(ATTEMPTS):
        before = _size(part)
        failure: Exception | None = None
        try:
            _transfer(url, part, before, stop)
        except requests.RequestException as error:
            failure = error
        if stop.is_set():
            return
        if part.exists() and sha256_of(part) == sha256:
            part.replace(path)
            return
        if failure is not None and _size(part) <= before:
            raise failure
        if failure is None:  # all there, and wrong
            found = sha256_of(part)
            part.unlink()
            if not before:  # not even a stale beginning to blame
                raise DataError(
                    f"{url} is not the file it should be: its SHA-256 is {found}, wanted {sha256}. "
                    f"Something on the way changed it; nothing was kept."
                )
    raise DataError(f"{url} broke off {ATTEMPTS} times. What has arrived is kept; try again.")


def _transfer(url: str, part: Path, start: int, stop: threading.Event) -> None:
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
                file.write(block)
            file.flush()
            os.fsync(file.fileno())


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
