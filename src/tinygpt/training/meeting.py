"""Ranks on slow links: each trains by itself, and all meet every so many steps (DiLoCo).

Between two meetings every rank takes optimizer steps of its own, on its own micro-batches. At a
meeting the ranks average how far their weights have moved since the last one, and an outer
optimizer, SGD with Nesterov's momentum, takes that average for a gradient. All go on from its
result; the moments of each rank's own optimizer stay where they are. With a meeting every N steps
the ranks send 1/N of what they would.

Douillard et al., "DiLoCo: Distributed Low-Communication Training of Language Models" (2023), arXiv
2311.08105, whose rate and momentum these are.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import numpy.typing as npt
from tinygrad import Tensor

from tinygpt.machine.flat_buffer import FlatBuffer
from tinygpt.machine.ranks.alone import Alone, LostRankError
from tinygpt.machine.transfer import memory, read, write

RATE, MOMENTUM = 0.7, 0.9


class Meeting:
    """The outer optimizer of weights that ranks train apart. Its momentum begins with 0."""

    def __init__(self, params: Sequence[Tensor], ranks: Alone) -> None:
        kinds = [(tuple(map(int, p.shape)), "CPU") for p in params]
        self.params, self.ranks = list(params), ranks
        self._moved, self._sum = FlatBuffer(kinds), FlatBuffer(kinds)
        self._start = FlatBuffer(kinds)
        self._velocity = np.zeros_like(self._start.array)
        self._put(self._start)

    def take(self) -> None:
        """Meet the other ranks; all have the same weights then."""
        while True:
            self._put(self._moved)
            self._moved.array[:] = self._start.array - self._moved.array
            with suppress(LostRankError):
                self.ranks.sum(self._moved, self._sum)
                break
        self._sum.array[-1] = 0.0  # the votes of `Ranks.sum`
        self._advance(self._sum.array / np.float32(self.ranks.active))
        for p, values in zip(self.params, self._start.tensors, strict=True):
            write(p, read(values))

    def _advance(self, gradient: npt.NDArray[np.float32]) -> None:
        self._velocity *= np.float32(MOMENTUM)
        self._velocity += gradient
        step = gradient + np.float32(MOMENTUM) * self._velocity
        self._start.array -= np.float32(RATE) * step

    def _put(self, buffer: FlatBuffer) -> None:
        """Copy the present weights into a buffer."""
        for p, place in zip(self.params, buffer.tensors, strict=True):
            values = memory(place)
            assert values is not None  # on the processor
            values[...] = read(p)
