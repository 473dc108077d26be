"""What a process of `scale.py` does: it trains as one of some ranks, and times its parts.

The processes of a world are started together, by mpiexec where there are several. Each of them
connects to the socket of the benchmark, sends its rank, and answers calls. While it waits for one
it sleeps, so that worlds can take turns.
"""

from __future__ import annotations

import hashlib
import json
import math
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from statistics import fmean
from typing import Any

import numpy as np
from common import CLOCKS
from cost import Plan
from tinygrad import Tensor

from tinygpt.config import PRESETS, GPTConfig, TrainConfig
from tinygpt.machine.flat_buffer import FlatBuffer
from tinygpt.machine.jit import jit
from tinygpt.machine.ranks.alone import Alone
from tinygpt.machine.ranks.join import join
from tinygpt.machine.several import open_devices
from tinygpt.machine.transfer import read, zeros
from tinygpt.model.lora import count_trainable
from tinygpt.model.transformer import Dropout, Transformer
from tinygpt.training import probe
from tinygpt.training.accumulation import add_to
from tinygpt.training.loop import Jitted, Step, train_steps
from tinygpt.training.meeting import Meeting
from tinygpt.training.optim import make_optimizer
from tinygpt.training.replicas import Replicas
from tinygpt.training.step import Outcome, key_of

STEPS = 1_000_000
"""More than any benchmark takes."""


class Away:
    """A communicator whose exchanges end ``delay`` seconds later: a link that is emulated."""

    def __init__(self, comm: Any) -> None:
        self.comm, self.delay = comm, 0.0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.comm, name)
        return partial(self._late, found) if name in ("Alltoallv", "Allgatherv") else found

    def _late(self, exchange: Callable[..., Any], *arguments: Any) -> None:
        exchange(*arguments)
        time.sleep(self.delay)


class Run:
    """A training under way."""

    def __init__(self, model: GPTConfig, config: TrainConfig, ranks: Alone) -> None:
        self.model = Transformer(model, seed=0)
        self.config, self.optimizer = config, make_optimizer(self.model.parameters(), config)
        tokens = frequent(model.vocab_size)
        self.steps: Iterator[Step] = train_steps(
            self.model, self.optimizer, config, tokens, ranks=ranks
        )

    def losses(self, count: int) -> list[float]:
        return [next(self.steps).train_loss for _ in range(count)]

    def weights(self) -> str:
        """A hash of them."""
        found = hashlib.sha256()
        for p in self.model.parameters().values():
            found.update(read(p).tobytes())
        return found.hexdigest()


def frequent(vocab_size: int) -> np.ndarray:
    """Tokens, some of which are frequent, so that there is something to learn."""
    powers = np.random.default_rng(0).random(200_000) ** 3
    return (powers * vocab_size).astype(np.uint16)


class Rank:
    """One process: its runs, each of which goes on from turn to turn, and its parts."""

    def __init__(self, model: dict[str, Any], train: dict[str, Any], cpu_time: bool) -> None:
        self.clock = CLOCKS[cpu_time]
        self.model, self.train = GPTConfig(**model), TrainConfig(**train | {"max_iters": STEPS})
        self.ranks = join()
        self.runs: dict[tuple[int, int | None], Run] = {}
        self._away: Away | None = None
        if self.ranks.size > 1:
            self._away = self.ranks._sum.comm = Away(self.ranks._sum.comm)
        self._works: dict[str, Callable[[], object]] = {}

    # ---- whole steps ----

    def losses(self, plan: Plan, count: int) -> tuple[list[float], str]:
        """The losses of the first steps of a plan, and a hash of the weights after them."""
        run = self._run(plan)
        return run.losses(count), run.weights()

    def sent(self, plan: Plan, count: int) -> float:
        """Bytes that this rank sends in each of some steps."""
        run, before = self._run(plan), self._bytes()
        run.losses(count)
        return (self._bytes() - before) / count

    def seconds(self, plan: Plan, count: int) -> float:
        """Seconds of each of some steps, from when all ranks begin until all are done."""
        run = self._run(plan)
        if self._away:
            self._away.delay = plan.delay
        self._meet()
        before = self.clock()
        run.losses(count)
        self._meet()
        taken = self.clock() - before
        if self._away:
            self._away.delay = 0.0
        return taken / count

    def _run(self, plan: Plan) -> Run:
        key = plan.devices, plan.sync_every
        if key not in self.runs:
            config = replace(
                self.train, grad_accum_steps=plan.micro_batches, sync_every=plan.sync_every,
                devices=None if plan.devices == 1 else plan.devices,
            )  # fmt: skip
            self.runs[key] = Run(self.model, config, self.ranks)
        plan_of_sum = self.runs[key].config
        self.ranks.check(plan_of_sum)  # which of the runs is under way
        return self.runs[key]

    def _meet(self) -> None:
        if self._away:
            self._away.comm.Barrier()

    def _bytes(self) -> int:
        return self.ranks._sum.sent if self._away else 0

    # ---- parts ----

    def part(self, name: str, repeats: int, burst: int) -> float:
        """The mean seconds of a part, which every rank of this world takes at the same time.

        It is taken ``burst`` times in a row, from when all ranks begin until all are done: what the
        ranks of a step wait for each other is in it. As a step is a sum of parts, the mean counts.
        """
        if name not in self._works:
            kind, _, number = name.partition(" ")
            make = getattr(self, f"_{kind}")
            self._works[name] = make(int(number)) if number else make()
            self._works[name]()
        work, times = self._works[name], list[float]()
        for _ in range(repeats):
            self._meet()
            before = self.clock()
            for _ in range(burst):
                work()
            self._meet()
            times.append((self.clock() - before) / burst)
        return fmean(times)

    def shape(self) -> tuple[int, int]:
        """Bytes of all gradients as they are sent, and the number of parameters."""
        buffer = self._buffer()
        return buffer.array.nbytes, len(buffer.tensors) - 1

    def gpt2(self) -> tuple[float, float]:
        """Seconds of a micro-batch of 1 x 1024 tokens of GPT-2 124M, and of an update."""
        model, train = GPTConfig(**PRESETS["gpt2"].model), TrainConfig(batch_size=1)
        parts = probe.Parts(model, train)
        micro_batch = parts.outside() + model.n_layer * parts.block()
        learning, _ = count_trainable(model, train)
        return micro_batch, learning * probe.update_seconds(learning)

    def _buffer(self, devices: Sequence[str] = ("CPU",)) -> FlatBuffer:
        """Room for the losses and the gradients of each device."""
        params = Transformer(self.model, seed=None).parameters().values()
        shapes = [tuple(map(int, p.shape)) for p in params]
        losses = [((), device) for device in devices]
        return FlatBuffer([*losses, *((shape, device) for device in devices for shape in shapes)])

    def _micro_batch(self, count: int = 1) -> Callable[[], object]:
        """Forward and backward, spread over so many devices, and added to a buffer."""
        devices = open_devices(count) if count > 1 else ("CPU",)
        replicas = Replicas(Transformer(self.model, seed=0), devices)
        buffer, shape = self._buffer(devices), (self.train.batch_size, self.model.block_size)
        tokens = frequent(self.model.vocab_size)[: math.prod(shape)].reshape(shape)

        def compute(x: Tensor, key: Tensor, first: Tensor) -> Tensor:
            losses, grads = list[Tensor](), list[Tensor]()
            keys = replicas.keys(key, shape[0])
            for model, own, k in zip(replicas.models, replicas.cut(x), keys, strict=True):
                losses.append(model.loss(own, own, Dropout(0.0, k)))
                grads += losses[-1].gradient(*model.parameters().values())
            return add_to(buffer.tensors, [*losses, *grads], first)

        run = partial(jit(compute), tokens, key_of(0, 0), False)
        return lambda: (run(), replicas.wait())

    def _carry(self) -> Callable[[], object]:
        upper, lower = self._buffer(), self._buffer()
        return partial(jit(lambda first: add_to(upper.tensors, lower.tensors, first)), False)

    def _update(self) -> Callable[[], object]:
        model, buffer = Transformer(self.model, seed=0), self._buffer()
        optimizer = make_optimizer(model.parameters(), self.train)
        loss, *grads = buffer.tensors

        def compute(lr: Tensor, limits: Tensor) -> Tensor:
            optimizer.lr.assign(lr.reshape(1))
            report = optimizer.update(grads, self.train.grad_clip, 0.25, loss, limits)
            return report.realize(optimizer.lr, *optimizer.changed())

        return partial(jit(compute), 1e-3, [np.inf, np.inf])

    def _fixed(self) -> Callable[[], object]:
        """The loop of a run whose steps compute nothing."""
        model = Transformer(self.model, seed=None)
        optimizer = make_optimizer(model.parameters(), self.train)
        nothing = Jitted(lambda *_: Outcome(4.0, 1.0, True), lambda *_: 4.0)
        config = replace(self.train, sync_every=None)
        tokens = frequent(self.model.vocab_size)
        steps = train_steps(model, optimizer, config, tokens, jitted=nothing)
        return lambda: next(steps)

    def _meeting(self) -> Callable[[], object]:
        optimizer = make_optimizer(Transformer(self.model, seed=0).parameters(), self.train)
        return Meeting(optimizer, Alone()).take

    def _exchange(self, size: int) -> Callable[[], object]:
        part, out = np.ones((2, size // 4), np.float32)
        return lambda: self.ranks._sum(part, out)

    def _devices(self, size: int) -> Callable[[], object]:
        """A Tensor to another device, and added there; its sum back, 16 times."""
        here, there = open_devices(2)
        near = [zeros((size // 4,), Tensor([0.0]).dtype, here) for _ in range(16)]
        far = [zeros((size // 4,), Tensor([0.0]).dtype, there) for _ in range(16)]

        def compute() -> Tensor:
            sums = [a.assign(a + b.to(here)) for a, b in zip(near, far, strict=True)]
            back = [b.assign(a.to(there)) for a, b in zip(sums, far, strict=True)]
            return near[0].realize(*near[1:], *back)

        return jit(compute)


def main(address: str, settings: str) -> None:
    """Answer calls until the socket is closed."""
    with socket.socket(socket.AF_UNIX) as opened:
        opened.connect(address)
        link = Connection(opened.detach())
    try:
        rank = Rank(**json.loads(settings))
        link.send((True, rank.ranks.rank))
        while True:
            method, arguments = link.recv()
            link.send((True, getattr(rank, method)(*arguments)))
    except EOFError:
        pass
    except BaseException:
        link.send((False, traceback.format_exc()))
        raise


if __name__ == "__main__":
    main(*sys.argv[1:])
