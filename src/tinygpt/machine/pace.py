"""Time a training step on a device, in a process of its own: a device is chosen once in each."""

from __future__ import annotations

import subprocess

from tinygpt.machine import children, choice, resources

LIMIT = 300
"""Seconds for a device, most of which go into compiling."""

STEP = """
import numpy as np
from tinygpt import GPT, GPTConfig, AdamW, TrainConfig
from tinygpt.training.loop import train_steps
model = GPT(GPTConfig(vocab_size=64, block_size=64, n_layer=1, n_head=2, n_embd=64))
config = TrainConfig(max_iters=4, batch_size=4, eval_interval=4)
tokens = np.arange(2000) % 64
steps = train_steps(model, AdamW(model.parameters()), config, tokens)
print(min(4 * 64 / step.tokens_per_second for step in steps))
"""
"""A small step, taken four times; prints the seconds of the fastest."""


def candidates() -> list[str]:
    """Names of tinygrad's devices worth a try here: the processor alone where nothing else is."""
    drivers = any(resources.OPENCL_DRIVERS.glob("*.icd"))
    if not (drivers or resources.may_have_accelerator()):
        return ["CPU"]
    from tinygpt.machine.tinygrad_internals import ALL_DEVICES

    return [name for name in ALL_DEVICES if name != "CL" or choice.has_opencl()]


def seconds_per_step(device: str) -> float | None:
    """Seconds of a small training step there; None where it fails or takes too long."""
    try:
        done = children.run_code(STEP, LIMIT, environment={"DEV": device})
        return float(done.stdout.split()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
