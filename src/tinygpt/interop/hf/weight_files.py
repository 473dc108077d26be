"""Safetensors files that others wrote, and those that others read.

    8 bytes   length of the header, little-endian
    header    JSON: for each tensor its type, shape and place; "__metadata__" may hold texts
    data      the tensors, one after another without a gap

Every claim of a header is checked before anything is made of it. The data is mapped, not read: a
tensor takes memory only while somebody looks at it.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from tinygpt.errors import InteropError
from tinygpt.files.atomic import replacing, write_all
from tinygpt.files.strict_json import to_json
from tinygpt.untrusted import brief, clip, is_sparse, open_regular, parse_json
from tinygpt.untrusted.foreign import HEAD, PICKLE, ZIP, no_model, recognize

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

MAX_HEADER = 4 << 20
"""Bytes of header that are read at most; that of GPT-2's largest has 80,000."""
PIECE = 1 << 22
"""Numbers that are converted at a time."""
WIDTHS = {
    **{"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "BOOL": 1},
    **{"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1},
}
"""Bytes of a number, by the name of its type."""
WEIGHTS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
"""Types that weights may have, and how numpy sees them: it has no bfloat16."""


@dataclass(frozen=True)
class Entry:
    """A tensor in a mapped file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    """Where in the file its bytes begin."""
    memory: mmap.mmap

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def floats(self) -> Floats:
        """The values in their shape: the file's own memory if they are float32 there."""
        return self._flat(0, self.size).reshape(self.shape)

    def pieces(self) -> Iterator[Floats]:
        """The values, flat, a few megabytes at a time; each piece holds until the next is asked."""
        for at in range(0, self.size, PIECE):
            yield self._flat(at, min(PIECE, self.size - at))
            self.release()

    def release(self) -> None:
        """Give back the memory of what was looked at; the system reads it again if need be."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self.memory.madvise(mmap.MADV_DONTNEED)

    def _flat(self, at: int, count: int) -> Floats:
        stored = np.dtype(WEIGHTS[self.dtype])
        raw = np.frombuffer(self.memory, stored, count, self.start + at * stored.itemsize)
        if self.dtype == "BF16":  # the upper half of a float32
            return (raw.astype(np.uint32) << 16).view(np.float32)
        return raw.astype(np.float32, copy=False)


def read_file(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file by name, in the order of the data, none of them read yet.

    Raises InteropError if any of the file cannot be right, and if it cannot be read.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            places, start = _read_header(file, path, size)
            if is_sparse(file):
                raise InteropError(f"{path} is damaged: nearly all of it was never written.")
            memory = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    except OSError as error:
        raise InteropError(f"{path} cannot be read: {error.strerror or error}.") from error
    return {
        name: Entry(path, dtype, shape, start + at, memory)
        for name, (dtype, shape, at) in places.items()
    }


Place = tuple[str, tuple[int, ...], int]
"""Type, shape, and where it begins in the data."""


def _read_header(file: BinaryIO, path: Path, size: int) -> tuple[dict[str, Place], int]:
    """-> the places of all tensors, and where in the file the data begins"""
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > min(size - 8, MAX_HEADER):
        file.seek(0)
        raise InteropError(_no_safetensors(path, file.read(HEAD), size))
    try:
        header = parse_json(file.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is no object")
        header.pop("__metadata__", None)
        return _check_places(header, size - 8 - length), 8 + length
    except ValueError as error:
        known = type(error) is ValueError
        reason = clip(error) if known else "its header cannot be read"
        raise InteropError(f"{path} is damaged or incomplete: {reason}. Fetch it again.") from error


def _check_places(header: Mapping[str, Any], size: int) -> dict[str, Place]:
    """The places, in order, if they fill ``size`` bytes without gap or overlap; or ValueError."""
    found = sorted((_check_entry(name, value) for name, value in header.items()), key=_order)
    places, end = {}, 0
    for name, dtype, shape, start, stop in found:
        if start != end:
            kind = "overlaps the one before it" if start < end else "leaves a gap before it"
            raise ValueError(f"{brief(name)} {kind}")
        places[name], end = (dtype, shape, start), stop
    if end != size:
        raise ValueError(f"its tensors take {end:,} bytes, but {size:,} are there")
    return places


Found = tuple[str, str, tuple[int, ...], int, int]


def _order(found: Found) -> tuple[int, int]:
    return found[3:]


def _check_entry(name: str, value: Any) -> Found:
    """Name, type, shape and place of a tensor, which agree with each other; or ValueError."""
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{brief(name)} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in WIDTHS:
        raise ValueError(f"{brief(name)} has the unknown type {brief(dtype)}")
    if not _are_counts(shape) or len(shape) > 8 or not _are_counts(offsets) or len(offsets) != 2:
        raise ValueError(f"{brief(name)} has a shape or a place that cannot be")
    start, stop = offsets
    if stop - start != math.prod(shape) * WIDTHS[dtype]:
        raise ValueError(f"{brief(name)} has another shape than its {stop - start:,} bytes hold")
    return name, dtype, tuple(shape), start, stop


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(n) is int and n >= 0 for n in values)


def _no_safetensors(path: Path, start: bytes, size: int) -> str:
    """What a file is that has no header, as far as its first bytes tell."""
    if size == 0:
        return f"{path} is empty (0 bytes): it never arrived. Fetch it again."
    if recognize(start) in (PICKLE, ZIP):  # what torch.save writes is a zip archive
        return refuse_pickle(path)
    return no_model(path, start) or (
        f"{path} is damaged or not a safetensors file: its {size:,} bytes cannot hold the header "
        f"it announces. Fetch it again."
    )


def refuse_pickle(path: Path) -> str:
    """Why such a file is not opened, and the line that converts it, for who trusts it.

    transformers needs the config.json of the model; other pickles are those of training programs.
    """
    if not (path.parent / "config.json").exists():
        return f"{path} is {PICKLE.name}. {PICKLE.as_model}"
    folder = str(path.parent)
    load = f"M.from_pretrained({folder!r}).save_pretrained({folder + '-safe'!r})"
    return (
        f"{path} is a Python pickle, which can run code when it is opened, and TinyGPT reads "
        f"safetensors only. If you trust it, convert it where transformers is installed:\n"
        f'  python -c "from transformers import AutoModelForCausalLM as M; {load}"'
    )


# Writing ----------------------------------------------------------------------------------------


def write_file(
    path: Path, shapes: Mapping[str, tuple[int, ...]], fetch: Callable[[str], Floats]
) -> None:
    """Write float32 tensors, fetched one at a time, in the order of their names.

    The file is the one that transformers writes of the same tensors. Raises OSError.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(shapes):
        start, end = end, end + 4 * math.prod(shapes[name])
        header[name] = {"dtype": "F32", "shape": shapes[name], "data_offsets": [start, end]}
    text = to_json(header, compact=True).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        write_all(file.fileno(), len(text).to_bytes(8, "little") + text)
        for name in sorted(shapes):
            values = np.ascontiguousarray(fetch(name), "<f4")
            assert values.shape == shapes[name], name
            write_all(file.fileno(), values.reshape(-1).view(np.uint8).data)
