"""Ranks on slow links: each trains by itself, and all meet every so many steps (DiLoCo).

Between two meetings every rank takes optimizer steps of its own, on its own micro-batches. At a
meeting the ranks average how far their weights have moved since the last one, and an outer
optimizer, SGD with Nesterov's momentum, takes that average for a gradient. All go on from its
result; the moments of each rank's own optimizer stay where they are. With a meeting every N steps
the ranks send 1/N of what they would.

A checkpoint has the outer momentum, and one state of the inner optimizer: where one is written, all
ranks go on from the mean of their states. So a run that is resumed by as many ranks goes on as if
it had not ended.

Douillard et al., "DiLoCo: Distributed Low-Communication Training of Language Models" (2023), arXiv
2311.08105, whose rate and momentum these are.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import numpy.typing as npt
from tinygrad import Tensor, dtypes
from tinygrad.nn.optim import Optimizer

from tinygpt.machine.flat_buffer import FlatBuffer
from tinygpt.machine.ranks.alone import Alone, LostRankError
from tinygpt.machine.transfer import memory, read, write, zeros_like
from tinygpt.training.optim import OUTER, optimizer_state

RATE, MOMENTUM = 0.7, 0.9


Floats = npt.NDArray[np.float32]


def give_outer_momentum(optimizer: Optimizer) -> list[Tensor]:
    """The outer momentum of each parameter, 0 at first; from here on a part of its state."""
    if not hasattr(optimizer, OUTER):
        setattr(optimizer, OUTER, [zeros_like(p, dtypes.float32) for p in optimizer.params])
    outer: list[Tensor] = getattr(optimizer, OUTER)
    return outer


class Meeting:
    """The outer optimizer of weights that ranks train apart."""

    def __init__(self, optimizer: Optimizer, ranks: Alone) -> None:
        self.params, self.ranks = list(optimizer.params), ranks
        self._velocity = give_outer_momentum(optimizer)
        shared = {id(v) for v in self._velocity}
        state = optimizer_state(optimizer, {}).values()
        self._state = [tensor for tensor in state if id(tensor) not in shared]
        self._start, self._moved = _buffer(self.params), _buffer(self.params)
        _copy(self.params, self._start)

    def take(self) -> None:
        """Meet the other ranks; all have the same weights then."""
        while True:
            _copy(self.params, self._moved)
            np.subtract(self._start.array, self._moved.array, out=self._moved.array)
            with suppress(LostRankError):
                self.ranks.sum(self._moved, self._moved)
                break
        count = np.float32(self.ranks.active)
        pieces = zip(self._moved.tensors, self._start.tensors, strict=True)
        for p, v, (moved, start) in zip(self.params, self._velocity, pieces, strict=True):
            write(p, self._advance(_values(start), _values(moved) / count, v))

    def share_state(self) -> None:
        """Give all ranks the mean of the states of their optimizers."""
        while True:
            mean = _buffer(self._state)  # not kept: it is as large as all moments
            _copy(self._state, mean)
            with suppress(LostRankError):
                self.ranks.sum(mean, mean, whole=True)
                break
        for tensor, values in zip(self._state, mean.tensors, strict=True):
            write(tensor, read(values) / np.float32(self.ranks.active))

    def _advance(self, start: Floats, gradient: Floats, velocity: Tensor) -> Floats:
        """The outer step of one parameter, in place; -> its new values."""
        momentum = read(velocity) * np.float32(MOMENTUM) + gradient
        write(velocity, momentum)
        start -= np.float32(RATE) * (gradient + np.float32(MOMENTUM) * momentum)
        return start


def _buffer(like: Sequence[Tensor]) -> FlatBuffer:
    return FlatBuffer([(tuple(map(int, t.shape)), "CPU") for t in like])


def _copy(tensors: Sequence[Tensor], buffer: FlatBuffer) -> None:
    for tensor, place in zip(tensors, buffer.tensors, strict=True):
        _values(place)[...] = read(tensor)


def _values(tensor: Tensor) -> Floats:
    """The memory of a Tensor on the processor."""
    values = memory(tensor)
    assert values is not None
    return values
