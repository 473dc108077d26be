"""Where text comes from: a file, a folder, JSONL, a download, or what Python itself carries."""

from __future__ import annotations

import codecs
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

from tinygpt.errors import DataError, nearest
from tinygpt.files import folders
from tinygpt.files.atomic import sha256_of, user_path
from tinygpt.files.download import download
from tinygpt.text.names import is_name
from tinygpt.text.walk import UTF16_OR_32, find_texts
from tinygpt.untrusted import brief, clip
from tinygpt.untrusted.foreign import HEAD, encoding_of, no_text

SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
NAMES = ("shakespeare", "pydocs", "auto")
"""Sources that are no path."""
PATIENCE = 5.0
"""Seconds that ``auto`` waits for the network."""
BLOCK = 1 << 20
"""Bytes read at a time."""
MAX_LINE = 64 << 20
"""Characters that a line of a JSONL file may have."""
LISTED = 8
"""Fields of a record that an error names."""


@dataclass(frozen=True)
class Corpus:
    """A text of any size, as a stream of pieces that can be read again and again."""

    name: str
    """Short, for the names of files and runs."""
    description: str
    """One line that tells the user what is read."""
    pieces: Callable[[], Iterator[str]]
    """Starts a new reading: pieces of bounded size that joined are the text."""

    def fingerprint(self) -> str:
        """SHA-256 of the text in UTF-8: the same for the same text, wherever it lies."""
        digest = hashlib.sha256()
        for piece in self.pieces():
            digest.update(piece.encode())
        return digest.hexdigest()

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

    ``source`` is the path of a UTF-8 text file, of a folder (every file below it that matches
    ``glob``, in the order of their paths; ``text_files`` says what is left out), or of a ``.jsonl``
    file (the texts under ``field``, one object a line); or ``shakespeare``, ``pydocs``, or
    ``auto``, which is the first of these two that can be had within seconds. Those are always meant
    by name, see ``names``; a folder called ``pydocs`` is ``./pydocs``. Several documents are
    separated by a blank line.
    """
    if not str(source):
        raise DataError("The source of the text is an empty name; give a file or 'auto'.")
    path = user_path(source)
    try:
        if is_name(source, NAMES):
            return {"shakespeare": shakespeare, "pydocs": pydocs, "auto": auto}[str(source)]()
        if path.is_dir():
            corpus = _folder(path, glob)
        elif path.is_file():
            is_jsonl = path.suffix.lower() in (".jsonl", ".ndjson")
            corpus = _jsonl(path, field) if is_jsonl else _file(path)
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
        f"Wanted: a text file, a folder, a .jsonl file, or one of {', '.join(NAMES)}."
    )


# Files ------------------------------------------------------------------------------------------


def _file(path: Path) -> Corpus:
    return Corpus(path.stem, f"{path} ({_size(path.stat().st_size)})", partial(read_text, path))


def _folder(path: Path, glob: str) -> Corpus:
    found = find_texts(path, glob)
    sizes = [file.stat().st_size for file in found.files]
    count = f"{len(sizes)} file{'s' * (len(sizes) > 1)} matching {glob}"
    empty = f", {sizes.count(0)} of them empty" if 0 in sizes else ""
    return Corpus(
        path.resolve().name or "folder",
        f"{path} ({count}{empty}, {_size(sum(sizes))}{found.left_out_text})",
        lambda: _documents(read_text(file) for file in found.files),
    )


def _documents(documents: Iterator[Iterator[str]]) -> Iterator[str]:
    """The pieces of all documents, with a blank line between one and the next."""
    last = ""
    for document in documents:
        between = ("\n" if last.endswith("\n") else "\n\n") if last else ""
        for piece in document:
            if piece:
                yield between + piece
                between, last = "", piece


def read_text(path: Path) -> Iterator[str]:
    """Pieces of a UTF-8 file, a byte order mark left out. Raises DataError with the offset of what
    is not text."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, first = 0, b""
    for block in _blocks(path):
        if offset == 0:
            first = block[:HEAD]
            if block.startswith(UTF16_OR_32):
                raise DataError(_wrong_encoding(path, "is UTF-16 or UTF-32", "UTF-16"))
            skipped = len(codecs.BOM_UTF8) if block.startswith(codecs.BOM_UTF8) else 0
            block, offset = block[skipped:], skipped
        zero = block.find(b"\0")
        if zero >= 0:
            raise DataError(_no_text(path, first, offset + zero))
        waiting = len(decoder.getstate()[0])  # bytes of a character that the last block began
        try:
            piece = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            at = offset - waiting + error.start
            what = f"has the byte 0x{error.object[error.start]:02x} at offset {at}"
            if known := no_text(path, first):
                raise DataError(known) from error
            head = first if at < len(first) else block[max(0, error.start - HEAD // 2) :][:HEAD]
            likely = encoding_of(head) or "WINDOWS-1252"
            raise DataError(_wrong_encoding(path, what, likely)) from error
        offset += len(block)
        if piece:
            yield piece


def _blocks(path: Path) -> Iterator[bytes]:
    """The file's bytes, and an empty block to end with."""
    try:
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                yield block
    except PermissionError as error:
        raise DataError(
            f"{path} may not be read. Allow it: chmod u+r {quote(str(path))}"
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    yield b""


def _wrong_encoding(path: Path, what: str, likely: str) -> str:
    return (
        f"{path} is not UTF-8: it {what}. Convert it, if it is {likely}, with: "
        f"iconv -f {likely} -t UTF-8 {quote(str(path))} > {quote(f'{path.stem}.utf8{path.suffix}')}"
    )


def _no_text(path: Path, head: bytes, zero: int) -> str:
    """What to say of a file with a zero byte, which no text has."""
    if known := no_text(path, head):
        return known
    encoding = encoding_of(head)
    if encoding is not None and encoding.startswith("UTF-"):
        return _wrong_encoding(path, "is UTF-16 or UTF-32, without a byte order mark", encoding)
    return (
        f"{path} is not a text file: it has a zero byte at offset {zero}. "
        f"Token files are .npy or .bin; other documents must be exported as plain text."
    )


# JSONL ------------------------------------------------------------------------------------------


def _jsonl(path: Path, field: str) -> Corpus:
    description = f"{path} (JSONL, field {field!r}, {_size(path.stat().st_size)})"
    return Corpus(path.stem, description, lambda: _documents(_records(path, field)))


def _records(path: Path, field: str) -> Iterator[Iterator[str]]:
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            yield iter([_record_text(line, field, f"{path}, line {number}")])


def _lines(path: Path) -> Iterator[str]:
    """Lines end at line feeds only: JSON texts may hold the other separators that str knows."""
    rest: list[str] = []
    waiting = 0  # characters in rest
    for piece in read_text(path):
        *whole, last = piece.split("\n")
        if whole:
            yield "".join([*rest, whole[0]])
            yield from whole[1:]
            rest = []
        rest.append(last)
        waiting = len(last) if whole else waiting + len(last)
        if waiting > MAX_LINE:
            raise DataError(
                f"{path} has a line of more than {MAX_LINE:,} characters. JSONL has one object on "
                f"each line; a single JSON value must be split up first."
            )
    yield "".join(rest)


def _record_text(line: str, field: str, where: str) -> str:
    try:
        record: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {clip(error)}. Wanted one object a line.") from error
    if not isinstance(record, dict):
        raise DataError(f"{where} is a JSON {type(record).__name__}, wanted an object.")
    if field not in record:
        names, more = list(record)[:LISTED], ", …" if len(record) > LISTED else ""
        raise DataError(
            f"{where} has no field {field!r}.{nearest(field, [name[:99] for name in names])} "
            f"It has: {', '.join(map(brief, names)) or 'none'}{more}. Name another with --field."
        )
    text = record[field]
    if not isinstance(text, str):
        raise DataError(f"{where}: field {field!r} is {type(text).__name__}, wanted a text.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: field {field!r} has half a character (a lone surrogate) at {error.start}."
        ) from error
    return text


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
    return Corpus("shakespeare", description, partial(read_text, path))


def pydocs() -> Corpus:
    """The language reference that every Python carries: English prose, about 465 KB."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(
            "This Python lacks pydoc_data, the text of 'pydocs'. Install the full standard "
            "library (on Debian: apt install libpython3-stdlib), or give a text file."
        ) from error
    texts = [topics[name] for name in sorted(topics)]
    return Corpus(
        "pydocs",
        f"the Python language reference that comes with Python ({_size(sum(map(len, texts)))})",
        lambda: _documents(iter([text]) for text in texts),
    )


def auto(url: str = SHAKESPEARE_URL, *, deadline: float = PATIENCE) -> Corpus:
    """Shakespeare if it is here or comes within ``deadline`` seconds, else ``pydocs``."""
    try:
        return shakespeare(url, deadline=deadline)
    except DataError:
        corpus = pydocs()
        why = "; Shakespeare could not be downloaded, and this text needs no network"
        return Corpus(corpus.name, corpus.description + why, corpus.pieces)


def _size(count: int) -> str:
    """1_115_394 -> '1.1 MB'"""
    value, units = float(count), ["bytes", "KB", "MB", "GB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{count} bytes" if units[0] == "bytes" else f"{value:.3g} {units[0]}"
