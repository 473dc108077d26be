"""Clipping and AdamW over all parameters, in place, in a handful of launches.

With the gradient g, scaled so that the norm of all gradients is at most ``clip``::

    m = β₁ m + (1 - β₁) g            v = β₂ v + (1 - β₂) g²
    p = p (1 - lr · decay) - lr · (m / (1 - β₁ᵗ)) / (√(v / (1 - β₂ᵗ)) + ε)

Three kernels do that: `_squares`, the sums of the squares of each gradient, in a fixed number of
parts whatever the number of cores; `_numbers`, the norms and what follows from them, and Adam's
bias corrections; `_update`, for as many parameters at once as a kernel may have buffers.

`_numbers` also decides whether the step is taken. If the loss or the norm is not finite, or not
below a limit, the updates write nothing. The decision reaches the host along with the loss, so
that nothing waits for it.

Kingma and Ba (2015); decoupled decay: Loshchilov and Hutter (2019).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

from tinygrad import Tensor, UOp, dtypes

from tinygpt.kernels.dispatch import first_device, operation
from tinygpt.kernels.loops import fill, own_share, share
from tinygpt.kernels.phases import Array, Kernel, as_uop, contiguous, empty, on_gpu, run, wide
from tinygpt.machine.tinygrad_internals import DType

LANES = 32
PARTS = 16
GPU_LANES, GPU_PARTS = 64, 1024
"""On a GPU so many threads share a gradient: memory is waited for by many, or for long."""
GPU_UNITS = 1024
BUFFERS = {"METAL": 31, "WEBGPU": 8}
"""The most buffers that a kernel may have, where that is less than tinygrad's 62 on the CPU."""


# The plain twin --------------------------------------------------------------------------------


def global_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm () of all gradients taken as one vector."""
    total = gradients[0].float().square().sum()
    for gradient in gradients[1:]:
        total = total + gradient.float().square().sum()
    return total.sqrt()


def plain_scaling(norm: Tensor, clip: float, scale: float) -> Tensor | float:
    """What to multiply gradients by: ``scale``, and less where ``norm`` is above ``clip``."""
    return (clip / (norm + 1e-6)).minimum(1.0) * scale if clip else scale


def verdict(loss: Tensor, gradients: Sequence[Tensor], scale: float, limits: Tensor) -> Tensor:
    """The report of a step, see `adamw_update`, from the loss () and the gradients."""
    loss, norm = loss * scale, global_norm(gradients) * scale
    taken = (loss > -math.inf) & (loss < limits[0]) & (norm < limits[1])
    norms = [global_norm([gradient]) * scale for gradient in gradients]
    return Tensor.stack(loss.cast(norm.dtype), norm, taken.cast(norm.dtype), *norms)


def judged(loss: Tensor | None, limits: Tensor | None, lr: Tensor) -> tuple[Tensor, Tensor]:
    """The loss () and the limits (2,) that decide on a step: 0 and infinities where not given."""
    loss = lr.zeros_like().contiguous() if loss is None else loss
    limits = lr.full_like(math.inf).expand(2).contiguous() if limits is None else limits
    return loss.reshape(()), limits


def plain_adamw_update(
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
) -> Tensor:
    """The formulas, one parameter after another; assignments keep old values in a skipped step."""
    loss, limits = judged(loss, limits, lr)
    report = verdict(loss, grads, scale, limits)
    taken = report[2] > 0
    factor = plain_scaling(report[1], clip, scale)

    def assign(tensor: Tensor, value: Tensor) -> None:
        tensor.assign(taken.where(value, tensor.detach()))

    assign(b1_t, b1_t * beta1)
    assign(b2_t, b2_t * beta2)
    own = grads[: len(params)]
    for p, gradient, m_p, v_p, rate in zip(params, own, m, v, decay, strict=True):
        g = gradient * factor
        assign(m_p, beta1 * m_p + (1 - beta1) * g)
        assign(v_p, beta2 * v_p + (1 - beta2) * g * g)
        direction = (m_p / (1 - b1_t)) / ((v_p / (1 - b2_t)).sqrt() + eps)
        assign(p, (p.detach() * (1 - lr * rate) - lr * direction).cast(p.dtype))
    return report


# The kernels -----------------------------------------------------------------------------------


@operation("adamw", plain_adamw_update, copies=True)
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
) -> Tensor:
    """Take one step: update params, m, v, b1_t and b2_t in place; -> a report (3 + n,).

    The report holds the loss, the norm of all gradients, 1 if the step was taken, else 0, and the
    norm of each of the n gradients. The step is taken if ``loss`` () and the norm are finite and
    below the ``limits`` (2,), infinity unless given. What is updated has to be realized together
    with the report. After the gradients of ``params`` those of other parameters may follow, which
    another optimizer updates: they count in the norm and in the report.

    ``lr``, ``b1_t`` and ``b2_t`` are (1,), the last two the products β₁ᵗ and β₂ᵗ so far. ``decay``
    is one number for each parameter. Loss and gradients are multiplied by ``scale``, for example
    1 / the number of micro-batches they were summed over, and the gradients then clipped to the
    norm ``clip``, if it is not 0.
    """
    grads = [contiguous(g) for g in grads]
    state = empty(m[0], 5), empty(m[0], 3 + len(grads)), b1_t, b2_t
    sums = squares(grads, wide(m[0].dtype))
    loss, limits = judged(loss, limits, lr)
    numbers, report = decide(
        state, [lr, loss, limits, *sums], beta1=beta1, beta2=beta2, clip=clip, scale=scale
    )
    change(params, grads[: len(params)], m, v, numbers, decay, beta1=beta1, beta2=beta2, eps=eps)
    return report


def squares(grads: Sequence[Tensor], dtype: DType) -> list[Tensor]:
    """The sums of the squares of each gradient in PARTS parts: (some gradients, PARTS) each."""
    sums, gpu = list[Tensor](), on_gpu(grads[0])
    lanes, parts = (GPU_LANES, GPU_PARTS) if gpu else (LANES, PARTS)
    for i, j in split(tuple(g.shape for g in grads), _most_buffers(grads[0]) - 1):
        sizes = tuple(math.prod(map(int, g.shape)) for g in grads[i:j])
        out, name = [empty(grads[0], j - i, parts, dtype=dtype)], f"squares_{j - i}"
        sums += run(_squares, out, grads[i:j], lanes=lanes, name=name, sizes=sizes, parts=parts)
    if gpu:  # what is left is for a kernel of one thread
        sums = [contiguous(s.reshape(-1, PARTS, parts // PARTS).sum(2)) for s in sums]
    return sums


def decide(
    state: Sequence[Tensor], given: Sequence[Tensor], **constants: Any
) -> tuple[Tensor, Tensor]:
    """Fill numbers and report, and update b1_t and b2_t in place: the ``state``.

    ``given`` are lr, loss, limits and what `squares` found.
    """
    lr, loss, limits, *sums = given
    state = list(state)
    filled = run(
        _numbers,
        state,
        [lr, contiguous(loss.reshape(1)), limits, *sums],
        lanes=LANES,
        name="adamw_numbers",
        counts=tuple(int(s.shape[0]) for s in sums),
        **constants,
    )
    replace(state[2:], filled[2:])
    return filled[0], filled[1]


def change(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    m: Sequence[Tensor],
    v: Sequence[Tensor],
    numbers: Tensor,
    decay: Sequence[float],
    **constants: Any,
) -> None:
    """Update params, m and v in place, as the numbers of a step say."""
    keys = tuple((p.shape, d) for p, d in zip(params, decay, strict=True))
    for i, j in split(keys, (_most_buffers(numbers) - 1) // 4):
        old = [*params[i:j], *m[i:j], *v[i:j]]
        new = run(
            _update,
            old,
            [*grads[i:j], numbers],
            lanes=GPU_LANES if on_gpu(numbers) else LANES,
            name=f"adamw_{j - i}",
            sizes=tuple(math.prod(map(int, p.shape)) for p in params[i:j]),
            decay=tuple(decay[i:j]),
            **constants,
        )
        replace(old, new)


def _most_buffers(like: Tensor) -> int:
    return BUFFERS.get(first_device(like).split(":")[0], 62)


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


def replace(old: Sequence[Tensor], new: Sequence[Tensor]) -> None:
    for before, after in zip(old, new, strict=True):
        before.replace(after)


def scaling(norm: UOp, clip: float, scale: float) -> UOp:
    """What a kernel multiplies gradients of this norm by; see ``plain_scaling``."""
    factor = clip / (norm + 1e-6)
    clipped = (as_uop(1.0, norm.dtype) < factor).where(1.0, factor)
    return clipped * scale if clip else as_uop(scale, norm.dtype)


def _squares(k: Kernel, out: Array, *grads: Array, sizes: tuple[int, ...], parts: int) -> None:
    """The sum of the squares of each gradient in one part of it: out (gradients, parts)."""
    part = k.units(parts)
    acc, total = k.tile(1, out.dtype, shared=True), k.tile(1, out.dtype)
    for i, (g, n) in enumerate(zip(grads, sizes, strict=True)):
        fill(k, 0.0, 1, acc)
        for at, lane, inside in share(k, n, part, parts):
            value = g[at].cast(out.dtype)
            acc[0, lane] = acc[0, lane] + inside.where(value * value, 0.0)
        k.fold(total, acc, 1)
        with k.phase(1):
            out[i * parts + part] = total[0, 0]


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
    counts: tuple[int, ...],
) -> None:
    """numbers: what a gradient is multiplied by, lr, 1 / (1 - β₁ᵗ), 1 / (1 - β₂ᵗ), is it taken?"""
    k.units(1)
    kind, first = numbers.dtype, 3
    one, total = (
        k.tile(1, kind, width=1),
        k.tile(1, kind, width=1),
    )  # squares: of a gradient, of all
    with k.phase(1):
        total[0, 0] = 0.0
    for squares, count in zip(sums, counts, strict=True):
        with k.loop(count) as i:
            with k.phase(1):
                one[0, 0] = 0.0
            with k.loop(PARTS) as part, k.phase(1):
                one[0, 0] = one[0, 0] + squares[i * PARTS + part]
            with k.phase(1):
                total[0, 0] = total[0, 0] + one[0, 0]
                report[first + i] = one[0, 0].sqrt() * scale
        first += count
    with k.phase(1):
        report[0], report[1] = loss[0].cast(kind) * scale, total[0, 0].sqrt() * scale
    with k.phase(1):  # strictly below: NaN is below nothing, and infinity not below itself
        finite = as_uop(-math.inf, kind) < report[0]
        taken = finite & (report[0] < limits[0]) & (report[1] < limits[1])
        numbers[4] = report[2] = taken.where(as_uop(1.0, kind), 0.0)
        b1_t[0] = taken.where(b1_t[0] * beta1, b1_t[0])
        b2_t[0] = taken.where(b2_t[0] * beta2, b2_t[0])
    with k.phase(1):
        numbers[0] = scaling(report[1], clip, scale)
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
