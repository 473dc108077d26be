"""``--batch-size auto``: the largest micro-batch that fits in memory, for as many tokens a step.

A step's sequences are cut into micro-batches of equal size. The estimate of ``preflight`` says
which sizes fit; of these the largest is tried in a process of its own, which takes a step and
evaluates, and reports the memory at its peak. Where that is more than there is, or the system ends
the process (it is the first to go when memory runs out), the next smaller size is tried.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

from tinygpt.config import GPTConfig, TrainConfig
from tinygpt.errors import DeviceError, UsageError
from tinygpt.files.disk import size
from tinygpt.kernels.loops import divisors
from tinygpt.machine import children, resources
from tinygpt.training import preflight

LIMIT = 3600
"""Seconds for a try."""

TRY = """
from contextlib import suppress
import numpy as np
from tinygpt import GPT, GPTConfig, TrainConfig
from tinygpt.machine import resources
from tinygpt.model import lora
from tinygpt.training.loop import make_jitted
from tinygpt.training.optim import make_optimizer
from tinygrad import Tensor
with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
    file.write("1000")
shape, config = GPTConfig(**MODEL), TrainConfig(**TRAIN)
Tensor([1.0]).realize()
before = resources.memory()
model = GPT(shape, config.seed)
lora.prepare(model, config)
jitted = make_jitted(model, make_optimizer(model.trainable(), config), config)
x = np.zeros((config.grad_accum_steps, config.batch_size, shape.block_size), np.int32)
jitted.take_step(x, x, 0.0, (0, 0))
jitted.evaluate_batch(x[0], x[0])
print(resources.peak_memory() - before)
"""
"""A step and an evaluation; prints the bytes that they take at the peak."""


class Fit(NamedTuple):
    """A recipe that fits, the bytes that it takes, which were measured, and those that are free."""

    train: TrainConfig
    taken: int
    free: int


Measure = Callable[[GPTConfig, TrainConfig], int | None]


def fit(
    model: GPTConfig, train: TrainConfig, given: bool = False, measure: Measure | None = None
) -> Fit:
    """``train`` with the largest micro-batch that fits; a step has the same sequences.

    ``measure`` says how many bytes a run takes, None if it could not be run. Raises UsageError
    where nothing fits, with what would; the weights may be ``given``, see ``preflight.check``.
    """
    free = resources.available_memory() if preflight.on_cpu() else 0
    if not free:
        raise UsageError(
            "--batch-size auto needs to know how much memory is free, which this device does not "
            "say. Give a number, and --grad-accum-steps for a larger step."
        )
    room = int(preflight.ROOM * free)
    for smaller in cuts(train):
        if preflight.preflight(model, smaller).needed > room:
            continue
        taken = (measure or measured)(model, smaller)
        if taken is not None and taken <= room:
            return Fit(smaller, taken, free)
    needed = preflight.preflight(model, smaller).needed
    raise UsageError(
        f"Not even micro-batches of {smaller.batch_size} fit: they need {size(needed)}, and "
        f"{size(room)} of {size(free)} are free. {preflight.advice(model, smaller, free, given)}"
    )


def cuts(train: TrainConfig) -> Iterator[TrainConfig]:
    """The ways to cut a step's sequences into equal micro-batches, the largest first."""
    rows, devices = train.batch_size * train.grad_accum_steps, train.n_devices
    for batch in reversed(divisors(rows)):
        if batch % devices == 0:
            yield replace(train, batch_size=batch, grad_accum_steps=rows // batch)


def measured(model: GPTConfig, train: TrainConfig) -> int | None:
    """Bytes that a run takes at its peak; None if it could not get them.

    Two micro-batches are as good as more, but for sums of sums; those, and the copy that is saved,
    are added as they are foreseen.
    """
    short = replace(train, grad_accum_steps=min(2, train.grad_accum_steps))
    settings = f"MODEL, TRAIN = {model.to_dict()!r}, {short.to_dict()!r}\n"
    try:
        done = children.run_code(settings + TRY, LIMIT)
    except subprocess.TimeoutExpired:
        return None
    if done.returncode < 0 or "MemoryError" in done.stderr:
        return None
    if done.returncode:
        raise DeviceError(f"A step could not be tried: {done.stderr.splitlines()[-1:]}.")
    whole, tried = preflight.preflight(model, train), preflight.preflight(model, short)
    return int(done.stdout.split()[-1]) + whole.saving + whole.sums - tried.sums
