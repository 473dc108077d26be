"""Embeddings: rows of a matrix picked by id, and their gradient, a scatter-add.

The gradient is zero but for the rows that were picked. It is cleared, and then the gradients of the
positions are added to it one after another, in their order, by whichever core owns the columns: no
two cores ever write the same number, and the order of a sum never changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from tinygrad import Tensor, UOp, dtypes

from tinygpt.kernels import reference
from tinygpt.kernels.fallback import falls_back, obstacle
from tinygpt.kernels.norm import empty, largest_divisor, sum_dtype
from tinygpt.kernels.phases import Array, Kernel, as_index, contiguous, run

LANES = 16
UNITS = 16
"""About so many share out the columns: the narrower they are, the worse they are cleared."""


def embedding(tokens: Tensor, weight: Tensor, positions: Tensor | None = None) -> Tensor:
    """Rows of weight (V, C) at the integer tokens (B, T) -> (B, T, C).

    With ``positions``, of at least T rows (..., C), row t is added to position t. An id outside of
    0..V-1 gives a row of NaN, so that the loss shows it, and no gradient.
    """
    tables = [weight] if positions is None else [weight, positions]
    if falls_back("embedding", obstacle(*tables, ids=[tokens])):
        return reference.embedding(tokens, weight, positions)
    B, T = map(int, tokens.shape)
    V, C = map(int, weight.shape)
    tables = [contiguous(t) for t in tables]
    tokens = contiguous(tokens.cast(dtypes.int32))
    launch = partial(run, lanes=largest_divisor(C, LANES), B=B, T=T, C=C)

    def backward(gradient: Tensor, _: Sequence[Tensor]) -> list[Tensor | None]:
        rows = tuple(int(t.shape[0]) for t in tables)
        sums = [empty(t, n, C, dtype=sum_dtype(t)) for t, n in zip(tables, rows, strict=True)]
        inputs = [contiguous(gradient), tokens]
        sums = launch(_backward, sums, inputs, name=f"embedding_grad_{V}x{C}", rows=rows)
        return [None, *(s.cast(t.dtype) for s, t in zip(sums, tables, strict=True))]

    out, inputs = [empty(weight, B, T, C)], [tokens, *tables]
    return launch(_forward, out, inputs, name=f"embedding_{B}x{T}x{C}", backward=backward, V=V)[0]


def _forward(
    k: Kernel,
    out: Array,
    tokens: Array,
    weight: Array,
    *positions: Array,
    B: int,
    T: int,
    C: int,
    V: int,
) -> None:
    i = k.units(B * T)
    row, known = row_of(tokens[i], V)
    with k.loop(C // k.lanes) as j, k.phase() as lane:
        at = j * k.lanes + lane
        value = weight[row * C + at]
        for table in positions:
            value = value + table[i % T * C + at]
        out[i * C + at] = known.where(value, math.nan)


def _backward(k: Kernel, *arrays: Array, rows: tuple[int, ...], B: int, T: int, C: int) -> None:
    """Outputs: the gradient of each table, so many ``rows``. Inputs: (B, T, C) gradient, tokens."""
    *sums, g, tokens = arrays
    blocks = C // k.lanes
    count = 1 if k.gpu else largest_divisor(blocks, max(1, blocks // UNITS))
    first = k.units(blocks // count) * count
    for total, n in zip(sums, rows, strict=True):
        with k.loop(n) as row, k.loop(count) as j, k.phase() as lane:
            total[row * C + (first + j) * k.lanes + lane] = 0.0
    with k.loop(B * T) as i, k.loop(count) as j, k.phase() as lane:
        at = (first + j) * k.lanes + lane
        row, known = row_of(tokens[i], rows[0])
        value = g[i * C + at].cast(sums[0].dtype)
        sums[0][row * C + at] = sums[0][row * C + at] + known.where(value, 0.0)
        for total in sums[1:]:
            total[i % T * C + at] = total[i % T * C + at] + value


def row_of(token: UOp, V: int) -> tuple[UOp, UOp]:
    """-> (the id's row of V, has it one?); an id that has none gets the first."""
    known = (token >= 0) & (token < V)
    return as_index(known.where(token, 0)), known
