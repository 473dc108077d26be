"""GELU, the activation of GPT-2's MLP, by itself and in the epilogue of products.

With s = 1 / (1 + exp(-2u)) and u = √(2/π) (x + 0.044715 x³), the tanh approximation of x Φ(x) is::

    gelu(x)  = x (1 + tanh u) / 2 = x s
    gelu'(x) = s + x ds/dx        = s + x s (1 - s) 2 du/dx

Hendrycks and Gimpel (2016).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from tinygrad import Tensor, UOp

from tinygpt.kernels.dispatch import operation
from tinygpt.kernels.loops import blocks
from tinygpt.kernels.phases import LOG2E, Array, Kernel, contiguous, empty, exp2, minimum, run

LANES = 32
UNITS = 64
CUBE = 0.044715
SLOPE = math.sqrt(2 / math.pi)


def plain_gelu(x: Tensor) -> Tensor:
    """0.5 x (1 + tanh u), as GPT-2 has it."""
    return 0.5 * x * (1 + (SLOPE * (x + CUBE * x * x * x)).tanh())


@operation("gelu", plain_gelu, cpu=True)
def gelu(x: Tensor) -> Tensor:
    """GELU of every element of x; on GPUs a part of tinygrad's products."""
    x = contiguous(x)

    def backward(gradient: Tensor, _: Sequence[Tensor]) -> list[Tensor | None]:
        return [gelu_gradient(contiguous(gradient), x)]

    n, units = sizes(x)
    new = [empty(x, *map(int, x.shape))]
    lanes = min(n, LANES)
    return run(_value, new, [x], lanes=lanes, ops=20 * n, backward=backward, n=n, units=units)[0]


def gelu_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """The gradient of x, given that of gelu(x)."""
    n, units = sizes(x)
    new = [empty(x, *map(int, x.shape))]
    return run(_gradient, new, [dy, x], lanes=min(n, LANES), ops=30 * n, n=n, units=units)[0]


def sizes(x: Tensor) -> tuple[int, int]:
    """The number of elements, and of units."""
    n = int(x.numel())
    return n, min(UNITS, blocks(n, LANES))


def gelu_value(x: UOp) -> UOp:
    """gelu(x), in a kernel."""
    return x * _gate(x)


def gelu_slope(x: UOp) -> UOp:
    """gelu'(x), in a kernel."""
    s = _gate(x)
    return s + x * s * (1.0 - s) * (x * x * (3 * CUBE) + 1.0) * (2 * SLOPE)


def _gate(x: UOp) -> UOp:
    """s"""
    u = x * (x * x * CUBE + 1.0) * SLOPE
    return (exp2(u * (-2 * LOG2E)) + 1.0).reciprocal()


def _value(k: Kernel, y: Array, x: Array, *, n: int, units: int) -> None:
    steps = blocks(n, units * k.lanes)
    first = k.units(units) * (steps * k.lanes)
    with k.loop(steps) as i, k.phase() as lane:
        at = minimum(first + i * k.lanes, n - k.lanes) + lane  # the last ones may be done twice
        y[at] = gelu_value(x[at])


def _gradient(k: Kernel, dx: Array, dy: Array, x: Array, *, n: int, units: int) -> None:
    steps = blocks(n, units * k.lanes)
    first = k.units(units) * (steps * k.lanes)
    with k.loop(steps) as i, k.phase() as lane:
        at = minimum(first + i * k.lanes, n - k.lanes) + lane
        dx[at] = dy[at] * gelu_slope(x[at])
