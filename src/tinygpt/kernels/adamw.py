"""Clipping and AdamW over all parameters, in place, in a handful of launches.

First the sum of the squares of all gradients, in a fixed number of parts, whatever the number of
cores. Then, in one small kernel, their norm and what follows from it, and Adam's bias corrections.
Last the update, for as many parameters at once as a kernel may have buffers. With the gradient g,
scaled so that the norm of all of them is at most the limit::

    m = β₁ m + (1 - β₁) g            v = β₂ v + (1 - β₂) g²
    p = p (1 - lr · decay) - lr · (m / (1 - β₁ᵗ)) / (√(v / (1 - β₂ᵗ)) + ε)

Whether the step is taken at all is decided by that small kernel too: if the loss or the norm is no
number, or not below a limit, the updates write nothing. The host learns of it along with the loss:
nothing has to wait for the decision.

Kingma and Ba (2015); decoupled decay: Loshchilov and Hutter (2019).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Sequence
from functools import lru_cache
from itertools import pairwise

from tinygrad import Tensor, UOp, dtypes

from tinygpt.kernels import reference
from tinygpt.kernels.fallback import falls_back, first_device, obstacle
from tinygpt.kernels.norm import empty, fill, own_share, share, sum_dtype
from tinygpt.kernels.phases import Array, Kernel, as_uop, contiguous, run

LANES = 32
PARTS = 16
GPU_UNITS = 512
BUFFERS = {"METAL": 31, "WEBGPU": 8}
"""The most buffers that a kernel may have, where that is less than tinygrad's 62 on the CPU."""


def adamw_update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    m: Sequence[Tensor],
    v: Sequence[Tensor],
    lr: Tensor,
    b1_t: Tensor,
    b2_t: Tensor,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    decay: Sequence[float],
    clip: float = 0.0,
    scale: float = 1.0,
    loss: Tensor | None = None,
    limits: Tensor | None = None,
    groups: Sequence[int] = (),
) -> Tensor:
    """Take one step: update params, m, v, b1_t and b2_t in place.

    Returns what became of it (3,): the loss, the gradients' norm, and 1 if the step was taken, else
    0. It is taken if ``loss`` () and the norm are finite and below the ``limits`` (2,), infinity
    unless given. With ``groups``, the number, from 0, of the group that each parameter belongs to,
    the norm of each group's gradients follows (3 + groups,). What is updated has to be realized
    together with the result.

    ``lr``, ``b1_t`` and ``b2_t`` are (1,), the last two the products β₁ᵗ and β₂ᵗ so far. ``decay``
    is one number for each parameter. Loss and gradients are multiplied by ``scale``, for example
    1 / the number of micro-batches they were summed over, and the gradients then clipped to the
    norm ``clip``, if it is not 0.
    """
    loss, limits = reference.judged(loss, limits, lr)
    if falls_back("adamw", obstacle(*params, *grads, *m, *v, copies=True)):
        return reference.adamw_update(
            params, grads, m, v, lr, b1_t, b2_t,
            beta1=beta1, beta2=beta2, eps=eps, decay=decay, clip=clip, scale=scale,
            loss=loss, limits=limits, groups=groups,
        )  # fmt: skip
    most = BUFFERS.get(first_device(params[0]).split(":")[0], 62)
    grads = [contiguous(g) for g in grads]
    sums: list[Tensor] = []
    places: list[list[tuple[int, int]]] = [[] for _ in set(groups)]
    for i, j in split(tuple(g.shape for g in grads), most - 1):
        sizes = tuple(math.prod(map(int, g.shape)) for g in grads[i:j])
        own = list(dict.fromkeys(groups[i:j]))
        blocks = tuple(1 + own.index(group) for group in groups[i:j]) if len(own) > 1 else ()
        for at, group in enumerate(own):
            places[group].append((len(sums), 1 + at if blocks else 0))
        shape = (1 + max(blocks, default=0)) * PARTS * LANES
        out = [empty(grads[0], shape, dtype=sum_dtype(m[0]))]
        sums += run(
            _squares,
            out,
            grads[i:j],
            lanes=LANES,
            name=f"squares_{j - i}",
            sizes=sizes,
            blocks=blocks,
        )
    state = [empty(m[0], 5), empty(m[0], 3 + len(places)), b1_t, b2_t]
    state = run(
        _numbers,
        state,
        [lr, contiguous(loss.reshape(1)), limits, *sums],
        lanes=LANES,
        name="adamw_numbers",
        beta1=beta1,
        beta2=beta2,
        clip=clip,
        scale=scale,
        places=tuple(map(tuple, places)),
    )
    numbers, report = state[:2]
    _replace([b1_t, b2_t], state[2:])
    keys = tuple((p.shape, d) for p, d in zip(params, decay, strict=True))
    for i, j in split(keys, (most - 1) // 4):
        old = [*params[i:j], *m[i:j], *v[i:j]]
        new = run(
            _update,
            old,
            [*grads[i:j], numbers],
            lanes=LANES,
            name=f"adamw_{j - i}",
            sizes=tuple(math.prod(map(int, p.shape)) for p in params[i:j]),
            decay=tuple(decay[i:j]),
            beta1=beta1,
            beta2=beta2,
            eps=eps,
        )
        _replace(old, new)
    return report


@lru_cache
def split(keys: tuple[Hashable, ...], most: int) -> list[tuple[int, int]]:
    """Cut a list into ranges of at most ``most`` entries, with as much repetition as can be had.

    Ranges with equal keys share a kernel, so that a model's layers, all alike, need only one. The
    best length and place of the first cut are found by trying all: building an entry of a kernel
    takes a few milliseconds, once; launching one takes a few microseconds, every step.
    """

    def ranges(first: int, length: int) -> list[tuple[int, int]]:
        cuts = sorted({0, *range(first, len(keys), length), len(keys)})
        return list(pairwise(cuts))

    def cost(found: list[tuple[int, int]]) -> int:
        return 2 * sum(map(len, {keys[i:j] for i, j in found})) + len(found)

    lengths = range(1, min(most, len(keys)) + 1)
    return min((ranges(first, n) for n in lengths for first in range(n)), key=cost)


def _replace(old: Sequence[Tensor], new: Sequence[Tensor]) -> None:
    for before, after in zip(old, new, strict=True):
        before.replace(after)


def _squares(
    k: Kernel, out: Array, *grads: Array, sizes: tuple[int, ...], blocks: tuple[int, ...]
) -> None:
    """Lane by lane, the sum of the squares of this part of every gradient.

    Block 0 of ``out`` is the sum over all, in their order. With ``blocks`` gradient i is also part
    of the sum in block ``blocks[i]``, which has a phase of its own: sharing the square would make
    a compiler round it, which the sum in block 0 does without, and change its last bit.
    """
    part = k.units(PARTS)
    rows = 1 + max(blocks, default=0)
    acc = k.tile(rows, out.dtype)
    fill(k, 0.0, rows, acc)
    for i, (g, n) in enumerate(zip(grads, sizes, strict=True)):
        rows_of = itertools.cycle((0, *blocks[i : i + 1]))
        for at, lane, inside in share(k, n, part, PARTS, phases=2 if blocks else 1):
            value, row = g[at].cast(out.dtype), next(rows_of)
            acc[row, lane] = acc[row, lane] + inside.where(value * value, 0.0)
    with k.phase() as lane:
        for row in range(rows):
            out[(row * PARTS + part) * k.lanes + lane] = acc[row, lane]


def _numbers(
    k: Kernel,
    numbers: Array,
    report: Array,
    b1_t: Array,
    b2_t: Array,
    lr: Array,
    loss: Array,
    limits: Array,
    *sums: Array,
    beta1: float,
    beta2: float,
    clip: float,
    scale: float,
    places: tuple[tuple[tuple[int, int], ...], ...],
) -> None:
    """numbers: what a gradient is multiplied by, lr, 1 / (1 - β₁ᵗ), 1 / (1 - β₂ᵗ), is it taken?"""
    k.units(1)
    acc, total = k.tile(1, numbers.dtype, shared=True), k.tile(1, numbers.dtype)

    def norm(blocks: Sequence[tuple[int, int]]) -> UOp:
        """Of what these blocks, of which sums, are the squares."""
        fill(k, 0.0, 1, acc)
        for i, block in blocks:
            with k.loop(PARTS) as part, k.phase() as lane:
                at = (block * PARTS + part) * k.lanes + lane
                acc[0, lane] = acc[0, lane] + sums[i][at]
        k.fold(total, acc, 1)
        return total[0, 0].sqrt() * scale

    for i, blocks in enumerate([[(j, 0) for j in range(len(sums))], *places]):
        value = norm(blocks)
        with k.phase(1):
            report[1 if i == 0 else 2 + i] = value
    with k.phase(1):
        report[0] = loss[0].cast(report.dtype) * scale
    with k.phase(1):  # strictly below: NaN is below nothing, and infinity not below itself
        finite = as_uop(-math.inf, report.dtype) < report[0]
        taken = finite & (report[0] < limits[0]) & (report[1] < limits[1])
        numbers[4] = report[2] = taken.where(as_uop(1.0, report.dtype), 0.0)
        b1_t[0] = taken.where(b1_t[0] * beta1, b1_t[0])
        b2_t[0] = taken.where(b2_t[0] * beta2, b2_t[0])
    with k.phase(1):
        factor = clip / (report[1] + 1e-6)
        numbers[0] = (
            (as_uop(1.0, report.dtype) < factor).where(1.0, factor) * scale if clip else scale
        )
        numbers[1] = lr[0]
        numbers[2] = 1.0 / (1.0 - b1_t[0])
        numbers[3] = 1.0 / (1.0 - b2_t[0])


def _update(
    k: Kernel,
    *arrays: Array,
    sizes: tuple[int, ...],
    decay: tuple[float, ...],
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """Arrays: the parameters, then their m, v and gradients, then the numbers."""
    n = len(sizes)
    params, ms, vs, grads = (arrays[i : i + n] for i in range(0, 4 * n, n))
    factor, lr, correct_m, correct_v, taken = (arrays[-1][i] for i in range(5))
    units = GPU_UNITS if k.gpu else k.pieces
    unit = k.units(units)
    with k.loop(taken.cast(dtypes.int32)):  # once, or not at all
        for p, m, v, g, size, d in zip(params, ms, vs, grads, sizes, decay, strict=True):
            for at, inside in own_share(k, size, unit, units):
                gradient = g[at].cast(m.dtype) * factor
                first = m[at] * beta1 + gradient * (1 - beta1)
                second = v[at] * beta2 + gradient * gradient * (1 - beta2)
                step = first * correct_m / ((second * correct_v).sqrt() + eps)
                kept = p[at].cast(m.dtype)
                kept = kept * (1.0 - lr * d) if d else kept
                p.put(at, kept - lr * step, where=inside)
                m.put(at, first, where=inside)
                v.put(at, second, where=inside)
