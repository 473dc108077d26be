"""A model's weights in a page: in chunks that can each be unpacked without the others.

``float32`` is what they are, ``float16`` rounds to half the size, ``int8`` to a quarter: each row
of a matrix is then whole numbers from -127 to 127 times a scale, and vectors stay float32. The page
computes in float32 in any case.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from tinygpt.errors import UsageError
from tinygpt.model.int8 import rounded as quantized

Floats = npt.NDArray[np.float32]
Kind = Literal["float16", "float32", "int8"]
KINDS: tuple[str, ...] = get_args(Kind)

CHUNK = 1 << 18
"""Numbers in a chunk, about: a megabyte, which a browser takes in a few milliseconds."""
LARGEST_HALF = 65504.0


@dataclass(frozen=True)
class Chunk:
    """Numbers that belong one after another from the ``at``-th float of the weights on.

    Of int8, ``columns`` is the length of a row; the data are the scales of all rows as float32, and
    then the rows.
    """

    kind: Kind
    at: int
    columns: int
    data: bytes


def rounded(values: Floats, kind: Kind) -> Floats:
    """What a page that carries ``values`` as ``kind`` computes with."""
    if kind == "float16":
        return values.astype(np.float16).astype(np.float32)
    if kind == "int8" and values.ndim == 2:
        numbers, scales = quantized(values)
        return numbers.astype(np.float32) * scales[:, None]
    return values


def check(arrays: Mapping[str, Floats], kind: Kind) -> None:
    """Raise UsageError where a weight cannot be carried as ``kind``."""
    for name, values in arrays.items():
        if not np.isfinite(values).all():
            raise UsageError(
                f"{name} has values that are not finite: this model's training failed."
            )
        if kind == "float16" and np.abs(values).max(initial=0) > LARGEST_HALF:
            raise UsageError(
                f"{name} has values beyond {LARGEST_HALF:,.0f}, the largest of float16. "
                f"Use --weights float32."
            )


def chunks(arrays: Mapping[str, Floats], places: Mapping[str, int], kind: Kind) -> Iterator[Chunk]:
    """All weights, each ``places[name]`` bytes from the start of the module's."""
    for name, values in arrays.items():
        at = places[name] // 4
        if kind == "int8" and values.ndim == 2:
            yield from _rows(values, at)
            continue
        plain: Kind = "float16" if kind == "float16" else "float32"
        flat: npt.NDArray[Any] = values.ravel().astype("<f2" if plain == "float16" else "<f4")
        for start in range(0, flat.size, CHUNK):
            yield Chunk(plain, at + start, 0, flat[start : start + CHUNK].tobytes())


def _rows(matrix: Floats, at: int) -> Iterator[Chunk]:
    numbers, scales = quantized(matrix)
    rows, columns = matrix.shape
    step = max(1, CHUNK // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        data = scales[part].astype("<f4").tobytes() + numbers[part].tobytes()
        yield Chunk("int8", at + start * columns, columns, data)


def values(chunk: Chunk) -> Floats:
    """The numbers that a chunk holds, as float32: what the page's ``put`` makes of it."""
    if chunk.kind != "int8":
        return np.frombuffer(chunk.data, "<f2" if chunk.kind == "float16" else "<f4").astype("<f4")
    rows = len(chunk.data) // (chunk.columns + 4)
    scales = np.frombuffer(chunk.data, "<f4", rows)
    numbers = np.frombuffer(chunk.data, np.int8, offset=4 * rows)
    whole: Floats = numbers.reshape(rows, -1).astype("<f4") * scales[:, None]
    return whole
