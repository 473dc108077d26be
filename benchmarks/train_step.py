"""A training step: ours against PyTorch's, eager and compiled, and against plain tinygrad.

    python benchmarks/train_step.py [--config baby|seeds|gpt2|muon|blocks] [--threads N]
                                    [--rounds R] [--eager] [--plain] [--half]
                                    [--optimizer fused|foreach|plain] [--check N]
                                    [--cpu-time] [--json FILE]

A step is forward, backward, clipping and AdamW, from numpy batches to the loss as a number. All
sides start from the same weights and see the same batches; their losses over the first steps must
agree. Then they take turns, with a loop of multiply-adds among them: a step's share of the peak is
of the one that was measured beside it, for all products of model and optimizer, whatever else a
step does. Of PyTorch's two ways the faster one counts. ``--plain`` adds the same model on tinygrad
without our kernels and without our pool of threads, in few steps.

With ``muon`` (``baby`` with batches of 24) and ``blocks`` (two of GPT-2's, with 16 x 1024 tokens)
the optimizer is Muon on both sides, PyTorch's in batched products; another side is ours with AdamW,
which tells what Muon costs.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    CLOCKS,
    MB,
    Side,
    SideError,
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
from peak import Peak

from tinygpt.config import PRESETS, GPTConfig, TrainConfig
from tinygpt.machine import resources
from tinygpt.text import batches
from tinygpt.training.preflight import preflight

TOLERANCE = 1e-3
"""Nats by which the losses of two sides may differ."""
PLAIN = "plain tinygrad"
PEAK = "peak"
ADAMW = "ours, AdamW"
HALF = "ours, bfloat16"
ANOTHER = (ADAMW, HALF)
"""Sides whose losses are others."""


@dataclass(frozen=True)
class Setting:
    """A model, a recipe, and how many of its steps are checked and make a turn."""

    model: GPTConfig
    train: TrainConfig
    checked: int
    turn: int
    rounds: int


BABY, GPT2 = PRESETS["baby"], PRESETS["gpt2"]
MUON = {"optimizer": "muon", "batch_size": 24, "weight_decay": 0.1, "beta2": 0.95}
TWO_BLOCKS = GPT2.model | {"n_layer": 2, "vocab_size": 256}
SETTINGS = {
    "baby": Setting(GPTConfig(vocab_size=65, **BABY.model), TrainConfig(**BABY.train), 25, 20, 25),
    "seeds": Setting(GPTConfig(vocab_size=50257), TrainConfig(batch_size=8), 25, 3, 15),
    "gpt2": Setting(
        GPTConfig(**GPT2.model), TrainConfig(**GPT2.train | {"grad_accum_steps": 1}), 4, 1, 5
    ),
    "muon": Setting(
        GPTConfig(vocab_size=65, **BABY.model), TrainConfig(**BABY.train | MUON), 10, 20, 25
    ),
    "blocks": Setting(GPTConfig(**TWO_BLOCKS), TrainConfig(**MUON | {"batch_size": 16}), 2, 1, 5),
}


class Trainer:
    """What the sides share: batches, losses and times."""

    def __init__(self, name: str) -> None:
        setting = SETTINGS[name]
        self.model, self.config, self.done = setting.model, setting.train, 0
        # Powers of a uniform number: some tokens are frequent, so that there is something to learn.
        powers = np.random.default_rng(0).random(200_000) ** 3
        self.tokens = (powers * setting.model.vocab_size).astype(np.uint16)
        self.memory_before = resources.memory()

    def step(self, x: np.ndarray, y: np.ndarray) -> float:
        raise NotImplementedError

    def losses(self, count: int) -> list[float]:
        """Of the next steps."""
        return [self._next() for _ in range(count)]

    def seconds(self, count: int, cpu_time: bool) -> float:
        """The median over the next steps."""
        times, clock = [], CLOCKS[cpu_time]
        for _ in range(count):
            start = clock()
            self._next()
            times.append(clock() - start)
        return statistics.median(times)

    def memory(self) -> tuple[int, int]:
        """Bytes: the peak, and what the process had before it made the model."""
        return resources.peak_memory(), self.memory_before

    def _next(self) -> float:
        batch_size, block_size = self.config.batch_size, self.model.block_size
        x, y = batches.batch(self.tokens, self.done, 0, batch_size, block_size)
        loss = self.step(x, y)
        self.done += 1
        return loss


class Ours(Trainer):
    def __init__(
        self,
        name: str,
        plain: bool = False,
        optimizer: str | None = None,
        dtype: str = "float32",
    ) -> None:
        import contextlib

        from tinygpt import kernels
        from tinygpt.model.transformer import Transformer
        from tinygpt.training.optim import make_optimizer
        from tinygpt.training.step import make_train_step

        super().__init__(name)
        optimizer = optimizer or self.config.optimizer
        self.config = replace(self.config, optimizer=optimizer, dtype=dtype)
        self.way = kernels.plain if plain else contextlib.nullcontext
        self.gpt = Transformer(self.model)
        made = make_optimizer(self.gpt.parameters(), self.config)
        self.take_step = make_train_step(self.gpt, made, self.config)

    def step(self, x: np.ndarray, y: np.ndarray) -> float:
        from tinygpt.training.optim import learning_rate

        rate = learning_rate(self.config, self.done)
        with self.way():
            return self.take_step(x[None], y[None], rate, (0, self.done))[0]

    def save_weights(self, folder: str) -> None:
        for name, parameter in self.gpt.parameters().items():
            np.save(Path(folder, f"{name}.npy"), parameter.numpy())

    def launches(self) -> int:
        """Kernels of one step, those of a captured jit included."""
        from tinygpt.machine.pool.workers import Pool

        run, counts = Pool.run, list[int]()

        def counting(pool: Pool, commands: Any, count: int) -> None:
            counts.append(count)
            run(pool, commands, count)

        Pool.run = counting  # type: ignore[method-assign]
        self._next()
        Pool.run = run  # type: ignore[method-assign]
        return sum(counts)


class Torch(Trainer):
    def __init__(self, name: str, folder: str, threads: int, compiled: bool, kind: str) -> None:
        import torch
        import torch_gpt

        torch.set_num_threads(threads)
        super().__init__(name)
        self.rate = torch_gpt.learning_rate
        model = torch_gpt.GPT(self.model).load(folder)
        self.take_step = torch_gpt.make_train_step(model, self.config, compiled, kind)

    def step(self, x: np.ndarray, y: np.ndarray) -> float:
        return self.take_step(x, y, self.rate(self.config, self.done))


def start(options: Any, folder: str) -> tuple[dict[str, Side], dict[str, float], dict[str, str]]:
    """The sides that work and agree; by how much they differ from ours; why others were left out.

    Raises SystemExit if losses differ.
    """
    name, threads = options.config, options.threads
    count = options.check or SETTINGS[name].checked
    sides = {"ours": Side(Ours, name, threads=threads)}
    sides["ours"]("save_weights", folder)
    wanted = sides["ours"]("losses", count)
    kinds = {"torch eager": (Torch, name, folder, threads, False, options.optimizer)}
    if not options.eager:
        kinds["torch compiled"] = (Torch, name, folder, threads, True, options.optimizer)
    if options.plain:
        kinds[PLAIN] = (Ours, name, True)
    if SETTINGS[name].train.optimizer == "muon":
        kinds[ADAMW] = (Ours, name, False, "adam")
    if options.half:
        kinds[HALF] = (Ours, name, False, None, "bfloat16")
    differences, left_out = {}, {}
    for kind, (make, *args) in kinds.items():
        few = kind == PLAIN
        checked = min(count, 3) if few else count
        environ = {"TINYGPT_THREADS": "0"} if few else {}
        try:
            side = Side(make, *args, threads=threads, environ=environ)
            losses = side("losses", checked)
        except SideError as error:
            left_out[kind] = str(error).strip().splitlines()[-1]
            continue
        difference = max(abs(a - b) for a, b in zip(losses, wanted, strict=False))
        if not difference <= TOLERANCE and kind not in ANOTHER:
            raise SystemExit(f"{kind}: the losses differ by {difference}:\n{wanted}\n{losses}")
        sides[kind], differences[kind] = side, difference
    return sides, differences, left_out


def measure(options: Any) -> dict[str, Any]:
    setting = SETTINGS[options.config]
    with tempfile.TemporaryDirectory() as folder:
        sides, differences, left_out = start(options, folder)
    fast = {name: side for name, side in sides.items() if name != PLAIN}
    limit = Side(Peak, options.threads, threads=options.threads)
    rounds = options.rounds or setting.rounds
    works = steps(fast, setting.turn, options.cpu_time)
    turns = take_turns(works | {PEAK: partial(limit, "per_second", options.cpu_time)}, rounds)
    taken = dict.fromkeys(fast, turns)
    if PLAIN in sides:
        taken[PLAIN] = take_turns(steps({n: sides[n] for n in ("ours", PLAIN)}, 1, False), 3)
    rows = []
    for name, seconds in taken.items():
        peak, before = sides[name]("memory")
        rows.append(
            {
                "side": name,
                "ms": Spread.of([1e3 * s for s in seconds[name]]),
                "ratio": ratio(seconds[name], seconds["ours"]),
                "peak_mb": peak / MB,
                "before_model_mb": before / MB,
                "loss_difference": differences.get(name, 0.0),
                "of_peak": share(setting, name, seconds) if PEAK in seconds else None,
            }
        )
    launches = sides["ours"]("launches")
    for side in (*sides.values(), limit):
        side.close()
    peak = Spread.of([p / 1e9 for p in turns[PEAK]])
    return {"rows": rows, "peak_gflops": peak, "launches": launches, "left_out": left_out}


def share(setting: Setting, name: str, seconds: dict[str, list[float]]) -> Spread:
    """Of the peak, turn by turn: what the products of a step need, and not what a side does."""
    train = setting.train if name != ADAMW else replace(setting.train, optimizer="adam")
    operations = preflight(setting.model, train).flops
    return ratio([operations / s for s in seconds[name]], seconds[PEAK])


def steps(sides: dict[str, Side], count: int, cpu_time: bool) -> dict[str, Callable[[], float]]:
    """For each side the work that takes so many steps and tells the seconds of one."""
    return {name: partial(side, "seconds", count, cpu_time) for name, side in sides.items()}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--config", choices=SETTINGS, default="baby")
    parser.add_argument("--rounds", type=int, help="turns of each side")
    parser.add_argument("--check", type=int, help="steps whose losses are compared")
    parser.add_argument("--eager", action="store_true", help="leave torch.compile out")
    parser.add_argument("--plain", action="store_true", help="plain tinygrad, too; slow")
    parser.add_argument("--half", action="store_true", help="ours in bfloat16, too")
    parser.add_argument("--optimizer", choices=("fused", "foreach", "plain"), default="fused")
    add_cpu_time(parser)
    options = parse(parser)
    where = machine()
    show_machine(where, options.threads)
    found = measure(options)
    setting = SETTINGS[options.config]
    print(
        f"{options.config}: {setting.model.num_params() / 1e6:.1f} M parameters, batch "
        f"{setting.train.batch_size} x {setting.model.block_size}, V = {setting.model.vocab_size}; "
        f"{found['launches']} launches in a step of ours; the peak is "
        f"{found['peak_gflops'].show('.0f')} GFLOPS"
    )
    for row in found["rows"]:
        of_peak = f"{row['of_peak'].show('.0%')} of the peak   " if row["of_peak"] else ""
        print(
            f"{row['side']:15} {row['ms'].show()} ms   {row['ratio'].show()} x ours   "
            f"{of_peak}{row['peak_mb']:.0f} MB at most, "
            f"{row['before_model_mb']:.0f} before the model   "
            f"losses within {row['loss_difference']:.0e}"
        )
    for name, reason in found["left_out"].items():
        print(f"{name}: left out: {reason}")
    result = {"benchmark": "train_step", "machine": where, "config": options.config}
    write_json(
        options.json, result | {"threads": options.threads, "cpu_time": options.cpu_time} | found
    )


if __name__ == "__main__":
    main()
