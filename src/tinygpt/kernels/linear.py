"""Linear layers: y = x Wᵀ + b, a residual and GELU in the same kernel, and its gradients.

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

from tinygrad import Tensor, UOp, dtypes

from tinygpt.kernels import reference
from tinygpt.kernels.activation import gelu, gelu_backward
from tinygpt.kernels.matmul import matmul
from tinygpt.kernels.norm import fill
from tinygpt.kernels.phases import (
    Array,
    Backward,
    Kernel,
    Tile,
    contiguous,
    minimum,
    on_gpu,
    run,
)
from tinygpt.machine.tinygrad_internals import least_upper_dtype

FEW = 16
"""Up to so many rows of x, `few_rows` is the faster."""
REAL = (dtypes.float16, dtypes.bfloat16, dtypes.float32, dtypes.float64)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: Literal["gelu"] | None = None,
) -> Tensor:
    """y = x Wᵀ + b, and then + residual, and then GELU, for x (..., I), weight (O, I) -> (..., O).

    bias is (O,), residual is (..., O) like y.
    Sums are float32, or float64 for float64. Where `supported` says no, the plain formula of
    ``reference`` is used.
    """
    given = [t for t in (x, weight, bias, residual) if t is not None]
    if not supported(*given):
        return reference.linear(x, weight, bias, residual, activation)
    (n_out, n_in), lead = map(int, weight.shape), x.shape[:-1]
    m = int(math.prod(lead))
    x2, w = contiguous(x.reshape(m, n_in)), contiguous(weight)

    def backward(gradient: Tensor, outputs: Sequence[Tensor]) -> list[Tensor | None]:
        dy = contiguous(gradient)
        du = gelu_backward(dy, outputs[1]) if activate else dy
        dx = matmul(du, w, (m, n_in, n_out), (n_out, 1), (n_in, 1))[0]
        dw, *db = matmul(du, x2, (n_out, n_in, m), (1, n_out), (n_in, 1), sums=bias is not None)
        grads = [dx, dw, *db] + [du] * (residual is not None)
        return [g.cast(t.dtype) for g, t in zip(grads, given, strict=True)]

    b = None if bias is None else contiguous(bias)
    r = None if residual is None else contiguous(residual.reshape(m, n_out))
    activate = activation == "gelu"
    if m <= FEW:
        y = matvec(x2, w, b, r, activate, backward)[0]
    else:
        y = matmul(
            x2,
            w,
            (m, n_out, n_in),
            (n_in, 1),
            (1, n_in),
            bias=b,
            residual=r,
            gelu=activate,
            backward=backward,
        )[0]
    return y.cast(least_upper_dtype(x.dtype, weight.dtype)).reshape(*lead, n_out)


def supported(*tensors: Tensor) -> bool:
    """Whether the kernels can take these: on one CPU, real, of fixed shapes without a zero.

    On GPUs tinygrad's own products use the tensor cores; these kernels would not.
    """
    return all(
        isinstance(t.device, str)
        and t.device.split(":")[0] == "CPU"
        and not on_gpu(t)
        and t.dtype in REAL
        and all(isinstance(n, int) and n > 0 for n in t.shape)
        for t in tensors
    )


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
    real = dtypes.float64 if out.dtype == dtypes.float64 else dtypes.float32

    rows = min(4, n_out)
    unit = k.units(-(-n_out // rows))
    first = minimum(unit * rows, n_out - rows)  # the last unit may repeat some of the one before
    acc, total = k.tile(rows, real, shared=True), k.tile(1, real, width=rows)
    steps, rest = divmod(n_in, k.lanes)
    vectors = -(-m * rows // k.lanes)
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
        _add_lanes(k, total, acc, rows)
        with k.phase(rows) as j:
            at, value = i * n_out + first + j, total[0, j]
            value = value + b[first + j].cast(real) if b is not None else value
            value = value + r[at].cast(real) if r is not None else value
            out[at] = value
            if activated is not None:
                before[place(i, j)] = value
    if activated is not None:
        with k.loop(vectors) as n, k.phase() as lane:
            before[n, lane] = gelu(before[n, lane])
        with k.loop(m) as i, k.phase(rows) as j:
            activated[i * n_out + first + j] = before[place(i, j)]


def _add_lanes(k: Kernel, total: Tile, acc: Tile, rows: int) -> None:
    """total[0, j] = the sum of acc[j, lane] over the lanes: in vectors, by halves, down to 4.

    One lane after another would take as long as a dot product of 128 numbers. acc is spent.
    """
    width = k.lanes
    while width > 4:
        width //= 2
        with k.phase(width) as lane:
            for j in range(rows):
                acc[j, lane] = acc[j, lane] + acc[j, lane + width]
    with k.phase(rows) as row:
        total[0, row] = (acc[row, 0] + acc[row, 1]) + (acc[row, 2] + acc[row, 3])


def matvec(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    r: Tensor | None,
    act: bool,
    backward: Backward,
) -> list[Tensor]:
    """[GELU of y,] y for few rows of x."""
    (m, n_in), n_out = map(int, x.shape), int(w.shape[0])
    wide = dtypes.float64 in (x.dtype, w.dtype)
    real = dtypes.float64 if wide else dtypes.float32
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
    )
