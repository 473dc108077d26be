"""From the start of the process to the first training step, and to the first generated token.

    python benchmarks/startup.py [--threads N] [--rounds R] [--json FILE]

The ``baby`` configuration in a fresh process each time, ours and PyTorch's taking turns. ``cold``
starts with an empty kernel cache, ``warm`` with the one that the cold start left. Files are in the
system's cache, as after any earlier start. The stages: Python itself, imports, the model (and the
optimizer), the first step or token, and the second one.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from common import SideError, Spread, arguments, machine, show_machine, write_json

WHOSE = ("our", "torch")
STAGES = ("python", "import", "model", "first", "second")


class Marks:
    """The moments at which stages ended, on the clock that all processes share."""

    def __init__(self) -> None:
        self.times = [time.monotonic()]

    def __call__(self) -> None:
        self.times.append(time.monotonic())

    def show(self) -> None:
        print("marks", *self.times)


def our_training(mark: Marks) -> None:
    import numpy as np

    from tinygpt import GPT, PRESETS, GPTConfig, TrainConfig, train_steps
    from tinygpt.training.optim import make_optimizer

    mark()
    preset = PRESETS["baby"]
    config = TrainConfig(**preset.train)
    model = GPT(GPTConfig(vocab_size=65, **preset.model))
    optimizer = make_optimizer(model.parameters(), config)
    mark()
    steps = train_steps(model, optimizer, config, np.arange(100_000) % 65)
    for _ in range(2):
        assert 0 < next(steps).train_loss < 5
        mark()


def our_generation(mark: Marks) -> None:
    from tinygpt import GPT, PRESETS, GPTConfig
    from tinygpt.generation.generate import generate_tokens

    mark()
    model = GPT(GPTConfig(vocab_size=65, **PRESETS["baby"].model)).eval()
    mark()
    tokens = generate_tokens(model.decoder, [[0]], 2)
    for _ in range(2):
        assert 0 <= int(next(tokens)[0]) < 65
        mark()


def torch_training(mark: Marks) -> None:
    import numpy as np
    import torch
    import torch_gpt

    from tinygpt.config import PRESETS, GPTConfig, TrainConfig
    from tinygpt.text import batches

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    mark()
    preset = PRESETS["baby"]
    config = TrainConfig(**preset.train)
    model = torch_gpt.GPT(GPTConfig(vocab_size=65, **preset.model))
    take_step = torch_gpt.make_train_step(model, config)
    mark()
    tokens = np.arange(100_000) % 65
    for i in range(2):
        x, y = batches.batch(tokens, i, 0, config.batch_size, 64)
        assert 0 < take_step(x, y, torch_gpt.learning_rate(config, i)) < 5
        mark()


def torch_generation(mark: Marks) -> None:
    import torch
    import torch_gpt

    from tinygpt.config import PRESETS, GPTConfig

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    mark()
    model = torch_gpt.GPT(GPTConfig(vocab_size=65, **PRESETS["baby"].model)).eval()
    decoder = torch_gpt.Decoder(model)
    mark()
    logits = decoder.logits(torch.tensor([[0]]), 0)
    for position in (1, 2):
        token = logits.argmax(-1, keepdim=True)
        assert 0 <= token.item() < 65
        mark()
        logits = decoder.logits(token, position)


WORKS = {
    "our training": our_training,
    "our generation": our_generation,
    "torch training": torch_training,
    "torch generation": torch_generation,
}


def run(name: str, threads: int, cache: Path) -> list[float]:
    """Seconds that each stage took in a process of its own."""
    environ = os.environ | {"CACHEDB": str(cache)}
    environ |= dict.fromkeys(("TINYGPT_THREADS", "OMP_NUM_THREADS"), str(threads))
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, __file__, "--work", name], env=environ, capture_output=True, text=True
    )
    marks = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("marks")]
    if done.returncode or not marks:
        raise SideError(done.stderr.strip().splitlines()[-1])
    times = [start, *map(float, marks[0])]
    return [after - before for before, after in itertools.pairwise(times)]


def measure(threads: int, rounds: int) -> dict[str, Any]:
    taken: dict[str, list[list[float]]] = {}
    left_out: dict[str, str] = {}

    def take(title: str, work: Any) -> None:
        try:
            taken.setdefault(title, []).append(work())
        except SideError as error:
            left_out[title] = str(error)

    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            for task in ("training", "generation"):
                cache = Path(folder, f"{task}.db")
                ours, theirs = (partial(run, f"{s} {task}", threads, cache) for s in WHOSE)
                take(f"ours, {task}, cold", ours)
                take(f"torch, {task}", theirs)
                take(f"ours, {task}, warm", ours)
    rows = [
        {
            "case": title,
            "to_first": Spread.of([sum(stages[: STAGES.index("second")]) for stages in runs]),
            "stages": {
                stage: Spread.of([stages[i] for stages in runs]) for i, stage in enumerate(STAGES)
            },
        }
        for title, runs in taken.items()
        if runs
    ]
    return {"rows": rows, "left_out": left_out}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", choices=WORKS, help="do this and tell when (used inside)")
    options = parser.parse_args()
    if options.work:
        mark = Marks()
        WORKS[options.work](mark)
        mark.show()
        return
    where = machine()
    show_machine(where, options.threads)
    found = measure(options.threads, options.rounds)
    print("seconds to the first step or token, and in each stage:", ", ".join(STAGES))
    for row in found["rows"]:
        stages = "  ".join(f"{spread.median:.2f}" for spread in row["stages"].values())
        print(f"{row['case']:23} {row['to_first'].show()} s   {stages}")
    for name, reason in found["left_out"].items():
        print(f"{name}: left out: {reason}")
    result = {"benchmark": "startup", "machine": where, "threads": options.threads}
    write_json(options.json, result | found)


if __name__ == "__main__":
    main()
