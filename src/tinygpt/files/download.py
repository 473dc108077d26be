"""Downloads that resume, verify and appear whole."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tinygpt.errors import DataError, extras
from tinygpt.files.atomic import is_at, lock, sha256_of, temporary_name

WATCH = 0.1
"""Seconds between two looks at a download."""
ATTEMPTS = 4
"""How often a download that breaks off is taken up again."""


@dataclass(frozen=True)
class _Wanted:
    """A file on a server, the digest that it must have, and at most ``size`` bytes."""

    url: str
    digest: str
    size: int | None
    headers: Mapping[str, str]

    def hash_of(self, path: Path) -> str:
        """The digest of a file, of the kind that is wanted."""
        if len(self.digest) == 64:
            return sha256_of(path)
        content = path.read_bytes()
        named = b"blob %d\0" % len(content) + content
        return hashlib.sha1(named, usedforsecurity=False).hexdigest()

    def is_at(self, path: Path) -> bool:
        return self.hash_of(path) == self.digest


def download(
    url: str,
    path: Path,
    digest: str,
    *,
    deadline: float | None = None,
    size: int | None = None,
    headers: Mapping[str, str] | None = None,
    watch: Callable[[int], None] | None = None,
) -> Path:
    """Fetch ``url`` to ``path`` and return ``path``, whose content then has the ``digest``.

    That is the SHA-256 in hexadecimal, or the shorter SHA-1 that git gives to a content.
    What has arrived is kept beside it as ``.part``, and a later call goes on from there. With a
    ``deadline`` in seconds the call gives up in time whatever hangs, the name lookup included.
    More than ``size`` bytes are not taken, ``headers`` go with each request, and ``watch`` gets the
    number of bytes that have arrived, every ``WATCH`` seconds. Raises DataError that says what went
    wrong.
    """
    wanted = _Wanted(url, digest, size, headers or {})
    stop, start, part = threading.Event(), time.monotonic(), _part(path)
    failures: list[Exception] = []

    def work() -> None:
        try:
            _fetch(wanted, path, stop)
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=work, daemon=True, name="tinygpt-download")
    thread.start()
    try:
        while thread.is_alive() and (deadline is None or time.monotonic() - start < deadline):
            thread.join(WATCH)
            if watch and (count := _size(part)):
                watch(count)
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


def _fetch(wanted: _Wanted, path: Path, stop: threading.Event) -> None:
    """Transfer, resume what breaks off, verify, and only then give the file its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _claimed(_part(path), stop) as part:
        if part is None or (path.is_file() and wanted.is_at(path)):
            return  # given up while another download had the part, or that one has done it
        _complete(wanted, part, stop)
        if not stop.is_set():
            part.replace(path)


@contextmanager
def _claimed(part: Path, stop: threading.Event) -> Iterator[Path | None]:
    """The unfinished file of a download, for one writer at a time; None if ``stop`` comes first.

    A second download waits for the first, in this process or another. The lock ends with its
    process, so that what a killed one left is resumed. On a disk without locks each download has
    a file of its own, and begins anew.
    """
    while True:
        with part.open("ab") as file:  # for writing, as network file systems want it for a lock
            locked = lock(file.fileno())
            if locked is False:
                if stop.wait(WATCH):
                    yield None
                    return
            elif is_at(file.fileno(), part):  # else it was finished, or thrown away, meanwhile
                own = part if locked else temporary_name(part)
                try:
                    yield own
                finally:
                    if own != part:
                        own.unlink(missing_ok=True)
                    if is_at(file.fileno(), part) and not _size(part):
                        part.unlink()
                return


def _complete(wanted: _Wanted, part: Path, stop: threading.Event) -> None:
    """Fetch until the content is right; what is wrong is emptied, and the file itself stays."""
    import requests

    for _ in range(ATTEMPTS):
        before = _size(part)
        failure: Exception | None = None
        try:
            _transfer(wanted, part, before, stop)
        except requests.RequestException as error:
            failure = error
        if stop.is_set() or (part.exists() and wanted.is_at(part)):
            return
        if failure is not None and _size(part) <= before:
            raise failure
        if failure is None:  # all there, and wrong
            found = wanted.hash_of(part)
            os.truncate(part, 0)
            if not before:  # not even a stale beginning to blame
                raise DataError(
                    f"{wanted.url} is not the file it should be: its hash is {found}, wanted "
                    f"{wanted.digest}. Something on the way changed it; nothing was kept."
                )
    raise DataError(
        f"{wanted.url} broke off {ATTEMPTS} times. What has arrived is kept; try again."
    )


def _transfer(wanted: _Wanted, part: Path, start: int, stop: threading.Event) -> None:
    """Append what is missing after byte ``start``; a server that cannot do that sends it all."""
    import requests

    headers = {"Accept-Encoding": "identity", **wanted.headers}
    if start:
        headers["Range"] = f"bytes={start}-"
    with requests.get(wanted.url, headers=headers, stream=True, timeout=(5, 20)) as response:
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
                if wanted.size is not None and file.tell() + len(block) > wanted.size:
                    file.truncate(0)
                    raise DataError(
                        f"{wanted.url} sends more than the {wanted.size:,} bytes it should have."
                    )
                file.write(block)
            file.flush()
            os.fsync(file.fileno())


def _part(path: Path) -> Path:
    """Where what has arrived of a file is kept."""
    return path.with_name(path.name + ".part")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
