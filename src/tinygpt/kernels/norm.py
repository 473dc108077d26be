"""Layer normalisation, forward and backward (Ba et al., 2016).

For a row x of C numbers, with mean μ, σ⁻¹ = 1/√(variance + ε) and x̂ = (x - μ)σ⁻¹::

    y  = x̂ ⊙ weight + bias

With g = ∂loss/∂y and h = g ⊙ weight, the gradients are::

    ∂loss/∂x      = σ⁻¹ (h - mean(h) - x̂ mean(h ⊙ x̂))
    ∂loss/∂weight = the sum over all rows of g ⊙ x̂,      ∂loss/∂bias = the sum of g

The forward kernel keeps μ and σ⁻¹, two numbers a row, and the backward kernel computes x̂ again.
Sums over rows are formed in a fixed number of parts, whatever the number of cores, and the parts
are added in their order, so that the result is always the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import NamedTuple

from tinygrad import Tensor, UOp

from tinygpt.kernels.dispatch import operation
from tinygpt.kernels.loops import across, add_up, fill, largest_divisor
from tinygpt.kernels.phases import Array, Kernel, as_uop, contiguous, empty, run, wide
from tinygpt.machine.tinygrad_internals import DType

LANES = 16
ROWS = 4  # rows at a time: the additions of one row wait for each other, those of four overlap
PARTS = 16


EPS = 1e-5
"""ε, which GPT-2 has too."""


class Shape(NamedTuple):
    """Rows of so many numbers, of which a unit takes a ``group`` at a time."""

    rows: int
    width: int
    group: int


def plain_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, dtype: DType | None = None
) -> Tensor:
    """The formula for y in stock operations."""
    dtype = dtype or x.dtype
    x, weight = x.cast(wide(x.dtype)), weight.cast(wide(x.dtype))
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    y = centred * (variance + EPS).rsqrt() * weight
    return (y if bias is None else y + bias).cast(dtype)


@operation("norm", plain_layer_norm)
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, dtype: DType | None = None
) -> Tensor:
    """Normalise the last axis of x (..., C) to mean 0 and variance 1, then scale and shift.

    weight and bias are (C,). Half precision is summed in float32. The result is of the type
    ``dtype``, that of x if it is not given.
    """
    *outer, width = map(int, x.shape)
    rows = prod(outer)
    group = largest_divisor(rows, ROWS)
    launch, size = partial(run, lanes=LANES, s=Shape(rows, width, group)), f"{rows}x{width}"
    x, affine = contiguous(x), [contiguous(t) for t in (weight, bias) if t is not None]

    def backward(gradient: Tensor, forward: Sequence[Tensor]) -> list[Tensor | None]:
        _, mean, rstd = forward
        parts = largest_divisor(rows // group, PARTS)
        outputs = [empty(x, *outer, width), *(empty(mean, parts, width) for _ in affine)]
        inputs = [contiguous(gradient), x, mean, rstd, affine[0]]
        dx, *pieces = launch(_backward, outputs, inputs, name=f"norm_grad_{size}", parts=parts)
        sums = [empty(t, width) for t in affine]
        return [dx, *run(_add_parts, sums, pieces, lanes=LANES, parts=parts, width=width)]

    statistics = [empty(x, rows, dtype=wide(x.dtype)) for _ in range(2)]
    outputs = [empty(x, *outer, width, dtype=dtype), *statistics]
    return launch(_forward, outputs, [x, *affine], name=f"norm_{size}", backward=backward)[0]


def _forward(
    k: Kernel, y: Array, mean: Array, rstd: Array, x: Array, weight: Array, *bias: Array, s: Shape
) -> None:
    """y, and each row's μ and σ⁻¹."""
    first, kind, group = k.units(s.rows // s.group) * s.group, mean.dtype, s.group
    acc = k.tile(group, kind, shared=True)
    total, mu, scale = (k.tile(group, kind) for _ in range(3))

    def number(u: int, at: UOp) -> UOp:
        return x[(first + u) * s.width + at].cast(kind)

    def centred(u: int, at: UOp) -> UOp:
        return number(u, at) - mu[u, 0]

    add_up(k, total, acc, group, s.width, number)
    with k.phase(1):
        for u in range(group):
            mu[u, 0] = total[u, 0] * (1 / s.width)
    add_up(k, total, acc, group, s.width, lambda u, at: centred(u, at) * centred(u, at))
    with k.phase(1):
        for u in range(group):
            scale[u, 0] = 1.0 / (total[u, 0] * (1 / s.width) + EPS).sqrt()
    for at, _, inside in across(k, s.width):
        for u in range(group):
            value = centred(u, at) * scale[u, 0] * weight[at].cast(kind)
            for shift in bias:
                value = value + shift[at].cast(kind)
            y.put((first + u) * s.width + at, value, where=inside)
    with k.phase(1):
        for u in range(group):
            mean[first + u] = mu[u, 0]
            rstd[first + u] = scale[u, 0]


def _backward(k: Kernel, dx: Array, dweight: Array, *rest: Array, s: Shape, parts: int) -> None:
    """dx, and for each part of the rows its sums for dweight and dbias (parts, width)."""
    *dbias, g, x, mean, rstd, weight = rest
    (rows, width, group), kind = s, mean.dtype
    groups, part = rows // group // parts, k.units(parts)
    acc, hx = k.tile(group, kind, shared=True), k.tile(group, kind, shared=True)
    mean_h, mean_hx = k.tile(group, kind), k.tile(group, kind)

    for at, _, inside in across(k, width):
        for sums in (dweight, *dbias):
            sums.put(part * width + at, 0.0, where=inside)
    with k.loop(groups) as i:
        first = (part * groups + i) * group

        def gradient(u: int, at: UOp) -> UOp:
            return g[(first + u) * width + at].cast(kind)

        def normal(u: int, at: UOp) -> UOp:
            value = x[(first + u) * width + at].cast(kind)
            return (value - mean[first + u]) * rstd[first + u]

        fill(k, 0.0, group, acc, hx)
        for at, lane, inside in across(k, width):
            to_weight, to_bias = dweight[part * width + at], as_uop(0.0, kind)
            for u in range(group):
                h = gradient(u, at) * weight[at].cast(kind)
                acc[u, lane] = acc[u, lane] + inside.where(h, 0.0)
                hx[u, lane] = hx[u, lane] + inside.where(h * normal(u, at), 0.0)
                to_weight = to_weight + gradient(u, at) * normal(u, at)
                to_bias = to_bias + gradient(u, at)
            dweight.put(part * width + at, to_weight, where=inside)
            for sums in dbias:
                sums.put(part * width + at, sums[part * width + at] + to_bias, where=inside)
        k.fold(mean_h, acc, group)
        k.fold(mean_hx, hx, group)
        for at, _, inside in across(k, width):
            for u in range(group):
                h = gradient(u, at) * weight[at].cast(kind)
                h = h - mean_h[u, 0] * (1 / width)
                h = h - normal(u, at) * (mean_hx[u, 0] * (1 / width))
                dx.put((first + u) * width + at, rstd[first + u] * h, where=inside)


def _add_parts(k: Kernel, *arrays: Array, parts: int, width: int) -> None:
    """Each of the first half of the arrays (width,) is the sum of its twin (parts, width)."""
    sums, partial = arrays[: len(arrays) // 2], arrays[len(arrays) // 2 :]
    k.units(1)
    for at, _, inside in across(k, width):
        for total, part in zip(sums, partial, strict=True):
            value = part[at]
            for p in range(1, parts):
                value = value + part[p * width + at]
            total.put(at, value, where=inside)
