"""What a step of several ranks or devices costs: time, bytes sent, and bytes of memory.

A step is M micro-batches, of which each of W ranks computes M / W. Then their gradients are summed,
and every rank updates its own copy of the weights::

    step = crowd · (M / W · micro-batch + carries · carry + update + fixed) + exchange

W ranks of one host with fewer cores share them, so that each of them needs ``crowd`` = W / cores
times as long for its own work, if that is more than 1. An exchange of N bytes is an Alltoall and an
Allgather, each of W - 1 messages of N / W bytes out of every rank::

    exchange = 2 (W - 1) · latency + 2 (W - 1) / W · N / bandwidth

Ranks that meet every K steps (``--sync-every``) have an exchange, and the copies around it, in one
step of K. Of several devices of a process the first one sums the gradients of all and hands the
weights out, so that N bytes go in and N bytes out for each of the others.

Times are seconds, sizes bytes. `scale.py` measures the parts, and compares.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import count, takewhile
from typing import Self

import numpy as np

from tinygpt.training.accumulation import levels, run_length

FLOAT = 4
"""Bytes of a number."""


@dataclass(frozen=True)
class Link:
    """What carries messages between ranks, or Tensors between devices."""

    latency: float
    """Of a message, however short."""
    bandwidth: float
    """Bytes a second out of each rank, while as many come in."""

    def exchange(self, ranks: int, size: float) -> float:
        """Time in which ranks sum an array of so many bytes, and all have the sum."""
        return messages(ranks) * self.latency + traffic(ranks, size) / self.bandwidth

    def carry(self, count: float, size: float) -> float:
        """Time for a number of messages, of so many bytes together, one after another."""
        return count * self.latency + size / self.bandwidth

    @classmethod
    def fit(cls, number: float, share: float, seconds: Mapping[float, float]) -> Self:
        """The link on which ``number`` messages take so long, by size: ``share`` of it is sent.

        Least squares of the relative errors.
        """
        rows = np.array([[number / t, share * size / t] for size, t in seconds.items()])
        (latency, slowness), *_ = np.linalg.lstsq(rows, np.ones(len(rows)))
        if latency < 0:  # noise, where all sizes are large
            latency, slowness = 0.0, rows[:, 1].sum() / (rows[:, 1] ** 2).sum()
        if slowness <= 0:  # noise, where all sizes are small
            latency, slowness = rows[:, 0].sum() / (rows[:, 0] ** 2).sum(), 0.0
        return cls(float(latency), float(1 / slowness) if slowness else math.inf)

    @classmethod
    def of_ranks(cls, ranks: int, seconds: Mapping[float, float]) -> Self:
        """The link between ranks whose exchange of each size takes so long."""
        return cls.fit(messages(ranks), traffic(ranks, 1.0), seconds)


def messages(ranks: int) -> int:
    """Messages that a rank sends in an exchange, one after another.

    >>> [messages(ranks) for ranks in (1, 2, 64)]
    [0, 2, 126]
    """
    return 2 * (ranks - 1)


def traffic(ranks: int, size: float) -> float:
    """Bytes that a rank sends, and receives, in an exchange of an array of so many bytes.

    >>> [traffic(ranks, 100) for ranks in (1, 2, 4)]
    [0.0, 100.0, 150.0]
    """
    return 2 * (ranks - 1) / ranks * size


def carries(count: int) -> int:
    """Additions of one whole buffer of gradients to another, to sum so many micro-batches.

    Those are the copies and sums of ``accumulation.PartialSums`` beyond the leaves' own.

    >>> [carries(count) for count in (1, 2, 4, 8)]
    [0, 0, 2, 6]
    """
    groups = count // run_length(count)
    return 2 * (groups - 1)


@dataclass(frozen=True)
class Plan:
    """How a step is divided."""

    micro_batches: int
    """Of a step, those of all ranks together."""
    ranks: int = 1
    devices: int = 1
    """Of each process, which take equal parts of each micro-batch."""
    sync_every: int | None = None
    """Steps from one meeting to the next, between which ranks exchange nothing."""
    delay: float = 0.0
    """Seconds that a link adds to each of the two halves of an exchange."""

    @property
    def own(self) -> int:
        """Micro-batches of each rank."""
        return self.micro_batches // self.ranks

    @property
    def name(self) -> str:
        """
        >>> Plan(4, ranks=2, sync_every=10, delay=0.01).name
        '2 ranks, 10 ms away, meeting every 10 steps'
        """
        what = "device" if self.ranks == 1 else "rank"
        count = self.devices if self.ranks == 1 else self.ranks
        words = [f"{count} {what}{'s' * (count > 1)}"]
        words += [f"{1000 * self.delay:g} ms away"] * bool(self.delay)
        words += [f"meeting every {self.sync_every} steps"] * bool(self.sync_every)
        return ", ".join(words)


@dataclass(frozen=True)
class Parts:
    """Seconds of what one rank does by itself."""

    micro_batch: float
    """Forward and backward, and adding its gradients to those of others."""
    carry: float
    update: float
    fixed: float
    """Of a step, however small the model: drawing a batch, and Python between the kernels."""
    meeting: float = 0.0
    """The copies and the outer step of a meeting, without its exchange."""
    spread: Mapping[int, float] = field(default_factory=dict)
    """A micro-batch that is spread over so many devices of a process."""


@dataclass(frozen=True)
class Host:
    """What was measured of a machine, for one model and micro-batch."""

    cores: int
    """Of which each rank uses one."""
    size: int
    """Bytes of all gradients."""
    tensors: int
    """Parameters, each of which is a message between devices."""
    parts: Mapping[int, Parts]
    """By how many ranks were at work at once, no more than there are cores."""
    links: Mapping[int, Link]
    """Between so many ranks of this host."""
    devices: Link | None = None
    """Between devices of one process."""


@dataclass(frozen=True)
class Step:
    """Where the seconds of a step go."""

    compute: float
    update: float
    """The optimizer, and what is fixed."""
    exchange: float

    @property
    def seconds(self) -> float:
        return self.compute + self.update + self.exchange

    @property
    def efficiency(self) -> float:
        """The share of it in which gradients are computed."""
        return self.compute / self.seconds


def foresee(host: Host, plan: Plan) -> Step:
    """The time of a step on one host, from its parts."""
    crowd = max(1.0, plan.ranks / host.cores)
    parts = host.parts[max(n for n in host.parts if n <= min(plan.ranks, host.cores) or n == 1)]
    micro_batch = parts.micro_batch if plan.devices == 1 else parts.spread[plan.devices]
    compute = crowd * (plan.own * micro_batch + carries(plan.own) * parts.carry)
    update = crowd * (parts.update + parts.fixed)
    exchange = 0.0
    if plan.devices > 1 and host.devices is not None:
        others = 2 * (plan.devices - 1)
        exchange += host.devices.carry(others * host.tensors, others * host.size)
    if plan.ranks > 1:
        between = host.links[plan.ranks].exchange(plan.ranks, host.size) + 2 * plan.delay
        if plan.sync_every:
            between = (between + crowd * parts.meeting) / plan.sync_every
        exchange += between
    return Step(compute, update, exchange)


def sent(plan: Plan, size: float) -> float:
    """Bytes that a rank sends in a step."""
    return traffic(plan.ranks, size) / (plan.sync_every or 1)


def memory(plan: Plan, size: int) -> int:
    """Bytes of a rank for weights, moments, and all that sums gradients; activations come on top.

    AdamW has two moments. Sums are one buffer for each level of a rank's tree; an exchange has room
    for what comes in, and a meeting for the weights before, how far they have moved, and the outer
    momentum.
    """
    sums = levels(plan.own) if plan.micro_batches > 1 else 0
    coming = plan.ranks > 1
    meeting = 3 if plan.sync_every else 0
    return size * (plan.devices * (1 + sums) + 2 + coming + meeting)


# Past this machine ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cluster:
    """Machines or cards, each of them one rank or one device, and what is between them."""

    machines: int
    micro_batch: float
    """Seconds of one of them for a micro-batch."""
    update: float
    link: Link
    size: float
    """Bytes of all gradients."""
    micro_batches: int = 1
    """Of a step, on each of them."""
    sync_every: int | None = None
    tensors: int | None = None
    """The number of parameters, where these are devices: each parameter travels by itself."""
    shared: bool = False
    """Whether each device sums some parameters (``--shard-optimizer``), or the first one all."""

    def step(self) -> Step:
        """The time of a step."""
        if self.tensors is None:
            exchange = self.link.exchange(self.machines, self.size)
        else:
            others = 2 * (self.machines - 1) / (self.machines if self.shared else 1)
            exchange = self.link.carry(others * self.tensors, others * self.size)
        compute = self.micro_batches * self.micro_batch
        return Step(compute, self.update, exchange / (self.sync_every or 1))

    def where_it_bends(self, most: int = 1 << 20) -> int | None:
        """The least power of two of machines with which most of a step is exchange.

        None if it is more than ``most``.
        """
        counts = takewhile(lambda n: n <= most, (2**i for i in count(1)))
        steps = ((n, replace(self, machines=n).step()) for n in counts)
        return next((n for n, step in steps if 2 * step.exchange > step.seconds), None)


def lost(machines: int, seconds: float, between: float) -> float:
    """How many of the machines are lost in a time, each once in ``between`` seconds on average.

    >>> lost(1024, 450, 8 * 3600)
    16.0
    """
    return machines * seconds / between
