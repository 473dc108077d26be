"""The kernels of the fused loss, in the order in which they are launched for a chunk of rows.

`fused` explains the algorithm. A *panel* is so many rows, or columns, of a matrix as there are
lanes, laid so that a vector of them is contiguous.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from tinygrad import UOp, dtypes

from tinygpt.kernels import pairs
from tinygpt.kernels.loops import blocks, fill, largest_divisor, product, row_of
from tinygpt.kernels.loss.cross_entropy import row_loss
from tinygpt.kernels.matmul import register_tile
from tinygpt.kernels.phases import (
    LOG2E,
    Array,
    Index,
    Kernel,
    Tile,
    as_index,
    as_uop,
    exp2,
    minimum,
)

BLOCK = 48
"""Rows of the weight that are worked off at a time, or half so many; a multiple of a tile's. As
pairs of bfloat16 numbers twice as many, which take as much of the cache."""
PARTS = 32
LOWEST = -3e38
"""Below every score but those beyond V, which are -inf: a block of these has exp(S - m) = 0."""
DEPTH = 256
"""Most steps of a product between two visits to memory."""
CHUNK = 512
"""About how many rows are worked off at a time."""
MOST_CHUNKS = 48
"""A kernel takes something of every chunk, and tinygrad 62 buffers at most."""


class Cut(NamedTuple):
    """How N rows of width C and V rows of weight are cut up."""

    N: int
    C: int
    V: int
    lanes: int
    tile: int  # rows of a register tile
    chunks: int
    rows: int  # of a chunk, a multiple of the lanes; those beyond N are zero and do not count
    padded: int  # rows of all chunks
    columns: int  # C, rounded up to a multiple of the lanes
    block: int  # rows of the weight of a block
    parts: int  # of the vocabulary, which are worked off independently
    blocks: int  # of the vocabulary, the same number for each part; the last may lie beyond V
    depth: int  # steps of the sum over C between two visits to memory
    frozen: bool  # the gradient of the weight is not wanted
    pairs: bool  # products of bfloat16 numbers, two at a time

    @property
    def powers(self) -> tuple[int, int]:
        """The shape of a chunk's exp(S - m), in numbers."""
        return self.blocks * self.block, self.rows

    @property
    def dx_parts(self) -> tuple[int, int, int]:
        """The shape of what the parts add to a chunk's dx, in numbers."""
        return self.parts, self.rows, self.C

    @property
    def numbers(self) -> int:
        """How many numbers a step of a sum takes at a time."""
        return 2 if self.pairs else 1

    @property
    def steps(self) -> int:
        """Steps of a sum over C."""
        return blocks(self.C, self.numbers)


def cut_of(N: int, C: int, V: int, frozen: bool = False, in_pairs: bool = False) -> Cut:
    """How N rows of width C and V rows of weight are cut up on this machine."""
    most = max(CHUNK, blocks(N, MOST_CHUNKS))
    lanes, tile = register_tile(most)
    if in_pairs:
        lanes, tile = 2 * pairs.VECTOR, 8
    chunks = blocks(N, most)
    rows = blocks(N, chunks * lanes) * lanes
    # smaller blocks where large ones would not make one for each part
    sizes = [BLOCK * 2] * in_pairs + [BLOCK]
    block = next((size for size in sizes if size * PARTS < V), BLOCK // 2)
    steps = blocks(C, 2) if in_pairs else C
    parts = min(PARTS, blocks(V, block))
    return Cut(
        *(N, C, V, lanes),
        tile=largest_divisor(BLOCK // 2, tile),
        chunks=chunks,
        rows=rows,
        padded=chunks * rows,
        columns=blocks(C, lanes) * lanes,
        block=block,
        parts=parts,
        blocks=blocks(V, block * parts) * parts,
        depth=next((d for d in range(DEPTH, DEPTH // 4, -1) if steps % d == 0), steps),
        frozen=frozen,
        pairs=in_pairs,
    )


def prepare(k: Kernel, inverse: Array, padded: Array, *arrays: Array, cut: Cut) -> None:
    """1 / the number of counted rows; the targets, -1 beyond the last one; each chunk's number.

    A chunk's number is data: one kernel serves all chunks.
    """
    *numbers, targets = arrays
    k.units(1)
    acc, total = k.tile(1, inverse.dtype, shared=True), k.tile(1, inverse.dtype)
    fill(k, 0.0, 1, acc)
    with k.loop(cut.padded // k.lanes) as j, k.phase() as lane:
        at = j * k.lanes + lane
        target = (at < cut.N).where(targets[minimum(at, cut.N - 1)], -1)
        padded[at] = target
        acc[0, lane] = acc[0, lane] + (target >= 0).where(as_uop(1.0, inverse.dtype), 0.0)
    k.fold(total, acc, 1)
    with k.phase(1):
        inverse[0] = 1.0 / total[0, 0].maximum(as_uop(1.0, inverse.dtype))
        for i, number in enumerate(numbers):
            number[0] = i


def pack(k: Kernel, by_row: Array, by_column: Array, x: Array, *, cut: Cut) -> None:
    """x in panels of so many rows, and in panels of so many columns, zero beyond N and C.

    With ``cut.pairs`` a number of the panels is a pair of them: of two columns, or of two rows.
    """
    N, C, L = cut.N, cut.C, k.lanes
    panel, kind = k.units(cut.padded // L), x.dtype if cut.pairs else by_row.dtype

    def element(row: UOp, column: UOp) -> UOp:
        value = x[minimum(row, N - 1) * C + minimum(column, C - 1)]
        return ((row < N) & (column < C)).where(value.cast(kind), as_uop(0.0, kind))

    def of_columns(row: UOp, c: UOp) -> UOp:
        if not cut.pairs:
            return element(row, c)
        return pairs.joined(element(row, c * 2), element(row, c * 2 + 1))

    def of_rows(r: UOp, column: UOp) -> UOp:
        if not cut.pairs:
            return element(r, column)
        return pairs.joined(element(r * 2, column), element(r * 2 + 1, column))

    with k.loop(cut.steps) as c, k.phase() as lane:
        by_row[(panel * cut.steps + c) * L + lane] = of_columns(panel * L + lane, c)
    rows, size = cut.padded // cut.numbers, L // cut.numbers
    with k.loop(cut.columns // L) as j, k.loop(size) as r, k.phase() as lane:
        row = panel * size + r
        by_column[(j * rows + row) * L + lane] = of_rows(row, j * L + lane)


def scores(k: Kernel, scores: Array, largest: Array, sums: Array, *given: Array, cut: Cut) -> None:
    """A block of S = W Xᵀ: the largest m of each column, all exp(S - m), and their sum.

    Inputs: the chunk's number, x in panels of rows, the weight.
    """
    number, by_row, weight = given
    block, C, V, L, rows, kind = k.units(cut.blocks), cut.C, cut.V, k.lanes, cut.rows, scores.dtype
    first = block * cut.block
    m, z = k.tile(1, kind), k.tile(1, kind)
    if cut.pairs:
        narrow = k.tile(cut.block, dtypes.bfloat16, width=2 * cut.steps)
        with k.loop(cut.block) as v, k.phase(2 * cut.steps) as c:
            value = weight[minimum(first + v, V - 1) * C + minimum(c, C - 1)]
            narrow[v, c] = value if C % 2 == 0 else (c < C).where(value, as_uop(0.0, weight.dtype))

    def element(v: Index, step: UOp, d: Index) -> UOp:
        if cut.pairs:
            return narrow[v, (step + d) * 2]
        return weight[minimum(first + v, V - 1) * C + step + d].cast(kind)

    with k.loop(rows // L) as j:
        panel = (as_index(number[0]) * (rows // L) + j) * cut.steps * L

        def at(v: Index, lane: UOp) -> UOp:
            return (first + v) * rows + j * L + lane

        with k.loop(cut.steps // cut.depth) as part:
            step = part * cut.depth

            def put(v: UOp, score: UOp, lane: UOp) -> None:
                scores[at(v, lane)] = (first + v < V).where(score, -math.inf)

            product(
                k,
                cut.block,
                cut.depth,
                lambda v, d: element(v, step, d),
                lambda d, lane: by_row[panel + (step + d) * L + lane],
                put,
                lambda v, lane: part.eq(0).where(0.0, scores[at(v, lane)]),
                tile=cut.tile,
                in_pairs=cut.pairs,
            )
        fill(k, LOWEST, 1, m)
        with k.loop(cut.block) as v, k.phase() as lane:
            m[0, lane] = m[0, lane].maximum(scores[at(v, lane)])
        fill(k, 0.0, 1, z)
        with k.loop(cut.block) as v, k.phase() as lane:
            power = exp2((scores[at(v, lane)] - m[0, lane]) * LOG2E)
            scores[at(v, lane)] = power
            z[0, lane] = z[0, lane] + power
        with k.phase() as lane:
            largest[block * rows + j * L + lane] = m[0, lane]
            sums[block * rows + j * L + lane] = z[0, lane]


def statistics(k: Kernel, out: Array, *given: Array, cut: Cut) -> None:
    """Each row's loss, its m, and 1 / (z · the number of rows), 0 if the row does not count.

    Inputs: the chunk's number, the blocks' m and sums, x in panels of rows, the weight, targets,
    1 / counted rows.
    """
    number, largest, sums, by_row, weight, targets, inverse = given
    panel = k.units(cut.rows // k.lanes)
    first, rows, kind, C = panel * k.lanes, cut.rows, out.dtype, cut.C
    m, z, logit = k.tile(1, kind), k.tile(1, kind), k.tile(1, kind)
    fill(k, LOWEST, 1, m)
    with k.loop(cut.blocks) as b, k.phase() as lane:
        m[0, lane] = m[0, lane].maximum(largest[b * rows + first + lane])
    fill(k, 0.0, 1, z, logit)
    with k.loop(cut.blocks) as b, k.phase() as lane:
        at = b * rows + first + lane
        z[0, lane] = z[0, lane] + sums[at] * exp2((largest[at] - m[0, lane]) * LOG2E)
    chunk = as_index(number[0])
    with k.loop(cut.steps) as c, k.phase() as lane:  # the target's score: exp has overwritten it
        row, _ = row_of(targets[chunk * rows + first + lane], cut.V)
        x = by_row[((chunk * (rows // k.lanes) + panel) * cut.steps + c) * k.lanes + lane]
        columns = [minimum(c * cut.numbers + i, C - 1) for i in range(cut.numbers)]
        numbers = [weight[row * C + column] for column in columns]
        if cut.pairs:  # rounded as in the other scores
            numbers = [number.cast(dtypes.bfloat16) for number in numbers]
        terms = zip(pairs.halves(x) if cut.pairs else [x], numbers, strict=True)
        products = [a * number.cast(kind) for a, number in terms]
        logit[0, lane] = functools.reduce(UOp.add, products, logit[0, lane])
    with k.phase() as lane:
        at = first + lane
        target = targets[chunk * rows + at]
        out[at] = row_loss(target, cut.V, logit[0, lane], m[0, lane], z[0, lane])
        out[rows + at] = m[0, lane]
        out[2 * rows + at] = (target < 0).where(as_uop(0.0, kind), inverse[0] / z[0, lane])


def products(k: Kernel, dx: Array, *arrays: Array, cut: Cut) -> None:
    """This part's blocks of the vocabulary: P, its own dx = P W, and its rows of [dweight] Pᵀ X.

    dx is (parts, panels of rows, C, lanes). Inputs: the chunk's number, exp(S - m), the blocks' m,
    the rows' statistics, targets, 1 / counted rows, the weight and x in panels of columns.
    """
    dweight = arrays[: 1 - cut.frozen]
    number, powers, largest, statistics, targets, inverse = arrays[1 - cut.frozen : -2]
    weight, by_column = arrays[-2:]
    C, V, L, rows, kind = cut.C, cut.V, k.lanes, cut.rows, powers.dtype
    part, chunk, per_part = k.units(cut.parts), as_index(number[0]), cut.blocks // cut.parts
    # columns of these tiles are read one behind the other: a width that is no power of two
    # keeps them from falling on the same few lines of the cache
    narrow = dtypes.bfloat16 if cut.pairs else kind
    p, w = k.tile(cut.block, narrow, width=rows + L), k.tile(C, narrow, width=cut.block)
    across = k.tile(cut.block // 2, dtypes.uint32, width=rows) if cut.pairs else p
    factor = k.tile(1, kind, width=rows)

    with k.loop(rows * C // L) as j, k.phase() as lane:
        dx[part * rows * C + j * L + lane] = 0.0
    with k.loop(per_part) as i:
        block = part * per_part + i
        first = block * cut.block
        with k.loop(rows // L) as j, k.phase() as lane:
            row = j * L + lane
            shrink = exp2((largest[block * rows + row] - statistics[rows + row]) * LOG2E)
            factor[0, row] = shrink * statistics[2 * rows + row]

        def probability(v: UOp, row: UOp, first: UOp = first) -> UOp:
            hit = as_index(targets[chunk * rows + row]).eq(first + v)
            power = powers[(first + v) * rows + row]
            return power * factor[0, row] - hit.where(inverse[0], 0.0)

        with k.loop(cut.block // cut.numbers) as v:
            with k.loop(rows // L) as j, k.phase() as lane:
                row = j * L + lane
                values = [probability(v * cut.numbers + x, row) for x in range(cut.numbers)]
                for x, value in enumerate(values):
                    p[v * cut.numbers + x, row] = value
                if cut.pairs:
                    across[v, row] = pairs.joined(*values)
            for x in range(cut.numbers):
                with k.phase(C) as c:
                    start = minimum(first + v * cut.numbers + x, V - 1) * C
                    w[c, v * cut.numbers + x] = weight[start + c]
        with k.loop(rows // L) as j:

            def at(c: UOp, lane: UOp) -> UOp:
                return ((part * (rows // L) + j) * C + c) * L + lane

            def put(c: UOp, value: UOp, lane: UOp) -> None:
                dx[at(c, lane)] = value

            product(
                k,
                C,
                cut.block // cut.numbers,
                lambda c, v: w[c, as_index(v) * cut.numbers],
                lambda v, lane: across[v, j * L + lane],
                put,
                lambda c, lane: dx[at(c, lane)],
                tile=cut.tile,
                in_pairs=cut.pairs,
            )
        for total in dweight:
            with k.loop(cut.columns // L) as j:
                _add_dweight(k, total, first, j, chunk, p, by_column, cut)


def _add_dweight(
    k: Kernel, dweight: Array, first: UOp, j: UOp, chunk: UOp, p: Tile, by_column: Array, cut: Cut
) -> None:
    """A block of rows of dweight, in one panel of columns, += Pᵀ X over the rows of the chunk."""
    C, V, L = cut.C, cut.V, k.lanes
    steps = cut.rows // cut.numbers
    panel = (j * cut.chunks + chunk) * steps
    ragged = cut.columns != C or cut.blocks * cut.block != V

    def put(v: UOp, value: UOp, lane: UOp) -> None:
        row, column = first + v, j * L + lane
        dweight.put(row * C + column, value, (row < V) & (column < C) if ragged else None)

    def start(v: UOp, lane: UOp) -> UOp:
        at = minimum(first + v, V - 1) * C + minimum(j * L + lane, C - 1)
        return chunk.eq(0).where(0.0, dweight[at])

    product(
        k,
        cut.block,
        steps,
        lambda v, r: p[v, as_index(r) * cut.numbers],
        lambda r, lane: by_column[(panel + r) * L + lane],
        put,
        start,
        tile=cut.tile,
        in_pairs=cut.pairs,
    )


def add_parts(k: Kernel, dx: Array, number: Array, parts: Array, *, cut: Cut) -> None:
    """The chunk's rows of dx (N, C): the sums of all parts, which lie in panels."""
    C, L, panels = cut.C, k.lanes, cut.rows // k.lanes
    panel = k.units(panels)
    with k.loop(C) as c, k.phase() as lane:
        value = parts[(panel * C + c) * L + lane]
        for part in range(1, cut.parts):
            value = value + parts[((part * panels + panel) * C + c) * L + lane]
        row = as_index(number[0]) * cut.rows + panel * L + lane
        dx.put(row * C + c, value, row < cut.N if cut.padded != cut.N else None)


def mean(k: Kernel, loss: Array, inverse: Array, *arrays: Array, cut: Cut) -> None:
    """The mean of the counted rows' losses, which stand first in each chunk's statistics."""
    k.units(1)
    acc, total = k.tile(1, loss.dtype, shared=True), k.tile(1, loss.dtype)
    fill(k, 0.0, 1, acc)
    for statistics in arrays[: cut.chunks]:
        with k.loop(cut.rows // k.lanes) as j, k.phase() as lane:
            acc[0, lane] = acc[0, lane] + statistics[j * k.lanes + lane]
    k.fold(total, acc, 1)
    with k.phase(1):
        loss[0] = total[0, 0] * inverse[0]
