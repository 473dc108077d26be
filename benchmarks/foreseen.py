"""What a run is foreseen to take, and what it takes: memory at the peak, and the time of a step.

    python benchmarks/foreseen.py [--case NAME ...] [--steps N] [--memory-only] [--json FILE]

Each case trains for a few steps in a process of its own, with an evaluation and a checkpoint. Its
peak is that of the process; its pace is the median of the steps after the first two, beside the
pace that was foreseen in the same process right before. The exit code is 1 if a peak is more than
10 % off, or a pace more than 15 %.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import Any

from common import MB, arguments, machine, show_machine, write_json

from tinygpt.config import PRESETS

MEMORY, PACE = 0.10, 0.15
"""How far a peak and a pace may be off, as a share of what was measured."""
LIMIT = 900
"""Seconds for a case."""


@dataclass(frozen=True)
class Case:
    """A model, a recipe, and the number of threads."""

    model: dict[str, Any]
    train: dict[str, Any]
    threads: int = 2


BABY = PRESETS["baby"].model | {"vocab_size": 65}
WIDE = {"vocab_size": 1024, "n_layer": 6, "n_embd": 256, "n_head": 8, "block_size": 256}
VAST = {"vocab_size": 50257, "n_layer": 2, "n_embd": 256, "n_head": 8, "block_size": 128}
DEEP = {"vocab_size": 1024, "n_layer": 12, "n_embd": 384, "n_head": 6, "block_size": 64}
CASES = {
    "baby": Case(BABY, {"batch_size": 12}),
    "baby, one thread": Case(BABY, {"batch_size": 12}, threads=1),
    "large vocabulary": Case(BABY | {"vocab_size": 50257}, {"batch_size": 8}),
    "wide": Case(WIDE, {"batch_size": 8}),
    "wide, one thread": Case(WIDE, {"batch_size": 4}, threads=1),
    "large batch": Case(BABY | {"block_size": 256}, {"batch_size": 48}),
    "dropout": Case(WIDE | {"dropout": 0.1}, {"batch_size": 8}),
    "plain attention": Case(BABY | {"block_size": 128, "attention": "plain"}, {"batch_size": 4}),
    "recompute": Case(WIDE, {"batch_size": 8, "recompute": True}),
    "recompute, dropout": Case(WIDE | {"dropout": 0.1}, {"batch_size": 16, "recompute": True}),
    "accumulation": Case(
        WIDE | {"tie_embeddings": False}, {"batch_size": 4, "grad_accum_steps": 3}
    ),
    "accumulation, recompute": Case(
        WIDE, {"batch_size": 4, "grad_accum_steps": 2, "recompute": True}
    ),
    "muon": Case(WIDE, {"batch_size": 8, "optimizer": "muon"}),
    "muon, accumulation": Case(
        WIDE, {"batch_size": 4, "optimizer": "muon", "grad_accum_steps": 2}
    ),
    "LoRA": Case(WIDE, {"batch_size": 8, "lora_rank": 8}),
    "LoRA, recompute": Case(WIDE, {"batch_size": 8, "lora_rank": 8, "recompute": True}),
    "freeze": Case(WIDE, {"batch_size": 8, "freeze": 4}),
    "bfloat16": Case(WIDE, {"batch_size": 8, "dtype": "bfloat16"}),
    "bfloat16, recompute": Case(
        WIDE, {"batch_size": 8, "dtype": "bfloat16", "recompute": True}
    ),
    "bfloat16, large vocabulary": Case(VAST, {"batch_size": 4, "dtype": "bfloat16"}),
    "float16, large vocabulary": Case(VAST, {"batch_size": 4, "dtype": "float16"}),
    "LoRA, bfloat16": Case(VAST, {"batch_size": 4, "lora_rank": 8, "dtype": "bfloat16"}),
    "LoRA, float16": Case(VAST, {"batch_size": 4, "lora_rank": 8, "dtype": "float16"}),
    "muon, deep": Case(DEEP, {"batch_size": 4, "optimizer": "muon"}),
    "two devices": Case(WIDE, {"batch_size": 8, "devices": 2}),
    "two devices, accumulation": Case(
        WIDE, {"batch_size": 4, "devices": 2, "grad_accum_steps": 2}
    ),
    "two devices, divided": Case(DEEP, {"batch_size": 8, "devices": 2, "shard_optimizer": True}),
}  # fmt: skip


def measure(case: Case, steps: int) -> dict[str, Any]:
    """What was foreseen and measured in this process, which does nothing else."""
    import numpy as np
    from tinygrad import Tensor
    from tinygrad.helpers import GlobalCounters

    from tinygpt import GPT
    from tinygpt.config import GPTConfig, TrainConfig
    from tinygpt.machine import resources
    from tinygpt.runs.run import TrainingRun
    from tinygpt.text.tokenizers import ByteTokenizer
    from tinygpt.training import preflight, probe

    model = GPTConfig(**case.model)
    settings = {"max_iters": steps, "eval_interval": steps, "eval_iters": 1, "warmup_steps": 0}
    train = TrainConfig(**settings | case.train)
    Tensor([1.0]).realize()  # the device is open
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, 20_000).astype(np.uint16)
    estimate = preflight.preflight(model, train)
    tokenizer = ByteTokenizer() if model.vocab_size == 256 else None
    seconds = probe.seconds_per_step(model, train)
    with tempfile.TemporaryDirectory() as folder:
        run = TrainingRun(
            GPT(model), train, tokens, tokens[-5000:], tokenizer=tokenizer, folder=folder
        )
        paces = [estimate.tokens / step.tokens_per_second for step in run]
    return {
        "foreseen": estimate.to_dict(),
        "foreseen_seconds": seconds,
        "peak": resources.peak_memory(),
        "device": GlobalCounters.mem_used,
        "seconds": statistics.median(paces[2:] or paces),
    }


def in_a_process(name: str, steps: int) -> dict[str, Any]:
    """``measure`` in a process of its own, with the case's threads."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", name, "--steps", str(steps)],
        env=os.environ | {"TINYGPT_THREADS": str(CASES[name].threads)},
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def off(foreseen: float, measured: float) -> float:
    """By what share of what was measured the estimate is above it, or below (negative)."""
    return foreseen / measured - 1


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--case", action="append", choices=CASES, help="all, if not given")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--memory-only", action="store_true", help="do not judge the pace")
    parser.add_argument("--child", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(CASES[options.child], options.steps)))
        return 0
    print("| case | threads | peak foreseen | measured | | step foreseen | measured | |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    results, wrong = dict[str, Any](), 0
    for name in options.case or CASES:
        found = results[name] = in_a_process(name, options.steps)
        memory = off(found["foreseen"]["peak"], found["peak"])
        pace = off(found["foreseen_seconds"], found["seconds"])
        wrong += abs(memory) > MEMORY or (abs(pace) > PACE and not options.memory_only)
        print(
            f"| {name} | {CASES[name].threads} "
            f"| {found['foreseen']['peak'] / MB:,.0f} MB | {found['peak'] / MB:,.0f} MB "
            f"| {memory:+.0%} | {1000 * found['foreseen_seconds']:,.0f} ms "
            f"| {1000 * found['seconds']:,.0f} ms | {pace:+.0%} |",
            flush=True,
        )
    found = machine()
    show_machine(found, options.threads)
    write_json(options.json, {"machine": found, "cases": results})
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
