"""Linear layers whose weights are int8: y = (x qᵀ) scale + b, with one scale for each row of q.

A step of decoding reads every weight once and computes little with it, so it takes the time that
reading takes, and a weight of one byte is read four times as fast. `few_rows_int8` converts the
bytes in the registers; the many rows of a prompt go through `matmul`, which converts as it copies.

The hardware prefetches from memory along addresses that are read in order, but only to the end of
a page, and a page of bytes is soon read. Several places read at once give the full bandwidth: a
unit takes rows that lie far apart, one from each of 8 shares of the weight, each read in order.
"""

from __future__ import annotations

import math

from tinygrad import Tensor, UOp

from tinygpt.kernels.dispatch import operation
from tinygpt.kernels.linear import FEW, plain_linear
from tinygpt.kernels.loops import blocks
from tinygpt.kernels.matmul import matmul
from tinygpt.kernels.phases import Array, Kernel, contiguous, run, wide

SHARES = 8
"""Rows of the weight that a unit works on: so many sums, and so many places that are read."""
LANES = 8
"""A register of AVX2. With wider lanes 8 sums would not stay in its 16 registers."""
TOGETHER = 2
"""Rows of x for which a weight is turned into a number once."""


def dequantized(weight: Tensor, scale: Tensor) -> Tensor:
    """The numbers that int8 weights (O, I) stand for, with a scale (O,) for each row."""
    return weight.cast(scale.dtype) * scale.unsqueeze(1)


def plain_quantized_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """The same layer with the dequantised weight."""
    return plain_linear(x, dequantized(weight, scale), bias)


@operation("int8", plain_quantized_linear, integers=("weight",), cpu=True)
def quantized_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """y = x Wᵀ + b, where W = weight scale, for x (..., I) -> (..., O).

    weight is int8 (O, I), scale and bias are (O,). Sums are float32, or float64 for float64. There
    is no gradient.
    """
    (n_out, n_in), lead = map(int, weight.shape), x.shape[:-1]
    m = int(math.prod(lead))
    x2, q, s = contiguous(x.reshape(m, n_in)), contiguous(weight), contiguous(scale)
    b = None if bias is None else contiguous(bias)
    if m <= FEW:
        y = run(
            few_rows_int8,
            [Tensor.empty(m, n_out, dtype=wide(x.dtype), device=x.device)],
            [t for t in (x2, q, s, b) if t is not None],
            lanes=min(LANES, n_in),
            name=f"matvec_int8_{m}x{n_out}x{n_in}",
            ops=2 * m * n_in * n_out,
            m=m,
            n_in=n_in,
            n_out=n_out,
            bias=b is not None,
        )[0]
    else:
        y = matmul(x2, q, (m, n_out, n_in), (n_in, 1), (1, n_in), scale=s, bias=b)[0]
    return y.cast(x.dtype).reshape(*lead, n_out)


def few_rows_int8(k: Kernel, *arrays: Array, m: int, n_in: int, n_out: int, bias: bool) -> None:
    """y = x Wᵀ + b for a few rows of x. Output: y; inputs: x, q, scale, [b].

    The lanes run along the rows of q, and are added up at the end.
    """
    left = iter(arrays)
    out, x, q, scale = next(left), next(left), next(left), next(left)
    b = next(left) if bias else None
    real = out.dtype

    shares = min(SHARES, n_out)
    units = blocks(n_out, shares)
    unit = k.units(units)
    # the shares overlap a little unless n_out is a multiple: then both compute the same numbers
    rows = [unit + (n_out - units) * j // max(shares - 1, 1) for j in range(shares)]

    def some(first: UOp | int, count: int) -> None:
        """The rows of x from ``first`` on, so many together."""
        sums = [(a, j) for a in range(count) for j in range(shares)]
        acc, total = k.tile(len(sums), real, shared=True), k.tile(len(sums), real)

        def add(start: UOp | int, lane: UOp) -> None:
            numbers = [q[row * n_in + start + lane].cast(real) for row in rows]
            vectors = [x[(first + a) * n_in + start + lane].cast(real) for a in range(count)]
            for i, (a, j) in enumerate(sums):
                acc[i, lane] = acc[i, lane] + vectors[a] * numbers[j]

        with k.phase() as lane:
            for i in range(len(sums)):
                acc[i, lane] = 0.0
        steps, rest = divmod(n_in, k.lanes)
        with k.loop(steps) as d, k.phase() as lane:
            add(d * k.lanes, lane)
        if rest:
            with k.phase(rest) as lane:
                add(steps * k.lanes, lane)
        k.fold(total, acc, len(sums))
        with k.phase(1):
            for i, (a, j) in enumerate(sums):
                at, value = (first + a) * n_out + rows[j], total[i, 0] * scale[rows[j]].cast(real)
                out[at] = value + b[rows[j]].cast(real) if b is not None else value

    if m >= TOGETHER:
        with k.loop(m // TOGETHER) as i:
            some(i * TOGETHER, TOGETHER)
    if m % TOGETHER:
        some(m - m % TOGETHER, m % TOGETHER)
