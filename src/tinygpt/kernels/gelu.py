"""GELU, the activation of GPT-2's MLP.

With s = 1 / (1 + exp(-2u)) and u = √(2/π) (x + 0.044715 x³), the tanh approximation of x Φ(x) is::

    gelu(x)  = x (1 + tanh u) / 2 = x s
    gelu'(x) = s + x ds/dx        = s + x s (1 - s) 2 du/dx

Hendrycks and Gimpel (2016).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from tinygrad import Tensor

from tinygpt.kernels.dispatch import operation
from tinygpt.kernels.loops import blocks
from tinygpt.kernels.phases import LOG2E, Array, Kernel, contiguous, empty, exp2, minimum, run, wide

LANES = 32
UNITS = 64
CUBE = 0.044715
SLOPE = math.sqrt(2 / math.pi)


def plain_gelu(x: Tensor) -> Tensor:
    """0.5 x (1 + tanh u), as GPT-2 has it."""
    given, x = x.dtype, x.cast(wide(x.dtype))
    return (0.5 * x * (1 + (SLOPE * (x + CUBE * x * x * x)).tanh())).cast(given)


@operation("gelu", plain_gelu, cpu=True)
def gelu(x: Tensor) -> Tensor:
    """GELU of every element of x, half precision in float32; on GPUs a part of the products."""
    x, n = contiguous(x), int(x.numel())
    launch = partial(run, _gelu, lanes=min(n, LANES), n=n, units=min(UNITS, blocks(n, LANES)))

    def backward(gradient: Tensor, _: Sequence[Tensor]) -> list[Tensor | None]:
        return [*launch([empty(x, *map(int, x.shape))], [contiguous(gradient), x], ops=30 * n)]

    return launch([empty(x, *map(int, x.shape))], [x], ops=20 * n, backward=backward)[0]


def _gelu(k: Kernel, out: Array, *inputs: Array, n: int, units: int) -> None:
    """gelu(x) of x, or the gradient of x from that of gelu(x), and x."""
    *dy, x = inputs
    steps = blocks(n, units * k.lanes)
    first = k.units(units) * (steps * k.lanes)
    with k.loop(steps) as i, k.phase() as lane:
        at = minimum(first + i * k.lanes, n - k.lanes) + lane  # the last ones may be done twice
        value = x[at].cast(wide(x.dtype))
        u = value * (value * value * CUBE + 1.0) * SLOPE
        s = (exp2(u * (-2 * LOG2E)) + 1.0).reciprocal()
        slope = s + value * s * (1.0 - s) * (value * value * (3 * CUBE) + 1.0) * (2 * SLOPE)
        out[at] = dy[0][at].cast(value.dtype) * slope if dy else value * s
