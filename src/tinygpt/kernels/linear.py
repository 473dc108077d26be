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

from tinygrad import Tensor, UOp

from tinygpt.kernels.dispatch import on_cpu, operation
from tinygpt.kernels.loops import add_across, blocks, fill, spread
from tinygpt.kernels.matmul import matmul
from tinygpt.kernels.phases import Array, Backward, Kernel, contiguous, run, wide
from tinygpt.kernels.wmma import core_of
from tinygpt.machine.tinygrad_internals import DType, least_upper_dtype

FEW = 16
"""Up to so many rows of x, `few_rows` is the faster."""


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

    return project(x2, w, bias, backward, kind).cast(kind).reshape(*lead, n_out)


def project(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    backward: Backward | None = None,
    dtype: DType | None = None,
) -> Tensor:
    """y = x Wᵀ + b (m, O) for x (m, I), w (O, I).

    y is of the type that sums have, or where possible of ``dtype``.
    """
    (m, n_in), n_out = map(int, x.shape), int(w.shape[0])
    if m > FEW:
        return project_many(x, w, None, b, backward, dtype)
    real = wide(least_upper_dtype(x.dtype, w.dtype))
    return run(
        few_rows,
        [Tensor.empty(m, n_out, dtype=dtype or real, device=x.device)],
        [x, w, *(contiguous(t) for t in (b,) if t is not None)],
        lanes=16,
        name=f"matvec_{m}x{n_out}x{n_in}",
        ops=2 * m * n_in * n_out,
        backward=backward,
        sizes=(m, n_in, n_out),
    )[0]


def project_many(
    x: Tensor,
    w: Tensor,
    scale: Tensor | None,
    b: Tensor | None,
    backward: Backward | None = None,
    dtype: DType | None = None,
) -> Tensor:
    """The same, y = x Wᵀ scale + b, for any number of rows; w is int8 if there is a scale (O,)."""
    (m, n_in), n_out = map(int, x.shape), int(w.shape[0])
    scale, b = (None if t is None else contiguous(t) for t in (scale, b))
    sizes = (m, n_out, n_in), (n_in, 1), (1, n_in)
    return matmul(x, w, *sizes, scale=scale, bias=b, dtype=dtype, backward=backward)[0]


def few_rows(
    k: Kernel, out: Array, x: Array, w: Array, *bias: Array, sizes: tuple[int, int, int]
) -> None:
    """y = x Wᵀ + b for a few rows of x.

    A unit is a few outputs; the lanes run along the rows of W, and are added up at the end. What a
    row becomes does not depend on how many there are.
    """
    m, n_in, n_out = sizes
    outputs, real = min(4, n_out), wide(out.dtype)  # so many sums are in registers
    row = spread(k.units(blocks(n_out, outputs)), n_out, outputs)
    steps, rest = divmod(n_in, k.lanes)
    with k.loop(m) as i:
        acc, total = k.tile(outputs, real, shared=True), k.tile(outputs, real, width=1)

        def add(d: UOp | int, lane: UOp) -> None:
            vector = x[i * n_in + d + lane].cast(real)
            for j in range(outputs):
                number = w[row(j) * n_in + d + lane].cast(real)
                acc[j, lane] = acc[j, lane] + vector * number

        fill(k, 0.0, outputs, acc)
        if steps:
            with k.loop(steps) as d, k.phase() as lane:
                add(d * k.lanes, lane)
        if rest:
            with k.phase(rest) as lane:
                add(steps * k.lanes, lane)
        add_across(k, total, acc, outputs)
        with k.phase(outputs) as j:
            value = total[j, 0]
            for b in bias:
                value = value + b[row(j)].cast(real)
            out[i * n_out + row(j)] = value
