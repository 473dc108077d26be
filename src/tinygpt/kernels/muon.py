"""Muon's update of the matrices of the blocks.

With the gradient G (O, I) of a matrix W, scaled so that the norm of all gradients is at most
``clip``::

    M = μ M + (1 - μ) G            U = (1 - μ) G + μ M      Nesterov's momentum
    W = W (1 - η decay) - η √max(1, O / I) · orthogonal(U)

U = P Σ Qᵀ has few large singular values, those of the directions that all examples ask for. The
update is P Qᵀ, nearly: it is as long in the rare directions. No decomposition is needed, as an odd
polynomial p(X) = a X + b (X Xᵀ) X + c (X Xᵀ)² X changes the singular values alone. Repeated (a
Newton-Schulz iteration), this one brings all of them between 0.7 and 1.2, and small ones soon, by
a = 3.4 at every step.

Queries, keys and values are three matrices in one weight, each with an orthogonal factor of its
own; the root is that of the weight.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); decoupled decay:
Liu et al., "Muon is Scalable for LLM Training" (2025).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from tinygrad import Tensor

from tinygpt.kernels.adamw import clip_factor

STEPS = ((3.4445, -4.7750, 2.0315),) * 5
"""a, b and c of each step of the iteration."""
TINY = 1e-7
"""What is added to the norm that a matrix is divided by."""


# The plain twin --------------------------------------------------------------------------------


def orthogonal(u: Tensor) -> Tensor:
    """Matrices (..., O, I) with their singular values brought near 1."""
    O, I = map(int, u.shape[-2:])  # noqa: E741 - as everywhere
    x = u.transpose(-1, -2) if O > I else u  # the products below are then as small as can be
    x = (x / (x.square().sum((-1, -2), keepdim=True).sqrt() + TINY)).contiguous()
    for a, b, c in STEPS:
        gram = (x @ x.transpose(-1, -2)).contiguous()
        x = (a * x + (b * gram + c * (gram @ gram)).contiguous() @ x).contiguous()
    return x.transpose(-1, -2) if O > I else x


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
    """Take one step, if ``report`` says so: update params and momenta in place.

    ``report`` is that of ``adamw_update``, which decided on the step. ``counts`` says how many
    matrices each parameter (O, I) is. Their rate is ``ratio`` times ``lr`` (1,). The gradients are
    multiplied by ``scale``, then clipped to the global norm ``clip``, if it is not 0.
    """
    taken, rate = report[2] > 0, lr * ratio
    factor = clip_factor(report[1], clip) * scale if clip else scale
    for p, gradient, m, count in zip(params, grads, momenta, counts, strict=True):
        O, I = map(int, p.shape)  # noqa: E741
        g = (gradient * factor).contiguous()
        m.assign(taken.where(momentum * m + (1 - momentum) * g, m.detach()))
        u = (1 - momentum) * g + momentum * m
        step = orthogonal(u.reshape(count, O // count, I)).reshape(O, I)
        kept = p.detach() * (1 - rate * decay)
        new = kept - rate * math.sqrt(max(1, O / I)) * step
        p.assign(taken.where(new.cast(p.dtype), p.detach()))


muon_update = plain_muon_update
