"""Embeddings: rows of a matrix picked by id, and their gradient, a scatter-add::

    y[b, t] = weight[tokens[b, t]] + positions[t]
    ∂loss/∂weight[v] = the sum of g[b, t] over all (b, t) with tokens[b, t] = v

The gradient is zero but for the rows that were picked. It is cleared, and then the gradients of the
positions are added to it one after another, in their order. A unit owns some columns: no two cores
write the same number, and the order of a sum never changes.

The weight may be int8 with a scale for each row (`quantized`); it then has no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from tinygrad import Tensor, dtypes

from tinygpt.kernels.dispatch import operation
from tinygpt.kernels.loops import largest_divisor, row_of
from tinygpt.kernels.phases import Array, Kernel, as_uop, contiguous, empty, run, wide
from tinygpt.machine.tinygrad_internals import DType

LANES = 16
UNITS = 16
"""About so many units share the columns: clearing the gradient is slower in narrower shares."""

Size = tuple[int, int, int]
"""B, T, C"""


def plain_embedding(
    tokens: Tensor, weight: Tensor, positions: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    """Rows by indexing; NaN where there is no such row."""
    known = (tokens >= 0) & (tokens < int(weight.shape[0]))
    row = known.where(tokens, 0)
    rows = weight[row].cast(out_type(weight, scale))
    if scale is not None:
        rows = rows * scale[row].unsqueeze(-1)
    if positions is not None:
        rows = rows + positions[: tokens.shape[1]]
    return known.unsqueeze(-1).where(rows, math.nan)


def out_type(weight: Tensor, scale: Tensor | None) -> DType:
    """The type of the rows: that of float weights, but float32 for those of 16 bits."""
    return wide(weight.dtype) if scale is None else scale.dtype


@operation("embedding", plain_embedding, integers=("tokens", "weight"))
def embedding(
    tokens: Tensor, weight: Tensor, positions: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    """Rows of weight (V, C) at the integer tokens (B, T) -> (B, T, C).

    With ``positions``, of at least T rows (..., C), row t is added to position t. An id outside of
    0..V-1 gives a row of NaN, so that the loss shows it, and no gradient. With ``scale`` (V,) each
    row of the weight, which may be int8, is multiplied by its number. Rows of 16-bit weights are
    float32.
    """
    (B, T), (V, C) = map(int, tokens.shape), map(int, weight.shape)
    tables = [contiguous(t) for t in (weight, positions) if t is not None]
    scales = [contiguous(t) for t in (scale,) if t is not None]
    tokens = contiguous(tokens.cast(dtypes.int32))
    launch = partial(run, lanes=largest_divisor(C, LANES), size=(B, T, C))

    def backward(gradient: Tensor, _: Sequence[Tensor]) -> list[Tensor | None]:
        rows = tuple(int(t.shape[0]) for t in tables)
        sums = [empty(t, n, C, dtype=wide(t.dtype)) for t, n in zip(tables, rows, strict=True)]
        inputs = [contiguous(gradient), tokens]
        sums = launch(_backward, sums, inputs, name=f"embedding_grad_{V}x{C}", rows=rows)
        return [None, *(s.cast(t.dtype) for s, t in zip(sums, tables, strict=True))]

    return launch(
        _forward,
        [empty(tokens, B, T, C, dtype=out_type(weight, scale))],
        [tokens, *scales, *tables],
        name=f"embedding_{B}x{T}x{C}" + "_scaled" * len(scales),
        backward=None if scales else backward,
        V=V,
        scaled=scale is not None,
    )[0]


def _forward(
    k: Kernel, out: Array, tokens: Array, *arrays: Array, size: Size, V: int, scaled: bool
) -> None:
    """A unit is one token. Inputs: tokens, [scale,] weight, [positions]."""
    (B, T, C), scale, (weight, *positions) = size, arrays[:scaled], arrays[scaled:]
    i = k.units(B * T)
    row, known = row_of(tokens[i], V)
    with k.loop(C // k.lanes) as j, k.phase() as lane:
        at = j * k.lanes + lane
        value = weight[row * C + at].cast(out.dtype)
        for factor in scale:
            value = value * factor[row]
        for table in positions:
            value = value + table[i % T * C + at].cast(out.dtype)
        out[i * C + at] = known.where(value, as_uop(math.nan, out.dtype))


def _backward(k: Kernel, *arrays: Array, rows: tuple[int, ...], size: Size) -> None:
    """Outputs: the gradient of each table, so many ``rows``. Inputs: (B, T, C) gradient, tokens."""
    (*sums, g, tokens), (B, T, C) = arrays, size
    whole = C // k.lanes  # vectors of columns, of which a unit owns some
    count = 1 if k.gpu else largest_divisor(whole, max(1, whole // UNITS))
    first = k.units(whole // count) * count
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
