"""GELU inside kernels: its value, its slope, and the gradient kernel of a fused layer."""

from __future__ import annotations

import math

from tinygrad import Tensor, UOp

from tinygpt.kernels.phases import Array, Kernel, exp2, minimum, run


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
