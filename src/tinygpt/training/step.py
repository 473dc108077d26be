"""One step of training, jitted: loss, gradients, update; and the loss of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from tinygrad import Tensor, dtypes
from tinygrad.nn.optim import Optimizer
from tinygrad.nn.state import get_parameters

from tinygpt.config import TrainConfig
from tinygpt.kernels.dispatch import way
from tinygpt.machine import precision
from tinygpt.machine.jit import jit
from tinygpt.machine.pool.recorded import Kept
from tinygpt.machine.precision import half_of
from tinygpt.machine.ranks.alone import Alone
from tinygpt.machine.transfer import Array
from tinygpt.model.transformer import INFERENCE, Dropout, Transformer, description
from tinygpt.text.batches import batch
from tinygpt.text.chat.packing import Conversations
from tinygpt.text.mix import Mix
from tinygpt.text.tokens import Tokens as Text
from tinygpt.training.accumulation import PartialSums, add_to
from tinygpt.training.guard import NO_LIMITS, Limits
from tinygpt.training.optim import AdamW, layer_of, realize_state, stock_update
from tinygpt.training.rank_shares import RankShares
from tinygpt.training.recompute import recomputed_gradients, scaled
from tinygpt.training.replicas import Replicas, replicas_for, total
from tinygpt.training.shares import owners_in, place, update_shares

Tokens = npt.NDArray[np.integer]


class Outcome(NamedTuple):
    """What a step did: the mean loss, the gradient norm, and whether it changed anything."""

    loss: float
    norm: float
    taken: bool
    norms: Mapping[str, float] = {}
    """The gradient norm of each layer."""


class TrainStep(Protocol):
    """One optimizer step on x and y (A, B, T), A micro-batches, at the learning rate ``lr``.

    Targets below 0 are not counted. A loss is the mean over all counted targets of the step, in
    whichever micro-batch and on whichever device they are.

    ``key`` is (seed, number of the step), from which dropout's masks are drawn. Unless the loss and
    the gradient norm lie below the limits nothing changes; NaN never does. In float16 the backward
    pass is that of the loss times ``scale``, see ``scaling``; what is reported is not.
    """

    def __call__(
        self,
        x: Tokens,
        y: Tokens,
        lr: float,
        key: tuple[int, int],
        limits: Limits = NO_LIMITS,
        scale: float = 1.0,
    ) -> Outcome: ...


def make_train_step(
    model: Transformer,
    optimizer: Optimizer,
    config: TrainConfig,
    replicas: Replicas | None = None,
    ranks: Alone | None = None,
    rank_shares: RankShares | None = None,
) -> TrainStep:
    """The jitted step: forward, backward, clipping and update.

    Raises DeviceError for a type that a device does not have.

    With accumulation one jitted function adds the micro-batches' gradients to buffers, in the order
    of ``accumulation``, and another applies their sum.

    On several devices each takes a part of every micro-batch, and has gradients of its own; the
    first adds them up, changes the weights, and hands them out. Whoever changes weights between
    steps calls ``replicas.refresh()``.

    Of several ranks each takes some of the micro-batches; their gradients are added up, and every
    rank changes its weights in the same way, or by ``rank_shares`` its share of them.
    """
    model.check_can_learn()
    ranks = ranks or Alone()
    replicas = replicas or replicas_for(model, config)
    for device in replicas.devices:
        precision.require(config.dtype, device)
    half, params, first_device = half_of(config.dtype), optimizer.params, replicas.devices[0]
    names = {id(p): name for name, p in model.parameters().items()}
    learned = [names[id(p)] for p in params]
    micro_batches, apart = config.grad_accum_steps, config.sync_every is not None
    summed = micro_batches // ranks.size if apart else micro_batches
    scale = 1 / (summed * len(replicas))
    realize_state(optimizer)
    shares = place(optimizer, replicas, config.shard_optimizer and len(replicas) > 1)
    owners = owners_in(shares, len(params))
    reported = [learned[i] for share in shares for i in share.chosen] or learned

    def part(
        replica: Transformer, x: Tensor, y: Tensor, key: Tensor, *factors: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """The loss () of x and y (B, T) on one device, and the gradient of each parameter."""
        scale, weight = told_apart(factors)
        factor = weight if scale is None else scale if weight is None else scale * weight
        drop = Dropout(model.config.dropout, key)
        if config.recompute:
            loss, by_name = recomputed_gradients(replica, x, y, drop, half, factor)
            found = [by_name[name] for name in learned]
        else:
            own = replica.parameters()
            loss = replica.loss(x, y, drop, half)
            found = scaled(loss, factor).gradient(*(own[name] for name in learned))
        return scaled(loss, weight), found if scale is None else [
            g * scale.reciprocal() for g in found
        ]

    def told_apart(factors: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """The loss scale (), in float16, and the weight () of the part, if it is not 1."""
        scale = factors[0] if half == dtypes.float16 else None
        weights = factors[0 if scale is None else 1 :]
        return scale, weights[0].reshape(()) if weights else None

    def gradients(
        x: Tensor, y: Tensor, key: Tensor, *factors: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The loss () of each device's part of a micro-batch x and y (B, T), and its gradients.

        The gradients of all parameters on the first device, then those on the second, … The
        ``factors`` are the scale of the loss () in float16, and a weight for each device's part
        (devices,) where not all targets are counted.
        """
        losses, grads = list[Tensor](), list[Tensor]()
        parts = [replicas.cut(x), replicas.cut(y), replicas.keys(key, int(x.shape[0]))]
        for factor in factors:
            spread = replicas.cut(factor) if factor.ndim else replicas.everywhere(factor)
            parts.append(spread)
        for given in zip(replicas.models, *parts, strict=True):
            loss, found = part(*given)
            losses.append(loss)
            grads += found
        return losses, grads

    def update(losses: list[Tensor], grads: list[Tensor], lr: Tensor, limits: Tensor) -> Tensor:
        """Change the weights, or not; -> the report of ``AdamW.update``."""
        optimizer.lr.assign(lr.reshape(1))
        judged = config.grad_clip, scale, total(losses, first_device), limits
        by_parameter = [grads[i :: len(params)] for i in range(len(params))]
        if shares and isinstance(optimizer, AdamW):
            report, changed = update_shares(optimizer, shares, by_parameter, *judged)
        else:
            sums = [total(parts, first_device) for parts in by_parameter]
            if isinstance(optimizer, AdamW):
                report, changed = optimizer.update(sums, *judged), optimizer.changed()
            else:
                report, changed = stock_update(optimizer, params, sums, *judged)
        return report.realize(optimizer.lr, *changed, *replicas.spread(learned, owners))  # (3 + n,)

    def about() -> str | None:
        one_device = len(replicas) == 1 and not shares
        settings = (config.grad_clip, config.recompute, config.dtype, scale, way())
        return description(model, learned, optimizer, *settings) if one_device else None

    def state() -> list[Tensor]:
        mine = [*model.parameters().values(), *get_parameters(optimizer)]
        return list({id(tensor): tensor for tensor in mine}.values())

    def whole_step(
        x: Tensor, y: Tensor, key: Tensor, lr: Tensor, limits: Tensor, *scale: Tensor
    ) -> Tensor:
        return update(*gradients(x, y, key, *scale), lr, limits)

    whole = jit(whole_step, kept=Kept(about, state))
    everywhere = [replica.parameters()[name] for replica in replicas.models for name in learned]
    sums = PartialSums(
        [*[((), device) for device in replicas.devices], *map(_shape_and_device, everywhere)]
    )
    split = len(replicas)  # losses come first
    layers = [layer_of(name) for name in reported]
    zeros = dict.fromkeys(map(layer_of, learned), 0.0)

    @jit
    def accumulate(x: Tensor, y: Tensor, key: Tensor, first: Tensor, *scale: Tensor) -> Tensor:
        losses, grads = gradients(x, y, key, *scale)
        return add_to(sums.levels[0].tensors, [*losses, *grads], first)

    @cache
    def apply_level(level: int) -> Callable[..., Array]:
        """The update by the sum that a level holds."""
        if rank_shares is not None:
            return rank_shares.updater(sums.levels[level], config.grad_clip, scale)
        tensors = sums.levels[level].tensors
        return jit(lambda lr, limits: update(tensors[:split], tensors[split:], lr, limits))

    def step(
        x: Tokens,
        y: Tokens,
        lr: float,
        key: tuple[int, int],
        limits: Limits = NO_LIMITS,
        scale: float = 1.0,
    ) -> Outcome:
        scales: list[float] = [scale] if half == dtypes.float16 else []
        own = ranks.share(micro_batches) if apart else range(micro_batches)
        weights = weights_of(y, len(replicas), own)
        seed, number = key
        keys = [key_of(seed, number * micro_batches + i) for i in range(micro_batches)]

        def add_leaf(i: int, first: bool) -> None:
            accumulate(x[i], y[i], keys[i], first, *scales, *weights[i])
            replicas.wait()

        if micro_batches == 1:
            report = whole(x[0], y[0], keys[0], lr, limits, *scales, *weights[0])
        else:
            divided = rank_shares is not None
            level = sums.over(ranks, micro_batches, add_leaf, apart, divided)
            report = apply_level(level)(lr, limits)
        replicas.wait()
        loss, norm, taken, *norms = report.tolist()
        by_layer = zeros.copy()
        for layer, other in zip(layers, norms, strict=True):
            by_layer[layer] = math.hypot(by_layer[layer], other)
        return Outcome(loss, norm, taken > 0, by_layer)

    return step


def weights_of(y: Tokens, devices: int, own: range) -> list[list[npt.NDArray[np.float32]]]:
    """What each part's mean loss weighs in the mean over all counted targets of y (A, B, T).

    For each micro-batch a list: the weights (devices,) of its parts, whose mean over the micro-
    batches in ``own`` is 1. The lists are empty where all targets are counted, or nothing is added.
    """
    if y.shape[0] * devices == 1 or not (y < 0).any():
        return [[] for _ in y]
    counts = (y >= 0).reshape(len(y), devices, -1).sum(-1)  # (A, devices)
    mean = max(float(counts[own.start : own.stop].mean()), 1e-9)
    return [[(count / mean).astype(np.float32)] for count in counts]


def _shape_and_device(p: Tensor) -> tuple[tuple[int, ...], str]:
    return tuple(map(int, p.shape)), str(p.device)


def key_of(seed: int, number: int) -> npt.NDArray[np.uint32]:
    """The key (2,) of the random numbers of one micro-batch."""
    return np.array([(seed ^ (seed >> 32)) & 0xFFFFFFFF, number & 0xFFFFFFFF], np.uint32)


def make_evaluate(
    model: Transformer, dtype: str = "float32", replicas: Replicas | None = None
) -> Callable[[Tokens, Tokens], float]:
    """A jitted loss without dropout: mean cross-entropy in nats of y (B, T) given x (B, T).

    Of several devices each takes a part of the batch, which must divide by their number.
    """
    half = half_of(dtype)
    if replicas is None or len(replicas) == 1:
        kept = Kept(
            lambda: description("evaluate", model, half, way()),
            lambda: list(model.parameters().values()),
        )
        loss = jit(partial(model.loss, drop=INFERENCE, half=half), kept=kept)
        return lambda x, y: float(loss(x, y))

    @jit
    def spread(x: Tensor, y: Tensor) -> Tensor:
        sums, counts = list[Tensor](), list[Tensor]()
        parts = zip(replicas.models, replicas.cut(x), replicas.cut(y), strict=True)
        for replica, x_own, y_own in parts:
            count = (y_own >= 0).sum().cast(dtypes.float32)
            loss = replica.loss(x_own, y_own, INFERENCE, half)
            sums.append((count > 0).where(loss * count, 0))
            counts.append(count)
        first = replicas.devices[0]
        return total(sums, first) / total(counts, first)

    def evaluate_batch(x: Tokens, y: Tokens) -> float:
        found = float(spread(x, y))
        replicas.wait()
        return found

    return evaluate_batch


EVAL_SEED = 0x5EED
"""Evaluations draw from a stream of their own, so that they compare from one step to the next."""


def evaluate(
    evaluate_batch: Callable[[Tokens, Tokens], float],
    tokens: Text,
    iters: int,
    batch_size: int,
    block_size: int,
    ranks: Alone | None = None,
) -> float:
    """Mean loss over the same ``iters`` batches every time, drawn evenly from the whole text.

    Ranks share the batches. The sum is exact before it is rounded, and thus the same in any order.
    Where some targets are not counted, it is the mean over those that are.
    """
    weights = counted(tokens, iters, batch_size, block_size)

    def loss(i: int) -> float:
        return weights[i] * evaluate_batch(*batch(tokens, i, EVAL_SEED, batch_size, block_size))

    return math.fsum((ranks or Alone()).each(loss, iters)) / max(math.fsum(weights), 1e-9)


def counted(tokens: Text, iters: int, batch_size: int, block_size: int) -> list[float]:
    """The share of targets that are counted in each batch of an evaluation."""
    if not has_answers(tokens):
        return [1.0] * iters
    targets = (batch(tokens, i, EVAL_SEED, batch_size, block_size)[1] for i in range(iters))
    return [float((y >= 0).mean()) for y in targets]


def has_answers(tokens: Text) -> bool:
    """Whether conversations are among the tokens, of which only the answers are counted."""
    parts = tokens.parts if isinstance(tokens, Mix) else [tokens]
    return any(isinstance(part, Conversations) for part in parts)
