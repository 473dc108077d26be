"""GPT-2's GELU: x Φ(x), the tanh approximation of Hendrycks and Gimpel (2016)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tinygrad import Tensor, UOp

from tinygpt.kernels.phases import Array, Kernel, contiguous, exp2, minimum, run


def gate_of_gelu(x: UOp) -> UOp:
    """(1 + tanh u) / 2 = 1 / (1 + exp(-2u)), where u = √(2/π) (x + 0.044715 x³)."""
    u = x * (x * x * 0.044715 + 1.0) * math.sqrt(2 / math.pi)
    return (exp2(u * (-2 * math.log2(math.e))) + 1.0).reciprocal()


def gelu(x: UOp) -> UOp:
    """GPT-2's GELU: x times its gate."""
    return x * gate_of_gelu(x)


def gelu_slope(x: UOp) -> UOp:
    """The derivative of `gelu`: s + x s (1 - s) 2 du/dx for the gate s."""
    s = gate_of_gelu(x)
    return s + x * s * (1.0 - s) * (x * x * (3 * 0.044715) + 1.0) * (2 * math.sqrt(2 / math.pi))


def forward(k: Kernel, y: Array, x: Array, *, n: int, units: int) -> None:
    """y = GELU of x, over n elements."""
    steps = -(-n // (units * k.lanes))
    first = k.units(units) * (steps * k.lanes)
    with k.loop(steps) as i, k.phase() as lane:
        at = minimum(first + i * k.lanes, n - k.lanes) + lane  # the last ones may be done twice
        y[at] = gelu(x[at])


def activate(x: Tensor) -> Tensor:
    """GELU of x, element by element."""
    x, n = contiguous(x), int(x.numel())

    def backward(gradient: Tensor, _: Sequence[Tensor]) -> list[Tensor | None]:
        return [gelu_backward(contiguous(gradient), x)]

    return run(
        forward,
        [Tensor.empty(*x.shape, dtype=x.dtype, device=x.device)],
        [x],
        lanes=min(n, 32),
        ops=20 * n,
        backward=backward,
        n=n,
        units=min(64, -(-n // 32)),
    )[0]


def gelu_gradient(k: Kernel, du: Array, dy: Array, u: Array, *, n: int, units: int) -> None:
    """du = dy times the slope of GELU at u, over n elements."""
    steps = -(-n // (units * k.lanes))
    first = k.units(units) * (steps * k.lanes)
    with k.loop(steps) as i, k.phase() as lane:
        at = minimum(first + i * k.lanes, n - k.lanes) + lane  # the last ones may be done twice
        du[at] = dy[at] * gelu_slope(u[at])


def gelu_backward(dy: Tensor, u: Tensor) -> Tensor:
    """The gradient before GELU, from the one after it and from GELU's argument u."""
    n = int(dy.numel())
    out = Tensor.empty(*u.shape, dtype=u.dtype, device=u.device)
    return run(
        gelu_gradient,
        [out],
        [dy, u],
        lanes=min(n, 32),
        ops=30 * n,
        n=n,
        units=min(64, -(-n // 32)),
    )[0]
