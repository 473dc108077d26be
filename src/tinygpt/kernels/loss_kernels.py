"""The kernels of `linear_cross_entropy`, in the order in which they are launched.

There the algorithm is explained. A *panel* is so many rows, or columns, of a matrix as there are
lanes, laid so that a vector of them is contiguous.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tinygrad import UOp

from tinygpt.kernels.cross_entropy import LOG2E, row_loss, within
from tinygpt.kernels.norm import fill, own_share
from tinygpt.kernels.phases import Array, Index, Kernel, Tile, as_index, as_uop, exp2, minimum

BLOCK = 48
"""Rows of the weight that are worked off at a time, or half so many; a multiple of a tile's."""
PARTS = 32
LOWEST = -3e38
"""Below every score but those beyond V, which are -inf: a block of these has exp(S - m) = 0."""
DEPTH = 256
"""Most steps of a product between two visits to memory."""


@dataclass(frozen=True)
class Plan:
    """How N rows of width C and V rows of weight are cut up."""

    N: int
    C: int
    V: int
    lanes: int
    tile: int  # rows of a register tile
    chunk: int  # about how many rows are worked off at a time
    frozen: bool = False  # nobody wants the gradient of the weight

    @property
    def name(self) -> str:
        return f"{self.N}x{self.V}x{self.C}"

    @property
    def chunks(self) -> int:
        return -(-self.N // self.chunk)

    @property
    def rows(self) -> int:
        """Rows of a chunk, a multiple of the lanes; those beyond N are zero and do not count."""
        return -(-self.N // (self.chunks * self.lanes)) * self.lanes

    @property
    def columns(self) -> int:
        """C, rounded up to a multiple of the lanes."""
        return -(-self.C // self.lanes) * self.lanes

    @property
    def block(self) -> int:
        """Rows of the weight of a block; fewer where they would not make a block for each part."""
        return BLOCK if self.V > BLOCK * PARTS else BLOCK // 2

    @property
    def parts(self) -> int:
        return min(PARTS, -(-self.V // self.block))

    @property
    def blocks(self) -> int:
        """Blocks of the vocabulary, the same number for each part; the last may lie beyond V."""
        return -(-self.V // (self.block * self.parts)) * self.parts

    @property
    def powers(self) -> tuple[int, int]:
        """The shape of a chunk's exp(S - m), in numbers."""
        return self.blocks * self.block, self.rows

    @property
    def dx_parts(self) -> tuple[int, int, int]:
        """The shape of what the parts add to a chunk's dx, in numbers."""
        return self.parts, self.rows, self.C

    @property
    def depth(self) -> int:
        """Steps of the sum over C between two visits to memory."""
        return next((d for d in range(DEPTH, DEPTH // 4, -1) if self.C % d == 0), self.C)


def prepare(k: Kernel, inverse: Array, padded: Array, *arrays: Array, plan: Plan) -> None:
    """1 / the number of counted rows; the targets, -1 beyond the last one; each chunk's number."""
    *chunks, targets = arrays
    k.units(1)
    acc, total = k.tile(1, inverse.dtype, shared=True), k.tile(1, inverse.dtype)
    fill(k, 0.0, 1, acc)
    with k.loop(plan.chunks * plan.rows // k.lanes) as j, k.phase() as lane:
        at = j * k.lanes + lane
        target = (at < plan.N).where(targets[minimum(at, plan.N - 1)], -1)
        padded[at] = target
        acc[0, lane] = acc[0, lane] + (target >= 0).where(as_uop(1.0, inverse.dtype), 0.0)
    k.fold(total, acc, 1)
    with k.phase(1):
        inverse[0] = 1.0 / total[0, 0].maximum(as_uop(1.0, inverse.dtype))
        for i, chunk in enumerate(chunks):
            chunk[0] = i


def pack(k: Kernel, by_row: Array, by_column: Array, x: Array, *, plan: Plan) -> None:
    """x in panels of so many rows, and in panels of so many columns, zero beyond N and C."""
    N, C, L = plan.N, plan.C, k.lanes
    total = plan.chunks * plan.rows
    panel = k.units(total // L)

    def element(row: UOp, column: UOp) -> UOp:
        value = x[minimum(row, N - 1) * C + minimum(column, C - 1)]
        return ((row < N) & (column < C)).where(value.cast(by_row.dtype), 0.0)

    with k.loop(C) as c, k.phase() as lane:
        by_row[(panel * C + c) * L + lane] = element(panel * L + lane, c)
    with k.loop(plan.columns // L) as j, k.loop(L) as r, k.phase() as lane:
        row = panel * L + r
        by_column[(j * total + row) * L + lane] = element(row, j * L + lane)


def scores(
    k: Kernel,
    scores: Array,
    largest: Array,
    sums: Array,
    chunk: Array,
    by_row: Array,
    weight: Array,
    *unused: Array,
    plan: Plan,
) -> None:
    """A block of S = W Xᵀ: the largest m of each column, all exp(S - m), and their sum."""
    block, C, V, L, rows = k.units(plan.blocks), plan.C, plan.V, k.lanes, plan.rows
    kind = scores.dtype
    acc, m, z = k.tile(plan.tile, kind), k.tile(1, kind), k.tile(1, kind)
    with k.loop(rows // L) as j:
        panel = (as_index(chunk[0]) * (rows // L) + j) * C * L
        with k.loop(C // plan.depth) as part, k.loop(plan.block // plan.tile) as t:
            first, start = block * plan.block + t * plan.tile, part * plan.depth
            places = [(first + u) * rows + j * L for u in range(plan.tile)]
            with k.phase() as lane:
                for u, place in enumerate(places):
                    acc[u, lane] = part.eq(0).where(0.0, scores[place + lane])
            with k.loop(plan.depth) as d, k.phase() as lane:
                vector = by_row[panel + (start + d) * L + lane]
                for u in range(plan.tile):
                    number = weight[minimum(first + u, V - 1) * C + start + d].cast(kind)
                    acc[u, lane] = acc[u, lane] + vector * number
            with k.phase() as lane:
                for u, place in enumerate(places):
                    scores[place + lane] = (first + u < V).where(acc[u, lane], -math.inf)
        fill(k, LOWEST, 1, m)
        with k.loop(plan.block) as v, k.phase() as lane:
            m[0, lane] = m[0, lane].maximum(scores[(block * plan.block + v) * rows + j * L + lane])
        fill(k, 0.0, 1, z)
        with k.loop(plan.block) as v, k.phase() as lane:
            at = (block * plan.block + v) * rows + j * L + lane
            power = exp2((scores[at] - m[0, lane]) * LOG2E)
            scores[at] = power
            z[0, lane] = z[0, lane] + power
        with k.phase() as lane:
            largest[block * rows + j * L + lane] = m[0, lane]
            sums[block * rows + j * L + lane] = z[0, lane]


def statistics(
    k: Kernel,
    out: Array,
    chunk: Array,
    largest: Array,
    sums: Array,
    by_row: Array,
    weight: Array,
    targets: Array,
    inverse: Array,
    *unused: Array,
    plan: Plan,
) -> None:
    """Each row's loss, its m, and 1 / (z · the number of rows), 0 if the row does not count."""
    panel = k.units(plan.rows // k.lanes)
    first, rows, kind, C = panel * k.lanes, plan.rows, out.dtype, plan.C
    m, z, logit = k.tile(1, kind), k.tile(1, kind), k.tile(1, kind)
    fill(k, LOWEST, 1, m)
    with k.loop(plan.blocks) as b, k.phase() as lane:
        m[0, lane] = m[0, lane].maximum(largest[b * rows + first + lane])
    fill(k, 0.0, 1, z, logit)
    with k.loop(plan.blocks) as b, k.phase() as lane:
        at = b * rows + first + lane
        z[0, lane] = z[0, lane] + sums[at] * exp2((largest[at] - m[0, lane]) * LOG2E)
    number = as_index(chunk[0])
    with k.loop(C) as c, k.phase() as lane:  # the score itself is gone
        target = targets[number * rows + first + lane]
        row = as_index(within(target, plan.V).where(target, 0))
        x = by_row[((number * (rows // k.lanes) + panel) * C + c) * k.lanes + lane]
        logit[0, lane] = logit[0, lane] + x * weight[row * C + c].cast(kind)
    with k.phase() as lane:
        at = first + lane
        target = targets[number * rows + at]
        out[at] = row_loss(target, plan.V, logit[0, lane], m[0, lane], z[0, lane])
        out[rows + at] = m[0, lane]
        out[2 * rows + at] = (target < 0).where(as_uop(0.0, kind), inverse[0] / z[0, lane])


def products(k: Kernel, dx_parts: Array, *arrays: Array, plan: Plan) -> None:
    """This part's blocks of the vocabulary: P, what it adds to dx, and its rows of [dweight]."""
    left = iter(arrays)
    dweight = None if plan.frozen else next(left)
    chunk, powers, largest, statistics, targets, inverse, weight = (next(left) for _ in range(7))
    by_column = None if plan.frozen else next(left)
    part, C, V, L, rows, kind = (
        k.units(plan.parts),
        plan.C,
        plan.V,
        k.lanes,
        plan.rows,
        powers.dtype,
    )
    number = as_index(chunk[0])
    # columns of these tiles are read one behind the other: a width that is no power of two
    # keeps them from falling on the same few lines of the cache
    p, w = k.tile(plan.block, kind, width=rows + L), k.tile(C, kind, width=plan.block)
    factor = k.tile(1, kind, width=rows)
    with k.loop(rows * C // L) as j, k.phase() as lane:
        dx_parts[(part * rows * C + j * L) + lane] = 0.0
    with k.loop(plan.blocks // plan.parts) as i:
        block = part * (plan.blocks // plan.parts) + i
        first = block * plan.block
        with k.loop(rows // L) as j, k.phase() as lane:
            at = j * L + lane
            shrink = exp2((largest[block * rows + at] - statistics[rows + at]) * LOG2E)
            factor[0, at] = shrink * statistics[2 * rows + at]
        with k.loop(plan.block) as v:
            with k.loop(rows // L) as j, k.phase() as lane:
                at = j * L + lane
                hit = as_index(targets[number * rows + at]).eq(first + v)
                power = powers[(first + v) * rows + at]
                p[v, at] = power * factor[0, at] - hit.where(inverse[0], 0.0)
            with k.phase(C) as c:
                w[c, v] = weight[minimum(first + v, V - 1) * C + c].cast(kind)
        with k.loop(rows // L) as j:
            out = (part * (rows // L) + j) * C
            tiles, rest = divmod(C, plan.tile)
            if tiles:
                with k.loop(tiles) as t:
                    _add_dx(k, dx_parts, out, t * plan.tile, plan.tile, plan.block, p, w, j * L)
            if rest:
                _add_dx(k, dx_parts, out, C - rest, rest, plan.block, p, w, j * L)
        if dweight is not None and by_column is not None:
            with k.loop(plan.columns // L) as j, k.loop(plan.block // plan.tile) as t:
                _add_dweight(k, dweight, first, t, j, number, p, by_column, plan)


def _add_dx(
    k: Kernel,
    dx: Array,
    out: Index,
    c: Index,
    tile: int,
    block: int,
    p: Tile,
    w: Tile,
    row: Index,
) -> None:
    """Columns c, c + 1, ... of dx for one vector of rows += P W over a block of the vocabulary."""
    acc = k.tile(tile, dx.dtype)
    with k.phase() as lane:
        for u in range(tile):
            acc[u, lane] = dx[(out + c + u) * k.lanes + lane]
    with k.loop(block) as v, k.phase() as lane:
        vector = p[v, row + lane]
        for u in range(tile):
            acc[u, lane] = acc[u, lane] + vector * w[c + u, v]
    with k.phase() as lane:
        for u in range(tile):
            dx[(out + c + u) * k.lanes + lane] = acc[u, lane]


def _add_dweight(
    k: Kernel,
    dweight: Array,
    first: Index,
    t: UOp,
    j: UOp,
    number: UOp,
    p: Tile,
    by_column: Array,
    plan: Plan,
) -> None:
    """One tile of dweight += Pᵀ X over the rows of the chunk."""
    C, V, L, rows, tile = plan.C, plan.V, k.lanes, plan.rows, plan.tile
    acc = k.tile(tile, dweight.dtype)
    ragged = plan.columns != C or plan.blocks * plan.block != V
    panel = (j * plan.chunks + number) * rows

    def place(u: int, lane: UOp) -> tuple[UOp, UOp | None]:
        v, c = first + t * tile + u, j * L + lane
        if not ragged:
            return v * C + c, None
        return minimum(v, V - 1) * C + minimum(c, C - 1), (v < V) & (c < C)

    with k.phase() as lane:
        for u in range(tile):
            acc[u, lane] = number.eq(0).where(0.0, dweight[place(u, lane)[0]])
    with k.loop(rows) as r, k.phase() as lane:
        vector = by_column[(panel + r) * L + lane]
        for u in range(tile):
            acc[u, lane] = acc[u, lane] + vector * p[t * tile + u, r]
    with k.phase() as lane:
        for u in range(tile):
            at, inside = place(u, lane)
            dweight.put(at, acc[u, lane], where=inside)


def add_parts(k: Kernel, dx: Array, parts: Array, *unused: Array, plan: Plan) -> None:
    """dx of a chunk, row by row: the sum of all parts, which lie in panels."""
    C, L, panels = plan.C, k.lanes, plan.rows // k.lanes
    panel = k.units(panels)
    with k.loop(C) as c, k.phase() as lane:
        value = parts[(panel * C + c) * L + lane]
        for part in range(1, plan.parts):
            value = value + parts[((part * panels + panel) * C + c) * L + lane]
        dx[(panel * L + lane) * C + c] = value


def collect(k: Kernel, dx: Array, g: Array, *chunks: Array, plan: Plan) -> None:
    """dx of all rows, times the gradient of the loss."""
    unit = k.units(k.pieces)
    for i, rows in enumerate(chunks):
        start = i * plan.rows * plan.C
        size = min(plan.rows, plan.N - i * plan.rows) * plan.C
        for at, inside in own_share(k, size, unit, k.pieces):
            dx.put(start + at, rows[at] * g[0].cast(dx.dtype), where=inside)


def scale(k: Kernel, dweight: Array, g: Array, *unused: Array, plan: Plan) -> None:
    """Multiply by the gradient of the loss; nothing to do if that is 1, as it mostly is."""
    unit = k.units(k.pieces)
    with k.loop(g[0].ne(1.0).where(1, 0)):
        for at, inside in own_share(k, plan.V * plan.C, unit, k.pieces):
            dweight.put(at, dweight[at] * g[0].cast(dweight.dtype), where=inside)


def loss(k: Kernel, loss: Array, inverse: Array, *arrays: Array, plan: Plan) -> None:
    """The mean of the counted rows' losses, which stand first in each chunk's statistics."""
    k.units(1)
    acc, total = k.tile(1, loss.dtype, shared=True), k.tile(1, loss.dtype)
    fill(k, 0.0, 1, acc)
    for statistics in arrays[: plan.chunks]:
        with k.loop(plan.rows // k.lanes) as j, k.phase() as lane:
            acc[0, lane] = acc[0, lane] + statistics[j * k.lanes + lane]
    k.fold(total, acc, 1)
    with k.phase(1):
        loss[0] = total[0, 0] * inverse[0]
