"""How long a step will take, from timing its parts: a block, what is outside of blocks, the update.

Each part is timed in the run's own shapes and types, with the kernels that the run will use, on
this machine as busy as it is. The blocks are alike, so one of them is enough::

    step = micro-batches · (blocks · block + outside + adding up) + update

A block's weights do not matter, nor do the tokens: kernels take as long for any numbers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import numpy as np
import numpy.typing as npt
from tinygrad import Tensor, dtypes

from tinygpt.config import GPTConfig, TrainConfig
from tinygpt.machine.jit import jit
from tinygpt.machine.precision import half_of
from tinygpt.machine.transfer import release_unused, write, zeros
from tinygpt.model import lora
from tinygpt.model.transformer import Dropout, Transformer
from tinygpt.training.optim import AdamW
from tinygpt.training.preflight import measured_rate, muon_matrices, muon_stacks

REPEATS, SECONDS = 3, 0.1
"""A part is timed so many times, or for so long, whichever is more; the median counts."""
SAMPLE = 1 << 21
"""Most parameters that an update is timed with."""
ADDING = 12 / 32
"""Bytes that adding a gradient to a sum moves, as a share of those of an update by AdamW."""


def seconds_per_step(model: GPTConfig, train: TrainConfig) -> float:
    """Seconds that a training step of this model should take here.

    It takes memory for one block and what is outside, and gives it back.
    """
    seconds = _seconds_per_step(model, train)
    release_unused()
    return seconds


def _seconds_per_step(model: GPTConfig, train: TrainConfig) -> float:
    frozen, parts = train.freeze or 0, Parts(model, train)
    micro_batch = parts.outside() + (model.n_layer - frozen) * parts.block()
    if forward := model.n_layer if train.recompute else frozen:
        micro_batch += forward * parts.forward()
    learning, _ = lora.count_trainable(model, train)
    update = learning * update_seconds(learning)
    if train.grad_accum_steps > 1:
        micro_batch += ADDING * update
    if matrices := muon_matrices(model, train):
        update += sum(s.operations for s in muon_stacks(matrices)) / measured_rate()
    return train.grad_accum_steps * micro_batch + update


class Parts:
    """The parts of a micro-batch, each timed when it is asked for."""

    def __init__(self, model: GPTConfig, train: TrainConfig) -> None:
        B, T, C = train.batch_size, model.block_size, model.n_embd
        # with one block none of them may be frozen; with freeze=0 the embeddings are
        freeze = None if train.freeze is None or train.lora_rank is not None else 0
        self.model = Transformer(replace(model, n_layer=1), seed=0)
        lora.prepare(self.model, replace(train, freeze=freeze))
        self.learns, self.recompute = self.model.trainable(), train.recompute
        self.half, self.p = half_of(train.dtype), model.dropout
        self.tokens = np.random.default_rng(0).integers(0, model.vocab_size, (B, T), np.int32)
        self.stream, self.gradient = _normal(B, T, C), _normal(B, T, C)
        self.key = np.zeros(2, np.uint32)

    def block(self) -> float:
        """A block forward and backward; with recomputation what the backward pass takes."""
        own = [p for name, p in self.learns.items() if name.startswith("h.")]

        def compute(key: Tensor) -> Tensor:
            y = self.model.h[0](self.stream, Dropout(self.p, key), None, self.half)
            grads = y.gradient(self.stream, *own, gradient=self.gradient)
            return _computed(*grads, *([] if self.recompute else [y]))

        return _time(compute, self.key)

    def forward(self) -> float:
        """A block forward."""

        def compute(key: Tensor) -> Tensor:
            return _computed(self.model.h[0](self.stream, Dropout(self.p, key), None, self.half))

        return _time(compute, self.key)

    def outside(self) -> float:
        """The embeddings, the last norm and the loss, forward and backward."""
        own = [p for name, p in self.learns.items() if not name.startswith("h.")]

        def compute(tokens: Tensor, key: Tensor) -> Tensor:
            x = Dropout(self.p, key)(self.model.embed(tokens))
            loss = self.model.loss_of(self.model.ln_f(x, self.half), tokens, gradient=True)
            return _computed(loss, *loss.gradient(x, *own))

        return _time(compute, self.tokens, self.key)


def update_seconds(learning: int) -> float:
    """Seconds of an update by AdamW, for each of so many parameters."""
    count = min(learning, SAMPLE)
    optimizer = AdamW({"weight": zeros((count,), dtypes.float32).is_param_(True)})
    gradient = _normal(count)

    def compute() -> Tensor:
        return optimizer.update([gradient], 1.0).realize(*optimizer.changed())

    return _time(compute) / count


def _normal(*shape: int) -> Tensor:
    """Random numbers in memory."""
    numbers = np.random.default_rng(0).standard_normal(shape, np.float32)
    return write(Tensor.empty(*shape, dtype=dtypes.float32), numbers)


def _computed(first: Tensor, *others: Tensor) -> Tensor:
    """One number, after all the Tensors have been computed."""
    first = first.contiguous()
    return first.flatten()[:1].contiguous().realize(first, *others)


def _time(compute: Callable[..., Tensor], *given: npt.NDArray[np.generic]) -> float:
    """The median time of a function that is compiled first; its memory is given back."""
    run = jit(compute)
    run(*given)
    began, times = time.perf_counter(), list[float]()
    while len(times) < REPEATS or time.perf_counter() - began < SECONDS:
        before = time.perf_counter()
        run(*given)
        times.append(time.perf_counter() - before)
    del run
    release_unused()
    return median(times)
