"""Idioms of the kernel language: shares of an array, sums across lanes, products of tiles.

`phases` is the language. What several kernels write in the same way stands here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tinygrad import UOp, dtypes

from tinygpt.kernels.pairs import add_products
from tinygpt.kernels.phases import Index, Kernel, Tile, as_index, as_uop, minimum


def blocks(n: int, size: int) -> int:
    """The number of blocks of this size that cover n elements."""
    return -(-n // size)


def divisors(n: int) -> list[int]:
    """All divisors of n, in ascending order."""
    return [d for d in range(1, n + 1) if n % d == 0]


def largest_divisor(n: int, limit: int) -> int:
    """The largest number up to ``limit`` that divides n."""
    return next(d for d in range(min(n, limit), 0, -1) if n % d == 0)


def spread(unit: UOp, n: int, size: int) -> Callable[[Index], UOp]:
    """Of n elements, those of a unit of ``size``: one from each of so many shares of the whole.

    So that places far apart are read at once, see `linear`. The last units may repeat some elements
    of others.
    """
    units = blocks(n, size)
    return lambda j: unit + (n - units) * j // max(size - 1, 1)


# Integers --------------------------------------------------------------------------------------


def int32(i: Index) -> UOp:
    """An index as an int32: comparisons of 32-bit integers vectorise, those of addresses do not."""
    return as_uop(i, dtypes.int32)


def uint32(i: Index) -> UOp:
    """An index as a uint32, by way of int32, which keeps tinygrad from making it 64 bits wide."""
    return int32(i).cast(dtypes.uint32)


def at_most(x: UOp, most: int) -> UOp:
    """An index that was read from memory and is known to lie in 0..most.

    The mask says so to tinygrad, which then computes addresses in 32 bits: WebGPU has no others. It
    has at least one bit, even where ``most`` is 0: were the input not read at all, tinygrad would
    give its number to a variable of the kernel, and the two would collide (trap 11).
    """
    return as_index(x & (2 ** max(1, most.bit_length()) - 1))


def row_of(token: UOp, V: int) -> tuple[UOp, UOp]:
    """-> (the row of an id, whether it is one of V rows); an id without a row gets the first."""
    known = (token >= 0) & (token < V)
    return at_most(known.where(token, 0), V - 1), known


# Loops -----------------------------------------------------------------------------------------


@contextmanager
def counted(k: Kernel, n: Index, most: int) -> Iterator[UOp]:
    """A loop like ``k.loop(n)`` with 1 <= n <= most, where n may depend on units and other loops.

    The length of a ``k.loop`` may not (trap 2). This loop has no length: a counter in a tile
    decides at the end of each round whether another one follows.
    """
    if isinstance(n, int):
        with k.loop(n) as index:
            yield index
        return
    count = k.tile(1, dtypes.int32)
    with k.phase() as lane:
        count[0, lane] = 0
    with k.repeat_while(lambda: count[0, 0] < int32(n)):
        i = count[0, 0]
        yield at_most(i, most)
        with k.phase(1):
            count[0, 0] = i + 1


def across(k: Kernel, n: int) -> Iterator[tuple[UOp, UOp, UOp]]:
    """Phases over the elements below n: yields (element, lane, whether it is one).

    The body of the caller's loop makes the assignments of a phase. It runs twice at most: for
    whole blocks of lanes, and for the rest. A CPU does the rest in a shorter loop; on a GPU the
    surplus lanes are given the last element, and must add or write nothing.
    """
    whole, rest = divmod(n, k.lanes)
    if whole:
        with k.loop(whole) as j, k.phase() as lane:
            yield j * k.lanes + lane, lane, as_uop(True)
    if rest and k.gpu:
        with k.phase() as lane:
            at = whole * k.lanes + lane
            yield minimum(at, n - 1), lane, at < n
    elif rest:
        with k.phase(rest) as lane:
            yield whole * k.lanes + lane, lane, as_uop(True)


def share(k: Kernel, n: int, part: UOp, parts: int) -> Iterator[tuple[UOp, UOp, UOp]]:
    """Phases over one part's share of the elements below n: yields (element, lane, is it one?).

    For sums. Every part has as many whole blocks of lanes, and of what is left over one block or
    none. Surplus lanes are given the last element, and must add nothing.
    """
    count = n // k.lanes // parts
    if count:
        with k.loop(count) as j, k.phase() as lane:
            yield (part * count + j) * k.lanes + lane, lane, as_uop(True)
    if n > (done := parts * count * k.lanes):
        with k.phase() as lane:
            at = done + part * k.lanes + lane
            yield minimum(at, n - 1), lane, at < n


def own_share(k: Kernel, n: int, part: UOp, parts: int) -> Iterator[tuple[UOp, UOp]]:
    """Phases over one part's share of the elements below n: yields (element, whether it is one).

    For state that is updated in place, one unit ``part`` for each piece: no element is in two
    shares. They differ by one block of lanes at most; the last part also has what is left over.
    """
    whole, rest = divmod(n, k.lanes)
    if whole:
        first = part * whole // parts
        count = whole if parts == 1 else (part + 1) * whole // parts - first
        with k.loop(count) as j, k.phase() as lane:
            yield (first + j) * k.lanes + lane, as_uop(True)
    if rest:
        with k.phase(None if k.gpu else rest) as lane:
            at, last = whole * k.lanes + lane, part.eq(parts - 1)
            yield minimum(at, n - 1), last & (at < n) if k.gpu else last


# Tiles -----------------------------------------------------------------------------------------


def fill(k: Kernel, value: float, rows: int, *tiles: Tile) -> None:
    """Set the first rows of the tiles to a number."""
    with k.phase() as lane:
        for tile in tiles:
            for u in range(rows):
                tile[u, lane] = value


def clear(k: Kernel, tile: Tile, rows: int) -> None:
    """Zeros for the first rows of a tile, in one loop on a CPU: compilers scatter them in two."""
    if k.gpu:
        with k.loop(rows) as row, k.phase() as lane:
            tile[row, lane] = 0.0
    else:
        with k.phase(rows * tile.width) as i:
            tile[0, i] = 0.0


def add_across(k: Kernel, sums: Tile, tile: Tile, rows: int) -> None:
    """sums[x, 0] = the sum of tile[x, lane] over the lanes, by halves. Overwrites ``tile``.

    `Kernel.fold` adds one lane after another, which takes as long as a dot product of 128 numbers:
    here vectors of lanes are added until 4 numbers are left.
    """
    width = k.lanes
    while width % 2 == 0 and width > 4 and not k.gpu:
        width //= 2
        with k.phase(width) as lane:
            for x in range(rows):
                tile[x, lane] = tile[x, lane] + tile[x, lane + width]
    if width == 4:
        with k.phase(rows) as row:
            sums[row, 0] = (tile[row, 0] + tile[row, 1]) + (tile[row, 2] + tile[row, 3])
        return
    with k.phase(1):
        for x in range(rows):
            sums[x, 0] = 0.0
    with k.loop(width) as lane, k.phase(1):
        for x in range(rows):
            sums[x, 0] = sums[x, 0] + tile[x, lane]


Matrix = Callable[[Index, Index], UOp]
"""The element of a row and a column."""


def read_turned(k: Kernel, out: Tile, width: int, value: Matrix, first: Index = 0) -> None:
    """out[first + d, lane] = value(lane, d) for d < ``width``, where memory is read along d."""
    if k.gpu:
        with k.loop(width) as d, k.phase() as lane:
            out[first + d, lane] = value(lane, d)
        return
    copy = k.tile(k.lanes, out.dtype, width=width)
    with k.loop(k.lanes) as x, k.phase(width) as d:
        copy[x, d] = value(x, d)
    _transpose(k, out, first, copy, 0, (k.lanes, width))


def write_turned(
    k: Kernel, tile: Tile, width: int, then: Callable[[Index, Index, UOp], None], first: Index = 0
) -> None:
    """then(lane, d, tile[first + d, lane]) for d < ``width``, which writes memory along d."""
    if k.gpu:
        with k.loop(width) as d, k.phase() as lane:
            then(lane, d, tile[first + d, lane])
        return
    copy = k.tile(k.lanes, tile.dtype, width=width)
    _transpose(k, copy, 0, tile, first, (width, k.lanes))
    with k.loop(k.lanes) as x, k.phase(width) as d:
        then(x, d, copy[x, d])


def _transpose(
    k: Kernel, out: Tile, to: Index, tile: Tile, at: Index, shape: tuple[int, int]
) -> None:
    """out[to + column, row] = tile[at + row, column], four rows and columns at a time.

    They are turned around in registers. Vectors that gather a column, or scatter one, take a load
    or a store for each of their numbers.
    """
    (rows, columns), to, at = shape, as_index(to), as_index(at)
    if rows % 4 or columns % 4 or rows < 8 or tile.dtype != dtypes.float32:
        with k.loop(columns) as column, k.phase(rows) as row:
            out[to + column, row] = tile[at + row, column]
        return
    code = _TURN.replace("FROM", str(tile.width)).replace("TO", str(out.width))
    with k.loop(rows // 4) as i, k.loop(columns // 4) as j, k.phase(1):
        k.statement(code, out[to + j * 4, i * 4], tile[at + i * 4, j * 4])


_TURN = """{{
  typedef float V __attribute__((vector_size(16), aligned(4), may_alias));
  V a = *(V*)({1}), b = *(V*)({1}+FROM), c = *(V*)({1}+2*FROM), d = *(V*)({1}+3*FROM);
  V p = __builtin_shufflevector(a, b, 0, 4, 1, 5), q = __builtin_shufflevector(c, d, 0, 4, 1, 5);
  V r = __builtin_shufflevector(a, b, 2, 6, 3, 7), s = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  *(V*)({0}) = __builtin_shufflevector(p, q, 0, 1, 4, 5);
  *(V*)({0}+TO) = __builtin_shufflevector(p, q, 2, 3, 6, 7);
  *(V*)({0}+2*TO) = __builtin_shufflevector(r, s, 0, 1, 4, 5);
  *(V*)({0}+3*TO) = __builtin_shufflevector(r, s, 2, 3, 6, 7);
}}"""
"""The statement of `_transpose`: {0} is the first of 16 numbers in ``out``, {1} in ``tile``."""


def add_up(
    k: Kernel, sums: Tile, acc: Tile, rows: int, n: int, value: Callable[[int, UOp], UOp]
) -> None:
    """sums[u, 0] = the sum of value(u, i) over the elements i < n, for u < rows; by way of acc."""
    fill(k, 0.0, rows, acc)
    for at, lane, inside in across(k, n):
        for u in range(rows):
            acc[u, lane] = acc[u, lane] + inside.where(value(u, at), 0.0)
    k.fold(sums, acc, rows)


def product(
    k: Kernel,
    rows: int,
    depth: int,
    a: Matrix,
    b: Matrix,
    then: Callable[[UOp, UOp, UOp], None],
    start: Callable[[UOp, UOp], UOp] | None = None,
    *,
    tile: int,
    in_pairs: bool = False,
) -> None:
    """The sums over y of a(x, y) b(y, lane), for every x below ``rows`` and every lane.

    ``tile`` rows are summed at a time, in registers: numbers of ``a`` times a vector of ``b``. A
    sum begins at ``start(x, lane)``, or 0, and is given to ``then(x, sum, lane)``, in a phase.
    ``in_pairs``: both are elements of memory that begin pairs of bfloat16 numbers, see `pairs`.
    """
    tile = min(tile, rows)
    sums = k.tile(tile, dtypes.float32 if in_pairs else a(0, 0).dtype)

    def some(first: Index, count: int) -> None:
        rows_of_tile = [(row, as_index(first) + row) for row in range(count)]
        with k.phase() as lane:
            for row, x in rows_of_tile:
                sums[row, lane] = 0.0 if start is None else start(x, lane)
        if in_pairs:
            add_products(
                k, depth, sums, lambda y: b(y, 0), lambda y: [a(x, y) for _, x in rows_of_tile]
            )
        else:
            with k.loop(depth) as y, k.phase() as lane:
                vector = b(y, lane)
                for row, x in rows_of_tile:
                    sums[row, lane] = sums[row, lane] + a(x, y) * vector
        with k.loop(count) as u, k.phase() as lane:
            then(as_index(first) + u, sums[u, lane], lane)

    whole, rest = divmod(rows, tile)
    with k.loop(whole) as i:
        some(i * tile, tile)
    if rest:
        some(whole * tile, rest)


def element(tile: Tile, first: Index = 0) -> Matrix:
    """For ``product``: the elements of a tile from a row on."""
    return lambda row, column: tile[first + as_index(row), column]


def store(tile: Tile, first: Index = 0) -> Callable[[UOp, UOp, UOp], None]:
    """For ``product``: write the sums to a tile from a row on."""

    def then(x: UOp, value: UOp, lane: UOp) -> None:
        tile[first + x, lane] = value

    return then
