"""Linear layers: y = x Wᵀ + b, and the gradients.

All three products of a layer are one kernel, `matmul`; they differ in how the operands lie.

====== ============ ==================== ====================
out    (m, n)       a (m, depth)         b (depth, n)
====== ============ ==================== ====================
y      (M, O)       x (M, I)             Wᵀ, where W is (O, I)
dx     (M, I)       dy (M, O)            W (O, I)
dW     (O, I)       dyᵀ, dy being (M, O) x (M, I)
====== ============ ==================== ====================

For the few rows of generation the weight is read once and nothing is worth copying: `few_rows`
takes the dot products as they stand. Such a product takes the time that reading the weight takes.
One more thing counts: the hardware prefetches along addresses that are read in order, but only to
the end of a page. Several places read at once give the full bandwidth, so the outputs of a unit lie
far apart: one from each of some shares of the weight, each of which is read in order.

The gradient of the bias, dy summed over M, comes with dW, which reads all of dy in any case.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from tinygrad import Tensor, UOp

from tinygpt.kernels.dispatch import on_cpu, operation
from tinygpt.kernels.loops import add_across, blocks, fill
from tinygpt.kernels.matmul import matmul
from tinygpt.kernels.phases import Array, Backward, Index, Kernel, contiguous, run, wide
from tinygpt.kernels.wmma import core_of
from tinygpt.machine.tinygrad_internals import DType, least_upper_dtype

FEW = 16
"""Up to so many rows of x, `few_rows` is the faster."""
INT8_LANES = 8
"""A register of AVX2. With wider lanes 8 sums would not stay in its 16 registers."""


def computed_in(x: Tensor, weight: Tensor) -> DType:
    """The type of y: if x is of 16 bits, that of x, to which the weight is rounded for it."""
    return x.dtype if x.dtype.itemsize == 2 else least_upper_dtype(x.dtype, weight.dtype)


def plain_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """One operation after the other."""
    y = wide_product(x, weight)
    return (y if bias is None else y + bias).cast(computed_in(x, weight))


def wide_product(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ as it is summed, both of the type that `computed_in` says."""
    kind = computed_in(x, weight)
    real = wide(kind) if on_cpu(x) else kind  # a CPU would round each product to 16 bits
    x, w = x.cast(kind).cast(real), weight.cast(kind).cast(real)
    if core_of(x):
        w = w.contiguous()  # rounded once for three products
    return x.matmul(w.transpose(0, 1), dtype=wide(kind))


@operation("linear", plain_linear, cpu=True)
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + b for x (..., I), weight (O, I), bias (O,) -> (..., O).

    Sums are float32, or float64 for float64. If x is bfloat16 or half, y and its gradient are too,
    whatever the type of the weight: a float32 weight is rounded as it is read, and its gradient is
    the sums as they are. On GPUs tinygrad's own products are used, which know the tensor cores.
    """
    given, kind = [t for t in (x, weight, bias) if t is not None], computed_in(x, weight)
    (n_out, n_in), lead = map(int, weight.shape), x.shape[:-1]
    m = int(math.prod(lead))
    x2, w = contiguous(x.reshape(m, n_in)), contiguous(weight)

    def backward(gradient: Tensor, _: Sequence[Tensor]) -> list[Tensor | None]:
        dy, sizes = contiguous(gradient.cast(kind)), (m, n_in, n_out)
        dx = matmul(dy, w, sizes, (n_out, 1), (n_in, 1), dtype=x.dtype)[0]
        dw, *db = matmul(dy, x2, (n_out, n_in, m), (1, n_out), (n_in, 1), sums=bias is not None)
        return [g.cast(t.dtype) for g, t in zip([dx, dw, *db], given, strict=True)]

    return project(x2, w, None, bias, backward, kind).cast(kind).reshape(*lead, n_out)


class Few(NamedTuple):
    """The sizes of a product of few rows, and which of its inputs there are."""

    m: int
    n_in: int
    n_out: int
    int8: bool
    bias: bool


def project(
    x: Tensor,
    w: Tensor,
    scale: Tensor | None,
    b: Tensor | None,
    backward: Backward | None = None,
    dtype: DType | None = None,
) -> Tensor:
    """y = x Wᵀ scale + b (m, O) for x (m, I), w (O, I), which is int8 if there is a scale (O,).

    y is of the type that sums have, or where possible of ``dtype``.
    """
    (m, n_in), n_out = map(int, x.shape), int(w.shape[0])
    scale, b = (None if t is None else contiguous(t) for t in (scale, b))
    if m > FEW:
        sizes = (m, n_out, n_in), (n_in, 1), (1, n_in)
        return matmul(x, w, *sizes, scale=scale, bias=b, dtype=dtype, backward=backward)[0]
    real = wide(least_upper_dtype(x.dtype, x.dtype if scale is not None else w.dtype))
    return run(
        few_rows,
        [Tensor.empty(m, n_out, dtype=dtype or real, device=x.device)],
        [t for t in (x, w, scale, b) if t is not None],
        lanes=16 if scale is None else min(INT8_LANES, n_in),
        name=f"matvec_{'int8_' * (scale is not None)}{m}x{n_out}x{n_in}",
        ops=2 * m * n_in * n_out,
        backward=backward,
        few=Few(m, n_in, n_out, scale is not None, b is not None),
    )[0]


def few_rows(k: Kernel, out: Array, x: Array, w: Array, *rest: Array, few: Few) -> None:
    """y = x Wᵀ scale + b for a few rows of x. Inputs: x, W, [scale], [b].

    A unit is a few outputs; the lanes run along the rows of W, and are added up at the end. What a
    row becomes does not depend on how many there are.
    """
    m, n_in, n_out, int8, bias = few
    scale, shift = rest[:int8], rest[int8 : int8 + bias]
    # so many sums are in registers; int8 weights are turned into floats once for two rows of x
    outputs, together = min(8 if int8 else 4, n_out), 2 if int8 else 1
    real, units = wide(out.dtype), blocks(n_out, outputs)
    unit = k.units(units)
    steps, rest_of_depth = divmod(n_in, k.lanes)

    def row(j: Index) -> UOp:
        """The unit's output j. The last units may repeat some of others: the numbers are equal."""
        return unit + (n_out - units) * j // max(outputs - 1, 1)

    def some(start: UOp | int, count: int) -> None:
        """The rows of x from ``start`` on, so many together."""
        sums = [(a, j) for a in range(count) for j in range(outputs)]
        acc, total = k.tile(len(sums), real, shared=True), k.tile(len(sums), real, width=1)

        def add(d: UOp | int, lane: UOp) -> None:
            numbers = [w[row(j) * n_in + d + lane].cast(real) for j in range(outputs)]
            vectors = [x[(start + a) * n_in + d + lane].cast(real) for a in range(count)]
            for i, (a, j) in enumerate(sums):
                acc[i, lane] = acc[i, lane] + vectors[a] * numbers[j]

        fill(k, 0.0, len(sums), acc)
        if steps:
            with k.loop(steps) as d, k.phase() as lane:
                add(d * k.lanes, lane)
        if rest_of_depth:
            with k.phase(rest_of_depth) as lane:
                add(steps * k.lanes, lane)
        if int8:  # in order: `add_across` would keep 16 sums in memory and not in registers
            k.fold(total, acc, len(sums))
        else:
            add_across(k, total, acc, len(sums))
        with k.phase(outputs) as j:
            for a in range(count):
                value = total[a * outputs + j, 0]
                for factor in scale:
                    value = value * factor[row(j)].cast(real)
                for b in shift:
                    value = value + b[row(j)].cast(real)
                out[(start + a) * n_out + row(j)] = value

    whole, rest_of_rows = divmod(m, together)
    if whole:
        with k.loop(whole) as i:
            some(i * together, together)
    if rest_of_rows:
        some(whole * together, rest_of_rows)
