"""What a checkpoint costs a run: the pause in the step loop, and what follows in the background.

    python benchmarks/checkpoint.py [--config baby|gpt2] [--folder DIR] [--threads N] [--rounds R]
                                    [--cpu-time] [--json FILE]

First the file must equal the state it was made from. Then come turns of a copy of as many bytes in
memory (both arrays touched before), of a save, and for ``baby`` of some training steps with and
without a save before them. The pause is the time until ``Saver.save`` returns, with no write still
under way; the write is what the thread takes then, to the last fsync, while nothing else is done.
The very first save, which also has to be given its memory, is told apart.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    MB,
    Spread,
    add_cpu_time,
    arguments,
    machine,
    parse,
    ratio,
    show_machine,
    take_turns,
    write_json,
)

from tinygpt.config import PRESETS, GPTConfig, TrainConfig
from tinygpt.runs import checkpoint
from tinygpt.text import batches

CLOCKS = {False: time.perf_counter, True: time.thread_time}
"""By whether processor time is asked for: that of the step loop alone, without the thread's."""


@dataclass(frozen=True)
class Setting:
    """A model and its recipe, how many steps make a turn, and how many turns there are."""

    model: GPTConfig
    train: TrainConfig
    turn: int
    rounds: int


BABY, GPT2 = PRESETS["baby"], PRESETS["gpt2"]
SETTINGS = {
    "baby": Setting(GPTConfig(vocab_size=65, **BABY.model), TrainConfig(**BABY.train), 20, 20),
    "gpt2": Setting(GPTConfig(**GPT2.model), TrainConfig(**GPT2.train), 0, 7),
}


class Run:
    """A model, its optimizer and what saves them."""

    def __init__(self, setting: Setting, folder: Path, cpu_time: bool) -> None:
        from tinygpt.model.transformer import Transformer
        from tinygpt.training.optim import make_optimizer
        from tinygpt.training.step import make_train_step

        self.setting, self.clock, self.done = setting, CLOCKS[cpu_time], 0
        self.model = Transformer(setting.model)
        self.optimizer = make_optimizer(self.model.parameters(), setting.train)
        self.take_step = make_train_step(self.model, self.optimizer, setting.train)
        powers = np.random.default_rng(0).random(200_000) ** 3
        self.tokens = (powers * setting.model.vocab_size).astype(np.uint16)
        self.saver = checkpoint.Saver(folder, keep_last=1)
        self.saves = 0
        size = checkpoint.state_size(self.model, self.optimizer)
        self.source, self.target = np.ones(size, np.uint8), np.zeros(size, np.uint8)

    def steps(self, count: int) -> None:
        train, block = self.setting.train, self.setting.model.block_size
        for _ in range(count):
            x, y = batches.batch(self.tokens, self.done, 0, train.batch_size, block)
            self.take_step(x[None], y[None], 1e-3, (0, self.done))
            self.done += 1

    def begin_to_save(self) -> Path:
        self.saves += 1
        meta = checkpoint.Meta(self.saves, self.setting.model, self.setting.train)
        return self.saver.save(self.model, self.optimizer, meta)

    def check(self) -> None:
        """The file is the state, bit for bit. Raises SystemExit if it is not."""
        path = self.begin_to_save()
        self.saver.wait()
        if news := self.saver.news():
            raise SystemExit("\n".join(news))
        _, arrays = checkpoint.read(path)
        for name, tensor in checkpoint.named_tensors(self.model, self.optimizer).items():
            if arrays[name].tobytes() != tensor.numpy().tobytes():
                raise SystemExit(f"{name} in {path} is not what it is in memory")

    # Turns, in seconds

    def copy(self) -> float:
        start = self.clock()
        np.copyto(self.target, self.source)
        return self.clock() - start

    def pause(self) -> float:
        self.saver.wait()
        start = self.clock()
        self.begin_to_save()
        return self.clock() - start

    def write(self) -> float:
        """On the wall's clock."""
        self.pause()
        start = time.perf_counter()
        self.saver.wait()
        return time.perf_counter() - start

    def step(self) -> float:
        """The median of some steps."""
        self.saver.wait()
        times = []
        for _ in range(self.setting.turn):
            start = self.clock()
            self.steps(1)
            times.append(self.clock() - start)
        return statistics.median(times)

    def plain_steps(self) -> float:
        self.saver.wait()
        start = self.clock()
        self.steps(self.setting.turn)
        return self.clock() - start

    def saving_steps(self) -> float:
        self.saver.wait()
        start = self.clock()
        self.begin_to_save()
        self.steps(self.setting.turn)
        return self.clock() - start


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    setting = SETTINGS[options.config]
    run = Run(setting, folder, options.cpu_time)
    if setting.turn:
        run.steps(setting.turn)
    first = run.pause()
    run.check()
    works = {"copy": run.copy, "pause": run.pause, "write": run.write}
    if setting.turn:
        works |= {"step": run.step, "plain": run.plain_steps, "saving": run.saving_steps}
    found = take_turns(works, options.rounds or setting.rounds)
    result: dict[str, Any] = {
        "bytes": run.source.nbytes,
        "first_pause_s": first,
        "copy_s": Spread.of(found["copy"]),
        "pause_s": Spread.of(found["pause"]),
        "pause_in_copies": ratio(found["pause"], found["copy"]),
        "write_s": Spread.of(found["write"]),
    }
    if setting.turn:
        more = [a - b for a, b in zip(found["saving"], found["plain"], strict=True)]
        result |= {
            "step_s": Spread.of(found["step"]),
            "pause_in_steps": ratio(found["pause"], found["step"]),
            "more_s": Spread.of(more),
            "turn": setting.turn,
        }
    return result


def milliseconds(spread: Spread) -> str:
    scaled = Spread(*(1000 * value for value in (spread.median, spread.low, spread.high)))
    return f"{scaled.show('.2f')} ms"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--config", choices=SETTINGS, default="baby")
    parser.add_argument("--folder", help="on the disk to measure [default: a temporary one]")
    parser.add_argument("--rounds", type=int, help="turns of each kind")
    add_cpu_time(parser)
    options = parse(parser)
    where = machine()
    show_machine(where, options.threads)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = measure(options, Path(folder))
    print(f"{options.config}: {found['bytes'] / MB:.1f} MB of weights and optimizer state")
    print(f"copy in memory   {milliseconds(found['copy_s'])}")
    print(
        f"pause of a save  {milliseconds(found['pause_s'])}: "
        f"{found['pause_in_copies'].show()} x the copy"
        f"; the first one {1000 * found['first_pause_s']:.1f} ms"
    )
    if "step_s" in found:
        print(
            f"training step    {milliseconds(found['step_s'])}: "
            f"the pause is {found['pause_in_steps'].show('.1%')} of it"
        )
        print(f"{found['turn']} steps take     {milliseconds(found['more_s'])} more with a save")
    print(f"background write {milliseconds(found['write_s'])}")
    result = {"benchmark": "checkpoint", "machine": where, "config": options.config}
    write_json(
        options.json, result | {"threads": options.threads, "cpu_time": options.cpu_time} | found
    )


if __name__ == "__main__":
    main()
