"""One step of training, jitted: loss, gradients, update; and the loss of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from tinygrad import Tensor, dtypes
from tinygrad.nn.optim import Optimizer

from tinygpt.config import TrainConfig
from tinygpt.machine.jit import jit
from tinygpt.machine.transfer import read, write, zeros, zeros_like
from tinygpt.model.transformer import Noise, Transformer
from tinygpt.model.transformer import mode as mode
from tinygpt.text.batches import batch
from tinygpt.training.guard import NO_LIMITS, Limits
from tinygpt.training.optim import AdamW, layer_of, realize_state, stock_update

Tokens = npt.NDArray[np.integer]


class TrainStep(Protocol):
    """Take one optimizer step on x and y (A, B, T), A micro-batches; -> what became of it.

    Unless the loss and the gradient norm lie below the limits nothing changes; NaN never does.
    """

    def __call__(
        self,
        x: Tokens,
        y: Tokens,
        lr: float,
        key: tuple[int, int],
        limits: Limits = NO_LIMITS,
    ) -> Outcome: ...


class Outcome(NamedTuple):
    """What became of a step: the mean loss, the gradient norm, and whether anything changed."""

    loss: float
    norm: float
    taken: bool
    norms: Mapping[str, float] = {}
    """The gradient norm of each layer."""


def make_train_step(model: Transformer, optimizer: Optimizer, config: TrainConfig) -> TrainStep:
    """The jitted step: forward, backward, clipping and update.

    With accumulation one jitted function sums the micro-batches into buffers and another applies
    them, so that memory does not depend on their number.
    """
    params = list(model.trainable().values())
    layers = list(map(layer_of, model.trainable()))
    micro_batches = config.grad_accum_steps
    inputs = Inputs(config.batch_size, model.config.block_size)
    realize_state(optimizer)

    def gradients() -> tuple[Tensor, list[Tensor]]:
        loss = model.loss(inputs.x, inputs.y, Noise(inputs.key))
        return loss, loss.gradient(*params)

    def update(loss: Tensor, grads: list[Tensor]) -> Tensor:
        """Take the step or skip it; -> AdamW.update's report."""
        optimizer.lr.assign(inputs.lr)
        judged = (config.grad_clip, 1 / micro_batches, loss, inputs.limits)
        if isinstance(optimizer, AdamW):
            report, changed = optimizer.update(grads, *judged), optimizer.changed()
        else:
            report, changed = stock_update(optimizer, params, grads, *judged)
        return report.realize(optimizer.lr, *changed)

    @jit
    def whole_step() -> Tensor:
        return update(*gradients())

    if micro_batches == 1:

        def step(
            x: Tokens, y: Tokens, lr: float, key: tuple[int, int], limits: Limits = NO_LIMITS
        ) -> Outcome:
            inputs.batch(x[0], y[0])
            inputs.draw(*key)
            inputs.update(lr, limits)
            return _outcome(read(whole_step()), layers)

        return step

    loss_sum = zeros((1,), dtypes.float32)
    sums = [zeros_like(p) for p in params]

    @jit
    def accumulate() -> Tensor:
        loss, grads = gradients()
        for total, g in zip([loss_sum, *sums], [loss.reshape(1), *grads], strict=True):
            total.assign(total + g)
        return loss_sum.realize(*sums)

    @jit
    def apply() -> Tensor:
        return update(loss_sum.clone(), [total.clone() for total in sums])

    @jit
    def clear() -> Tensor:
        for total in [loss_sum, *sums]:
            total.assign(total.zeros_like())  # not total * 0: a NaN would stay
        return loss_sum.realize(*sums)

    def accumulated_step(
        x: Tokens, y: Tokens, lr: float, key: tuple[int, int], limits: Limits = NO_LIMITS
    ) -> Outcome:
        seed, number = key
        for i in range(micro_batches):
            inputs.batch(x[i], y[i])
            inputs.draw(seed, number * micro_batches + i)
            accumulate()
        inputs.update(lr, limits)
        outcome = _outcome(read(apply()), layers)
        clear()
        return outcome

    return accumulated_step


class Inputs:
    """Buffers that tell a step its batch x and y (B, T), random key (2,), rate (1,), limits (2,).

    The jitted functions know them from the start, which spares what tinygrad does for an argument.
    """

    def __init__(self, batch_size: int, block_size: int) -> None:
        shape = (batch_size, block_size)
        self.x, self.y = zeros(shape, dtypes.int32), zeros(shape, dtypes.int32)
        self.key, self.lr = zeros((2,), dtypes.uint32), zeros((1,), dtypes.float32)
        self.limits = zeros((2,), dtypes.float32)

    def batch(self, x: Tokens, y: Tokens) -> None:
        write(self.x, x)
        write(self.y, y)

    def draw(self, seed: int, number: int) -> None:
        """Make the key of the random numbers of one micro-batch."""
        write(self.key, key_of(seed, number))

    def update(self, lr: float, limits: Limits) -> None:
        """Say at what rate to update the weights, and when not to."""
        write(self.lr, [lr])
        write(self.limits, limits)


def key_of(seed: int, number: int) -> tuple[int, int]:
    return (seed ^ (seed >> 32)) & 0xFFFFFFFF, number & 0xFFFFFFFF


def _outcome(report: npt.NDArray[Any], layers: Sequence[str]) -> Outcome:
    loss, norm, taken, *norms = report.tolist()
    by_layer: dict[str, float] = {}
    for layer, other in zip(layers, norms, strict=True):
        by_layer[layer] = math.hypot(by_layer.get(layer, 0.0), other)
    return Outcome(loss, norm, taken > 0, by_layer)


def make_evaluate(model: Transformer, batch_size: int) -> Callable[[Tokens, Tokens], float]:
    """A jitted loss in inference mode: mean cross-entropy in nats of y (B, T) given x (B, T)."""
    inputs = Inputs(batch_size, model.config.block_size)

    @jit
    def loss() -> Tensor:
        return model.loss(inputs.x, inputs.y).realize()

    def evaluate_batch(x: Tokens, y: Tokens) -> float:
        inputs.batch(x, y)
        with mode(model, training=False):
            return float(read(loss()))

    return evaluate_batch


EVAL_SEED = 0x5EED
"""Evaluations draw from a stream of their own, so that they compare from one step to the next."""


def evaluate(
    evaluate_batch: Callable[[Tokens, Tokens], float],
    tokens: Tokens,
    iters: int,
    batch_size: int,
    block_size: int,
) -> float:
    """Mean loss over ``iters`` random batches, the same ones every time."""
    batches = (batch(tokens, i, EVAL_SEED, batch_size, block_size) for i in range(iters))
    return math.fsum(evaluate_batch(x, y) for x, y in batches) / iters
