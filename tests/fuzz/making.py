"""What the corpus is made of: small files that are right, by hand, so that each part can be wrong.

A hostile checkpoint can have all its hashes right, since whoever makes one can compute them. So
``sealed`` writes the format of docs/checkpoints.md from scratch, around whatever it is given.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Arrays = dict[str, npt.NDArray[Any]]

V, T, C = 8, 4, 4
SHAPE = {"block_size": T, "vocab_size": V, "n_layer": 1, "n_head": 2, "n_embd": C}
LAYERS = {
    "wte": (V, C), "wpe": (T, C), "h.0.ln_1": (C,), "h.0.attn.c_attn": (3 * C, C),
    "h.0.attn.c_proj": (C, C), "h.0.ln_2": (C,), "h.0.mlp.c_fc": (4 * C, C),
    "h.0.mlp.c_proj": (C, 4 * C), "ln_f": (C,),
}  # fmt: skip
OPENING, ZEROS = b'{"__metadata__":{"digest":"', b"0" * 64
SPELLED = {"float32": "F32", "float64": "F64", "int64": "I64", "uint8": "U8"}
TERABYTE = 1 << 40


def weights() -> Arrays:
    """The tensors of a model of shape SHAPE, under their names in a checkpoint."""
    rng = np.random.default_rng(0)
    arrays: Arrays = {}
    for name, shape in LAYERS.items():
        arrays[f"model.{name}.weight"] = rng.standard_normal(shape).astype(np.float32)
        if not name.startswith("w"):
            arrays[f"model.{name}.bias"] = np.zeros(shape[0], np.float32)
    return arrays


def described(**changes: Any) -> dict[str, Any]:
    """What a checkpoint says of itself, but for the hashes."""
    return {
        "format_version": 2, "iter_num": 3, "model": dict(SHAPE), "train": None,
        "tokenizer": {"kind": "char", "chars": "\n abcdef"}, "data": None,
        "progress": {"best_val_loss": 1.5, "best_iter": 3, "evaluations_since_best": 0},
        "random_state": {"seed": 1, "step": 3}, "run": None, **changes,
    }  # fmt: skip


def places(arrays: Arrays) -> dict[str, Any]:
    """The entries of a safetensors header for tensors that follow one another."""
    entries, end = {}, 0
    for name, array in arrays.items():
        start, end = end, end + array.nbytes
        dtype, shape = SPELLED[array.dtype.name], list(array.shape)
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    return entries


def data_of(arrays: Arrays) -> bytes:
    return b"".join(array.tobytes() for array in arrays.values())


def hashes_of(arrays: Arrays) -> dict[str, str]:
    return {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in arrays.items()}


def container(header: bytes, data: bytes = b"") -> bytes:
    """A safetensors file with any header."""
    return len(header).to_bytes(8, "little") + header + data


def seal(header: bytes) -> bytes:
    """The same header with the right digest in its place, if it has the place."""
    if not header.startswith(OPENING):
        return header
    start, end = len(OPENING), len(OPENING) + len(ZEROS)
    blank = header[:start] + ZEROS + header[end:]
    digest = hashlib.sha256(len(header).to_bytes(8, "little") + blank).hexdigest().encode()
    return header[:start] + digest + header[end:]


def header_of(description: str, entries: dict[str, Any]) -> bytes:
    """A header without its digest, around a description that is text of any kind."""
    metadata = {"digest": ZEROS.decode(), "tinygpt": description}
    return json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()


def checkpoint(
    arrays: Arrays | None = None,
    description: str | None = None,
    entries: dict[str, Any] | None = None,
    data: bytes | None = None,
    **changes: Any,
) -> bytes:
    """A checkpoint with right hashes; whatever is given takes the place of what is right."""
    arrays = weights() if arrays is None else arrays
    if description is None:
        description = json.dumps({"sha256": hashes_of(arrays), **described(**changes)})
    header = header_of(description, places(arrays) if entries is None else entries)
    return container(seal(header), data_of(arrays) if data is None else data)


def raw_header(**changes: Any) -> bytes:
    """A checkpoint of which one entry of the header is exchanged: {tensor name: entry}."""
    arrays = weights()
    description = json.dumps({"sha256": hashes_of(arrays), **described()})
    return checkpoint(arrays, description, {**places(arrays), **changes})


def npy(header: str | bytes, data: bytes = b"", version: tuple[int, int] = (1, 0)) -> bytes:
    """A .npy file with any header."""
    text = header.encode("latin-1") if isinstance(header, str) else header
    width = 2 if version == (1, 0) else 4
    return b"\x93NUMPY" + bytes(version) + len(text).to_bytes(width, "little") + text + data


def npy_header(descr: str = "'<u2'", shape: str = "(3,)") -> str:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n"


# Things that are no ordinary file, and files that are larger than any disk ------------------------

Maker = Callable[[Path], None]


def written(content: bytes) -> Maker:
    return lambda path: path.write_bytes(content) and None


def sparse(size: int, beginning: bytes = b"") -> Maker:
    """A file of ``size`` bytes, of which only the beginning was ever written."""

    def make(path: Path) -> None:
        with path.open("wb") as file:
            file.write(beginning)
            file.truncate(size)

    return make


def fifo(path: Path) -> None:
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.mkdir()


def link_to(target: str) -> Maker:
    return lambda path: path.symlink_to(target)


def terabyte_checkpoint(path: Path) -> None:
    """Right hashes but for the last tensor's, which is a terabyte of nothing."""
    arrays = weights()
    entries = places(arrays)
    start = len(data_of(arrays))
    shape = [TERABYTE // 4]
    entries["optimizer.m.all"] = {
        "dtype": "F32", "shape": shape, "data_offsets": [start, start + TERABYTE],
    }  # fmt: skip
    hashes = {**hashes_of(arrays), "optimizer.m.all": "0" * 64}
    text = json.dumps({"sha256": hashes, **described()})
    content = container(seal(header_of(text, entries)), data_of(arrays))
    sparse(len(content) + TERABYTE, content)(path)
