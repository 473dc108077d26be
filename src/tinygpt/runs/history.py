"""The rows of a run in a file of JSON lines: appended step by step, read whole or while they grow.

Each row is one JSON object on a line of its own and is handed to the operating system at once, so
``tail -f`` shows a run as it trains and a crash loses at most the line that was being written.
JSON has no NaN and no infinity: a row holds null in their place and names them in ``nonfinite``.
A file may come from anybody, so all readers share these bounds: only ordinary files, no files that
are nearly all hole, and lines of at most ``MAX_LINE`` bytes.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from tinygpt.errors import DataError
from tinygpt.files.atomic import replacing, user_path
from tinygpt.files.strict_json import to_json
from tinygpt.untrusted import open_regular, parse_json

MAX_LINE = 1 << 20
"""Bytes that a row may have; a longer line is damage."""
CHUNK = 1 << 18
"""Bytes that one look of a ``Tail`` reads, or one line if that is longer."""
MARK = 512
"""Bytes before a ``Tail``'s position that must be unchanged, or the file is another one."""

Row = dict[str, Any]
"""One step or evaluation: plain JSON values under names such as ``iter`` and ``train_loss``."""


# ---- one row ----


def encode(row: Mapping[str, Any]) -> bytes:
    """The line for a row, its newline included. Raises DataError if it is too long to be read."""
    plain = {key: value.item() if hasattr(value, "item") else value for key, value in row.items()}
    odd = {k: str(v) for k, v in plain.items() if isinstance(v, float) and not math.isfinite(v)}
    if odd:
        plain |= dict.fromkeys(odd) | {"nonfinite": odd}
    line = to_json(plain, other=str).encode() + b"\n"
    if len(line) > MAX_LINE:
        raise DataError(f"A row of {len(line):,} bytes is too long: {MAX_LINE:,} are read at most.")
    return line


def decode(line: bytes) -> Row | None:
    """The row that a line holds; None if the line is torn or is no JSON object."""
    try:
        row = parse_json(line)
        if not isinstance(row, dict):
            return None
        row.update({key: float(text) for key, text in row.pop("nonfinite", {}).items()})
        return row
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None


def decode_all(text: bytes) -> tuple[list[Row], int]:
    """The rows in many lines, and how many lines hold none.

    All lines are parsed in one call, which takes a quarter of the time of one call for each; only
    if a line is damaged are they parsed one by one. ``nonfinite`` is then left as it is written.
    """
    lines = [line for line in text.split(b"\n") if line.strip()]
    try:
        rows = json.loads(b"[" + b",".join(lines) + b"]")
    except (ValueError, RecursionError):
        rows = []
    if len(rows) != len(lines) or not all(type(row) is dict for row in rows):
        rows = [row for line in lines if (row := decode(line)) is not None]
    return rows, len(lines) - len(rows)


# ---- reading ----


def read(path: str | Path) -> Iterator[Row]:
    """The rows of a file, oldest first; none if there is no such file.

    A last line without its end, left by a crash, is skipped. Raises DataError, with the number of
    the line, if any other line is not a JSON object.
    """
    path = user_path(path)
    if not path.exists():
        return
    with _opened(path) as file:
        for number, line in enumerate(_lines(file), start=1):
            row = decode(line)
            if row is not None:
                yield row
            elif len(line) == MAX_LINE or (line.endswith(b"\n") and line.strip()):
                raise DataError(f"{path}, line {number}: not a JSON object; delete it to go on.")


class Tail:
    """Reads the rows of a file that a run appends to, each look from where the last one ended.

    A resumed run cuts its file and goes on; a file may be replaced or vanish. The bytes just before
    the position show that: if they have changed, ``restarts`` grows and the rows come again from
    the first. A last line without its newline waits until it has one. Nothing is raised.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.restarts = 0
        self.damaged = 0
        """Lines since the last restart that hold no row."""
        self.more = False
        """Whether the last look ended before the file did."""
        self.trouble: str | None = None
        """Why a file that is there could not be read in the last look."""
        self._offset, self._mark = 0, b""

    def look(self) -> list[Row]:
        """The rows that are new since the last look, from ``CHUNK`` bytes at most."""
        self.more, self.trouble = False, None
        try:
            lines = self._next_lines()
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                self.trouble = error.strerror or str(error)
            self._restart()
            return []
        rows, damaged = decode_all(lines)
        self.damaged += damaged
        return rows

    def _next_lines(self) -> bytes:
        if self.path.is_symlink():  # it could lead out of the folder, to what must not be shown
            raise OSError("It is a link, and links are not followed")
        with open_regular(self.path) as file:
            if not self._continues(file):
                self._restart()
            if os.fstat(file.fileno()).st_size == self._offset:
                return b""
            file.seek(self._offset)
            chunk = file.read(CHUNK)
            full = len(chunk) == CHUNK
            if full and b"\n" not in chunk:
                chunk += file.read(MAX_LINE)
        end = chunk.rfind(b"\n") + 1
        if end == 0 and len(chunk) >= MAX_LINE:  # no row is so long: the line's start is skipped
            end = len(chunk)
        self._offset, self.more = self._offset + end, full and end > 0
        self._mark = (self._mark + chunk[:end])[-MARK:]
        return chunk[:end]

    def _continues(self, file: BinaryIO) -> bool:
        file.seek(self._offset - len(self._mark))
        return file.read(len(self._mark)) == self._mark

    def _restart(self) -> None:
        if self._offset:
            self.restarts += 1
        self._offset, self._mark, self.damaged = 0, b"", 0


def _opened(path: Path) -> BinaryIO:
    try:
        return open_regular(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines, or parts of ``MAX_LINE`` bytes of a line that is longer."""
    return iter(lambda: file.readline(MAX_LINE), b"")


# ---- writing ----


@dataclass(frozen=True)
class Cut:
    """What was found when the rows after a checkpoint's step were cut off."""

    missing: tuple[int, ...] = ()
    """Steps up to the checkpoint that have no row."""
    damaged: int = 0
    """Lines that were no JSON objects and are removed."""


class History:
    """The rows of a run: appended to a file, or held in memory where there is none.

    Rows are not kept in memory beside the file, so a run of any length needs no more of it; only
    rows that could not be written wait in memory.

    >>> history = History()
    >>> history.append({"iter": 1, "train_loss": 4.2})
    >>> history.rows
    [{'iter': 1, 'train_loss': 4.2}]
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = user_path(path) if path is not None else None
        self._file: IO[bytes] | None = None
        self._memory: list[Row] = []
        self._waiting: deque[bytes] = deque()

    @property
    def waiting(self) -> int:
        """Rows that could not be written yet."""
        return len(self._waiting)

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row and hand it to the operating system at once.

        Raises DataError for a row that is too long to be read, and OSError if the file cannot be
        written: then the row waits, and the next ``append`` tries again, in order.
        """
        if self.path is None:
            self._memory.append(dict(row))
            return
        self._waiting.append(encode(row))
        self.flush()

    def flush(self) -> None:
        """Write the rows that wait."""
        while self._waiting:
            if self._file is None:
                self._file = _open_for_append(cast(Path, self.path))
            try:
                _write_whole(self._file, self._waiting[0])
            except OSError:
                self._file.close()  # the next attempt begins by mending a torn line
                self._file = None
                raise
            self._waiting.popleft()

    def sync(self) -> None:
        """Wait until the rows are on the disk, so that a checkpoint never knows more steps."""
        if (file := self._file) is not None:
            try:
                os.fsync(file.fileno())
            except (OSError, ValueError):
                if self._file is file:  # else it was closed meanwhile, by another thread
                    raise

    @property
    def rows(self) -> list[Row]:
        """All rows, oldest first."""
        return list(self)

    def __iter__(self) -> Iterator[Row]:
        if self.path is None:
            return iter(list(self._memory))
        waiting = (cast(Row, decode(line)) for line in list(self._waiting))
        return itertools.chain(read(self.path), waiting)

    def truncate_after(self, iter_num: int, every_step: bool = False) -> Cut:
        """Drop the rows of steps after ``iter_num``, which a resumed run takes again.

        Damaged lines are dropped too, and of a step that was written twice the second row. With
        ``every_step``, ``Cut.missing`` lists the steps up to ``iter_num`` without a row. A crash
        leaves the old file or the new one.
        """
        if self.path is None:
            self._memory = [row for row in self._memory if row.get("iter", 0) <= iter_num]
            return Cut()
        self.close()
        found: dict[object, bytes] = {}
        damaged = 0
        _refuse_link(self.path)
        if self.path.exists():
            with _opened(self.path) as file:
                for number, line in enumerate(_lines(file)):
                    row = decode(line)
                    if row is None:
                        damaged += line.endswith(b"\n") and bool(line.strip())
                    elif not isinstance(step := row.get("iter"), int):
                        found[f"line {number}"] = line
                    elif step <= iter_num:
                        found.setdefault(step, line)
            _shorten(self.path, b"".join(line.rstrip(b"\n") + b"\n" for line in found.values()))
        steps = range(1, iter_num + 1) if every_step else range(0)
        return Cut(tuple(step for step in steps if step not in found), damaged)

    def close(self) -> None:
        """Close the file; a later ``append`` opens it again."""
        with suppress(OSError):
            self.flush()
        file, self._file = self._file, None
        if file is not None:
            file.close()


def _refuse_link(path: Path) -> None:
    """DataError for a link: in a folder from elsewhere it could lead to any file of the user's."""
    if path.is_symlink():
        raise DataError(
            f"{path} is a link, and a run writes only into files of its own folder. Remove it, or "
            f"put the file that it leads to in its place."
        )


def _open_for_append(path: Path) -> IO[bytes]:
    """Open at the end, after mending a last line that a crash left without its newline."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _refuse_link(path)
    file = cast(IO[bytes], path.open("a+b", buffering=0))
    try:
        if size := file.seek(0, os.SEEK_END):
            start, tail = _last_line(file, size)
            if not tail.endswith(b"\n"):
                if decode(tail) is None:
                    file.truncate(start)
                else:
                    _write_whole(file, b"\n")
    except BaseException:
        file.close()
        raise
    return file


def _write_whole(file: IO[bytes], line: bytes) -> None:
    """Append a line whole; if it does not fit on the disk, remove its beginning where possible."""
    start, done = file.seek(0, os.SEEK_END), 0
    try:
        while done < len(line):
            done += file.write(line[done:])
    except BaseException:
        with suppress(OSError):
            file.truncate(start)
        raise


def _shorten(path: Path, kept: bytes) -> None:
    """Make ``kept`` the content: by a mere cut where the file begins with it, as it mostly does.

    A cut works on a full disk too.
    """
    with path.open("rb") as file:
        is_prefix = file.read(len(kept)) == kept
    if is_prefix:
        os.truncate(path, len(kept))
    else:
        with replacing(path) as file:
            file.write(kept)


def _last_line(file: IO[bytes], size: int) -> tuple[int, bytes]:
    """Offset and bytes of the last line, found from the end in ever larger blocks."""
    block = 4096
    while True:
        start = max(size - block, 0)
        file.seek(start)
        tail = file.read(size - start)
        newline = tail.rfind(b"\n", 0, len(tail) - 1)
        if newline >= 0 or start == 0:
            return start + newline + 1, tail[newline + 1 :]
        block *= 2
