"""The sum of an array over ranks, with the same bits for any number of them.

Each of W ranks, a power of two, holds the sum of one of W neighbouring subtrees. ``Alltoall`` gives
rank r the r-th piece of every such array; r adds the pieces in pairs, then pairs of those sums,
which is the rest of the tree; ``Allgather`` gives the pieces of the result to all. That moves
2 (W - 1) / W of the array in and out of each rank, as the ring of an all-reduce does, whose order
of additions depends on W. After the loss of a rank there may be more ranks than W: those beyond W
add nothing and receive the result.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Halves = npt.NDArray[np.uint16]

EXACT = 16
"""Numbers at either end of an array that are never rounded."""


def add_in_pairs(parts: Floats) -> Floats:
    """The sum (n,) of the rows of parts (W, n), added as a tree of pairs; overwrites them."""
    stride = 1
    while stride < len(parts):
        for i in range(0, len(parts), 2 * stride):
            np.add(parts[i], parts[i + stride], out=parts[i])
        stride *= 2
    total: Floats = parts[0]
    return total


def to_bfloat16(values: Floats) -> Halves:
    """The upper halves of floats, rounded to nearest, ties to even. NaN stays NaN."""
    bits = values.view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + (bits >> 16 & 1))) >> 16
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def from_bfloat16(halves: Halves) -> Floats:
    """The floats that have these upper halves."""
    return (halves.astype(np.uint32) << 16).view(np.float32)


class TreeSum:
    """Sums over the first ``active`` ranks of a communicator, with buffers that are reused."""

    def __init__(self, comm: Any, active: int, half: bool = False) -> None:
        self.comm, self.active, self.half = comm, active, half
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        self.sent = 0
        """Bytes that this rank has sent so far."""
        self._buffer: npt.NDArray[Any] = np.empty(0, np.float32)

    def __call__(self, part: Floats, out: Floats, whole: bool = False) -> None:
        """Put the sum over ranks of ``part`` (N,) into ``out`` (N,) of every rank.

        Both may be the same array. With ``half`` the numbers travel as bfloat16 and are added as
        float32; the first and the last ``EXACT``, where losses and votes are, as they are, and all
        of them if ``whole``.
        """
        half = self.half and not whole
        exact = self._exact(part) if half else None
        bounds = [part.size * i // self.active for i in range(self.active + 1)]
        counts = [b - a for a, b in pairwise(bounds)] + [0] * (self.size - self.active)
        piece = self.piece(part, counts, whole)
        if exact is None:
            self._gather(piece, out, counts)
        else:
            result = np.empty(part.shape, np.uint16)
            self._gather(to_bfloat16(piece), result, counts)
            out[:] = from_bfloat16(result)
            out[:EXACT], out[-EXACT:] = exact[:EXACT], exact[EXACT:]

    def _gather(self, piece: npt.NDArray[Any], result: npt.NDArray[Any], counts: list[int]) -> None:
        self.comm.Allgatherv([piece, len(piece)], [result, counts])
        self.sent += (self.size - 1) * piece.nbytes

    def piece(self, part: Floats, counts: list[int], whole: bool = False) -> Floats:
        """The sum over ranks of this rank's piece of ``part``; ``counts`` are all pieces' sizes."""
        half = self.half and not whole
        sent: npt.NDArray[Any] = to_bfloat16(part) if half else part
        rows = self._all_to_all(sent, counts)
        if self.rank < self.active:
            self.sent += sent.nbytes - rows[:1].nbytes
        return add_in_pairs(from_bfloat16(rows) if half else rows)

    def _exact(self, part: Floats) -> Floats:
        ends = np.concatenate([part[:EXACT], part[-EXACT:]])
        rows = np.empty((self.size, 2 * EXACT), np.float32)
        self.comm.Allgather(ends, rows)
        return add_in_pairs(rows[: self.active])

    def _all_to_all(self, part: npt.NDArray[Any], pieces: list[int]) -> npt.NDArray[Any]:
        """This rank's piece of every active rank's part: (active, n)."""
        own, none = pieces[self.rank], [0] * self.size
        if self._buffer.shape != (self.active, own) or self._buffer.dtype != part.dtype:
            self._buffer = np.empty((self.active, own), part.dtype)
        mine = self.rank < self.active
        take = [own] * self.active + [0] * (self.size - self.active)
        self.comm.Alltoallv(
            [part, pieces if mine else none], [self._buffer, take if mine else none]
        )
        return self._buffer
