"""Layer normalisation, forward and backward.

For a row x of C numbers, with mean μ, σ⁻¹ = 1/√(variance + ε) and x̂ = (x - μ)σ⁻¹::

    y  = x̂ ⊙ weight + bias

The backward pass is given g = ∂loss/∂y. With h = g ⊙ weight::

    ∂loss/∂x      = σ⁻¹ (h - mean(h) - x̂ mean(h ⊙ x̂))
    ∂loss/∂weight = the sum over all rows of g ⊙ x̂,      ∂loss/∂bias = the sum of g

The forward pass keeps μ and σ⁻¹, two numbers a row; x̂ is computed again. The sums over rows are
formed in a fixed number of parts, whatever the number of cores, and the parts are added in their
order, so that the result is always the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from math import prod

from tinygrad import Tensor, UOp, dtypes

from tinygpt.kernels import reference
from tinygpt.kernels.fallback import falls_back, obstacle
from tinygpt.kernels.phases import Array, Kernel, Tile, as_uop, contiguous, minimum, run
from tinygpt.machine.tinygrad_internals import DType

LANES = 16
ROWS = 4  # rows at a time: the additions of one row wait for each other, those of four overlap
PARTS = 16


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    """Normalise the last axis of x (..., C) to mean 0 and variance 1, then scale and shift.

    weight and bias are (C,). Half precision is summed in float32. Ba et al. (2016).
    """
    if falls_back("norm", obstacle(x, weight)):
        return reference.layer_norm(x, weight, bias, eps)
    *outer, width = map(int, x.shape)
    rows = prod(outer)
    group = largest_divisor(rows, ROWS)
    launch = partial(run, lanes=LANES, rows=rows, width=width, group=group)
    size = f"{rows}x{width}"
    x = contiguous(x)
    affine = [contiguous(weight)] if bias is None else [contiguous(weight), contiguous(bias)]

    def backward(gradient: Tensor, forward: Sequence[Tensor]) -> list[Tensor | None]:
        _, mean, rstd = forward
        parts = largest_divisor(rows // group, PARTS)
        outputs = [empty(x, *outer, width), *(empty(mean, parts, width) for _ in affine)]
        inputs = [contiguous(gradient), x, mean, rstd, affine[0]]
        dx, *pieces = launch(_backward, outputs, inputs, name=f"norm_grad_{size}", parts=parts)
        sums = [empty(t, width) for t in affine]
        return [dx, *run(_add_parts, sums, pieces, lanes=LANES, parts=parts, width=width)]

    statistics = [empty(x, rows, dtype=sum_dtype(x)) for _ in range(2)]
    return launch(
        _forward,
        [empty(x, *outer, width), *statistics],
        [x, *affine],
        name=f"norm_{size}",
        backward=backward,
        eps=eps,
    )[0]


def _forward(
    k: Kernel,
    y: Array,
    mean: Array,
    rstd: Array,
    x: Array,
    weight: Array,
    *bias: Array,
    rows: int,
    width: int,
    group: int,
    eps: float,
) -> None:
    first = k.units(rows // group) * group
    kind = mean.dtype
    acc = k.tile(group, kind, shared=True)
    total, mu, scale = (k.tile(group, kind) for _ in range(3))

    def centred(u: int, at: UOp) -> UOp:
        return x[(first + u) * width + at].cast(kind) - mu[u, 0]

    fill(k, 0.0, group, acc)
    for at, lane, inside in across(k, width):
        for u in range(group):
            value = x[(first + u) * width + at].cast(kind)
            acc[u, lane] = acc[u, lane] + inside.where(value, 0.0)
    k.fold(total, acc, group)
    with k.phase(1):
        for u in range(group):
            mu[u, 0] = total[u, 0] * (1 / width)
    fill(k, 0.0, group, acc)
    for at, lane, inside in across(k, width):
        for u in range(group):
            acc[u, lane] = acc[u, lane] + inside.where(centred(u, at) * centred(u, at), 0.0)
    k.fold(total, acc, group)
    with k.phase(1):
        for u in range(group):
            scale[u, 0] = 1.0 / (total[u, 0] * (1 / width) + eps).sqrt()
    for at, _, inside in across(k, width):
        for u in range(group):
            value = centred(u, at) * scale[u, 0] * weight[at].cast(kind)
            if bias:
                value = value + bias[0][at].cast(kind)
            y.put((first + u) * width + at, value, where=inside)
    with k.phase(1):
        for u in range(group):
            mean[first + u] = mu[u, 0]
            rstd[first + u] = scale[u, 0]


def _backward(
    k: Kernel,
    dx: Array,
    dweight: Array,
    *rest: Array,
    rows: int,
    width: int,
    group: int,
    parts: int,
) -> None:
    *dbias, g, x, mean, rstd, weight = rest
    groups, part = rows // group // parts, k.units(parts)
    kind = mean.dtype
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


def across(k: Kernel, n: int) -> Iterator[tuple[UOp, UOp, UOp]]:
    """Phases over the elements below n, lane by lane: yields (element, lane, is it one?).

    The loop's body, the assignments of a phase, runs twice at most: for whole blocks of lanes, and
    for the rest. A CPU does the rest in a shorter loop, so that no lane is ever idle; on a GPU the
    idle lanes see the last element, and must add or write nothing.
    """
    blocks, rest = divmod(n, k.lanes)
    if blocks:
        with k.loop(blocks) as j, k.phase() as lane:
            yield j * k.lanes + lane, lane, as_uop(True)
    if rest and k.gpu:
        with k.phase() as lane:
            at = blocks * k.lanes + lane
            yield minimum(at, n - 1), lane, at < n
    elif rest:
        with k.phase(rest) as lane:
            yield blocks * k.lanes + lane, lane, as_uop(True)


def share(
    k: Kernel, n: int, part: UOp, parts: int, phases: int = 1
) -> Iterator[tuple[UOp, UOp, UOp]]:
    """Phases over one part's share of the elements below n: yields (element, lane, is it one?).

    Every part has as many whole blocks of lanes, and of what is left over a block or nothing. Lanes
    that are left with nothing see the last element, and must add or write nothing. Every block can
    have several ``phases``, one after the other.
    """
    blocks = n // k.lanes // parts
    if blocks:
        with k.loop(blocks) as j:
            for _ in range(phases):
                with k.phase() as lane:
                    yield (part * blocks + j) * k.lanes + lane, lane, as_uop(True)
    if n > (done := parts * blocks * k.lanes):
        for _ in range(phases):
            with k.phase() as lane:
                at = done + part * k.lanes + lane
                yield minimum(at, n - 1), lane, at < n


def own_share(k: Kernel, n: int, part: UOp, parts: int) -> Iterator[tuple[UOp, UOp]]:
    """Phases over one part's share of the elements below n: yields (element, is it one?).

    The shares differ by a block of lanes at most; the last part has what is left over as well. For
    kernels of one unit, ``part``, per piece, and state that is updated in place: no element is in
    two shares.
    """
    blocks, rest = divmod(n, k.lanes)
    if blocks:
        first = part * blocks // parts
        count = blocks if parts == 1 else (part + 1) * blocks // parts - first
        with k.loop(count) as j, k.phase() as lane:
            yield (first + j) * k.lanes + lane, as_uop(True)
    if rest:
        with k.phase(None if k.gpu else rest) as lane:
            at, last = blocks * k.lanes + lane, part.eq(parts - 1)
            yield minimum(at, n - 1), last & (at < n) if k.gpu else last


def fill(k: Kernel, value: float, rows: int, *tiles: Tile) -> None:
    """Set rows of the tiles to a number."""
    with k.phase() as lane:
        for tile in tiles:
            for u in range(rows):
                tile[u, lane] = value


def sum_dtype(x: Tensor) -> DType:
    """The type to add up elements of x in: at least float32."""
    return dtypes.float64 if x.dtype == dtypes.float64 else dtypes.float32


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def largest_divisor(n: int, limit: int) -> int:
    """The largest number up to ``limit`` that divides n."""
    return next(d for d in range(min(n, limit), 0, -1) if n % d == 0)


def empty(t: Tensor, *shape: int, dtype: DType | None = None) -> Tensor:
    """Memory for a kernel's output, on t's devices, cut along the axis along which t is cut."""
    new = partial(Tensor.empty, dtype=dtype or t.dtype, device=t.device)
    if isinstance(t.device, tuple) and (axis := t.uop.axis) is not None:
        local = [n // len(t.device) if i == axis else n for i, n in enumerate(shape)]
        return Tensor(new(*local).uop.unshard(axis))
    return new(*shape)
