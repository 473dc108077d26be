"""One step of training, jitted: loss, gradients, update; and the loss of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from tinygrad import Tensor, dtypes
from tinygrad.nn.optim import Optimizer

from tinygpt.config import TrainConfig
from tinygpt.machine.jit import jit
from tinygpt.machine.precision import half_of
from tinygpt.machine.transfer import zeros, zeros_like
from tinygpt.model.transformer import INFERENCE, Dropout, Transformer
from tinygpt.text.batches import batch
from tinygpt.training.guard import NO_LIMITS, Limits
from tinygpt.training.optim import AdamW, layer_of, realize_state, stock_update
from tinygpt.training.recompute import recomputed_gradients

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

    ``key`` is (seed, number of the step), from which dropout's masks are drawn. Unless the loss and
    the gradient norm lie below the limits nothing changes; NaN never does.
    """

    def __call__(
        self,
        x: Tokens,
        y: Tokens,
        lr: float,
        key: tuple[int, int],
        limits: Limits = NO_LIMITS,
    ) -> Outcome: ...


def make_train_step(model: Transformer, optimizer: Optimizer, config: TrainConfig) -> TrainStep:
    """The jitted step: forward, backward, clipping and update.

    With accumulation one jitted function adds the micro-batches' gradients to buffers and another
    applies their sum, so that memory does not depend on the number of micro-batches.
    """
    model.check_can_learn()
    half, params = half_of(config.dtype), optimizer.params
    names = {id(p): name for name, p in model.parameters().items()}
    layers = [layer_of(names[id(p)]) for p in params]
    micro_batches = config.grad_accum_steps
    realize_state(optimizer)

    def gradients(x: Tensor, y: Tensor, key: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The loss () of a micro-batch x and y (B, T), and the gradient of each parameter."""
        drop = Dropout(model.config.dropout, key)
        if config.recompute:
            loss, found = recomputed_gradients(model, x, y, drop, half)
            return loss, [found[names[id(p)]] for p in params]
        loss = model.loss(x, y, drop, half)
        return loss, loss.gradient(*params)

    def update(loss: Tensor, grads: list[Tensor], lr: Tensor, limits: Tensor) -> Tensor:
        """Change the weights, or not; -> the report of ``AdamW.update``."""
        optimizer.lr.assign(lr.reshape(1))
        judged = (config.grad_clip, 1 / micro_batches, loss, limits)
        if isinstance(optimizer, AdamW):
            report, changed = optimizer.update(grads, *judged), optimizer.changed()
        else:
            report, changed = stock_update(optimizer, params, grads, *judged)
        return report.realize(optimizer.lr, *changed)  # (3 + n,)

    @jit
    def whole(x: Tensor, y: Tensor, key: Tensor, lr: Tensor, limits: Tensor) -> Tensor:
        return update(*gradients(x, y, key), lr, limits)

    loss_sum = zeros((), dtypes.float32)
    sums = [zeros_like(p) for p in params] if micro_batches > 1 else []

    @jit
    def accumulate(x: Tensor, y: Tensor, key: Tensor, first: Tensor) -> Tensor:
        loss, grads = gradients(x, y, key)
        for total, new in zip([loss_sum, *sums], [loss, *grads], strict=True):
            total.assign(first.where(new, total + new))  # not total * 0: a NaN would stay
        return loss_sum.realize(*sums)

    @jit
    def apply(lr: Tensor, limits: Tensor) -> Tensor:
        return update(loss_sum.clone(), [total.clone() for total in sums], lr, limits)

    def step(
        x: Tokens, y: Tokens, lr: float, key: tuple[int, int], limits: Limits = NO_LIMITS
    ) -> Outcome:
        seed, number = key
        keys = [key_of(seed, number * micro_batches + i) for i in range(micro_batches)]
        if micro_batches == 1:
            report = whole(x[0], y[0], keys[0], lr, limits)
        else:
            for i in range(micro_batches):
                accumulate(x[i], y[i], keys[i], i == 0)
            report = apply(lr, limits)
        loss, norm, taken, *norms = report.tolist()
        by_layer = dict.fromkeys(layers, 0.0)
        for layer, other in zip(layers, norms, strict=True):
            by_layer[layer] = math.hypot(by_layer[layer], other)
        return Outcome(loss, norm, taken > 0, by_layer)

    return step


def key_of(seed: int, number: int) -> npt.NDArray[np.uint32]:
    """The key (2,) of the random numbers of one micro-batch."""
    return np.array([(seed ^ (seed >> 32)) & 0xFFFFFFFF, number & 0xFFFFFFFF], np.uint32)


def make_evaluate(model: Transformer, dtype: str = "float32") -> Callable[[Tokens, Tokens], float]:
    """A jitted loss without dropout: mean cross-entropy in nats of y (B, T) given x (B, T)."""
    loss = jit(partial(model.loss, drop=INFERENCE, half=half_of(dtype)))
    return lambda x, y: float(loss(x, y))


EVAL_SEED = 0x5EED
"""Evaluations draw from a stream of their own, so that they compare from one step to the next."""


def evaluate(
    evaluate_batch: Callable[[Tokens, Tokens], float],
    tokens: Tokens,
    iters: int,
    batch_size: int,
    block_size: int,
) -> float:
    """Mean loss over the same ``iters`` batches every time, drawn evenly from the whole text."""
    batches = (batch(tokens, i, EVAL_SEED, batch_size, block_size) for i in range(iters))
    return math.fsum(evaluate_batch(x, y) for x, y in batches) / iters
