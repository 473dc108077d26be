"""What a run measures: perplexity, bits per byte, and the history kept as JSON lines.

The file is the truth: one JSON object per step or evaluation, appended and flushed at once, so a
run can be watched with ``tail -f`` and a crash loses at most the line being written.
"""

from __future__ import annotations

import itertools
import math
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, cast

from tinygpt.errors import DataError
from tinygpt.files.atomic import replacing, user_path
from tinygpt.files.strict_json import to_json
from tinygpt.untrusted import is_sparse, open_regular, parse_json

MAX_LINE = 1 << 20
"""Bytes that a row may have; a longer line is damage."""

Row = dict[str, Any]
"""One step or evaluation: plain JSON values under names such as ``iter`` and ``train_loss``."""


def perplexity(loss: float) -> float:
    """``exp(loss)`` of a mean loss in nats per token; infinity where that overflows.

    >>> round(perplexity(math.log(65)))
    65
    """
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def bits_per_byte(loss: float, tokens: int, n_bytes: int) -> float:
    """Bits that the model needs per byte of text: comparable across tokenizers.

    ``loss`` is the mean in nats per token over ``tokens`` predictions, which spell ``n_bytes``
    bytes of UTF-8. Raises DataError if ``n_bytes`` is not positive.

    >>> bits_per_byte(math.log(2), tokens=10, n_bytes=10)
    1.0
    """
    if n_bytes <= 0:
        raise DataError(f"Bits per byte need some text, but n_bytes={n_bytes}.")
    return loss * tokens / (math.log(2) * n_bytes)


def smooth(values: Iterable[float | None], weight: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for its start; a gap repeats the value before it.

    The correction is Adam's: without it the curve would begin at zero. ``weight`` is the share of
    the past, from 0 (no smoothing) up to 1. Values that are missing or not finite count as gaps.

    >>> smooth([4.0, None, 2.0], weight=0.5)
    [4.0, 4.0, 2.6666666666666665]
    """
    mean = total = 0.0
    out: list[float] = []
    for value in values:
        if value is not None and math.isfinite(value):
            mean = weight * mean + (1 - weight) * value
            total = weight * total + (1 - weight)
        out.append(mean / total if total else math.nan)
    return out


def short(value: float) -> float | None:
    """A number in four digits, for rows with many of them; None for what is not finite.

    >>> short(0.123456)
    0.1235
    """
    return float(f"{value:.4g}") if math.isfinite(value) else None


@dataclass(frozen=True)
class Cut:
    """What was found when the rows of a run were cut off behind its checkpoint."""

    missing: tuple[int, ...] = ()
    """Steps up to the checkpoint that have no row."""
    damaged: int = 0
    """Lines that were no JSON objects, and are gone."""


class History:
    """The rows of a run: appended to a file of JSON lines, or held in memory where there is none.

    Rows are not kept in memory beside the file, so a run of any length needs no more of it; only
    what could not be written waits there.

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

        Numbers that are not finite, which JSON cannot hold, are written as null and named in a
        ``nonfinite`` entry; reading puts them back. DataError for a row that is too long to be
        read. Where the file cannot be written an OSError is
        raised and the row waits: the next ``append`` tries again, in order.
        """
        if self.path is None:
            self._memory.append(dict(row))
            return
        self._waiting.append(_encode(row))
        self.flush()

    def flush(self) -> None:
        """Write what waits."""
        while self._waiting:
            if self._file is None:
                self._file = _open_for_append(cast(Path, self.path))
            try:
                _write_whole(self._file, self._waiting[0])
            except OSError:
                self._file.close()  # the next attempt begins by mending what is torn
                self._file = None
                raise
            self._waiting.popleft()

    def sync(self) -> None:
        """Bring the rows to the disk, so that a checkpoint never knows more steps than they."""
        if (file := self._file) is not None:
            with suppress(ValueError):  # closed meanwhile: another thread may ask for this
                os.fsync(file.fileno())

    @property
    def rows(self) -> list[Row]:
        """All rows, oldest first."""
        return list(self)

    def __iter__(self) -> Iterator[Row]:
        if self.path is None:
            return iter(list(self._memory))
        waiting = (cast(Row, _decode(line)) for line in list(self._waiting))
        return itertools.chain(read(self.path), waiting)

    def truncate_after(self, iter_num: int, every_step: bool = False) -> Cut:
        """Drop the rows of steps after ``iter_num``: those a resumed run will take again.

        Damaged lines go too, and of a step that was written twice the first row. With
        ``every_step`` the steps up to ``iter_num`` without a row are told. A crash leaves the file
        as it was or as it is to be.
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
                    row = _decode(line)
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
        if self._waiting:
            with suppress(OSError):
                self.flush()
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read(path: str | Path) -> Iterator[Row]:
    """The rows of a history file, oldest first; none if there is no such file.

    A last line without its end, left by a crash, is skipped. Raises DataError, with the number of
    the line, if any other line is not a JSON object.
    """
    path = user_path(path)
    if not path.exists():
        return
    with _opened(path) as file:
        for number, line in enumerate(_lines(file), start=1):
            row = _decode(line)
            if row is not None:
                yield row
            elif len(line) == MAX_LINE or (line.endswith(b"\n") and line.strip()):
                raise DataError(
                    f"{path}, line {number}: not a JSON object. The file is damaged there; delete "
                    f"that line to go on without it."
                )


def _opened(path: Path) -> IO[bytes]:
    try:
        file = open_regular(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    if is_sparse(file):
        file.close()
        raise DataError(f"{path} is damaged: nearly all of it was never written.")
    return file


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    """Lines, or parts of ``MAX_LINE`` bytes of what has no end."""
    return iter(lambda: file.readline(MAX_LINE), b"")


def _refuse_link(path: Path) -> None:
    """A folder from elsewhere could lead what is written into any file of the user's."""
    if path.is_symlink():
        raise DataError(
            f"{path} is a link, and a run writes only into files of its own folder. Remove it, or "
            f"put the file that it leads to in its place."
        )


def _encode(row: Mapping[str, Any]) -> bytes:
    plain = {key: value.item() if hasattr(value, "item") else value for key, value in row.items()}
    odd = {k: str(v) for k, v in plain.items() if isinstance(v, float) and not math.isfinite(v)}
    if odd:
        plain |= dict.fromkeys(odd) | {"nonfinite": odd}
    line = to_json(plain, other=str).encode() + b"\n"
    if len(line) > MAX_LINE:
        raise DataError(f"A row of {len(line):,} bytes is too long: {MAX_LINE:,} are read at most.")
    return line


def _decode(line: bytes) -> Row | None:
    try:
        row = parse_json(line)
        if not isinstance(row, dict):
            return None
        row.update({key: float(text) for key, text in row.pop("nonfinite", {}).items()})
        return row
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None  # torn, perhaps inside a character, or not written by us


def _open_for_append(path: Path) -> IO[bytes]:
    """Open at the end, after mending a last line that a crash left without its newline."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _refuse_link(path)
    file = cast(IO[bytes], path.open("a+b", buffering=0))
    try:
        size = file.seek(0, os.SEEK_END)
        if size:
            start, tail = _last_line(file, size)
            if not tail.endswith(b"\n"):
                if _decode(tail) is None:
                    file.truncate(start)
                else:
                    _write_whole(file, b"\n")
    except BaseException:
        file.close()
        raise
    return file


def _write_whole(file: IO[bytes], line: bytes) -> None:
    """Append a line whole; of one that does not fit on the disk nothing stays, where possible."""
    start, done = file.seek(0, os.SEEK_END), 0
    try:
        while done < len(line):
            done += file.write(line[done:])
    except BaseException:
        with suppress(OSError):
            file.truncate(start)
        raise


def _shorten(path: Path, kept: bytes) -> None:
    """Make ``kept`` the content: a mere cut where it is the beginning of the file, as it mostly is.

    That works on a full disk too.
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
