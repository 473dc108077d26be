"""Tensors that lie one after another in one array of the host.

Numbers of many Tensors can so be sent, added or written as one piece, without a copy of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt
from tinygrad import Device, Tensor, dtypes

from tinygpt.machine.transfer import read, write, zeros

LANES = 16
"""Every Tensor begins at a multiple of so many floats: the 64 bytes of a vector register."""


class FlatBuffer:
    """float32 Tensors of the given shapes, and the array in which their values lie.

    On the processor they share the memory of ``array``. On another device they have memory of
    their own, and ``fetch`` and ``put`` copy all of it into the array and back; on the processor
    these do nothing. Between the Tensors the array may hold zeros.
    """

    def __init__(
        self, shapes: Sequence[tuple[int, ...]], device: str | tuple[str, ...] | None = None
    ) -> None:
        sizes = [int(np.prod(shape)) for shape in shapes]
        self._starts = list(accumulate((-(-n // LANES) * LANES for n in sizes), initial=0))
        self._sizes = sizes
        self.shared = isinstance(device, str | None) and (device or Device.DEFAULT) == "CPU"
        self.array = _aligned(self._starts[-1])
        self.tensors = [
            Tensor.from_blob(self.array[i:].ctypes.data, shape, dtype=dtypes.float32, device="CPU")
            if self.shared
            else zeros(shape, dtypes.float32, device)
            for i, shape in zip(self._starts, shapes, strict=False)
        ]

    def fetch(self) -> None:
        """Bring ``array`` up to date with the Tensors."""
        if not self.shared:
            for tensor, place in zip(self.tensors, self._places(), strict=True):
                place[...] = read(tensor).reshape(-1)

    def put(self) -> None:
        """Bring the Tensors up to date with ``array``."""
        if not self.shared:
            for tensor, place in zip(self.tensors, self._places(), strict=True):
                write(tensor, place)

    def _places(self) -> list[npt.NDArray[np.float32]]:
        return [self.array[i : i + n] for i, n in zip(self._starts, self._sizes, strict=False)]


def _aligned(size: int) -> npt.NDArray[np.float32]:
    """Zeros (size,) whose first is at a multiple of ``LANES`` floats."""
    room = np.zeros(size + 2 * LANES, np.float32)
    skipped = -(room.ctypes.data // room.itemsize) % LANES
    return room[skipped : skipped + size + LANES]
