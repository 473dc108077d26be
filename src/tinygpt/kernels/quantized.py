"""Linear layers whose weights are int8: y = (x qᵀ) scale + b, with one scale for each row of q.

A step of decoding reads every weight once and computes little with it, so it takes the time that
reading takes, and a weight of one byte is read four times as fast. `linear.few_rows` converts the
bytes in the registers; the many rows of a prompt go through `matmul`, which converts as it copies.
"""

from __future__ import annotations

from tinygrad import Tensor

from tinygpt.kernels.dispatch import operation
from tinygpt.kernels.linear import plain_linear, project
from tinygpt.kernels.phases import contiguous


def dequantized(weight: Tensor, scale: Tensor) -> Tensor:
    """The numbers that int8 weights (O, I) stand for, with a scale (O,) for each row."""
    return weight.cast(scale.dtype) * scale.unsqueeze(1)


def plain_quantized_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """The same layer with the dequantised weight."""
    return plain_linear(x, dequantized(weight, scale), bias)


@operation("int8", plain_quantized_linear, integers=("weight",), cpu=True)
def quantized_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """y = x Wᵀ + b, where W = weight scale, for x (..., I) -> (..., O).

    weight is int8 (O, I), scale and bias are (O,). Sums are float32, or float64 for float64. There
    is no gradient.
    """
    n_out, n_in = map(int, weight.shape)
    y = project(contiguous(x.reshape(-1, n_in)), contiguous(weight), scale, bias)
    return y.cast(x.dtype).reshape(*x.shape[:-1], n_out)
