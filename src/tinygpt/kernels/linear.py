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
takes the dot products as they stand.

The gradient of the bias, dy summed over M, comes with dW, which reads all of dy in any case.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from tinygrad import Tensor, UOp

from tinygpt.kernels.dispatch import operation
from tinygpt.kernels.loops import add_across, blocks, fill
from tinygpt.kernels.matmul import matmul
from tinygpt.kernels.phases import Array, Backward, Kernel, contiguous, minimum, run, wide
from tinygpt.machine.tinygrad_internals import least_upper_dtype

FEW = 16
"""Up to so many rows of x, `few_rows` is the faster."""


def plain_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """One operation after the other."""
    y = x @ weight.transpose(0, 1)
    return y if bias is None else y + bias


@operation("linear", plain_linear, cpu=True)
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + b for x (..., I), weight (O, I), bias (O,) -> (..., O).

    Sums are float32, or float64 for float64. On GPUs tinygrad's own products are used, which know
    the tensor cores.
    """
    given = [t for t in (x, weight, bias) if t is not None]
    (n_out, n_in), lead = map(int, weight.shape), x.shape[:-1]
    m = int(math.prod(lead))
    x2, w = contiguous(x.reshape(m, n_in)), contiguous(weight)

    def backward(gradient: Tensor, _: Sequence[Tensor]) -> list[Tensor | None]:
        dy = contiguous(gradient)
        dx = matmul(dy, w, (m, n_in, n_out), (n_out, 1), (n_in, 1))[0]
        dw, *db = matmul(dy, x2, (n_out, n_in, m), (1, n_out), (n_in, 1), sums=bias is not None)
        return [g.cast(t.dtype) for g, t in zip([dx, dw, *db], given, strict=True)]

    b = None if bias is None else contiguous(bias)
    if m <= FEW:
        y = matvec(x2, w, b, backward)
    else:
        y = matmul(x2, w, (m, n_out, n_in), (n_in, 1), (1, n_in), bias=b, backward=backward)[0]
    return y.cast(least_upper_dtype(x.dtype, weight.dtype)).reshape(*lead, n_out)


def matvec(x: Tensor, w: Tensor, b: Tensor | None, backward: Backward) -> Tensor:
    """y for few rows of x (m, I)."""
    (m, n_in), n_out = map(int, x.shape), int(w.shape[0])
    real = wide(least_upper_dtype(x.dtype, w.dtype))
    return run(
        few_rows,
        [Tensor.empty(m, n_out, dtype=real, device=x.device)],
        [t for t in (x, w, b) if t is not None],
        lanes=16,
        name=f"matvec_{m}x{n_out}x{n_in}",
        ops=2 * m * n_in * n_out,
        backward=backward,
        m=m,
        n_in=n_in,
        n_out=n_out,
        bias=b is not None,
    )[0]


def few_rows(
    k: Kernel, out: Array, x: Array, w: Array, *b: Array, m: int, n_in: int, n_out: int, bias: bool
) -> None:
    """y = x Wᵀ + b for a few rows of x.

    A unit is 4 outputs; the lanes run along the rows of W, and are added up at the end. What a row
    becomes does not depend on how many there are.
    """
    real = wide(out.dtype)

    rows = min(4, n_out)
    unit = k.units(blocks(n_out, rows))
    first = minimum(unit * rows, n_out - rows)  # the last unit may repeat some of the one before
    acc, total = k.tile(rows, real, shared=True), k.tile(rows, real, width=1)
    steps, rest = divmod(n_in, k.lanes)

    with k.loop(m) as i:

        def add(start: UOp | int, lane: UOp) -> None:
            vector = x[i * n_in + start + lane].cast(real)
            for j in range(rows):
                weight = w[(first + j) * n_in + start + lane].cast(real)
                acc[j, lane] = acc[j, lane] + vector * weight

        fill(k, 0.0, rows, acc)
        if steps:
            with k.loop(steps) as d, k.phase() as lane:
                add(d * k.lanes, lane)
        if rest:
            with k.phase(rest) as lane:
                add(steps * k.lanes, lane)
        add_across(k, total, acc, rows)
        with k.phase(rows) as j:
            value = total[j, 0]
            out[i * n_out + first + j] = value + b[0][first + j].cast(real) if bias else value
