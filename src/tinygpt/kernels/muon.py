"""Muon's update of the matrices of the blocks.

With the gradient G (O, I) of a matrix W, scaled so that the norm of all gradients is at most
``clip``::

    M = μ M + (1 - μ) G            U = μ M + (1 - μ) G      Nesterov's momentum
    W = W (1 - η decay) - η √max(1, O / I) · orthogonal(U)

U = P Σ Qᵀ has few large singular values, those of the directions that most examples ask for. The
update is P Qᵀ, nearly: as long in the rare directions as in the frequent ones.

Queries, keys and values are three matrices in one weight, each with an orthogonal factor of its
own; the root is that of the whole weight.

Three kernels do that for some matrices of one shape at a time: `_momentum`; that of
`newton_schulz`; and `_apply`, which adds what came of it to the weights.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); decoupled decay:
Liu et al., "Muon is Scalable for LLM Training" (2025).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby

from tinygrad import Tensor, UOp, dtypes

from tinygpt.kernels.adamw import plain_scaling, replace, scaling
from tinygpt.kernels.dispatch import operation
from tinygpt.kernels.loops import blocks, own_share
from tinygpt.kernels.newton_schulz import Sizes, lanes, orthogonal, plain_orthogonal
from tinygpt.kernels.phases import Array, Kernel, contiguous, empty, minimum, run, wide
from tinygpt.machine import pool

TOGETHER = 16
"""Most matrices that are worked on at once."""
NUMBERS = 1 << 23
"""How many numbers a stack of matrices and what is computed of it may be, in memory. Large matrices
are more, since each thread needs some: ``PER_THREAD``."""
PER_THREAD = 2
Shape = tuple[int, int, int]
"""Of the matrices in a weight: their number, O and I of each."""


# The plain twin --------------------------------------------------------------------------------


def plain_muon_update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    counts: Sequence[int],
    lr: Tensor,
    report: Tensor,
    *,
    ratio: float,
    momentum: float,
    decay: float,
    clip: float = 0.0,
    scale: float = 1.0,
) -> None:
    """The formulas, one weight after another; assignments keep old values in a skipped step."""
    taken, rate = report[2] > 0, lr * ratio
    factor = plain_scaling(report[1], clip, scale)
    for p, gradient, m, count in zip(params, grads, momenta, counts, strict=True):
        O, I = map(int, p.shape)  # noqa: E741
        g = (gradient * factor).contiguous()
        m.assign(taken.where(momentum * m + (1 - momentum) * g, m.detach()))
        u = momentum * m + (1 - momentum) * g
        step = plain_orthogonal(u.reshape(count, O // count, I)).reshape(O, I)
        new = p.detach() * (1 - rate * decay) - rate * root(O, I) * step
        p.assign(taken.where(new.cast(p.dtype), p.detach()))


def root(O: int, I: int) -> float:  # noqa: E741
    """How long an update is in each direction, for a weight (O, I)."""
    return math.sqrt(max(1, O / I))


# The kernels -----------------------------------------------------------------------------------


@operation("muon", plain_muon_update, copies=True, cpu=True)
def muon_update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    counts: Sequence[int],
    lr: Tensor,
    report: Tensor,
    *,
    ratio: float,
    momentum: float,
    decay: float,
    clip: float = 0.0,
    scale: float = 1.0,
) -> None:
    """Take one step, if ``report`` says so: update params and momenta in place.

    ``report`` is that of ``adamw_update``, which decided on the step. ``counts`` says how many
    matrices each weight (O, I) is. Their rate is ``ratio`` times ``lr`` (1,). The gradients are
    multiplied by ``scale``, then clipped to the global norm ``clip``, if it is not 0.

    A stack's first kernel has the rate from the last kernel of the stack before, which does not
    change it, for an input: so no more than one stack is in memory.
    """
    heights = [int(p.shape[0]) // count for p, count in zip(params, counts, strict=True)]
    shapes = [(c, h, int(p.shape[1])) for c, h, p in zip(counts, heights, params, strict=True)]
    for chosen in together(shapes):
        p, g, m = ([tensors[i] for i in chosen] for tensors in (params, grads, momenta))
        some = tuple(shapes[i] for i in chosen)
        sizes = Sizes.of(sum(count for count, _, _ in some), *some[0][1:])
        name = "x".join(map(str, sizes))
        *new, stack = run(
            _momentum,
            [*m, empty(m[0], sizes.numbers, dtype=wide(m[0].dtype))],
            [*map(contiguous, g), report, lr],
            lanes=lanes(),
            name=f"muon_momentum_{name}",
            shapes=some,
            momentum=momentum,
            clip=clip,
            scale=scale,
        )
        replace(m, new)
        *new, lr = run(
            _apply,
            [*p, lr],
            [orthogonal(stack, sizes), report],
            lanes=lanes(),
            name=f"muon_{name}",
            shapes=some,
            ratio=ratio,
            decay=decay,
        )
        replace(p, new)


def at_once(shape: tuple[int, int]) -> int:
    """Most matrices (O, I) of a stack."""
    one = Sizes.of(1, *shape)
    return min(TOGETHER, max(PER_THREAD * pool.threads(), NUMBERS // one.needed))


def together(shapes: Sequence[Shape]) -> Iterator[list[int]]:
    """The indices of weights whose matrices are worked on at once: of one shape, not too many."""
    order = sorted(range(len(shapes)), key=lambda i: shapes[i][1:])
    for shape, group in groupby(order, key=lambda i: shapes[i][1:]):
        chosen, count, most = list[int](), 0, at_once(shape)
        for i in group:
            if chosen and count + shapes[i][0] > most:
                yield chosen
                chosen, count = [], 0
            chosen.append(i)
            count += shapes[i][0]
        yield chosen


def places(
    k: Kernel, unit: UOp, shapes: tuple[Shape, ...]
) -> Iterator[tuple[int, UOp, UOp, UOp, UOp]]:
    """Phases over the elements of some weights, and where they are in a stack of panels.

    A unit for each piece. Yields the number of the weight, its element, the place in the stack, and
    whether there is such a place, and such an element: panels may have columns beyond the last.
    """
    W, first = k.lanes, 0
    for number, (count, O, I) in enumerate(shapes):  # noqa: E741
        upright = O >= I
        m, n = (O, I) if upright else (I, O)
        padded = blocks(n, W) * W
        height, width = (m, padded) if upright else (padded, blocks(m, W) * W)
        for at, _ in own_share(k, count * height * width, unit, k.pieces):
            y, x = at // width % height, at % width  # of the weight
            row, column = (y, x) if upright else (minimum(x, m - 1), y)  # of the panels
            i = at // (width * height)
            element = i * (O * I) + minimum(y, O - 1) * I + minimum(x, I - 1)
            place = (first + i) * (padded * m) + (column // W * m + row) * W + column % W
            yield number, element, place, row < m if upright else x < m, (y < O) & (x < I)
        first += count


def _momentum(
    k: Kernel,
    *arrays: Array,
    shapes: tuple[Shape, ...],
    momentum: float,
    clip: float,
    scale: float,
) -> None:
    """Arrays: the momenta and the stack of U; the gradients, the report, and the rate, unused."""
    n, unit = len(shapes), k.units(k.pieces)
    ms, stack, gs, report = arrays[:n], arrays[n], arrays[n + 1 : -2], arrays[-2]
    by = scaling(report[1], clip, scale)
    with k.loop(report[2].cast(dtypes.int32)):  # once, or not at all
        for i, element, place, panel, inside in places(k, unit, shapes):
            g = gs[i][element].cast(stack.dtype) * by * (1 - momentum)
            m = ms[i][element].cast(stack.dtype) * momentum + g
            stack.put(place, inside.where(m * momentum + g, 0.0), where=panel)
            ms[i].put(element, m, where=inside)


def _apply(
    k: Kernel, *arrays: Array, shapes: tuple[Shape, ...], ratio: float, decay: float
) -> None:
    """Arrays: the weights and the rate; the stack of orthogonal factors, and the report."""
    *ps, lr, stack, report = arrays
    unit, rate = k.units(k.pieces), lr[0] * ratio
    with k.loop(report[2].cast(dtypes.int32)):
        for i, element, place, _, inside in places(k, unit, shapes):
            count, O, I = shapes[i]  # noqa: E741
            kept = ps[i][element].cast(stack.dtype)
            kept = kept * (1.0 - rate * decay) if decay else kept
            ps[i].put(element, kept - stack[place] * (rate * root(count * O, I)), where=inside)
