"""AdamW where several devices update a share of the parameters each: the same step in three parts.

Each device adds up the squares of its gradients (`squared_sums`), one device decides on the step
for all of them (`adamw_numbers`), and each follows with its own parameters (`adamw_follow`). What
goes from device to device is a few numbers. The kernels are those of `adamw`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from tinygrad import Tensor

from tinygpt.kernels.adamw import PARTS, change, decide, judged, plain_scaling, squares
from tinygpt.kernels.dispatch import operation
from tinygpt.kernels.phases import contiguous, empty, wide


def plain_squared_sums(grads: Sequence[Tensor]) -> list[Tensor]:
    """Each gradient's sum in the first of its PARTS, and 0 in the others."""
    sums = Tensor.stack(*[g.float().square().sum() for g in grads])
    return [sums.reshape(len(grads), 1).pad(((0, 0), (0, PARTS - 1)))]


@operation("adamw", plain_squared_sums)
def squared_sums(grads: Sequence[Tensor]) -> list[Tensor]:
    """The squares of each gradient, added up in PARTS parts: (gradients, PARTS), in some pieces."""
    return squares([contiguous(g) for g in grads], wide(grads[0].dtype))


def plain_adamw_numbers(
    squared: Sequence[Tensor],
    lr: Tensor,
    b1_t: Tensor,
    b2_t: Tensor,
    *,
    beta1: float,
    beta2: float,
    clip: float = 0.0,
    scale: float = 1.0,
    loss: Tensor | None = None,
    limits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The formulas; assignments keep old values in a skipped step."""
    loss, limits = judged(loss, limits, lr)
    sums = squared[0].cat(*squared[1:]).sum(1)
    loss, norm, norms = loss * scale, sums.sum().sqrt() * scale, sums.sqrt() * scale
    taken = (loss > -math.inf) & (loss < limits[0]) & (norm < limits[1])
    for power, beta in ((b1_t, beta1), (b2_t, beta2)):
        power.assign(taken.where(power * beta, power.detach()))
    factor = norm.ones_like() * plain_scaling(norm, clip, scale)
    yes = taken.cast(norm.dtype)
    corrections = (1 / (1 - b1_t[0]), 1 / (1 - b2_t[0]))
    numbers = Tensor.stack(factor, lr[0], *corrections, yes)
    return numbers, Tensor.stack(loss.cast(norm.dtype), norm, yes).cat(norms)


@operation("adamw", plain_adamw_numbers)
def adamw_numbers(
    squared: Sequence[Tensor],
    lr: Tensor,
    b1_t: Tensor,
    b2_t: Tensor,
    *,
    beta1: float,
    beta2: float,
    clip: float = 0.0,
    scale: float = 1.0,
    loss: Tensor | None = None,
    limits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Decide on a step; -> numbers for `adamw_follow` (5,), and a report (3 + n,).

    ``squared`` is what `squared_sums` found of all n gradients. The report and the other arguments
    are those of ``adamw_update``; b1_t and b2_t change in place.
    """
    loss, limits = judged(loss, limits, lr)
    sums = [contiguous(x) for x in squared]
    n = sum(int(x.shape[0]) for x in sums)
    return decide(
        [empty(lr, 5), empty(lr, 3 + n), b1_t, b2_t],
        [lr, loss, limits, *sums],
        beta1=beta1,
        beta2=beta2,
        clip=clip,
        scale=scale,
    )


def plain_adamw_follow(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    m: Sequence[Tensor],
    v: Sequence[Tensor],
    numbers: Tensor,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    decay: Sequence[float],
) -> None:
    """The formulas, one parameter after another; assignments keep old values in a skipped step."""
    factor, lr, correct_m, correct_v, taken = (numbers[i] for i in range(5))

    def assign(tensor: Tensor, value: Tensor) -> None:
        tensor.assign((taken > 0).where(value, tensor.detach()))

    for p, gradient, m_p, v_p, rate in zip(params, grads, m, v, decay, strict=True):
        g = gradient * factor
        assign(m_p, beta1 * m_p + (1 - beta1) * g)
        assign(v_p, beta2 * v_p + (1 - beta2) * g * g)
        direction = m_p * correct_m / ((v_p * correct_v).sqrt() + eps)
        assign(p, (p.detach() * (1 - lr * rate) - lr * direction).cast(p.dtype))


@operation("adamw", plain_adamw_follow)
def adamw_follow(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    m: Sequence[Tensor],
    v: Sequence[Tensor],
    numbers: Tensor,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    decay: Sequence[float],
) -> None:
    """Update params, m and v in place, if the ``numbers`` (5,) of the step say so.

    ``decay`` is one number for each parameter. Realize what is updated.
    """
    given = [contiguous(g) for g in grads]
    change(params, given, m, v, contiguous(numbers), decay, beta1=beta1, beta2=beta2, eps=eps)
