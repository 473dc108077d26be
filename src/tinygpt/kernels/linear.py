"""Linear layers: y = x Wᵀ + b, optionally fused: + residual, then GELU; and the gradients.

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

The gradient of the bias, dy summed over M, comes with dW, which reads all of dy in any case. With
GELU, y = gelu(u) for u = x Wᵀ + b + residual: u is kept, and dy is first multiplied by the slope of
GELU at u.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from tinygrad import Tensor, UOp

from tinygpt.kernels.dispatch import operation
from tinygpt.kernels.gelu import gelu_gradient, gelu_value, plain_gelu
from tinygpt.kernels.loops import add_across, blocks, fill
from tinygpt.kernels.matmul import matmul
from tinygpt.kernels.phases import Array, Backward, Kernel, contiguous, minimum, run, wide
from tinygpt.machine.tinygrad_internals import least_upper_dtype

FEW = 16
"""Up to so many rows of x, `few_rows` is the faster."""

Activation = Literal["gelu"]


def plain_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: Activation | None = None,
) -> Tensor:
    """One operation after the other."""
    y = x @ weight.transpose(0, 1)
    if bias is not None:
        y = y + bias
    if residual is not None:
        y = y + residual
    return plain_gelu(y) if activation == "gelu" else y


@operation("linear", plain_linear, cpu=True)
def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: Activation | None = None,
) -> Tensor:
    """y = x Wᵀ + b, then + residual, then GELU, for x (..., I), weight (O, I) -> (..., O).

    bias is (O,), residual (..., O) like y. Sums are float32, or float64 for float64. On GPUs
    tinygrad's own products are used, which know the tensor cores.
    """
    given = [t for t in (x, weight, bias, residual) if t is not None]
    (n_out, n_in), lead = map(int, weight.shape), x.shape[:-1]
    m = int(math.prod(lead))
    x2, w = contiguous(x.reshape(m, n_in)), contiguous(weight)

    def backward(gradient: Tensor, outputs: Sequence[Tensor]) -> list[Tensor | None]:
        dy = contiguous(gradient)
        du = gelu_gradient(dy, outputs[1]) if act else dy
        dx = matmul(du, w, (m, n_in, n_out), (n_out, 1), (n_in, 1))[0]
        dw, *db = matmul(du, x2, (n_out, n_in, m), (1, n_out), (n_in, 1), sums=bias is not None)
        grads = [dx, dw, *db] + [du] * (residual is not None)
        return [g.cast(t.dtype) for g, t in zip(grads, given, strict=True)]

    b = None if bias is None else contiguous(bias)
    r = None if residual is None else contiguous(residual.reshape(m, n_out))
    act = activation == "gelu"
    if m <= FEW:
        y = matvec(x2, w, b, r, act, backward)
    else:
        y = matmul(
            x2,
            w,
            (m, n_out, n_in),
            (n_in, 1),
            (1, n_in),
            bias=b,
            residual=r,
            gelu=act,
            backward=backward,
        )[0]
    return y.cast(least_upper_dtype(x.dtype, weight.dtype)).reshape(*lead, n_out)


def matvec(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    r: Tensor | None,
    act: bool,
    backward: Backward,
) -> Tensor:
    """y, or GELU of y, for few rows of x (m, I)."""
    (m, n_in), n_out = map(int, x.shape), int(w.shape[0])
    real = wide(least_upper_dtype(x.dtype, w.dtype))
    return run(
        few_rows,
        [Tensor.empty(m, n_out, dtype=real, device=x.device) for _ in range(1 + act)],
        [t for t in (x, w, b, r) if t is not None],
        lanes=16,
        name=f"matvec_{m}x{n_out}x{n_in}" + "_gelu" * act,
        ops=2 * m * n_in * n_out,
        backward=backward,
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
    """y = x Wᵀ + b for a few rows of x. Outputs: [GELU,] y; inputs: x, W, [b,] [residual].

    A unit is 4 outputs; the lanes run along the rows of W, and are added up at the end. What a row
    becomes does not depend on how many there are. GELU waits for all rows, to be done in vectors.
    """
    left = iter(arrays)
    activated = next(left) if act else None
    out, x, w = next(left), next(left), next(left)
    b = next(left) if bias else None
    r = next(left) if residual else None
    real = wide(out.dtype)

    rows = min(4, n_out)
    unit = k.units(blocks(n_out, rows))
    first = minimum(unit * rows, n_out - rows)  # the last unit may repeat some of the one before
    acc, total = k.tile(rows, real, shared=True), k.tile(rows, real, width=1)
    steps, rest = divmod(n_in, k.lanes)
    vectors = blocks(m * rows, k.lanes)
    before = k.tile(vectors, real)  # GELU, which is m x rows numbers
    if activated is not None:
        fill(k, 0.0, vectors, before)

    def place(i: UOp, j: UOp) -> tuple[UOp, UOp]:
        number = i * rows + j
        return number // k.lanes, number % k.lanes

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
            at, value = i * n_out + first + j, total[j, 0]
            value = value + b[first + j].cast(real) if b is not None else value
            value = value + r[at].cast(real) if r is not None else value
            out[at] = value
            if activated is not None:
                before[place(i, j)] = value
    if activated is not None:
        with k.loop(vectors) as n, k.phase() as lane:
            before[n, lane] = gelu_value(before[n, lane])
        with k.loop(m) as i, k.phase(rows) as j:
            activated[i * n_out + first + j] = before[place(i, j)]
