"""Models of the Hugging Face hub by name: fetched once, verified, kept in the user's cache folder.

The hub states the size and the hash of each file before it is fetched: the SHA-256 of large files,
and of small ones the SHA-1 that git knows them by. It also states which commit a branch is at: all
files are fetched from the one that it was at first. ``HF_ENDPOINT`` names another server that
speaks the same protocol, as it does for Hugging Face's own tools. What those have fetched already
is used where it lies, and their token is sent along (``hub_cache``).

The folder ``hub`` of the cache holds

owner--name@COMMIT   the files of one commit
owner--name@main     a file that says which commit a branch or tag was at when it was fetched
owner--name          files that were put there by hand, or of a server that states no commit
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, urljoin, urlsplit

from tinygpt.errors import DataError, InteropError, nearest
from tinygpt.files import folders
from tinygpt.files.atomic import replacing
from tinygpt.files.download import download, network_advice
from tinygpt.interop.hf import hub_cache
from tinygpt.interop.hf.weight_files import INDEX, weight_map
from tinygpt.untrusted import brief, read_bounded

if TYPE_CHECKING:
    from requests import Response

NAMES = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
}
"""Models by the short names that everybody uses."""
REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
BRANCH = "main"
"""What is fetched where nothing else is asked for."""
REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
FILES = (".safetensors", ".bin", ".json", ".pt", ".pth", ".gguf")
"""Ends of what is a path to a file, though it may look like owner/name."""
ENDPOINT = "https://huggingface.co"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
TOKENIZER = (
    *("vocab.json", "merges.txt", "tokenizer.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)
"""Files that may be missing."""
SMALL = 16 << 20
"""Bytes that a file other than weights may have."""
TIMEOUT = (5, 20)
"""Seconds to wait for a connection, and for an answer."""
REDIRECTS = 5

Watch = Callable[[str, int, int], None]
"""Called with a file's name, how many of its bytes have arrived, and how many it has."""


@dataclass(frozen=True)
class Snapshot:
    """A model that was fetched."""

    folder: Path
    repository: str
    commit: str | None
    """The commit that its files are of; None if it is not known."""


@dataclass(frozen=True)
class Remote:
    """What the hub says of a file."""

    url: str
    size: int
    digest: str
    """SHA-256 in hexadecimal, or the SHA-1 that git gives to the content."""
    commit: str | None = None
    """The commit that it was asked of, or that the branch was at, if the server states it."""


def fetch(name: str, progress: bool = False, revision: str | None = None) -> Snapshot:
    """A model's config.json, weights and tokenizer in a folder, fetched unless they are there.

    ``name`` is ``gpt2``, ``gpt2-medium``, ``gpt2-large``, ``gpt2-xl``, ``distilgpt2`` or
    ``owner/name``; ``revision`` a commit, tag or branch. Raises InteropError: where the hub cannot
    be reached, it says which files belong where.
    """
    repository = NAMES.get(name, name)
    if not REPOSITORY.fullmatch(repository) or ".." in repository or name.endswith(FILES):
        raise InteropError(
            f"There is no file or folder {brief(name, 200)}, and no model of that name."
            f"{nearest(name[:99], list(NAMES))} Known names: {', '.join(NAMES)}, or owner/name."
        )
    if revision is not None and (not REVISION.fullmatch(revision) or ".." in revision):
        raise InteropError(f"{brief(revision, 200)} is no commit, tag or branch of {repository}.")
    try:
        place = folders.cache_dir() / "hub" / repository.replace("/", "--")
        found = _kept(place, revision) or _kept_by_others(repository, revision)
        if found is None:
            with _bar(progress) as watch:
                found = _fetch_all(repository, place, revision, watch)
    except (DataError, OSError) as error:
        raise InteropError(_by_hand(name, repository, error)) from error
    commit = found.name.rpartition("@")[2]
    return Snapshot(found, repository, commit if COMMIT.fullmatch(commit) else None)


def _kept(place: Path, revision: str | None) -> Path | None:
    """The folder of a model that was fetched before, or put there by hand."""
    named = place if revision is None else _at(place, revision)
    if _is_complete(named):
        return named
    try:
        commit = read_bounded(_at(place, revision or BRANCH), 100).decode().strip()
    except (OSError, ValueError):
        return None
    found = _at(place, commit)
    return found if COMMIT.fullmatch(commit) and _is_complete(found) else None


def _kept_by_others(repository: str, revision: str | None) -> Path | None:
    """The folder of a model that Hugging Face's own tools have fetched with its tokenizer."""
    found = hub_cache.snapshot(repository, revision or BRANCH)
    if found is None or not _is_complete(found):
        return None
    has_tokenizer = any((found / name).is_file() for name in TOKENIZER[:3])
    return found if has_tokenizer and COMMIT.fullmatch(found.name) else None


def _at(place: Path, revision: str) -> Path:
    return place.with_name(f"{place.name}@{revision.replace('/', '--')}")


def _is_complete(folder: Path) -> bool:
    """config.json comes last, so that the rest is there when it is."""
    if not (folder / CONFIG).is_file():
        return False
    if (folder / WEIGHTS).is_file():
        return True
    index = folder / INDEX
    return index.is_file() and all((folder / n).is_file() for n in weight_map(index).values())


def _fetch_all(repository: str, place: Path, revision: str | None, watch: Watch) -> Path:
    """-> the folder with all files of one commit, or of a branch that stayed as it was meanwhile"""
    site = os.environ.get("HF_ENDPOINT", "").rstrip("/") or ENDPOINT
    base, wanted = f"{site}/{repository}/resolve", revision or BRANCH
    first = _Files(f"{base}/{quote(wanted, safe='')}").wanted(CONFIG)
    commit = wanted if COMMIT.fullmatch(wanted) else first.commit
    files = _Files(f"{base}/{quote(commit or wanted, safe='')}", commit)
    folder = _at(place, commit or wanted) if commit or revision else place
    config = files.wanted(CONFIG)
    for name in TOKENIZER:
        if remote := files.ask(name):
            _take(remote, folder / name, watch)
        else:
            (folder / name).unlink(missing_ok=True)  # of another state of the branch
    weights = list(_weights(repository, files, folder, watch))
    files.check_unchanged()
    for remote in weights:
        _take(remote, folder / remote.url.rpartition("/")[2], watch)
    _take(config, folder / CONFIG, watch)  # the last: where it is, all is
    if commit not in (None, wanted):
        with replacing(_at(place, wanted)) as file:
            file.write(f"{commit}\n".encode())
    return folder


def _weights(repository: str, files: _Files, folder: Path, watch: Watch) -> Iterator[Remote]:
    if remote := files.ask(WEIGHTS):
        yield remote
        return
    if (index := files.ask(INDEX)) is None:
        raise DataError(
            f"{repository} has neither {WEIGHTS} nor {INDEX}, and TinyGPT opens no pickle."
        )
    _take(index, folder / INDEX, watch)
    for shard in sorted(set(weight_map(folder / INDEX).values())):
        yield files.wanted(shard)


@dataclass
class _Files:
    """The files of a repository at one commit, or else of a branch as it was when it was asked."""

    base: str
    commit: str | None = None
    asked: dict[str, Remote | None] = field(default_factory=dict)

    def ask(self, name: str) -> Remote | None:
        """What the server says of a file; DataError for what is not taken, whatever is in it."""
        url = f"{self.base}/{name}"
        found = self.asked[name] = _ask(url)
        if found is None:
            return None
        if found.commit is not None and self.commit not in (None, found.commit):
            raise DataError(f"{url} is said to be of another commit, {found.commit}.")
        large = name.endswith(".safetensors")
        if large and len(found.digest) != 64:
            raise DataError(f"{url}: the server does not tell its SHA-256, so it is not taken.")
        if not large and found.size > SMALL:
            raise DataError(f"{url} has {found.size:,} bytes, far more than such a file needs.")
        return found

    def wanted(self, name: str) -> Remote:
        if (found := self.ask(name)) is None:
            raise DataError(f"{self.base}/{name} answered 404: there is no such file.")
        return found

    def check_unchanged(self) -> None:
        """DataError if a branch has moved on meanwhile: the files may be of two of its states.

        What is fetched afterwards must have the hash that was stated before.
        """
        if self.commit is None:
            for name, remote in self.asked.items():
                if _ask(f"{self.base}/{name}") != remote:
                    raise DataError(f"{self.base}/{name} changed while the model was fetched.")


def _ask(url: str) -> Remote | None:
    """What the hub says of a file; None if there is none.

    The answer for a large file points to where its bytes are, and has its hash in the headers; that
    for a model which was renamed points to the model's new place.
    """
    import requests

    asked = url
    try:
        for _ in range(REDIRECTS):
            headers = {"Accept-Encoding": "identity", **_authorization()}
            answer = requests.head(asked, headers=headers, timeout=TIMEOUT)
            if answer.status_code == 404:
                return None
            answer.raise_for_status()
            if "X-Linked-Etag" in answer.headers or not answer.is_redirect:
                return _described(url, answer)
            asked = urljoin(asked, answer.headers["Location"])
            if urlsplit(asked).netloc != urlsplit(url).netloc:
                raise DataError(f"{url} leads elsewhere without telling its hash: not taken.")
    except requests.HTTPError as error:
        said = f"{error.response.status_code} {error.response.reason}"
        raise DataError(f"{url} answered {said}.") from error
    except OSError as error:  # requests' own errors, and those of reading certificates
        raise DataError(f"{url} could not be reached. {network_advice(error) or error}") from error
    raise DataError(f"{url} leads from one address to the next, {REDIRECTS} times.")


def _authorization() -> dict[str, str]:
    """The header with the user's token; requests drops it where an answer leads to another host."""
    token = hub_cache.token()
    return {"Authorization": f"Bearer {token}"} if token else {}


def _described(url: str, answer: Response) -> Remote:
    headers = answer.headers
    of_link = "X-Linked-Etag" in headers
    tag = headers.get("X-Linked-Etag" if of_link else "ETag", "")
    size = headers.get("X-Linked-Size" if of_link else "Content-Length", "")
    digest = tag.removeprefix("W/").strip('"').lower()
    if not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", digest) or not re.fullmatch("[0-9]+", size):
        raise DataError(f"{url}: the server does not tell its size and hash, so it is not taken.")
    commit = headers.get("X-Repo-Commit", "")
    return Remote(url, int(size), digest, commit if COMMIT.fullmatch(commit) else None)


def _take(remote: Remote, path: Path, watch: Watch) -> None:
    """Fetch a file, resumed where it broke off; one that is there already is checked."""
    download(
        remote.url,
        path,
        remote.digest,
        headers=_authorization(),
        size=remote.size,
        watch=lambda count: watch(path.name, count, remote.size),
    )


def _by_hand(name: str, repository: str, error: Exception) -> str:
    files = f"config.json, {WEIGHTS}, vocab.json and merges.txt"
    return (
        f"{name} could not be fetched: {error}\n"
        f"What has arrived is kept; try again to go on. Or fetch it yourself, on another machine "
        f"if need be: put {files}\nof {ENDPOINT}/{repository} into a folder, and give that "
        f"folder in place of the name."
    )


@contextmanager
def _bar(shown: bool) -> Iterator[Watch]:
    """A progress bar on stderr, where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    console = Console(stderr=True)
    columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, disable=not (shown and console.is_terminal)) as bar:
        tasks = {}

        def watch(name: str, count: int, size: int) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(name, total=size)
            bar.update(tasks[name], completed=count)

        yield watch
