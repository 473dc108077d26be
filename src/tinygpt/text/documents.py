"""The documents in a file: a plain text, the lines of JSONL, the rows of a Parquet table.

A large file can be read in parts, by several processes. Where one part ends and the next begins is
chosen so that each part has whole records, and a plain text is cut where a byte-pair encoding does
not notice (see ``tokenizers.chunks``). A file that is compressed has one part.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from shlex import quote
from typing import Any

from tinygpt.errors import DataError, extras, nearest
from tinygpt.text.compressed import blocks, is_compressed
from tinygpt.text.walk import UTF16_OR_32
from tinygpt.untrusted import brief, clip
from tinygpt.untrusted.foreign import HEAD, encoding_of, no_text

MAX_LINE = 64 << 20
"""Characters that a line of a JSONL file may have."""
LISTED = 8
"""Fields of a record that an error names."""
ROWS = 256
"""Rows of a table that are read at a time."""
WINDOWS = (1 << 16, 8 << 20)
"""Bytes in which a place to cut is sought, and if there is none, in which at last."""
PYDOCS = "pydocs"
"""The one text that is in no file."""


@dataclass(frozen=True)
class Part:
    """A file, or the part of one that is read by itself."""

    path: str
    field: str = "text"
    """Field or column with the texts, where there are several."""
    start: int = 0
    """Where it begins: at a byte, or of a table at a row group."""
    stop: int | None = None
    """Where it ends; None for the end of the file."""
    weight: int = 0
    """About how many bytes of text it has, to share out the work."""

    @property
    def kind(self) -> str:
        """``text``, ``jsonl``, ``parquet``, or ``pydocs``."""
        return PYDOCS if self.path == PYDOCS else kind_of(Path(self.path))

    def documents(self) -> Iterator[Iterator[str]]:
        """Each document in pieces of bounded size; in the middle of a plain text, a part of it.

        Raises DataError for what is not text, with the place.
        """
        path = Path(self.path)
        if self.kind == PYDOCS:
            return (iter([text]) for text in python_topics())
        if self.kind == "parquet":
            return (iter([text]) for text in _rows(path, self.field, self.start, self.stop))
        if self.kind == "jsonl":
            return (iter([text]) for text in _records(path, self.field, self.start, self.stop))
        return iter([read_text(path, self.start, self.stop)])


def kind_of(path: Path) -> str:
    """How the documents lie in a file, by its name.

    >>> [kind_of(Path(name)) for name in ("a.md", "a.jsonl", "c4.json.gz", "a.parquet")]
    ['text', 'jsonl', 'jsonl', 'parquet']
    """
    packed = is_compressed(path)
    suffix = (Path(path.stem) if packed else path).suffix.lower()
    if suffix in (".jsonl", ".ndjson") or (packed and suffix == ".json"):
        return "jsonl"
    return "parquet" if suffix == ".parquet" and not packed else "text"


def whole(path: Path, field: str) -> Part:
    """All of a file."""
    size = path.stat().st_size
    return Part(str(path.absolute()), field, weight=PACKING * size if is_compressed(path) else size)


PACKING = 3
"""Bytes of text in a byte of a compressed file, about."""


def parts(whole: Part, size: int) -> Iterator[Part]:
    """The file in parts of about ``size`` bytes: the same, however many processes read them."""
    path = Path(whole.path)
    if whole.kind == "parquet":
        yield from _row_groups(whole, size)
        return
    count = round(whole.weight / size)
    if whole.kind == PYDOCS or is_compressed(path) or count < 2:
        yield whole
        return
    find = _next_line if whole.kind == "jsonl" else _next_cut
    start = 0
    for i in range(1, count):
        place = whole.weight * i // count
        if place > start and (stop := find(path, place)) is not None:
            yield replace(whole, start=start, stop=stop, weight=stop - start)
            start = stop
    yield replace(whole, start=start, weight=whole.weight - start)


def _next_cut(path: Path, place: int) -> int | None:
    """The first byte from ``place`` on at which a text can be cut; None if there is none near."""
    from tinygpt.text.tokenizers.chunks import first_cut  # late: with numpy

    for window in WINDOWS:
        with path.open("rb") as file:
            file.seek(place)
            read = file.read(window)
        begun = next((i for i, byte in enumerate(read[:4]) if byte & 0xC0 != 0x80), 0)
        try:
            text = codecs.getincrementaldecoder("utf-8")().decode(read[begun:])
        except UnicodeDecodeError:
            return None  # the reader says what is wrong there
        if (cut := first_cut(text)) is not None:
            return place + begun + len(text[:cut].encode())
    return None


def _next_line(path: Path, place: int) -> int | None:
    """The first byte after a line feed, from ``place`` on."""
    read = place
    for block in blocks(path, place):
        if (found := block.find(b"\n")) >= 0:
            return read + found + 1
        read += len(block)
    return None


# Plain text -------------------------------------------------------------------------------------


def read_text(path: Path, start: int = 0, stop: int | None = None) -> Iterator[str]:
    """Pieces of a UTF-8 file, or of its bytes from ``start`` to ``stop``.

    A byte order mark is left out. Raises DataError with the offset of what is not text.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, first = start, b""
    for block in chain(blocks(path, start, stop), [b""]):  # the empty one ends the last character
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
        f"Token files are .npy, .bin or .ds; other documents must be exported as plain text."
    )


# JSONL ------------------------------------------------------------------------------------------


def _records(path: Path, field: str, start: int, stop: int | None) -> Iterator[str]:
    behind = f" behind byte {start:,}" if start else ""
    for number, line in enumerate(jsonl_lines(path, start, stop), 1):
        if line.strip():
            yield _record_text(line, field, f"{path}, line {number}{behind}")


def jsonl_lines(path: Path, start: int = 0, stop: int | None = None) -> Iterator[str]:
    """Lines end at line feeds only: JSON texts may hold the other separators that str knows."""
    rest: list[str] = []
    waiting = 0  # characters in rest
    for piece in read_text(path, start, stop):
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
        raise DataError(_no_field(where, "field", field, list(record)))
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


# Parquet ----------------------------------------------------------------------------------------


def _table(path: Path, field: str) -> Any:
    """An open Parquet file that has the column ``field``, with texts in it."""
    pyarrow = extras.need("parquet", f"Reading {path.name}", "pyarrow.parquet", "pyarrow")
    try:
        table = pyarrow.parquet.ParquetFile(path, pre_buffer=False)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(
            f"{path} is damaged, or no Parquet table: {clip(error)}. Fetch it again."
        ) from error
    schema = table.schema_arrow
    if field not in schema.names:
        raise DataError(_no_field(str(path), "column", field, schema.names))
    kind = schema.field(field).type
    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        texts = [f.name for f in schema if pyarrow.types.is_string(f.type)]
        raise DataError(
            f"{path}: the column {field!r} holds {kind}, wanted texts. Columns with texts: "
            f"{', '.join(map(brief, texts[:LISTED])) or 'none'}. Name one with --field."
        )
    return table


def _rows(path: Path, field: str, start: int, stop: int | None) -> Iterator[str]:
    table = _table(path, field)
    groups = range(start, table.num_row_groups if stop is None else stop)
    pyarrow = extras.need("parquet", f"Reading {path.name}", "pyarrow")
    try:
        for batch in table.iter_batches(ROWS, groups, columns=[field], use_threads=False):
            for text in batch.column(0).to_pylist():
                if text:  # a row may have none
                    yield text
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged: {clip(error)}. Fetch it again.") from error


def _row_groups(whole: Part, size: int) -> Iterator[Part]:
    metadata = _table(Path(whole.path), whole.field).metadata
    at = metadata.schema.names.index(whole.field) if metadata.num_row_groups else 0
    start = weight = 0
    for group in range(metadata.num_row_groups):
        weight += metadata.row_group(group).column(at).total_uncompressed_size
        if weight >= size or group == metadata.num_row_groups - 1:
            yield replace(whole, start=start, stop=group + 1, weight=weight)
            start, weight = group + 1, 0


def _no_field(where: str, what: str, field: str, names: list[str]) -> str:
    listed, more = names[:LISTED], ", …" if len(names) > LISTED else ""
    return (
        f"{where} has no {what} {field!r}.{nearest(field, [name[:99] for name in names])} "
        f"It has: {', '.join(map(brief, listed)) or 'none'}{more}. Name another with --field."
    )


# Of Python itself -------------------------------------------------------------------------------


def python_topics() -> list[str]:
    """The chapters of the language reference that comes with Python."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(
            "This Python lacks pydoc_data, the text of 'pydocs'. Install the full standard "
            "library (on Debian: apt install libpython3-stdlib), or give a text file."
        ) from error
    return [topics[name] for name in sorted(topics)]
