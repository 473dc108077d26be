"""The training loop: a generator that yields after every optimizer step.

Nothing here prints or saves: the code that iterates does, see ``runs``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tinygrad import Tensor
from tinygrad.nn.optim import Optimizer

from tinygpt.config import TrainConfig
from tinygpt.errors import TrainingError
from tinygpt.machine.precision import half_of
from tinygpt.machine.ranks.alone import Alone
from tinygpt.model.transformer import Transformer
from tinygpt.text.batches import batch
from tinygpt.text.tokens import Tokens as Text
from tinygpt.training.diagnose import diagnose
from tinygpt.training.guard import Guard, why_skipped
from tinygpt.training.meeting import Meeting
from tinygpt.training.optim import learning_rate
from tinygpt.training.rank_shares import RankShares
from tinygpt.training.replicas import replicas_for
from tinygpt.training.scaling import LossScale
from tinygpt.training.step import (
    Tokens,
    TrainStep,
    evaluate,
    key_of,
    make_evaluate,
    make_train_step,
)


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
    skipped: str | None = None
    """Why this step changed nothing, if so: a loss or gradient norm too large or no number."""
    train_bits_per_byte: float | None = None
    val_bits_per_byte: float | None = None
    """The losses in bits per byte of text, where a run has a tokenizer."""
    best: bool = False
    """Whether ``val_loss`` is the lowest so far."""
    sample: str | None = None
    exact: Mapping[str, float] | None = None
    """The share of questions that were answered exactly, by kind and in ``total``, where asked."""
    checkpoint: Path | None = None
    notices: tuple[str, ...] = ()
    """Messages for the user, such as of a checkpoint that could not be written."""
    loss_scale: float | None = None
    """What the loss of the next step is multiplied by in the backward pass, in float16."""
    overflows: int = 0
    """How often this step was taken again, at half the scale: gradients overflowed float16."""
    grad_norms: Mapping[str, float] = field(default_factory=dict)
    """The gradient's norm layer by layer, before clipping: ``wte``, ``h.0``, …"""


class Jitted(NamedTuple):
    """The functions that a run calls, see ``step``: they may have been called before it begins."""

    take_step: TrainStep
    evaluate_batch: Callable[[Tokens, Tokens], float]
    refresh: Callable[[], None] = lambda: None
    """Gives further devices the present weights: ``replicas.refresh``."""


def make_jitted(
    model: Transformer,
    optimizer: Optimizer,
    config: TrainConfig,
    ranks: Alone | None = None,
    rank_shares: RankShares | None = None,
) -> Jitted:
    """The functions of a run, on its devices. Raises DeviceError where one is not there."""
    if config.n_devices == 1:
        step = make_train_step(model, optimizer, config, None, ranks, rank_shares)
        return Jitted(step, make_evaluate(model, config.dtype))
    replicas = replicas_for(model, config)
    step = make_train_step(model, optimizer, config, replicas, ranks)
    return Jitted(step, make_evaluate(model, config.dtype, replicas), replicas.refresh)


def train_steps(
    model: Transformer,
    optimizer: Optimizer,
    config: TrainConfig,
    train_tokens: Text,
    val_tokens: Text | None = None,
    start: int = 0,
    guard: Guard | None = None,
    jitted: Jitted | None = None,
    ranks: Alone | None = None,
    scaling: LossScale | None = None,
    rank_shares: RankShares | None = None,
) -> Iterator[Step]:
    """Train from step ``start`` to ``config.max_iters``, yielding after every step.

    A batch depends on nothing but the tokens, the step and the seed, so a run that is resumed at a
    step goes on exactly as the one that was never interrupted; ``guard`` then holds the losses of
    the steps before, and ``scaling`` the loss scale. Raises TrainingError if too many steps in a
    row had to be skipped. With ``ranks``, processes that all iterate share every step, and all get
    the same.

    >>> for step in train_steps(model, optimizer, config, tokens):
    ...     print(step.iter, step.train_loss)
    """
    A, B, T = config.grad_accum_steps, config.batch_size, model.config.block_size
    guard, scaling = guard or Guard(config), scaling or LossScale(config.dtype)
    take_step, evaluate_batch, refresh = jitted or make_jitted(
        model, optimizer, config, ranks, rank_shares
    )
    refresh()
    apart, ranks = config.sync_every, ranks or Alone()
    meeting = None if apart is None else Meeting(optimizer, ranks)
    began = time.perf_counter()
    for i in range(start, config.max_iters):
        before = time.perf_counter()
        x, y = (a.reshape(A, B, T) for a in batch(train_tokens, i, config.seed, A * B, T))
        lr, limits = learning_rate(config, i), guard.limits()
        taking = partial(take_step, x, y, lr, (config.seed, i), limits)
        (loss, norm, taken, norms), overflows = scaling.take(taking)
        guard.see(loss, norm, taken)
        rate = A * B * T / (time.perf_counter() - before)
        done, val_loss = i + 1, None
        due = done % config.eval_interval == 0 or done == config.max_iters
        saves = config.checkpoint_interval and done % config.checkpoint_interval == 0
        if meeting is not None and apart and (done % apart == 0 or due or saves):
            meeting.take()
            if due or saves or ranks.stopping or ranks.saving:
                meeting.share_state()
            refresh()
        if val_tokens is not None and due:
            val_loss = evaluate(evaluate_batch, val_tokens, config.eval_iters, B, T, ranks)
        elapsed = time.perf_counter() - began
        skipped = None if taken else why_skipped(loss, norm, limits)
        yield Step(
            done, loss, lr, norm, rate, elapsed, val_loss, skipped,
            loss_scale=scaling.value if scaling.dynamic else None,
            overflows=overflows, grad_norms=norms,
        )  # fmt: skip
        if skipped and guard.exhausted:
            ranks.over = meeting is None  # of all ranks, unless each has losses of its own
            raise _given_up(model, config, x, y, done, skipped)


def _given_up(
    model: Transformer, config: TrainConfig, x: Tokens, y: Tokens, done: int, skipped: str
) -> TrainingError:
    """The error after too many skipped steps; ``x``, ``y`` (A, B, T) are those of step ``done``."""
    keys = (key_of(config.seed, (done - 1) * len(x) + i) for i in range(len(x)))
    finding = diagnose(model, x, y, [Tensor(key) for key in keys], half_of(config.dtype))
    steps = f"{config.max_skipped} steps in a row" if config.max_skipped > 1 else "A step"
    return TrainingError(
        f"{steps} had to be skipped, the last at step {done}: {skipped}. {finding} "
        f"The weights are those of the last step that was taken. {finding.advice(config)}"
    )
