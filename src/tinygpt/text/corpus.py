"""Where text comes from: files, a folder, a download, or what Python itself carries."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from tinygpt.errors import DataError, nearest
from tinygpt.files import folders
from tinygpt.files.atomic import sha256_of, user_path
from tinygpt.files.download import download
from tinygpt.text.chat.conversations import Messages, form_in, read_conversations
from tinygpt.text.compressed import is_compressed
from tinygpt.text.documents import PYDOCS, Part, kind_of, python_topics, whole
from tinygpt.text.hub_texts import SCHEME, fetch, is_on_hub
from tinygpt.text.names import is_name
from tinygpt.text.walk import find_texts

SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
NAMES = ("shakespeare", "pydocs", "auto")
"""Sources that are no path."""
RECORDS = ("jsonl", "parquet")
"""Kinds of files that hold a document in each line or row."""
PATIENCE = 5.0
"""Seconds that ``auto`` waits for the network."""


@dataclass(frozen=True)
class Corpus:
    """A text of any size, as a stream of pieces that can be read again and again."""

    name: str
    """Short, for the names of files and runs."""
    description: str
    """One line that tells the user what is read."""
    pieces: Callable[[], Iterator[str]]
    """Starts a new reading: pieces of bounded size that joined are the text."""
    parts: tuple[Part, ...] = ()
    """The files that it consists of, if it is one of files."""
    size: int | None = None
    """Bytes of the text in UTF-8; None where only reading tells."""
    documents: Callable[[], Iterator[Iterator[str]]] | None = None
    """Starts a new reading, each document in pieces of bounded size; None for a text that is one,
    or whose documents are to be parted by blank lines alone."""
    conversations: Callable[[], Iterator[Messages]] | None = None
    """Starts a new reading of conversations, where it is a file of these: the pieces are then what
    their messages say."""

    def fingerprint(self) -> str:
        """SHA-256 of the text in UTF-8: the same for the same text, wherever it lies."""
        digest = hashlib.sha256()
        for piece in self.pieces():
            digest.update(piece.encode())
        return digest.hexdigest()

    def parted(self) -> Iterator[str | None]:
        """Pieces of the documents without what is between them, and None behind each."""
        assert self.documents is not None, "it is one document"
        for document in self.documents():
            empty = True
            for piece in filter(None, document):
                empty = False
                yield piece
            if not empty:
                yield None

    def beginning(self, share: float) -> Iterator[str]:
        """Pieces of the first ``share`` of the characters, such as those that are trained on."""
        left = math.ceil(share * sum(map(len, self.pieces()))) if share < 1 else math.inf
        for piece in self.pieces():
            if len(piece) >= left:
                yield piece[: int(left)]
                return
            yield piece
            left -= len(piece)


def open_corpus(source: str | Path, *, field: str = "text", glob: str = "**/*.txt") -> Corpus:
    """The text that ``source`` names; everything that can be wrong with it is a DataError.

    ``source`` is the path of a UTF-8 text file, of a ``.jsonl`` file (the texts under ``field``,
    one object a line), of conversations (``.jsonl`` or ``.json``, see ``chat.conversations``) or a
    ``.parquet`` table (the texts in the column ``field``), of a text or a ``.jsonl`` file
    compressed as ``.gz`` or ``.zst``, or of a folder (every file below it that matches ``glob``, in
    the order of their paths; ``walk`` says what is left out); or ``shakespeare``, ``pydocs``, or
    ``auto``, which is the first of these two that can be had within seconds; or
    ``hf://datasets/OWNER/NAME/PATH``, see ``hub_texts``. Names are always meant as such, see
    ``names``; a folder called ``pydocs`` is ``./pydocs``. In the text, several documents are
    separated by a blank line; in its tokens, by ``<|endoftext|>`` where a vocabulary has it.
    """
    if not str(source):
        raise DataError("The source of the text is an empty name; give a file or 'auto'.")
    if is_on_hub(source):
        return _on_hub(str(source), field)
    path = user_path(source)
    try:
        if is_name(source, NAMES):
            return {"shakespeare": shakespeare, "pydocs": pydocs, "auto": auto}[str(source)]()
        if path.is_dir():
            corpus = _folder(path, glob, field)
        elif path.is_file():
            corpus = _file(path, field)
        else:
            raise DataError(_missing(source, path))
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{str(source)!r} cannot be read: {error}.") from error
    # What is wrong with the first piece is said at once, not after a model has been built.
    if not any(corpus.pieces()):
        raise DataError(f"{path} holds no text: it is empty. Give a file with text in it.")
    return corpus


def _missing(source: str | Path, path: Path) -> str:
    if path.exists():
        return f"{path} is neither a file nor a folder; save what it gives to a file first."
    if str(source).startswith(("http://", "https://")):
        return f"{source} is an address; download it to a file first, and give its path."
    if not path.parent.is_dir():
        return f"There is no file {str(source)!r}: the folder {str(path.parent)!r} does not exist."
    beside = [str(path.with_name(other.name)) for other in path.parent.iterdir()]
    return (
        f"There is no file or folder {str(source)!r}.{nearest(str(path), [*NAMES, *beside])} "
        f"Wanted: a text file, a folder, a .jsonl or .parquet file, or one of {', '.join(NAMES)}."
    )


# Files ------------------------------------------------------------------------------------------


def _file(path: Path, field: str) -> Corpus:
    name = path.stem.partition(".")[0] if is_compressed(path) else path.stem
    kinds = {"jsonl": f"JSONL, field {field!r}, ", "parquet": f"Parquet, column {field!r}, "}
    size = _size(path.stat().st_size)
    form = form_in(path, field)
    kind = f"conversations, {form.name} form, " if form else kinds.get(kind_of(path), "")
    return _of_paths(name or path.name, f"{path} ({kind}{size})", [path], field)


def _of_paths(name: str, description: str, paths: Sequence[Path], field: str) -> Corpus:
    """The texts in some files; or the conversations, all of which are checked, if the first file
    that is not empty holds some."""
    first = next((path for path in paths if path.stat().st_size), None)
    if first is None or form_in(first, field) is None:
        return _of_files(name, description, [whole(path, field) for path in paths])

    def conversations() -> Iterator[Messages]:
        return chain.from_iterable(map(read_conversations, paths))

    def pieces() -> Iterator[str]:
        for messages in conversations():
            yield "".join(message["content"] + "\n" for message in messages)

    return Corpus(name, description, pieces, conversations=conversations)


def _folder(path: Path, glob: str, field: str) -> Corpus:
    found = find_texts(path, glob)
    sizes = [file.stat().st_size for file in found.files]
    count = f"{len(sizes)} file{'s' * (len(sizes) > 1)} matching {glob}"
    empty = f", {sizes.count(0)} of them empty" if 0 in sizes else ""
    description = f"{path} ({count}{empty}, {_size(sum(sizes))}{found.left_out_text})"
    name = path.resolve().name or "folder"
    return _of_paths(name, description, found.files, field)


def _on_hub(source: str, field: str) -> Corpus:
    found = fetch(source)
    total = _size(sum(file.stat().st_size for file in found.files))
    count = f"{len(found.files)} file{'s' * (len(found.files) > 1)}"
    description = f"{source} ({count}, {total}, commit {found.commit[:12]})"
    name = source.removeprefix(f"{SCHEME}datasets/").split("/")[1].partition("@")[0]
    corpus = _of_paths(name, description, found.files, field)
    if not any(corpus.pieces()):
        raise DataError(f"{source} holds no text: its files are empty.")
    return corpus


def _of_files(name: str, description: str, parts: list[Part]) -> Corpus:
    written = [part for part in parts if part.weight]
    several = len(written) > 1 or any(part.kind in RECORDS for part in written)
    plain = all(part.kind == "text" and not is_compressed(Path(part.path)) for part in parts)
    size = sum(part.weight for part in parts) if plain else None
    documents = (lambda: documents_of(parts)) if several else None
    return Corpus(name, description, lambda: text_of(parts), tuple(parts), size, documents)


def text_of(parts: Iterable[Part]) -> Iterator[str]:
    """The pieces of all documents in some files, as one text."""
    return _documents(documents_of(parts))


def documents_of(parts: Iterable[Part]) -> Iterator[Iterator[str]]:
    """Each document in some files, in pieces."""
    return chain.from_iterable(part.documents() for part in parts)


def _documents(documents: Iterator[Iterator[str]]) -> Iterator[str]:
    """The pieces of all documents, with a blank line between one and the next."""
    last = ""
    for document in documents:
        between = ("\n" if last.endswith("\n") else "\n\n") if last else ""
        for piece in document:
            if piece:
                yield between + piece
                between, last = "", piece


# Texts with a name ------------------------------------------------------------------------------


def shakespeare(url: str = SHAKESPEARE_URL, *, deadline: float | None = None) -> Corpus:
    """Tiny Shakespeare, 1.1 MB; downloaded once, verified, and kept in the user's cache folder.

    Raises DataError if it is not there and cannot be downloaded (within ``deadline`` seconds).
    """
    path = folders.cache_dir() / "shakespeare.txt"
    if not path.is_file() or sha256_of(path) != SHAKESPEARE_SHA256:
        try:
            download(url, path, SHAKESPEARE_SHA256, deadline=deadline)
        except DataError as error:
            raise DataError(
                f"Shakespeare is not on this machine yet, and: {error} "
                f"'pydocs' is a text that needs no network."
            ) from error
    description = f"tiny Shakespeare ({_size(path.stat().st_size)})"
    return _of_files("shakespeare", description, [whole(path, "")])


def pydocs() -> Corpus:
    """The language reference that every Python carries: English prose, about 465 KB."""
    size = sum(map(len, python_topics()))
    description = f"the Python language reference that comes with Python ({_size(size)})"
    return _of_files(PYDOCS, description, [Part(PYDOCS, weight=size)])


def auto(url: str = SHAKESPEARE_URL, *, deadline: float = PATIENCE) -> Corpus:
    """Shakespeare if it is here or comes within ``deadline`` seconds, else ``pydocs``."""
    try:
        return shakespeare(url, deadline=deadline)
    except DataError:
        corpus = pydocs()
        why = "; Shakespeare could not be downloaded, and this text needs no network"
        return replace(corpus, description=corpus.description + why)


def _size(count: int) -> str:
    """1_115_394 -> '1.1 MB'"""
    value, units = float(count), ["bytes", "KB", "MB", "GB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{count} bytes" if units[0] == "bytes" else f"{value:.3g} {units[0]}"
