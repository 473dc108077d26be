"""What a run measures: perplexity, bits per byte, and the history kept as JSON lines.

The file is the truth: one JSON object per step or evaluation, appended and flushed at once, so a
run can be watched with ``tail -f`` and a crash loses at most the line being written.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from tinygpt.errors import DataError
from tinygpt.files import replacing

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


class History:
    """The rows of a run: appended to a file of JSON lines, or held in memory where there is none.

    Rows are not kept in memory beside the file, so a run of any length needs no more of it.

    >>> history = History()
    >>> history.append({"iter": 1, "train_loss": 4.2})
    >>> history.rows
    [{'iter': 1, 'train_loss': 4.2}]
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = Path(path) if path is not None else None
        self._file: IO[bytes] | None = None
        self._memory: list[Row] = []

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row and hand it to the operating system at once.

        Numbers that are not finite, which JSON cannot hold, are written as null and named in a
        ``nonfinite`` entry; reading puts them back.
        """
        if self.path is None:
            self._memory.append(dict(row))
            return
        if self._file is None:
            self._file = _open_for_append(self.path)
        self._file.write(_encode(row))
        self._file.flush()

    @property
    def rows(self) -> list[Row]:
        """All rows, oldest first."""
        return list(self)

    def __iter__(self) -> Iterator[Row]:
        return iter(list(self._memory)) if self.path is None else read(self.path)

    def truncate_after(self, iter_num: int) -> None:
        """Drop the rows of steps after ``iter_num``: those a resumed run will take again.

        The file is replaced in one piece: a crash leaves the old one or the new one.
        """
        kept = [row for row in self if row.get("iter", 0) <= iter_num]
        if self.path is None:
            self._memory = kept
            return
        self.close()
        if self.path.exists():
            with replacing(self.path) as file:
                file.writelines(map(_encode, kept))

    def close(self) -> None:
        """Close the file; a later ``append`` opens it again."""
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
    path = Path(path)
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            row = _decode(line)
            if row is not None:
                yield row
            elif line.endswith(b"\n") and line.strip():
                raise DataError(
                    f"{path}, line {number}: not a JSON object. The file is damaged there; delete "
                    f"that line to go on without it."
                )


def _encode(row: Mapping[str, Any]) -> bytes:
    plain = {key: value.item() if hasattr(value, "item") else value for key, value in row.items()}
    odd = {k: str(v) for k, v in plain.items() if isinstance(v, float) and not math.isfinite(v)}
    if odd:
        plain |= dict.fromkeys(odd) | {"nonfinite": odd}
    return json.dumps(plain, allow_nan=False, default=str).encode() + b"\n"


def _decode(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:  # also UnicodeDecodeError: a line torn inside a character
        return None
    if not isinstance(row, dict):
        return None
    row.update((key, float(text)) for key, text in row.pop("nonfinite", {}).items())
    return row


def _open_for_append(path: Path) -> IO[bytes]:
    """Open at the end, after mending a last line that a crash left without its newline."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+b")
    size = file.seek(0, os.SEEK_END)
    if size:
        start, tail = _last_line(file, size)
        if not tail.endswith(b"\n"):
            if _decode(tail) is None:
                file.truncate(start)
            else:
                file.write(b"\n")
    return file


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
