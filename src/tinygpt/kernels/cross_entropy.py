"""The loss: cross-entropy, the mean of -log softmax(logits)[target].

For a row of logits s with the target t, let m = max s and z = Σ exp(s - m). Then::

    loss = -log softmax(s)[t] = log z - (s[t] - m)
    ∂loss/∂s[v] = exp(s[v] - m) / z - (v = t)

and the mean over the counted rows, those with a target >= 0, is what comes out. m and z are kept
apart, not as log z + m, because for logits of 10⁴ that sum would round away what matters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from tinygrad import Tensor, UOp, dtypes

from tinygpt.kernels import reference
from tinygpt.kernels.fallback import falls_back, obstacle
from tinygpt.kernels.norm import across, empty, fill, largest_divisor, sum_dtype
from tinygpt.kernels.phases import Array, Backward, Kernel, as_index, as_uop, contiguous, exp2, run

LANES = 16
ROWS = 4
LOG2E = 1 / math.log(2)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean of -log softmax(logits)[target] in nats, a float32 or float64 ().

    logits (N, V), integer targets (N,). Targets < 0 are left out; a target beyond V makes it NaN.
    """
    if falls_back("loss", obstacle(logits, ids=[targets])):
        return reference.cross_entropy(logits, targets)
    N, V = map(int, logits.shape)
    logits, targets = contiguous(logits), contiguous(targets.cast(dtypes.int32))
    launch = partial(run, lanes=LANES, N=N, V=V, group=largest_divisor(N, ROWS))
    rows = [empty(logits, N, dtype=sum_dtype(logits)) for _ in range(3)]
    inputs = [logits, targets]
    losses, *statistics = launch(_row_losses, rows, inputs, name=f"cross_entropy_{N}x{V}")

    def backward(gradient: Tensor, outputs: Sequence[Tensor]) -> list[Tensor | None]:
        inputs = [contiguous(gradient), outputs[1], *statistics, logits, targets]
        out = [empty(logits, N, V)]
        dlogits = launch(_row_gradients, out, inputs, name=f"cross_entropy_grad_{N}x{V}")
        return [None, None, *dlogits]

    return mean(losses, targets, [logits], backward)


def mean(
    losses: Tensor,
    targets: Tensor,
    sources: list[Tensor],
    backward: Backward,
) -> Tensor:
    """-> mean loss () of the counted rows.

    ``backward`` is given the gradient of the mean, (1,), and the outputs, of which the second is 1
    / the number of counted rows (1,). It returns the gradients of losses and targets, which are
    None, and of the ``sources`` that the losses were computed from.
    """
    outputs = [empty(losses, 1), empty(losses, 1)]
    inputs = [losses, targets, *sources]
    N = int(losses.shape[0])
    loss = run(_mean, outputs, inputs, lanes=LANES, name="mean_loss", backward=backward, N=N)[0]
    return loss.reshape(())


def _row_losses(
    k: Kernel,
    losses: Array,
    largest: Array,
    scale: Array,
    logits: Array,
    targets: Array,
    *,
    N: int,
    V: int,
    group: int,
) -> None:
    """For each row its loss, m and 1 / z."""
    first, kind = k.units(N // group) * group, losses.dtype
    acc = k.tile(group, kind, shared=True)
    m, z = k.tile(group, kind), k.tile(group, kind)
    fill(k, -math.inf, group, acc)
    for at, lane, _ in across(k, V):
        for u in range(group):
            acc[u, lane] = acc[u, lane].maximum(logits[(first + u) * V + at].cast(kind))
    with k.phase(1):
        for u in range(group):
            m[u, 0] = acc[u, 0]
    with k.loop(k.lanes) as j, k.phase(1):
        for u in range(group):
            m[u, 0] = m[u, 0].maximum(acc[u, j])
    fill(k, 0.0, group, acc)
    for at, lane, inside in across(k, V):
        for u in range(group):
            power = exp2((logits[(first + u) * V + at].cast(kind) - m[u, 0]) * LOG2E)
            acc[u, lane] = acc[u, lane] + inside.where(power, 0.0)
    k.fold(z, acc, group)
    with k.phase(1):
        for u in range(group):
            row = first + u
            target = targets[row]
            logit = logits[row * V + as_index(within(target, V).where(target, 0))].cast(kind)
            losses[row] = row_loss(target, V, logit, m[u, 0], z[u, 0])
            largest[row] = m[u, 0]
            scale[row] = 1.0 / z[u, 0]


def row_loss(target: UOp, V: int, logit: UOp, m: UOp, z: UOp) -> UOp:
    """log z - (logit - m); 0 for a target that does not count, NaN for one that does not exist"""
    loss = z.log2() * math.log(2) - (logit - m)
    return (target < 0).where(0.0, (target < V).where(loss, math.nan))


def within(target: UOp, V: int) -> UOp:
    return (target >= 0) & (target < V)


def _row_gradients(
    k: Kernel,
    out: Array,
    gradient: Array,
    inverse: Array,
    largest: Array,
    scale: Array,
    logits: Array,
    targets: Array,
    *,
    N: int,
    V: int,
    group: int,
) -> None:
    first, kind = k.units(N // group) * group, scale.dtype
    for at, _, inside in across(k, V):
        for u in range(group):
            row = first + u
            target = targets[row]
            weight = (target < 0).where(as_uop(0.0, kind), gradient[0].cast(kind) * inverse[0])
            power = exp2((logits[row * V + at].cast(kind) - largest[row]) * LOG2E) * scale[row]
            hit = as_index(target).eq(at).where(as_uop(1.0, kind), 0.0)
            out.put(row * V + at, (power - hit) * weight, where=inside)


def _mean(
    k: Kernel, loss: Array, inverse: Array, losses: Array, targets: Array, *unused: Array, N: int
) -> None:
    k.units(1)
    acc, total = k.tile(2, loss.dtype, shared=True), k.tile(2, loss.dtype)
    fill(k, 0.0, 2, acc)
    for at, lane, inside in across(k, N):
        acc[0, lane] = acc[0, lane] + inside.where(losses[at], 0.0)
        counted = inside & (targets[at] >= 0)
        acc[1, lane] = acc[1, lane] + counted.where(as_uop(1.0, loss.dtype), 0.0)
    k.fold(total, acc, 2)
    with k.phase(1):
        inverse[0] = 1.0 / total[1, 0].maximum(as_uop(1.0, loss.dtype))
    with k.phase(1):
        loss[0] = total[0, 0] * inverse[0]
