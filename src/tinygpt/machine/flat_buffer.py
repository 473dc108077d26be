"""Tensors that lie one after another in one array of the host.

Numbers of many Tensors can so be sent, added or written as one piece, without a copy of each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt
from tinygrad import Tensor, dtypes

from tinygpt.machine.transfer import read, write, zeros

LANES = 16
"""Every Tensor begins at a multiple of so many floats: the 64 bytes of a vector register."""


Kind = tuple[tuple[int, ...], str]
"""Shape and device of a Tensor."""


class FlatBuffer:
    """float32 Tensors of the given shapes and devices, and the array in which their values lie.

    On the processor they share the memory of ``array``. On another device they have memory of
    their own, and ``fetch`` and ``put`` copy all of it into the array and back; on the processor
    these do nothing. Between the Tensors and at its end the array has room, where zeros are.
    """

    def __init__(self, kinds: Sequence[Kind]) -> None:
        self._sizes = [math.prod(shape) for shape, _ in kinds]
        self.starts = list(accumulate((-(-n // LANES) * LANES for n in self._sizes), initial=0))
        """Where in the array each Tensor begins, and after the last one the end."""
        self.array = _aligned(self.starts[-1] + LANES)
        self.tensors = [
            Tensor.from_blob(self.array[i:].ctypes.data, shape, dtype=dtypes.float32, device=device)
            if _on_processor(device)
            else zeros(shape, dtypes.float32, device)
            for i, (shape, device) in zip(self.starts, kinds, strict=False)
        ]

    def places(self) -> list[npt.NDArray[np.float32]]:
        """The part of the array for each Tensor, flat."""
        pieces = zip(self.starts, self._sizes, strict=False)
        return [self.array[i : i + n] for i, n in pieces]

    def fetch(self) -> None:
        """Bring ``array`` up to date with the Tensors."""
        for tensor, place in self._apart():
            place[...] = read(tensor).reshape(-1)

    def put(self) -> None:
        """Bring the Tensors up to date with ``array``."""
        for tensor, place in self._apart():
            write(tensor, place)

    def _apart(self) -> Iterator[tuple[Tensor, npt.NDArray[np.float32]]]:
        """The Tensors that have memory of their own, and their places in the array."""
        for tensor, place in zip(self.tensors, self.places(), strict=True):
            if not _on_processor(str(tensor.device)):
                yield tensor, place


def _on_processor(device: str) -> bool:
    return device.partition(":")[0] == "CPU"


def _aligned(size: int) -> npt.NDArray[np.float32]:
    """Zeros (size,) whose first is at a multiple of ``LANES`` floats."""
    room = np.zeros(size + LANES, np.float32)
    skipped = -(room.ctypes.data // room.itemsize) % LANES
    return room[skipped : skipped + size]
