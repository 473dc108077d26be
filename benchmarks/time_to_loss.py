"""nanoGPT's recipe for a CPU, from the start of the process to the trained model.

    python benchmarks/time_to_loss.py tinyshakespeare.txt [--threads N] [--iters N] [--rounds R]
                                      [--compiled] [--fill] [--json FILE]

The preset ``baby``: 2000 steps of 12 x 64 characters, 4 layers, 128 wide, an evaluation on 20
batches every 250 steps. The time counts from the start of the process to the last evaluation:
imports, reading the text, compiling and all. The loss is that of the whole validation split, the
last tenth of the text, and is taken after the clock has stopped. Both start from the same weights
and see the same batches. ``--fill`` trains ours once more, with as many steps as fit into the time
that PyTorch took.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    MB,
    Side,
    SideError,
    Spread,
    arguments,
    machine,
    ratio,
    show_machine,
    take_turns,
    write_json,
)

from tinygpt.config import PRESETS, GPTConfig, TrainConfig
from tinygpt.machine import resources
from tinygpt.text.batches import batch, split

EVAL_SEED = 0x5EED


class Recipe:
    """What the sides share: the text, the settings, and the loss over the whole split."""

    def __init__(self, path: str, iters: int) -> None:
        from tinygpt.text.tokenizers import CharTokenizer

        text = Path(path).read_text(encoding="utf-8")
        tokenizer, preset = CharTokenizer.train(text), PRESETS["baby"]
        tokens = np.array(tokenizer.encode(text), np.uint16)
        self.model = GPTConfig(vocab_size=tokenizer.vocab_size, **preset.model)
        self.config = TrainConfig(**preset.train | {"max_iters": iters})
        self.train_tokens, self.val_tokens = split(tokens, 0.1, self.model.block_size)
        self.curve: list[float] = []

    def loss(self, x: np.ndarray, y: np.ndarray) -> float:
        raise NotImplementedError

    def whole_validation(self) -> float:
        """Mean loss over every token of the validation split."""
        from tinygpt.training.evaluation import windows

        shape = (self.config.batch_size, self.model.block_size)
        batches = windows(self.val_tokens, *shape)
        weighted = [(self.loss(x, y) * count, count) for x, y, count in batches]
        return sum(loss for loss, _ in weighted) / sum(count for _, count in weighted)

    def outcome(self) -> dict[str, Any]:
        loss = self.whole_validation()
        return {"loss": loss, "curve": self.curve, "peak_mb": resources.peak_memory() / MB}


class Ours(Recipe):
    def train(self) -> None:
        from tinygpt.model.transformer import Transformer
        from tinygpt.training.loop import train_steps
        from tinygpt.training.optim import make_optimizer
        from tinygpt.training.step import make_evaluate

        model = Transformer(self.model)
        optimizer = make_optimizer(model.parameters(), self.config)
        for step in train_steps(model, optimizer, self.config, self.train_tokens, self.val_tokens):
            if step.val_loss is not None:
                self.curve.append(step.val_loss)
        self.evaluate = make_evaluate(model)

    def loss(self, x: np.ndarray, y: np.ndarray) -> float:
        return self.evaluate(x, y)


class Torch(Recipe):
    def __init__(self, path: str, iters: int, threads: int, compiled: bool) -> None:
        super().__init__(path, iters)
        self.threads, self.compiled = threads, compiled

    def train(self) -> None:
        import torch
        import torch_gpt

        torch.set_num_threads(self.threads)
        self.torch, config, block = torch, self.config, self.model.block_size
        self.gpt = torch_gpt.GPT(self.model)
        take_step = torch_gpt.make_train_step(self.gpt, config, self.compiled)
        for i in range(config.max_iters):
            x, y = batch(self.train_tokens, i, config.seed, config.batch_size, block)
            take_step(x, y, torch_gpt.learning_rate(config, i))
            if (i + 1) % config.eval_interval == 0 or i + 1 == config.max_iters:
                self.curve.append(self._evaluate())

    def loss(self, x: np.ndarray, y: np.ndarray) -> float:
        with self.torch.inference_mode():
            ids = (self.torch.from_numpy(a).long() for a in (x, y))
            return self.gpt(*ids).item()

    def _evaluate(self) -> float:
        shape = (self.config.batch_size, self.model.block_size)
        batches = (
            batch(self.val_tokens, i, EVAL_SEED, *shape) for i in range(self.config.eval_iters)
        )
        return statistics.fmean(self.loss(x, y) for x, y in batches)


class Runs:
    """Whole runs of one side, each in a new process; what came of them is kept."""

    def __init__(self, make: Any, *args: Any, threads: int) -> None:
        self.make, self.args, self.threads = make, args, threads
        self.outcomes: list[dict[str, Any]] = []

    def __call__(self) -> float:
        """-> seconds"""
        start = time.perf_counter()
        side = Side(self.make, *self.args, threads=self.threads)
        side("train")
        seconds = time.perf_counter() - start
        self.outcomes.append(side("outcome"))
        side.close()
        return seconds

    def row(self, name: str, seconds: list[float], ours: list[float]) -> dict[str, Any]:
        return {
            "side": name,
            "iters": self.args[1],
            "seconds": Spread.of(seconds),
            "ratio": ratio(seconds, ours),
            "loss": Spread.of([outcome["loss"] for outcome in self.outcomes]),
            "peak_mb": max(outcome["peak_mb"] for outcome in self.outcomes),
            "curve": self.outcomes[-1]["curve"],
        }


def measure(options: Any) -> list[dict[str, Any]]:
    path, iters, threads = options.text, options.iters, options.threads
    runs = {
        "ours": Runs(Ours, path, iters, threads=threads),
        "torch": Runs(Torch, path, iters, threads, options.compiled, threads=threads),
    }
    seconds = take_turns(runs, options.rounds)
    rows = [run.row(name, seconds[name], seconds["ours"]) for name, run in runs.items()]
    if options.fill:
        # From two lengths: what a start costs, and what a step costs.
        short = max(1, iters // 10)
        begin, whole = Runs(Ours, path, short, threads=threads)(), rows[0]["seconds"].median
        step = (whole - begin) / (iters - short)
        more = int(short + (rows[1]["seconds"].median - begin) / step)
        run = Runs(Ours, path, more, threads=threads)
        rows.append(run.row("ours, as long", [run()], [whole]))
    return rows


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("text", help="the text: tinyshakespeare, for the known figures")
    parser.add_argument("--iters", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--compiled", action="store_true", help="PyTorch with torch.compile")
    parser.add_argument("--fill", action="store_true", help="ours again, as long as PyTorch took")
    options = parser.parse_args()
    where = machine()
    show_machine(where, options.threads)
    try:
        rows = measure(options)
    except SideError as error:
        raise SystemExit(str(error)) from None
    for row in rows:
        print(
            f"{row['side']:14} {row['iters']:5} steps   {row['seconds'].show('.1f')} s   "
            f"{row['ratio'].show()} x the time of ours   "
            f"validation loss {row['loss'].show('.3f')}   peak {row['peak_mb']:.0f} MB"
        )
    result = {"benchmark": "time_to_loss", "machine": where, "threads": options.threads}
    write_json(options.json, result | {"compiled": options.compiled, "rows": rows})


if __name__ == "__main__":
    main()
