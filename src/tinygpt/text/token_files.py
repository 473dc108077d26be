"""Token files: how ids lie on disk, in our format and in those of nanoGPT, llm.c and datatrove.

.npy  of numpy; ours end their header in a hash of the tokens
.bin  of nanoGPT: uint16 and nothing else
.bin  of llm.c: 256 int32 (magic, version, number of tokens), then uint16 (GPT-2) or uint32 (Llama)
.ds   of datatrove: uint16 or uint32 and nothing else; beside it ``.ds.index``, the ends of the
      documents in tokens as uint64, and ``.ds.metadata``, three lines: the tokenizer's name and the
      bytes of a token (``gpt2|2``; older files have the name alone), the number of tokens, and the
      same for people

What a file says of itself is checked against its size before anything is mapped.
"""

from __future__ import annotations

import io
import math
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from tinygpt.errors import DataError
from tinygpt.untrusted import clip, open_regular, read_bounded

Array = NDArray[Any]
"""Token ids (n,) in any integer type; mostly a memory-mapped file."""
TOKEN_FILES = (".npy", ".bin", ".ds")
"""Suffixes of token files: ours, those that nanoGPT and llm.c write, and datatrove's."""
LLMC_HEADER = 256 * 4
"""Bytes of the header that llm.c puts before its tokens: 256 int32."""
LLMC = {20240520: (1, "<u2"), 20240801: (7, "<u4")}
"""Its magic numbers, each with its version and the type of the tokens. As the first two tokens of a
raw file, which has none, they would be 55448 or 55729, beyond GPT-2's vocabulary, and 308."""
MAX_NPY_HEADER = 4096
"""Bytes of a .npy file's header that are read at most; numpy writes 128."""
MAX_METADATA = 1 << 16
"""Bytes of a .ds.metadata file that are read at most."""
_NPY_LENGTH_BYTES = {(1, 0): 2, (2, 0): 4, (3, 0): 4}
_NPY_HEADER = re.compile(
    r"\{'descr': '([<>|=][biufc]\d{1,2})', 'fortran_order': (?:False|True), "
    r"'shape': \(((?:\d{1,18}, ?)*(?:\d{1,18})?)\),? *\} *(?:# [0-9a-f]{32})?\n?"
)
"""The one way in which numpy writes a header; no Python expression is ever evaluated."""
NPY_HEADER = 128
"""Bytes of the header of a token file of ours."""
_SEAL = re.compile(rb"# ([0-9a-f]{32})\n$")
"""The hash of its tokens, at the header's end."""

# Ours -------------------------------------------------------------------------------------------


def write_header(file: BinaryIO, dtype: np.dtype[Any], count: int, seal: str = "") -> None:
    """Write the header of a .npy, which ends in the hash of the tokens: to numpy, a comment.

    It is always as long: the format leaves room for the count.
    """
    header = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
    whole = io.BytesIO()
    npy.write_array_header_1_0(whole, header)
    end = f"# {seal}\n".encode()
    text = whole.getvalue()[: -len(end)] + end if seal else whole.getvalue()
    assert len(text) == NPY_HEADER
    file.write(text)


def sealed(path: Path) -> str | None:
    """The hash of its tokens that a file of ours states; None for another file, or none."""
    try:
        with open_regular(path) as file:
            found = _SEAL.search(file.read(NPY_HEADER))
    except OSError:
        return None
    return found[1].decode() if found else None


# All of them ------------------------------------------------------------------------------------


def map_file(path: Path) -> Array:
    """The ids of a token file (n,), memory-mapped. DataError for what is none, or is cut off."""
    if path.suffix not in TOKEN_FILES:
        raise DataError(
            f"{path} is no token file (.npy, .bin as of nanoGPT or llm.c, or .ds as of datatrove). "
            f"Text is tokenized first: tokenize(open_corpus(path), tokenizer)."
        )
    try:
        with open_regular(path) as file:
            return {".npy": _map_npy, ".bin": _map_bin, ".ds": _map_ds}[path.suffix](file)
    except FileNotFoundError as error:
        raise DataError(f"There is no token file {str(path)!r}.") from error
    except DataError:
        raise
    except (OSError, ValueError, TypeError) as error:
        reason = clip(getattr(error, "strerror", None) or error)
        raise DataError(f"{path} cannot be read as a token file: {reason}.") from error


def _map_bin(file: BinaryIO) -> Array:
    """llm.c's token file if it begins with a magic number of these, else nanoGPT's raw uint16."""
    size = os.fstat(file.fileno()).st_size
    header = np.frombuffer(file.read(min(LLMC_HEADER, size) // 4 * 4), "<i4")
    if len(header) and int(header[0]) in LLMC:
        return _map_llmc(file, size, header)
    if size % 2 or not size:
        raise DataError(f"{file.name} has {size} bytes, wanted a number of uint16 tokens.")
    return np.memmap(file, "<u2", "r")


def _map_llmc(file: BinaryIO, size: int, header: NDArray[np.int32]) -> Array:
    if size < LLMC_HEADER:
        raise DataError(f"{file.name} ends within the header of llm.c, after {size} bytes.")
    magic, version, count = map(int, header[:3])
    wanted, dtype = LLMC[magic]
    if version != wanted:
        raise DataError(
            f"{file.name} is a token file of llm.c in version {version}; of those with its magic "
            f"number, {magic}, version {wanted} can be read."
        )
    length = LLMC_HEADER + count * np.dtype(dtype).itemsize
    if count < 0 or length != size:
        raise DataError(
            f"{file.name} is damaged or incomplete: its header announces {count:,} tokens, which "
            f"would make {length:,} bytes, and it has {size:,}."
        )
    return np.memmap(file, dtype, "r", LLMC_HEADER, (count,)) if count else np.zeros(0, dtype)


def _map_npy(file: BinaryIO) -> Array:
    """Map a .npy file after checking that it is as long as its header says.

    numpy's own reader evaluates the header as Python, and takes its length from the file.
    """
    version = npy.read_magic(file)
    if version not in _NPY_LENGTH_BYTES:
        raise ValueError(f"its format version {version} is unknown")
    width = _NPY_LENGTH_BYTES[version]
    length = int.from_bytes(file.read(width), "little")
    if length > MAX_NPY_HEADER:
        raise ValueError(f"its header of {length:,} bytes is too long")
    found = _NPY_HEADER.fullmatch(file.read(length).decode("latin-1"))
    if found is None:
        raise ValueError("its header is damaged, or it does not hold plain numbers")
    dtype = np.dtype(found[1])
    shape = tuple(int(n) for n in found[2].split(",") if n.strip())  # (n,)
    start = file.tell()
    wanted = start + math.prod(shape) * dtype.itemsize
    size = os.fstat(file.fileno()).st_size
    if wanted != size:
        raise ValueError(f"it has {size:,} bytes, but its header announces {wanted:,}")
    if not math.prod(shape):
        return np.zeros(shape, dtype)  # nothing can be mapped
    return np.memmap(file, dtype, "r", start, shape)


def _map_ds(file: BinaryIO) -> Array:
    """datatrove's file, in the type that what lies beside it states or implies; else uint16."""
    path, size = Path(file.name), os.fstat(file.fileno()).st_size
    _, width, count = ds_metadata(path)
    if width is None:
        width = 4 if size and _last_end(path) == size // 4 else 2
    if size % width or not size or (count is not None and count * width != size):
        announced = f"{count:,} tokens" if count is not None else "whole tokens"
        raise DataError(
            f"{path} is damaged or incomplete: wanted {announced} of {width} bytes, and it has "
            f"{size:,} bytes."
        )
    return np.memmap(file, f"<u{width}", "r")


def ds_metadata(path: Path) -> tuple[str | None, int | None, int | None]:
    """What datatrove says of a file: the tokenizer's name, bytes of a token, number of tokens."""
    beside = path.with_name(f"{path.name}.metadata")
    try:
        lines = read_bounded(beside, MAX_METADATA).decode("utf-8", "replace").split("\n")
    except (OSError, ValueError):
        return None, None, None
    name, _, width = lines[0].rpartition("|")
    if width not in ("2", "4"):
        name, width = lines[0], ""
    name = name.split("|")[0]  # an unknown tokenizer's line states the width twice
    count = int(lines[1]) if len(lines) > 1 and re.fullmatch(r"\d{1,18}", lines[1]) else None
    known = name not in ("", "Unknown Tokenizer")
    return name if known else None, int(width) if width else None, count


def _last_end(path: Path) -> int | None:
    """Where the last document ends, in tokens, by the index beside the file."""
    with suppress(OSError), open_regular(path.with_name(f"{path.name}.index")) as index:
        size = os.fstat(index.fileno()).st_size
        if size and size % 8 == 0:
            index.seek(size - 8)
            return int.from_bytes(index.read(8), "little")
    return None
