"""The safetensors format: what stands before the data, written, and read with every claim checked.

    8 bytes   length of the header, little-endian
    header    JSON: for each tensor its type, shape and place; "__metadata__" may hold texts
    data      the tensors, one after another without a gap

Checkpoints are such files, and so are the weights that other programs write and read.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from tinygpt.files.strict_json import to_json
from tinygpt.untrusted import brief, clip, parse_json

NUMPY = {
    **{"F64": "f8", "F32": "f4", "F16": "f2", "BOOL": "?"},
    **{"I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1"},
    **{"U64": "u8", "U32": "u4", "U16": "u2", "U8": "u1"},
}
"""Types by the name that the format gives them, and how numpy spells them."""
CODES = NUMPY | {"BF16": "u2", "F8_E4M3": "u1", "F8_E5M2": "u1"}
"""The same with types that numpy lacks: their bits as whole numbers."""


STORED = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""What the format calls the types of ``config.PRECISIONS``."""
PIECE = 1 << 20
"""Numbers that are rounded at a time."""


@dataclass(frozen=True)
class Place:
    """Type, shape and place of a tensor; the place counts from the beginning of the data."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        return np.dtype("<" + CODES[self.dtype])


def to_bfloat16(values: Any) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """The bits of the bfloat16 nearest to each value, in its shape; of two, the even one.

    >>> to_bfloat16([1.0, -2.0]).tolist() == [0x3F80, 0xC000]
    True
    """
    floats = np.ascontiguousarray(values, np.float32)
    flat, found = floats.reshape(-1), np.empty(floats.size, np.uint16)
    for at in range(0, flat.size, PIECE):
        bits = flat[at : at + PIECE].view(np.uint32)
        last = (bits >> 16) & 1  # of what is kept: half a step rounds up where it is 1
        is_nan = (bits & 0x7FFFFFFF) > 0x7F800000  # which would round to infinity
        rounded = np.where(is_nan, bits | 0x400000, bits + (0x7FFF + last))
        found[at : at + PIECE] = rounded >> 16
    return found.reshape(floats.shape)


def from_bfloat16(
    bits: np.ndarray[Any, np.dtype[np.uint16]], out: np.ndarray[Any, Any] | None = None
) -> np.ndarray[Any, Any]:
    """The float32 values of the bits of bfloat16, which are its upper half; in ``out``, if given.

    Nothing else is allocated.
    """
    found = np.empty(bits.shape, np.float32) if out is None else out
    np.left_shift(bits, 16, out=found.view(np.uint32), dtype=np.uint32)
    return found


def stored(values: Any, kind: str) -> np.ndarray[Any, Any]:
    """Values in the type that the format calls ``kind``, rounded to the nearest number it has."""
    if kind == "BF16":
        return to_bfloat16(values)
    with np.errstate(over="ignore"):  # what is too large becomes infinite
        return np.ascontiguousarray(values, "<" + NUMPY[kind])


def as_floats(values: np.ndarray[Any, Any], kind: str) -> np.ndarray[Any, Any]:
    """The float32 values of what is ``stored``; float32 itself as it is."""
    return from_bfloat16(values) if kind == "BF16" else values.astype(np.float32, copy=False)


Layout = dict[str, Place]
"""Where each tensor is, in the order of the data."""


def arrange(kinds: Iterable[tuple[str, np.dtype[Any], tuple[int, ...]]]) -> Layout:
    """Places for tensors given as (name, type, shape), the widest types first: all are aligned."""
    spelled = {np.dtype(code): name for name, code in NUMPY.items()}
    layout: Layout = {}
    end = 0
    for name, dtype, shape in sorted(kinds, key=lambda kind: -kind[1].itemsize):
        start, end = end, end + math.prod(shape) * dtype.itemsize
        layout[name] = Place(spelled[dtype], shape, start, end)
    return layout


def opening(metadata: Mapping[str, str], layout: Layout) -> bytes:
    """All that stands before the data: length and header."""
    header: dict[str, Any] = {"__metadata__": metadata}
    for name, place in layout.items():
        offsets = [place.start, place.end]
        header[name] = {"dtype": place.dtype, "shape": place.shape, "data_offsets": offsets}
    text = to_json(header, compact=True).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def read_opening(file: BinaryIO, size: int, limit: int) -> bytes | None:
    """Length and header of a file of ``size`` bytes; None if there is no room for the header.

    No header of more than ``limit`` bytes is read.
    """
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > min(size - 8, limit):
        return None
    text = file.read(length)
    return start + text if len(text) == length else None


def parse(
    start: bytes, size: int, types: Collection[str] = CODES.keys()
) -> tuple[dict[str, Any], Layout]:
    """-> metadata and places by the ``start`` of a file of ``size`` bytes, what ``opening`` made

    Nothing is allocated for what a header merely announces. Raises ValueError if a type is not one
    of ``types``, or the tensors do not fill the file without a gap.
    """
    try:
        header = parse_json(start[8:])
    except ValueError as error:
        own = type(error) is ValueError  # else it is of json or of a codec, and says little
        raise ValueError(clip(error) if own else "its header cannot be read") from error
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    metadata = header.pop("__metadata__", None)
    found = [(name, _place(name, value, types)) for name, value in header.items()]
    layout = dict(sorted(found, key=lambda item: (item[1].start, item[1].end)))
    end = 0
    for name, place in layout.items():
        if place.start != end:
            kind = "overlaps the one before it" if place.start < end else "leaves a gap before it"
            raise ValueError(f"{brief(name)} {kind}")
        end = place.end
    if end != size - len(start):
        raise ValueError(f"its tensors take {end:,} bytes, but {size - len(start):,} are there")
    return metadata if isinstance(metadata, dict) else {}, layout


def _place(name: str, value: Any, types: Collection[str]) -> Place:
    """Type, shape and place of a tensor, which agree with each other; or ValueError."""
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{brief(name)} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in types:
        raise ValueError(f"{brief(name)} has the unknown type {brief(dtype)}")
    if not _are_counts(shape) or len(shape) > 8 or not _are_counts(offsets) or len(offsets) != 2:
        raise ValueError(f"{brief(name)} has a shape or a place that cannot be")
    place = Place(dtype, tuple(shape), *offsets)
    length = place.end - place.start
    if length != math.prod(shape) * place.numpy_dtype.itemsize:
        raise ValueError(f"{brief(name)} has another shape than its {length:,} bytes hold")
    return place


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(n) is int and n >= 0 for n in values)
