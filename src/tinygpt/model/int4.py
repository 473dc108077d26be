"""Rounding to int4, for generation: an eighth of the memory, in the blocks of llama.cpp's Q4_0.

32 numbers of a row share a float16 scale d, the one that is largest by amount over -8, and each is
rounded to a whole number from 0 to 15 that stands for d (number - 8). `kernels.nibbles` says how a
block lies in memory. Rows whose length is no multiple of 32 are rounded to int8 instead.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tinygpt.kernels.nibbles import BLOCK

Array = npt.NDArray[Any]


def rounded(weight: Array) -> tuple[Array, Array]:
    """float32 weight (..., I) -> its uint8 bytes (..., I / 2) and float16 scales (..., I / 32).

    As llama.cpp rounds to Q4_0, bit for bit.

    >>> packed, scale = rounded(np.arange(-8, 24, dtype=np.float32)[None] / 2)
    >>> packed.shape, scale.tolist()
    ((1, 16), [[-1.4375]])
    """
    values = np.asarray(weight, np.float32).reshape(-1, BLOCK)
    largest = np.take_along_axis(values, np.abs(values).argmax(-1, keepdims=True), -1)
    scale = largest / np.float32(-8)
    with np.errstate(all="ignore"):  # what is not finite is seen by its scale
        by = np.where(scale == 0, np.float32(0), np.float32(1) / scale)
        whole = np.trunc(values * by + np.float32(8.5)).clip(0, 15).astype(np.uint8)
        half = scale.astype(np.float16)
    low, high = whole[:, : BLOCK // 2], whole[:, BLOCK // 2 :]
    lead = weight.shape[:-1]
    return (low | high << 4).reshape(*lead, -1), half.reshape(*lead, -1)
