"""Dropout as a kernel: the mask is made where it is applied, and once more for the gradient.

Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting" (2014).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod

from tinygrad import Tensor, UOp, dtypes

from tinygpt.kernels import reference
from tinygpt.kernels.fallback import falls_back, obstacle
from tinygpt.kernels.masks import keeps, stream
from tinygpt.kernels.norm import across, empty
from tinygpt.kernels.phases import Array, Kernel, as_uop, contiguous, minimum, run

LANES = 16


def dropout(x: Tensor, p: float, key: Tensor, residual: Tensor | None = None) -> Tensor:
    """residual + x, of which each element is 0 with probability p, the rest divided by 1 - p.

    ``key`` (2,) uint32 chooses the mask. Its rows are those of x (..., C).
    """
    given = [x] if residual is None else [x, residual]
    if falls_back("dropout", obstacle(*given)):
        return reference.dropout(x, p, key, residual)
    *outer, width = map(int, x.shape)
    rows = prod(outer)
    launch = partial(run, lanes=LANES, ops=20 * rows * width, rows=rows, width=width, p=p)
    key = contiguous(key.to(x.device))

    def backward(gradient: Tensor, _: Sequence[Tensor]) -> list[Tensor | None]:
        inputs = [contiguous(gradient), key]
        dx = launch(_dropout, [empty(x, *outer, width)], inputs, name=f"dropout_{rows}x{width}")
        return [*dx, None, *(gradient for _ in given[1:])]

    name = f"dropout_{rows}x{width}" + ("" if residual is None else "_add")
    inputs = [contiguous(x), key, *(contiguous(r) for r in given[1:])]
    return launch(_dropout, [empty(x, *outer, width)], inputs, name=name, backward=backward)[0]


def _dropout(
    k: Kernel, out: Array, x: Array, key: Array, *residual: Array, rows: int, width: int, p: float
) -> None:
    """A unit is as many rows as there are lanes: so the streams of the rows are vectors too."""
    first = k.units(-(-rows // k.lanes)) * k.lanes
    start, stride = (k.tile(1, dtypes.uint32, shared=True) for _ in range(2))
    kind = dtypes.float64 if x.dtype == dtypes.float64 else dtypes.float32
    with k.phase() as lane:
        row = unsigned(minimum(first + lane, rows - 1))
        start[0, lane], stride[0, lane] = stream((key[0], key[1]), row)
    with k.loop(k.lanes) as i:
        row = minimum(first + i, rows - 1)  # surplus rows do the last one again
        for at, _, inside in across(k, width):
            kept = keeps(start[0, i], stride[0, i], unsigned(at), p)
            value = kept.where(x[row * width + at].cast(kind) * (1 / (1 - p)), 0.0)
            for r in residual:
                value = r[row * width + at].cast(kind) + value
            out.put(row * width + at, value, where=inside)


def unsigned(i: UOp) -> UOp:
    """An index as a uint32, by way of int32, which keeps it from becoming 64 bits wide."""
    return as_uop(i, dtypes.int32).cast(dtypes.uint32)
