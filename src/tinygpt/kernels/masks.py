"""Dropout's random masks: each element's bits from a key and its place, without those before it.

Nothing is stored and no state moves on, so a backward kernel makes the forward kernel's mask again,
whatever the order, the tiles or the number of cores. A mask is a matrix. Each row is a Weyl
sequence with a start and an odd stride of its own, and each element a hash of the row's sequence at
its column: SplitMix, with a generator per row, in 32 bits, which every GPU has.

Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators" (2014), for the generator;
Wellons, https://github.com/skeeto/hash-prospector (2018), for the hash, lowbias32. It is no cipher.

The functions take Tensors, and numbers inside kernels, alike; all are of type uint32 and wrap.
"""

from __future__ import annotations

from typing import TypeVar

from tinygrad import Tensor, UOp

Number = TypeVar("Number", Tensor, UOp)

GOLDEN = 0x9E3779B9
"""2³² divided by the golden ratio; odd, so that adding it again and again meets every number."""


def mix(x: Number) -> Number:
    """lowbias32: one to one, and each bit of x changes each bit of the result half of the time."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


def stream(key: tuple[Number, Number], row: Number) -> tuple[Number, Number]:
    """The start and the stride of a row's sequence."""
    first, second = key
    start = mix(mix(row ^ first) + second)
    stride = mix(mix(row ^ second) + (first + GOLDEN)) | 1
    return start, stride


def keeps(start: Number, stride: Number, column: Number, p: float) -> Number:
    """Whether dropout with probability p keeps the element of a row with this stream."""
    return mix(start + stride * column) < min(round((1 - p) * 2**32), 2**32 - 1)


def next_key(key: Tensor) -> Tensor:
    """The key (2,) of the mask after the one that ``key`` makes."""
    return (key + GOLDEN).contiguous()
