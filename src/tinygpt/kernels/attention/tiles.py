"""What the attention kernels share: their sizes, where heads lie in memory, dropout of weights.

A *tile* is as many queries (forward) or keys (backward) as there are lanes; a *block* is up to
`BLOCK` rows of the other side, which meet it one block after another. All products of a kernel then
are ``sums[x, lane] += a(x, y) b(y, lane)`` (`loops.product`): nothing is added up across lanes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tinygrad import UOp, dtypes

from tinygpt.kernels.dropout import keeps, stream
from tinygpt.kernels.loops import Matrix, blocks, element, int32
from tinygpt.kernels.matmul import register_tiles
from tinygpt.kernels.pairs import joined
from tinygpt.kernels.phases import LOG2E, Array, Index, Kernel, Tile, Value, as_index, wide

BLOCK = 32
"""Rows of the other side that meet a tile at once: so all tiles of a unit fit a 32 KB L1 cache."""

HIDDEN = -1e30
"""The score of a key that a query may not see; finite, since GPUs may assume that numbers are."""


@dataclass(frozen=True)
class Problem:
    """The sizes of one attention, and how its arrays lie in memory.

    ``packed``: q, k and v are the thirds of one (B, T, 3, H, D) array, and the result is
    (B, T, H, D); otherwise they are (B, H, T, D), and so is the result.
    """

    B: int
    H: int
    Tq: int
    Tk: int
    D: int
    causal: bool
    packed: bool
    dropout: float = 0.0
    """The probability with which a weight is dropped. If it is not 0, the inputs end with a key."""
    part: bool = False
    """Whether that key is (3,), of a part of a batch: see `dropout.is_part`."""
    pairs: bool = False
    """Whether products are of bfloat16 numbers, two at a time: weights are rounded for them."""

    @property
    def scale(self) -> float:
        """What the products of queries and keys are multiplied by."""
        return 1 / math.sqrt(self.D)

    @property
    def log2_scale(self) -> float:
        """The same for scores to the base 2: exp(x) is 2 ** (x log2(e))."""
        return self.scale * LOG2E

    @property
    def ahead(self) -> int:
        """How many keys query 0 can see besides its own: the queries are the last positions."""
        return self.Tk - self.Tq

    @property
    def boost(self) -> float:
        """What the weights that dropout keeps are multiplied by: 1 without it."""
        return 1 / (1 - self.dropout)

    def name(self, kind: str) -> str:
        """A kernel's name, for profiles."""
        sort = "_causal" * self.causal + "_dropout" * bool(self.dropout) + "_part" * self.part
        sizes = f"{self.B}_{self.H}_{self.Tq}_{self.Tk}_{self.D}"
        return f"attention_{kind}_{sizes}{sort}" + "_bfloat16" * self.pairs

    def ops(self, products: int) -> int:
        """Floating-point operations of so many products of all queries and keys."""
        seen = self.Tk - (self.Tq - 1) / 2 if self.causal else self.Tk  # keys of the mean query
        return int(2 * products * self.B * self.H * self.Tq * seen * self.D)

    def head(self, array: Array, head: UOp, T: int, part: int = 0, parts: int = 1) -> Head:
        """Head number ``head`` of B * H in an array with T positions and so many parts in a row."""
        if not self.packed:
            return Head(array, head * (T * self.D), self.D)
        stride = parts * self.H * self.D
        b, h = head // self.H, head % self.H
        return Head(array, b * (T * stride) + part * self.H * self.D + h * self.D, stride)

    def heads(self, arrays: Sequence[Array], head: UOp) -> list[Head]:
        """The head's queries, keys and values, or their gradients, from one array or three."""
        if self.packed:
            return [self.head(arrays[0], head, self.Tq, part, 3) for part in range(3)]
        lengths = (self.Tq, self.Tk, self.Tk)
        return [self.head(x, head, T) for x, T in zip(arrays[:3], lengths, strict=True)]


class Head:
    """One head of an array, a (T, D) matrix: ``x[t, d]`` reads, in the type that sums have."""

    def __init__(self, array: Array, start: Index, stride: int) -> None:
        self.array, self._start, self._stride = array, start, stride
        self.dtype = wide(array.dtype)

    def at(self, t: Index, d: Index) -> Index:
        return as_index(self._start) + as_index(t) * self._stride + d

    def __getitem__(self, at: tuple[Index, Index]) -> UOp:
        return self.array[self.at(*at)].cast(self.dtype)

    def raw(self, t: Index, d: Index) -> UOp:
        """The same in the array's own type."""
        return self.array[self.at(t, d)]

    def rows(self, k: Kernel, row: Callable[[Index], UOp], n: int, D: int) -> Matrix:
        """The n rows row(0), row(1), ... for a kernel that reads them again and again.

        Rows that lie far apart (a power of two of bytes, often) fall on the same few sets of a
        cache, and rows of another type would be converted at each use: both are copied into a tile
        first. On a GPU they are read where they lie, since the tile would not fit its registers.
        """
        if k.gpu or (self._stride == D and self.array.dtype == self.dtype):
            return lambda x, d: self[row(x), d]
        copy = k.tile(n, self.dtype, width=D)
        with k.loop(n) as x, k.phase(D) as d:
            copy[x, d] = self[row(x), d]
        return lambda x, d: copy[x, d]

    def pairs_along(self, k: Kernel, row: Callable[[Index], UOp], n: int, D: int) -> Matrix:
        """The n rows as pairs, for a product along D: (x, y) is where pair y of row x begins."""
        copy = k.tile(n, dtypes.bfloat16, width=D)
        with k.loop(n) as x, k.phase(D) as d:
            copy[x, d] = self.raw(row(x), d)
        return lambda x, y: copy[x, as_index(y) * 2]

    def pairs_across(self, k: Kernel, row: Callable[[Index], UOp], n: int, D: int) -> Matrix:
        """The same for a product along the rows: (y, d) is the pair of rows 2y and 2y + 1.

        There is as much room as a multiple of the lanes; what stands beyond D is of no importance.
        """
        both = k.tile(n // 2, dtypes.uint32, width=blocks(D, k.lanes) * k.lanes)
        with k.loop(n // 2) as y, k.phase(D) as d:
            both[y, d] = joined(self.raw(row(y * 2), d), self.raw(row(y * 2 + 1), d))
        return element(both)

    def pairs_by_lane(
        self, k: Kernel, row: Callable[[Index], UOp], D: int, out: Tile, first: Index = 0
    ) -> None:
        """Write the pairs of each lane's row to a tile (D / 2, lanes), from row ``first`` on."""
        with k.loop(D // 2) as y, k.phase() as lane:
            out[as_index(first) + y, lane] = joined(
                *(self.raw(row(lane), y * 2 + i) for i in (0, 1))
            )

    def put(self, t: Index, d: Index, value: Value, where: UOp | None = None) -> None:
        self.array.put(self.at(t, d), value, where)


def pairs_of_rows(k: Kernel, tile: Tile, n: int) -> Matrix:
    """The n rows of a tile in bfloat16, two by two: (y, lane) is the pair of rows 2y and 2y + 1."""
    both = k.tile(n // 2, dtypes.uint32)
    with k.loop(n // 2) as y, k.phase() as lane:
        both[y, lane] = joined(tile[y * 2, lane], tile[y * 2 + 1, lane])
    return element(both)


class Dropout:
    """Dropout of the weights of one head; without dropout in the problem, nothing at all.

    A row of the mask belongs to a key, a column to a query. Call `take` for each new block of keys:
    it computes their streams, of up to ``n`` keys, which every query then uses.
    """

    def __init__(self, k: Kernel, p: Problem, head: UOp, inputs: Sequence[Array], n: int) -> None:
        self._k, self._p, self._first = k, p, head * p.Tk
        if p.dropout:
            self._key, self._n = inputs[-1], blocks(n, k.lanes)
            width = self._n * k.lanes
            self._start, self._stride = (
                k.tile(1, dtypes.uint32, width=width, shared=True) for _ in range(2)
            )

    def take(self, row: Callable[[Index], UOp]) -> None:
        """Compute the streams of the keys at the positions row(0), row(1), ..."""
        if not self._p.dropout:
            return
        key = (self._key[0], self._key[1])
        with self._k.loop(self._n) as i, self._k.phase() as lane:
            x = i * self._k.lanes + lane
            number = (int32(self._first) + int32(row(x))).cast(dtypes.uint32)
            if self._p.part:
                number = number + self._key[2] * (self._p.H * self._p.Tk)
            self._start[0, x], self._stride[0, x] = stream(key, number)

    def __call__(self, value: UOp, x: Index, query: UOp) -> UOp:
        """The value of key row(x) and a query, or 0 where it is dropped."""
        if not self._p.dropout:
            return value
        start, stride = self._start[0, x], self._stride[0, x]
        return keeps(start, stride, query.cast(dtypes.uint32), self._p.dropout).where(value, 0.0)


def tile_shape(gpu: bool) -> tuple[int, int]:
    """(lanes, rows) of the register tiles: of those that suit the machine the tallest.

    A square tile loads least for its multiplications, and few lanes leave room in the L1 for the
    D rows of up to four tiles. The rows are a power of two, which divides the usual head sizes.
    """
    if gpu:
        return 32, 4
    suitable = [(lanes, rows) for lanes, rows in register_tiles().items() if rows in (4, 8)]
    return max(suitable, key=lambda shape: (shape[0] >= 16, shape[1]))


def block_size(T: int) -> int:
    """Rows of a block of T positions: a multiple of 4, so that rows can be taken together."""
    return min(BLOCK, blocks(T, 4) * 4)
