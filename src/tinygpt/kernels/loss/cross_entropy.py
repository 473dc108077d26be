"""Cross-entropy of logits that exist: each row's loss, and the gradient of the logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from tinygrad import Tensor, UOp, dtypes

from tinygpt.kernels.dispatch import operation
from tinygpt.kernels.loops import across, add_up, fill, largest_divisor, row_of
from tinygpt.kernels.phases import (
    LOG2E,
    Array,
    Kernel,
    as_index,
    as_uop,
    contiguous,
    empty,
    exp2,
    on_gpu,
    run,
    wide,
)

LANES = 16
ROWS = 4  # rows at a time: the additions of one row wait for each other, those of four overlap
GPU_LANES = 128
"""A row per unit on a GPU, read by so many threads."""


class Size(NamedTuple):
    """N rows of V logits, ``width`` apart; a unit takes a group of so many rows."""

    N: int
    V: int
    width: int
    group: int


def plain_cross_entropy(logits: Tensor, targets: Tensor, classes: int | None = None) -> Tensor:
    """log z + m - s[t], row by row."""
    logits = logits[:, :classes].cast(wide(logits.dtype))
    counted, exists = targets >= 0, targets < int(logits.shape[-1])
    picked = (Tensor.arange(logits.shape[-1]) == targets.unsqueeze(-1)).where(logits, 0).sum(-1)
    losses = counted.where(exists.where(logits.logsumexp(-1) - picked, math.nan), 0)
    return losses.sum() / counted.cast(dtypes.int32).sum().maximum(1)


@operation("loss", plain_cross_entropy, integers=("targets",))
def cross_entropy(logits: Tensor, targets: Tensor, classes: int | None = None) -> Tensor:
    """Mean of -log softmax(logits)[target] in nats, a float32 or float64 ().

    logits (N, V), integer targets (N,). Targets < 0 are left out; a target beyond V makes it NaN.
    Only the first ``classes`` logits of a row count (None: all); the others have the gradient 0.
    """
    N, width = map(int, logits.shape)
    V, gpu = classes or width, on_gpu(logits)
    logits, targets = contiguous(logits), contiguous(targets.cast(dtypes.int32))
    size = Size(N, V, width, 1 if gpu else largest_divisor(N, ROWS))
    launch = partial(run, lanes=GPU_LANES if gpu else LANES, size=size)

    def backward(gradient: Tensor, outputs: Sequence[Tensor]) -> list[Tensor | None]:
        _, *statistics = outputs
        inputs = [contiguous(gradient), *statistics, logits, targets]
        out, name = [empty(logits, N, width)], f"cross_entropy_grad_{N}x{V}"
        return [launch(_row_gradients, out, inputs, name=name)[0], None]

    rows = [empty(logits, N, dtype=wide(logits.dtype)) for _ in range(3)]
    name = f"cross_entropy_{N}x{V}"
    losses = launch(_row_losses, rows, [logits, targets], name=name, backward=backward)[0]
    return losses.sum() / (targets >= 0).cast(dtypes.int32).sum().maximum(1)


def _row_losses(k: Kernel, *arrays: Array, size: Size) -> None:
    """For each row its loss, m and 1 / z, from the logits and the targets."""
    (losses, largest, scale, logits, targets), (N, V, width, group) = arrays, size
    first, kind = k.units(N // group) * group, losses.dtype
    acc = k.tile(group, kind, shared=True)
    m, z = k.tile(group, kind), k.tile(group, kind)

    def logit(u: int, at: UOp) -> UOp:
        return logits[(first + u) * width + at].cast(kind)

    fill(k, -math.inf, group, acc)
    for at, lane, _ in across(k, V):
        for u in range(group):
            acc[u, lane] = acc[u, lane].maximum(logit(u, at))
    k.fold(m, acc, group, UOp.maximum, -math.inf)
    add_up(k, z, acc, group, V, lambda u, at: exp2((logit(u, at) - m[u, 0]) * LOG2E))
    with k.phase(1):
        for u in range(group):
            row, target = first + u, targets[first + u]
            losses[row] = row_loss(target, V, logit(u, row_of(target, V)[0]), m[u, 0], z[u, 0])
            largest[row] = m[u, 0]
            scale[row] = 1.0 / z[u, 0]


def row_loss(target: UOp, V: int, logit: UOp, m: UOp, z: UOp) -> UOp:
    """log z - (logit - m); 0 for a target that does not count, NaN for one that does not exist."""
    loss = z.log2() * math.log(2) - (logit - m)
    return (target < 0).where(0.0, (target < V).where(loss, math.nan))


def _row_gradients(k: Kernel, *arrays: Array, size: Size) -> None:
    """(softmax - onehot) times the gradient of each row's loss; 0 for rows that do not count."""
    (out, gradient, largest, scale, logits, targets), (N, V, width, group) = arrays, size
    first, kind = k.units(N // group) * group, scale.dtype
    for at, _, inside in across(k, width):
        for u in range(group):
            row = first + u
            weight = (targets[row] < 0).where(as_uop(0.0, kind), gradient[row].cast(kind))
            power = exp2((logits[row * width + at].cast(kind) - largest[row]) * LOG2E) * scale[row]
            hit = as_index(targets[row]).eq(at).where(as_uop(1.0, kind), 0.0)
            found = (power - hit) * weight
            if width > V:
                found = (at < V).where(found, 0.0)
            out.put(row * width + at, found, where=inside)
