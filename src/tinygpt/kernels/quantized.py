"""Layers whose weights are int8: y = (x qᵀ) scale + b, with one scale for each row of q.

A step of decoding reads every weight once and computes little with it, so it takes the time that
reading takes, and a weight of one byte is read four times as fast. `few_rows` makes numbers of the
bytes in the registers; the many rows of a prompt go through `matmul`, which does so as it copies.

Memory gives its best only to a reader of several places at once: the hardware foresees a reader who
goes straight on, but only to the end of a page, and a page of bytes is soon over. So a unit takes
rows that lie far apart, one from each of 8 shares of the weight, and each share is read in order.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Literal

from tinygrad import Tensor, UOp, dtypes

from tinygpt.kernels import reference
from tinygpt.kernels.activation import gelu
from tinygpt.kernels.embedding import LANES as EMBEDDING_LANES
from tinygpt.kernels.embedding import row_of
from tinygpt.kernels.fallback import falls_back, obstacle
from tinygpt.kernels.linear import FEW, supported
from tinygpt.kernels.matmul import matmul
from tinygpt.kernels.norm import empty, largest_divisor
from tinygpt.kernels.phases import Array, Kernel, as_uop, contiguous, run

SHARES = 8
"""Rows of the weight that a unit works on: so many sums, and so many places that are read."""
LANES = 8
"""A register of AVX2. With wider lanes 8 sums would not stay in its 16 registers."""
TOGETHER = 2
"""Rows of x for which a weight is turned into a number once."""


def linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: Literal["gelu"] | None = None,
) -> Tensor:
    """y = x Wᵀ + b, then + residual, then GELU, where W = weight scale, for x (..., I) -> (..., O).

    weight is int8 (O, I), scale (O,), bias (O,), and residual (..., O) like y. Sums are float32, or
    float64 for float64. There is no gradient. Where no kernel can run, and on GPUs, whose own
    products are fast, the plain formula of ``reference`` is used.
    """
    given = [t for t in (x, scale, bias, residual) if t is not None]
    if falls_back("a quantised layer", obstacle(*given, ids=[weight])) or not supported(*given):
        return reference.quantized_linear(x, weight, scale, bias, residual, activation)
    (n_out, n_in), lead = map(int, weight.shape), x.shape[:-1]
    m = int(math.prod(lead))
    x2, q, s = contiguous(x.reshape(m, n_in)), contiguous(weight), contiguous(scale)
    b = None if bias is None else contiguous(bias)
    r = None if residual is None else contiguous(residual.reshape(m, n_out))
    activate = activation == "gelu"
    if m <= FEW:
        y = matvec(x2, q, s, b, r, activate)
    else:
        y = matmul(
            x2,
            q,
            (m, n_out, n_in),
            (n_in, 1),
            (1, n_in),
            scale=s,
            bias=b,
            residual=r,
            gelu=activate,
        )[0]
    return y.cast(x.dtype).reshape(*lead, n_out)


def matvec(
    x: Tensor,
    q: Tensor,
    s: Tensor,
    b: Tensor | None,
    r: Tensor | None,
    act: bool,
) -> Tensor:
    """y for few rows of x."""
    (m, n_in), n_out = map(int, x.shape), int(q.shape[0])
    real = dtypes.float64 if x.dtype == dtypes.float64 else dtypes.float32
    return run(
        few_rows,
        [Tensor.empty(m, n_out, dtype=real, device=x.device)],
        [t for t in (x, q, s, b, r) if t is not None],
        lanes=min(LANES, n_in),
        name=f"matvec_int8_{m}x{n_out}x{n_in}" + "_gelu" * act,
        ops=2 * m * n_in * n_out,
        m=m,
        n_in=n_in,
        n_out=n_out,
        bias=b is not None,
        residual=r is not None,
        act=act,
    )[0]


def few_rows(
    k: Kernel, *arrays: Array, m: int, n_in: int, n_out: int, bias: bool, residual: bool, act: bool
) -> None:
    """y = x Wᵀ + b for a few rows of x. Output: y; inputs: x, q, scale, [b,] [residual].

    The lanes run along the rows of q, and are added up at the end.
    """
    left = iter(arrays)
    out, x, q, scale = next(left), next(left), next(left), next(left)
    b = next(left) if bias else None
    r = next(left) if residual else None
    real = out.dtype

    shares = min(SHARES, n_out)
    units = -(-n_out // shares)
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
                value = value + b[rows[j]].cast(real) if b is not None else value
                value = value + r[at].cast(real) if r is not None else value
                out[at] = gelu(value) if act else value

    if m >= TOGETHER:
        with k.loop(m // TOGETHER) as i:
            some(i * TOGETHER, TOGETHER)
    if m % TOGETHER:
        some(m - m % TOGETHER, m % TOGETHER)


def embedding(
    tokens: Tensor, weight: Tensor, scale: Tensor, positions: Tensor | None = None
) -> Tensor:
    """Rows of W = weight scale (V, C) at tokens (B, T), plus rows of positions -> (B, T, C).

    As `embedding.embedding`: an id outside of 0..V-1 gives a row of NaN. There is no gradient.
    """
    tables = [scale] if positions is None else [scale, positions]
    if falls_back("embedding", obstacle(*tables, ids=[tokens, weight])):
        return reference.quantized_embedding(tokens, weight, scale, positions)
    (B, T), (V, C) = map(int, tokens.shape), map(int, weight.shape)
    inputs = [contiguous(t) for t in (tokens.cast(dtypes.int32), weight, *tables)]
    name = f"embedding_int8_{B}x{T}x{C}"
    launch = partial(run, lanes=largest_divisor(C, EMBEDDING_LANES), name=name)
    return launch(pick_rows, [empty(scale, B, T, C)], inputs, B=B, T=T, C=C, V=V)[0]


def pick_rows(
    k: Kernel,
    out: Array,
    tokens: Array,
    weight: Array,
    scale: Array,
    *positions: Array,
    B: int,
    T: int,
    C: int,
    V: int,
) -> None:
    """A unit is one token."""
    i = k.units(B * T)
    row, known = row_of(tokens[i], V)
    with k.loop(C // k.lanes) as j, k.phase() as lane:
        at = j * k.lanes + lane
        value = weight[row * C + at].cast(out.dtype) * scale[row]
        for table in positions:
            value = value + table[i % T * C + at]
        out[i * C + at] = known.where(value, as_uop(math.nan, out.dtype))
