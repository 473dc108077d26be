"""What the attention kernels share: their sizes, where heads lie in memory, products of tiles."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from tinygrad import UOp, dtypes

from tinygpt.kernels.masks import keeps, stream
from tinygpt.kernels.matmul import register_tiles
from tinygpt.kernels.phases import Array, Index, Kernel, Tile, Value, as_index, as_uop, exp2
from tinygpt.machine.tinygrad_internals import DType

BLOCK = 32
"""Rows of the other side that meet a tile at once: with them, all of a unit stays in a 32 KB L1."""

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

    @property
    def scale(self) -> float:
        """What the products of queries and keys are multiplied by."""
        return 1 / math.sqrt(self.D)

    @property
    def log2_scale(self) -> float:
        """The same for scores to the base 2: exp(x) is 2 ** (x log2(e))."""
        return self.scale * math.log2(math.e)

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
        sort = ("_causal" if self.causal else "") + ("_dropout" if self.dropout else "")
        return f"attention_{kind}_{self.B}_{self.H}_{self.Tq}_{self.Tk}_{self.D}{sort}"

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
        self._array, self._start, self._stride = array, start, stride
        self.dtype = sum_dtype(array.dtype)

    def at(self, t: Index, d: Index) -> Index:
        return as_index(self._start) + as_index(t) * self._stride + d

    def __getitem__(self, at: tuple[Index, Index]) -> UOp:
        return self._array[self.at(*at)].cast(self.dtype)

    def rows(self, k: Kernel, row: Callable[[Index], UOp], n: int, D: int) -> Matrix:
        """The n rows row(0), row(1), ... for a kernel that reads them again and again.

        Rows far apart, which compete for the same places in a cache, and rows of another type are
        copied first; a GPU has no room for that.
        """
        if k.gpu or (self._stride == D and self._array.dtype == self.dtype):
            return lambda x, d: self[row(x), d]
        copy = k.tile(n, self.dtype, width=D)
        with k.loop(n) as x, k.phase(D) as d:
            copy[x, d] = self[row(x), d]
        return lambda x, d: copy[x, d]

    def put(self, t: Index, d: Index, value: Value, where: UOp | None = None) -> None:
        self._array.put(self.at(t, d), value, where)


Matrix = Callable[[Index, Index], UOp]
"""The element of a row and a column."""


class Dropout:
    """Dropout of the weights of one head; without dropout in the problem, nothing at all.

    A row of the mask belongs to a key, a column to a query. The streams of up to ``n`` keys are
    kept at hand: `take` them first.
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
        """The streams of the keys at the positions row(0), row(1), ..."""
        if not self._p.dropout:
            return
        key = (self._key[0], self._key[1])
        with self._k.loop(self._n) as i, self._k.phase() as lane:
            x = i * self._k.lanes + lane
            number = (position(self._first) + position(row(x))).cast(dtypes.uint32)
            self._start[0, x], self._stride[0, x] = stream(key, number)

    def __call__(self, value: UOp, x: Index, query: UOp) -> UOp:
        """The value of key row(x) and a query, or 0 where it is dropped."""
        if not self._p.dropout:
            return value
        start, stride = self._start[0, x], self._stride[0, x]
        return keeps(start, stride, query.cast(dtypes.uint32), self._p.dropout).where(value, 0.0)


def sum_dtype(dtype: DType) -> DType:
    """The type to compute in: float32, or float64 for float64."""
    return dtypes.float64 if dtype == dtypes.float64 else dtypes.float32


def tile_shape(gpu: bool) -> tuple[int, int]:
    """(lanes, rows) of the register tiles: of those that suit the machine the tallest.

    A square tile loads least for its multiplications, and few lanes leave room in the L1 for the
    D rows of up to four tiles. The rows are a power of two, which divides the usual head sizes.
    """
    if gpu:
        return 32, 4
    suitable = [(lanes, rows) for lanes, rows in register_tiles().items() if rows in (4, 8)]
    return max(suitable, key=lambda shape: (shape[0] >= 16, shape[1]))


def product(
    k: Kernel,
    rows: int,
    depth: int,
    a: Matrix,
    b: Matrix,
    then: Callable[[UOp, UOp, UOp], None],
    start: Callable[[UOp, UOp], UOp] | None = None,
) -> None:
    """``sum over y of a(x, y) * b(y, lane)`` for all x below ``rows`` and all lanes.

    The sums begin at ``start(x, lane)``, or 0, and are kept in registers for a few rows at a time:
    a number of ``a`` meets a vector of ``b``. ``then(x, value, lane)``, in a phase, is given them.
    """
    step = math.gcd(rows, tile_shape(k.gpu)[1])
    sums = k.tile(step, a(0, 0).dtype)
    with k.loop(rows // step) as i:
        with k.loop(step) as x, k.phase() as lane:
            sums[x, lane] = 0.0 if start is None else start(i * step + x, lane)
        with k.loop(depth) as y, k.phase() as lane:
            factor = b(y, lane)
            for row in range(step):
                sums[row, lane] = sums[row, lane] + a(i * step + row, y) * factor
        with k.loop(step) as x, k.phase() as lane:
            then(i * step + x, sums[x, lane], lane)


def element(tile: Tile, first: Index = 0) -> Matrix:
    """For ``product``: the elements of a tile from a row on."""
    return lambda row, column: tile[first + as_index(row), column]


def store(tile: Tile, first: Index = 0) -> Callable[[UOp, UOp, UOp], None]:
    """For ``product``: write the values to a tile from a row on."""

    def then(x: UOp, value: UOp, lane: UOp) -> None:
        tile[first + x, lane] = value

    return then


def power(x: UOp) -> UOp:
    """2 ** x for x <= 0, and exactly 0 from -126.5 down; cheaper than ``exp2``.

    2 ** whole is made from its bits, which are all zero for whole = -127.
    """
    if x.dtype != dtypes.float32:
        return exp2(x)
    x = x.maximum(-127.0)
    whole = (x + 150.5).cast(dtypes.int32) - 150  # round to nearest, by truncating above zero
    rest = x - whole.cast(dtypes.float32)
    value = as_uop(SERIES[0], dtypes.float32)
    for coefficient in SERIES[1:]:
        value = value * rest + coefficient
    return value * ((whole + 127) * (1 << 23)).bitcast(dtypes.float32)


SERIES = [math.log(2) ** n / math.factorial(n) for n in range(6, -1, -1)]


def clamp(i: Index, n: int) -> UOp:
    """i, or n - 1 if that is less: surplus rows and lanes repeat the last one."""
    i = as_index(i)
    return (i < n).where(i, as_index(n - 1))


def position(i: Index) -> UOp:
    """An index as an int32, to compare in vectors: positions are small, addresses need not be."""
    return as_uop(i, dtypes.int32)


def blocks(n: int, size: int) -> int:
    """How many blocks cover n."""
    return -(-n // size)


def block_size(T: int) -> int:
    """Rows of a block of T positions: a multiple of 4, so that rows can be taken together."""
    return min(BLOCK, blocks(T, 4) * 4)


def at_most(x: UOp, most: int) -> UOp:
    """An index read from memory, of which it is known that it is from 0 to ``most``.

    That keeps the arithmetic with it in 32 bits, where addresses fit: WebGPU has no others. It is
    at least one bit, even where ``most`` is 0: were the input not read at all, tinygrad would give
    its number to a variable of the kernel, and the two would collide.
    """
    return as_index(x & (2 ** max(1, most.bit_length()) - 1))


@contextmanager
def counted(k: Kernel, n: Index, most: int) -> Iterator[UOp]:
    """A loop like ``k.loop(n)`` with 1 <= n <= most, which may depend on the unit or other loops.

    tinygrad, where it ends a loop, ends those that its length was computed from as well. So this
    one has no length: it counts for itself, and ends with a question.
    """
    if isinstance(n, int):
        with k.loop(n) as index:
            yield index
        return
    count = k.tile(1, dtypes.int32)
    with k.phase() as lane:
        count[0, lane] = 0
    with k.repeat_while(lambda: count[0, 0] < position(n)):
        i = count[0, 0]
        yield at_most(i, most)
        with k.phase(1):
            count[0, 0] = i + 1
