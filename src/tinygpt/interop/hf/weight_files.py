"""Safetensors files (``files/tensor_file``) that others wrote, and those that others read.

The data is mapped, not read: a tensor takes memory only while it is used. The weights of
a large model lie in several files, with an index that says in which of them each one is.
"""

from __future__ import annotations

import math
import mmap
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tinygpt.errors import InteropError, nearest
from tinygpt.files.atomic import replacing, write_all
from tinygpt.files.tensor_file import (
    CODES,
    Place,
    arrange,
    as_floats,
    opening,
    parse,
    read_opening,
    stored,
)
from tinygpt.interop.hf.hf_config import read_object
from tinygpt.untrusted import brief, clip, open_regular
from tinygpt.untrusted.foreign import HEAD, PICKLE, ZIP, no_model, recognize

Floats = npt.NDArray[np.float32]

MAX_HEADER = 4 << 20
"""Bytes of header that are read at most; that of GPT-2's largest has 80,000."""
PIECE = 1 << 22
"""Numbers that are converted at a time."""
WEIGHTS = ("F32", "F16", "BF16")
"""Types that weights may have."""
INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,120}\.safetensors")
"""Names of files that an index may speak of: beside itself, and nothing hidden."""
MAX_SHARDS = 1024
LISTED = 5
"""Names that an error lists at most."""


@dataclass(frozen=True)
class Entry:
    """A tensor in a mapped file."""

    path: Path
    place: Place
    data: int
    """Where in the file the data of all tensors begins."""
    memory: mmap.mmap

    @property
    def size(self) -> int:
        return math.prod(self.place.shape)

    def floats(self) -> Floats:
        """The values in their shape: the file's own memory if they are float32 there."""
        return self._flat(0, self.size).reshape(self.place.shape)

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
        stored = self.place.numpy_dtype
        start = self.data + self.place.start + at * stored.itemsize
        raw = np.frombuffer(self.memory, stored, count, start)
        return as_floats(raw, self.place.dtype)


def read_file(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file by name, in the order of the data, none of them read yet.

    Raises InteropError if any of the file cannot be right, and if it cannot be read.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if (start := read_opening(file, size, MAX_HEADER)) is None:
                file.seek(0)
                raise InteropError(_no_safetensors(path, file.read(HEAD), size))
            try:
                _, layout = parse(start, size)
            except ValueError as error:
                raise InteropError(
                    f"{path} is damaged or incomplete: {error}. Fetch it again."
                ) from error
            memory = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    except OSError as error:
        raise InteropError(f"{path} cannot be read: {error.strerror or error}.") from error
    return {name: Entry(path, place, len(start), memory) for name, place in layout.items()}


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


# Several files ----------------------------------------------------------------------------------


def read_shards(index: Path) -> dict[str, Entry]:
    """The tensors of all files that an index names; InteropError if they are not those it lists."""
    places = weight_map(index)
    found: dict[str, Entry] = {}
    absent = sorted({n for n in places.values() if not (index.parent / n).exists()})
    if absent:
        listed = clip(", ".join(absent[:LISTED]))
        raise InteropError(f"{index} names {len(absent)} that are not beside it: {listed}.")
    for shard in sorted(set(places.values())):
        for name, entry in read_file(index.parent / shard).items():
            if places.get(name) != shard:
                said = f"says that it is in {places[name]}" if name in places else "lacks it"
                raise InteropError(f"{index.parent / shard} holds {brief(name)}; the index {said}.")
            found[name] = entry
    missing = [name for name in places if name not in found]
    if missing:
        near = nearest(missing[0][:99], list(found)[:10_000])
        place = index.parent / places[missing[0]]
        raise InteropError(f"{place} lacks {brief(missing[0])}, which {index} lists.{near}")
    return found


def weight_map(index: Path) -> dict[str, str]:
    """From each tensor's name to the name of its file, which is a plain one beside the index."""
    places: Any = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise InteropError(f"{index} is damaged: it has no weight_map.")
    for name, shard in places.items():
        if not isinstance(shard, str) or not SHARD.fullmatch(shard):
            raise InteropError(
                f"{index}: {brief(name)} would be in {brief(shard)}, which is no name of a "
                f"safetensors file beside the index. Such a file is not opened."
            )
    if len(set(places.values())) > MAX_SHARDS:
        raise InteropError(f"{index} names more than {MAX_SHARDS:,} files.")
    return dict(places)


# Writing ----------------------------------------------------------------------------------------


def write_file(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    fetch: Callable[[str], Floats],
    kind: str = "F32",
) -> None:
    """Write tensors of the type ``kind``, fetched one at a time, in the order of their names.

    The file is the one that transformers writes of the same tensors. Raises OSError.
    """
    bits = np.dtype(CODES[kind])
    places = arrange((name, bits, shapes[name]) for name in sorted(shapes))
    layout = {name: replace(place, dtype=kind) for name, place in places.items()}
    with replacing(path) as file:
        write_all(file.fileno(), opening({"format": "pt"}, layout))
        for name, place in layout.items():
            values = stored(fetch(name), kind)
            assert values.shape == place.shape, name
            write_all(file.fileno(), values.reshape(-1).view(np.uint8).data)
