"""Dropout: each element is 0 with probability p, the rest divided by 1 - p; and its masks.

Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting" (2014).

A mask is not stored and no generator's state moves on: each element's random bits follow from a
key and the element's place. So the backward kernel makes the forward kernel's mask again, whatever
the order, the tiles or the number of cores. Each row of a mask is a Weyl sequence, with a start
and an odd stride of its own, and each element a hash of its row's sequence at its column::

    bits(row, column) = mix(start(row) + stride(row) * column),     kept where bits < (1 - p) 2³²

That is SplitMix with a generator per row, in 32 bits, which every GPU has. Steele, Lea and Flood,
"Fast Splittable Pseudorandom Number Generators" (2014), for the generator; Wellons,
https://github.com/skeeto/hash-prospector (2018), for the hash, lowbias32. It is no cipher.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TypeVar

from tinygrad import Tensor, UOp, dtypes

from tinygpt.kernels.dispatch import operation
from tinygpt.kernels.loops import across, blocks, uint32
from tinygpt.kernels.phases import Array, Backward, Kernel, contiguous, empty, minimum, run, wide

Number = TypeVar("Number", Tensor, UOp)
"""The masks' functions take Tensors, and numbers inside kernels, alike: uint32, which wraps."""

LANES = 16
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
    """The key of the mask after the one that ``key`` makes."""
    return (
        (key[:2] + GOLDEN).cat(key[2:]).contiguous()
        if is_part(key)
        else (key + GOLDEN).contiguous()
    )


def is_part(key: Tensor) -> bool:
    """Whether a key is (3,): that of a part of a batch, which its last number says the begin of.

    The part that begins with sequence ``key[2]`` has the rows of the whole batch's mask that belong
    to its sequences: cut into parts, over several devices, a batch has the same mask.
    """
    return tuple(key.shape) == (3,)


def plain_mask(rows: int, columns: int, p: float, key: Tensor, each: int = 1) -> Tensor:
    """Boolean (rows, columns): what dropout with probability p keeps, by ``key`` (2,) uint32.

    A key (3,) is that of a part, of a batch of ``each`` rows a sequence.
    """
    row = Tensor.arange(rows, dtype=dtypes.uint32).reshape(rows, 1)
    if is_part(key):
        row = row + key[2] * each
    column = Tensor.arange(columns, dtype=dtypes.uint32)
    start, stride = stream((key[0], key[1]), row)
    return keeps(start, stride, column, p)


def plain_dropout(x: Tensor, p: float, key: Tensor) -> Tensor:
    """The mask as a matrix, and a choice."""
    width = int(x.shape[-1])
    rows = int(x.numel()) // width
    mask = plain_mask(rows, width, p, key.to(x.device), rows // int(x.shape[0]))
    return mask.reshape(x.shape).where(x / (1 - p), 0)


@operation("dropout", plain_dropout, integers=("key",))
def dropout(x: Tensor, p: float, key: Tensor) -> Tensor:
    """x (..., C), of which each element is 0 with probability p, or divided by 1 - p.

    ``key`` (2,) uint32 chooses the mask, whose rows are those of x, or a key (3,): see `is_part`.
    """
    key = contiguous(key)

    def backward(gradient: Tensor, _: Sequence[Tensor]) -> list[Tensor | None]:
        return [_launch(contiguous(gradient), p, key), None]

    return _launch(contiguous(x), p, key, backward)


def _launch(x: Tensor, p: float, key: Tensor, backward: Backward | None = None) -> Tensor:
    *outer, width = map(int, x.shape)
    rows = prod(outer)
    return run(
        _dropout,
        [empty(x, *outer, width)],
        [x, key],
        lanes=LANES,
        name=f"dropout_{rows}x{width}" + "_part" * is_part(key),
        ops=20 * rows * width,
        backward=backward,
        rows=rows,
        width=width,
        p=p,
        each=rows // outer[0] if is_part(key) else 0,
    )[0]


def _dropout(
    k: Kernel, out: Array, x: Array, key: Array, *, rows: int, width: int, p: float, each: int = 0
) -> None:
    """A unit is as many rows as there are lanes: so the streams of the rows are vectors too.

    With ``each``, the rows of a sequence, the key is that of a part.
    """
    first = k.units(blocks(rows, k.lanes)) * k.lanes
    start, stride = (k.tile(1, dtypes.uint32, shared=True) for _ in range(2))
    kind = wide(x.dtype)
    with k.phase() as lane:
        row = uint32(minimum(first + lane, rows - 1))
        row = row + key[2] * each if each else row
        start[0, lane], stride[0, lane] = stream((key[0], key[1]), row)
    with k.loop(k.lanes) as i:
        row = minimum(first + i, rows - 1)  # surplus rows do the last one again
        for at, _, inside in across(k, width):
            kept = keeps(start[0, i], stride[0, i], uint32(at), p)
            value = kept.where(x[row * width + at].cast(kind) * (1 / (1 - p)), 0.0)
            out.put(row * width + at, value, where=inside)
