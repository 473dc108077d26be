"""The training loop: a jitted step, and a generator that takes one step after another.

Nothing here prints or saves: whoever iterates does (see ``runs.py``).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from tinygrad import Tensor, TinyJit
from tinygrad.helpers import Context
from tinygrad.nn.optim import Optimizer

from tinygpt import data
from tinygpt.config import TrainConfig
from tinygpt.kernels.reference import clip_factor, global_norm
from tinygpt.model import Noise, Transformer
from tinygpt.optim import AdamW, learning_rate
from tinygpt.transfer import read, write

Tokens = npt.NDArray[np.integer]


@dataclass(frozen=True)
class Step:
    """What one optimizer step did. Losses are in nats per token, times in seconds."""

    iter: int
    """Optimizer steps done so far, this one included."""
    train_loss: float
    lr: float
    grad_norm: float
    tokens_per_second: float
    elapsed: float
    """Seconds since the start of this process's part of the run."""
    val_loss: float | None = None
    """Set where an evaluation took place."""
    best: bool = False
    """The best validation loss so far."""
    sample: str | None = None
    checkpoint: Path | None = None
    notices: tuple[str, ...] = ()
    """What whoever watches should be told: a checkpoint that could not be written, for example."""


class TrainStep(Protocol):
    """Take one optimizer step on x and y (A, B, T), A micro-batches; -> (loss, gradient norm)."""

    def __call__(
        self, x: Tokens, y: Tokens, lr: float, key: tuple[int, int]
    ) -> tuple[float, float]: ...


def make_train_step(model: Transformer, optimizer: Optimizer, config: TrainConfig) -> TrainStep:
    """The jitted step: forward, backward, clipping and update.

    With accumulation one jitted function sums the micro-batches into buffers and another applies
    them, so that memory does not depend on their number.
    """
    params = list(model.parameters().values())
    micro_batches = config.grad_accum_steps
    inputs = Inputs(config.batch_size, model.config.block_size)

    def gradients() -> tuple[Tensor, list[Tensor]]:
        loss = model.loss(inputs.x, inputs.y, Noise(inputs.key))
        return loss, loss.gradient(*params)

    def update(grads: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """-> the gradients' norm, and everything that has to be realized with it"""
        optimizer.lr.assign(inputs.lr)
        if isinstance(optimizer, AdamW):
            norm = optimizer.update(grads, config.grad_clip, 1 / micro_batches)
            return norm, [norm, optimizer.lr, *optimizer.changed()]
        norm = global_norm(grads) / micro_batches
        factor = clip_factor(norm, config.grad_clip) if config.grad_clip else 1.0
        for p, g in zip(params, grads, strict=True):
            p.grad = g * (factor / micro_batches)
        with Context(TRAINING=1):  # tinygrad's own optimizers insist on it
            changed = optimizer.schedule_step()
        for p in params:
            p.grad = None  # freed as soon as it is used
        return norm, [norm, optimizer.lr, *changed]

    @TinyJit
    def whole_step() -> Tensor:
        loss, grads = gradients()
        norm, changed = update(grads)
        result = loss.reshape(1).cat(norm.reshape(1))
        return result.realize(*changed)

    if micro_batches == 1:

        def step(x: Tokens, y: Tokens, lr: float, key: tuple[int, int]) -> tuple[float, float]:
            inputs.batch(x[0], y[0])
            inputs.draw(*key)
            inputs.rate(lr)
            loss, norm = read(whole_step())
            return float(loss), float(norm)

        return step

    sums = [Tensor.zeros(*p.shape, dtype=p.dtype).contiguous().realize() for p in params]

    @TinyJit
    def accumulate() -> Tensor:
        loss, grads = gradients()
        for total, g in zip(sums, grads, strict=True):
            total.assign(total + g)
        return loss.realize(*sums)

    @TinyJit
    def apply() -> Tensor:
        norm, changed = update([total.clone() for total in sums])
        return norm.realize(*changed)

    @TinyJit
    def clear() -> Tensor:
        for total in sums:
            total.assign(total * 0)
        return sums[0].realize(*sums[1:])

    def accumulated_step(
        x: Tokens, y: Tokens, lr: float, key: tuple[int, int]
    ) -> tuple[float, float]:
        seed, number = key
        loss = 0.0
        for i in range(micro_batches):
            inputs.batch(x[i], y[i])
            inputs.draw(seed, number * micro_batches + i)
            loss += float(read(accumulate()))
        inputs.rate(lr)
        norm = float(read(apply()))
        clear()
        return loss / micro_batches, norm

    return accumulated_step


class Inputs:
    """Buffers that tell each step its batch x and y (B, T), its random key (2,) and its rate (1,).

    The jitted functions know them from the start, which spares what tinygrad does for an argument.
    """

    def __init__(self, batch_size: int, block_size: int) -> None:
        shape = (batch_size, block_size)
        self.x, self.y = _buffer(np.zeros(shape, np.int32)), _buffer(np.zeros(shape, np.int32))
        self.key, self.lr = _buffer(np.zeros(2, np.uint32)), _buffer(np.zeros(1, np.float32))

    def batch(self, x: Tokens, y: Tokens) -> None:
        write(self.x, x)
        write(self.y, y)

    def draw(self, seed: int, number: int) -> None:
        """Make the key of the random numbers of one micro-batch."""
        write(self.key, [(seed ^ (seed >> 32)) & 0xFFFFFFFF, number & 0xFFFFFFFF])

    def rate(self, lr: float) -> None:
        write(self.lr, [lr])


def _buffer(array: npt.NDArray[Any]) -> Tensor:
    return Tensor(array).contiguous().realize()


def make_evaluate(model: Transformer, batch_size: int) -> Callable[[Tokens, Tokens], float]:
    """A jitted loss in inference mode: mean cross-entropy in nats of y (B, T) given x (B, T)."""
    inputs = Inputs(batch_size, model.config.block_size)

    @TinyJit
    def loss() -> Tensor:
        return model.loss(inputs.x, inputs.y).realize()

    def evaluate_batch(x: Tokens, y: Tokens) -> float:
        inputs.batch(x, y)
        with mode(model, training=False):
            return float(read(loss()))

    return evaluate_batch


def evaluate(
    evaluate_batch: Callable[[Tokens, Tokens], float],
    tokens: Tokens,
    iters: int,
    batch_size: int,
    block_size: int,
) -> float:
    """Mean loss over ``iters`` random batches, the same ones every time."""
    batches = (data.batch(tokens, i, EVAL_SEED, batch_size, block_size) for i in range(iters))
    return math.fsum(evaluate_batch(x, y) for x, y in batches) / iters


EVAL_SEED = 0x5EED
"""Evaluations draw from a stream of their own, so that they compare from one step to the next."""


@contextmanager
def mode(model: Transformer, training: bool) -> Iterator[None]:
    """Put the model into a mode, and back into the one it was in."""
    found = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(found)


def train_steps(
    model: Transformer,
    optimizer: Optimizer,
    config: TrainConfig,
    train_tokens: Tokens,
    val_tokens: Tokens | None = None,
    start: int = 0,
) -> Iterator[Step]:
    """Train from step ``start`` to ``config.max_iters``, yielding after every step.

    A batch depends on nothing but the tokens, the step and the seed, so a run that starts again at
    a step goes on exactly as the one that was never interrupted.

    >>> for step in train_steps(model, optimizer, config, tokens):
    ...     print(step.iter, step.train_loss)
    """
    block = model.config.block_size
    rows = config.batch_size * config.grad_accum_steps
    shape = (config.grad_accum_steps, config.batch_size, block)
    take_step = make_train_step(model, optimizer, config)
    evaluate_batch = make_evaluate(model, config.batch_size)
    began = time.perf_counter()
    for i in range(start, config.max_iters):
        before = time.perf_counter()
        x, y = data.batch(train_tokens, i, config.seed, rows, block)
        lr = learning_rate(config, i)
        with mode(model, training=True):
            loss, norm = take_step(x.reshape(shape), y.reshape(shape), lr, (config.seed, i))
        seconds = time.perf_counter() - before
        done, val_loss = i + 1, None
        due = done % config.eval_interval == 0 or done == config.max_iters
        if val_tokens is not None and due:
            val_loss = evaluate(
                evaluate_batch, val_tokens, config.eval_iters, config.batch_size, block
            )
        elapsed = time.perf_counter() - began
        yield Step(done, loss, lr, norm, x.size / seconds, elapsed, val_loss)
