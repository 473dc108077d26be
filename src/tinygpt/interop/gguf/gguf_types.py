"""How GGUF files store weights: whole, in half the bits, a quarter or an eighth."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tinygpt.files.tensor_file import as_floats, stored
from tinygpt.model import int4

Kind = Literal["f32", "f16", "bf16", "q8_0", "q4_0"]
Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

BLOCK = 32
"""Numbers that share a scale in q8_0 and q4_0."""
BLOCK_BYTES = {"q8_0": BLOCK + 2, "q4_0": BLOCK // 2 + 2}


def store(values: Floats, kind: Kind) -> tuple[Array, Floats]:
    """-> what is stored of ``values``, and what a reader gets from that

    q8_0 stores rows of bytes: for every 32 numbers a float16 scale, the largest of them by amount
    over 127, and 32 whole numbers from -127 to 127. q4_0 stores the same scale and bytes as
    ``tinygpt.model.int4``. Rows must be a multiple of 32 long.
    """
    if kind == "f32":
        return values, values
    with np.errstate(all="ignore"):  # what is too large is found when the logits are compared
        if kind == "q4_0":
            return _nibbles(values)
        return _bytes(values) if kind == "q8_0" else _half(values, kind.upper())


def _half(values: Floats, kind: str) -> tuple[Array, Floats]:
    half = stored(values, kind)
    return half, as_floats(half, kind)


def _bytes(values: Floats) -> tuple[Array, Floats]:
    blocks = values.reshape(-1, BLOCK)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    whole = np.rint(np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale > 0))
    half = scale.astype(np.float16)
    stored = np.concatenate([half.view(np.uint8), whole.astype(np.int8).view(np.uint8)], axis=1)
    rounded = half.astype(np.float32) * whole
    return stored.reshape(*values.shape[:-1], -1), rounded.reshape(values.shape)


def _nibbles(values: Floats) -> tuple[Array, Floats]:
    packed, half = int4.rounded(values)
    blocks, scale = packed.reshape(-1, BLOCK // 2), half.reshape(-1, 1)
    data = np.concatenate([scale.view(np.uint8), blocks], axis=1)
    whole = np.concatenate([blocks & 15, blocks >> 4], axis=1).astype(np.float32) - 8
    rounded = scale.astype(np.float32) * whole
    return data.reshape(*values.shape[:-1], -1), rounded.reshape(values.shape)
