"""The backward kernels: weights recomputed tile by tile, and five products from them.

With W the weights, O = W V, and for the gradient dO of the result:

    dV = Wᵀ dO        dW = dO Vᵀ        dS = W * (dW - delta)        dQ = scale dS K
                                                                     dK = scale dSᵀ Q

where delta, one number for each query, is the sum of dO * O along the head: the softmax's own
gradient. W is not stored: 2 ** (score - lse) makes it again. Dropout, a mask M of zeros and of
1 / (1 - p), turns the first W into M * W and dW into M * dW, and leaves delta as it is.

Lanes are keys: a tile of keys stays in place, and one block of queries after another is computed
against it. dK and dV of the tile are summed in tiles, (D, lanes) each. dQ belongs to the queries:
it is summed in memory, key tile after key tile, with the head's dimensions for lanes.

There are two ways to share out the work, which add the same numbers in the same order. `fused` has
a head per unit, and makes W and dW once. On a GPU, or where there are few heads, `keys` has a tile
of keys per unit, for dK and dV, and `queries` a block of queries per unit, for dQ: more units, at
the price of making W and dW twice.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from tinygrad import UOp, dtypes

from tinygpt.kernels.attention.tiles import (
    HIDDEN,
    Dropout,
    Head,
    Problem,
    block_size,
    pairs_of_rows,
    tile_shape,
)
from tinygpt.kernels.loops import (
    Matrix,
    blocks,
    clear,
    counted,
    element,
    int32,
    product,
    read_turned,
    store,
    write_turned,
)
from tinygpt.kernels.phases import Array, Index, Kernel, Tile, as_index, as_uop, exp2, minimum


def fused(k: Kernel, *arrays: Array, p: Problem) -> None:
    """All three gradients, and delta on the way, with a head per unit."""
    n = 1 if p.packed else 3
    gradients, (delta, grad, out, lse), inputs = arrays[:n], arrays[n : n + 4], arrays[n + 4 :]
    head = k.units(p.B * p.H)
    dq, dk, dv = p.heads(gradients, head)
    add_up(k, p, head, delta, grad, out)
    sweep = Sweep(k, p, head, (grad, lse, delta, *inputs))
    with k.loop(blocks(p.Tq, sweep.block)) as block:
        sweep.clear(block, dq)
    with k.loop(blocks(p.Tk, k.lanes)) as tile:
        sweep.keys(tile, dk, dv, dq)


def keys(k: Kernel, *arrays: Array, p: Problem) -> None:
    """dK and dV, with a tile of keys per unit."""
    n = 1 if p.packed else 2
    gradients, given = arrays[:n], arrays[n:]
    n_tiles = blocks(p.Tk, k.lanes)
    unit = k.units(p.B * p.H * n_tiles)
    head = unit // n_tiles
    dk, dv = p.heads(gradients if p.packed else (given[0], *gradients), head)[1:]
    Sweep(k, p, head, given).keys(unit % n_tiles, dk, dv)


def queries(k: Kernel, gradient: Array, *given: Array, p: Problem) -> None:
    """dQ, with a block of queries per unit."""
    n_blocks = blocks(p.Tq, block_size(p.Tq))
    unit = k.units(p.B * p.H * n_blocks)
    head, block = unit // n_blocks, unit % n_blocks
    dq = p.head(gradient, head, p.Tq, 0, 3)
    sweep = Sweep(k, p, head, given)
    sweep.clear(block, dq)
    q, grad_rows = sweep.rows(block)
    with counted(k, sweep.tiles_seen_by(block), blocks(p.Tk, k.lanes)) as tile:
        sweep.take(tile)
        sweep.weigh(tile, block, q, grad_rows)
        sweep.add_to_queries(tile, block, dq)


def deltas(k: Kernel, delta: Array, grad: Array, out: Array, *, p: Problem) -> None:
    """delta (B, H, Tq) by itself, for ``keys`` and ``queries``."""
    add_up(k, p, k.units(p.B * p.H), delta, grad, out)


def add_up(k: Kernel, p: Problem, head: UOp, delta: Array, grad: Array, out: Array) -> None:
    """delta, the sums of grad * out along each position of one head; lanes are positions."""
    a, b = (p.head(x, head, p.Tq) for x in (grad, out))
    sums, columns = k.tile(1, delta.dtype), None if k.gpu else k.tile(p.D, delta.dtype)
    with k.loop(blocks(p.Tq, k.lanes)) as i:

        def product(lane: Index, d: Index) -> UOp:
            t = minimum(i * k.lanes + lane, p.Tq - 1)
            return a[t, d] * b[t, d]

        if columns is not None:
            read_turned(k, columns, p.D, product)
        with k.phase() as lane:
            sums[0, lane] = 0.0
        with k.loop(p.D) as d, k.phase() as lane:
            value = product(lane, d) if columns is None else columns[d, lane]
            sums[0, lane] = sums[0, lane] + value
        with k.phase() as lane:
            delta[head * p.Tq + minimum(i * k.lanes + lane, p.Tq - 1)] = sums[0, lane]


class Sweep:
    """One tile of keys of one head, and the blocks of queries that pass by it."""

    def __init__(self, k: Kernel, p: Problem, head: UOp, given: Sequence[Array]) -> None:
        """``given``: dO, lse, delta, and the inputs of the forward kernel."""
        grad, lse, delta, *inputs = given
        self.k, self.p, self.block = k, p, block_size(p.Tq)
        self.rows_of_tile = tile_shape(k.gpu)[1]
        self.q, self.key, self.value = p.heads(inputs, head)
        self.grad = p.head(grad, head, p.Tq)
        self.lse, self.delta, self.first = lse, delta, head * p.Tq
        dtype = lse.dtype
        self.depth = p.D // 2 if p.pairs else p.D  # steps along the head
        narrow, column = (dtypes.bfloat16, dtypes.uint32) if p.pairs else (dtype, dtype)
        self.key_t, self.value_t = (k.tile(self.depth, column) for _ in range(2))  # (D, lanes)
        self.scores = k.tile(self.block, dtype)  # (queries, lanes), as are w and ds
        self.w = k.tile(self.block, narrow) if p.pairs else self.scores
        self.ds = k.tile(self.block, narrow, shared=True)
        self.drop = Dropout(k, p, head, inputs, k.lanes)

    def keys(self, tile: UOp, dk: Head, dv: Head, dq: Head | None = None) -> None:
        """dK and dV of a tile of keys, and what it adds to dQ."""
        k, p = self.k, self.p
        dk_t, dv_t = k.tile(p.D, self.lse.dtype), k.tile(p.D, self.lse.dtype)
        self.take(tile)
        for sums in (dk_t, dv_t):
            clear(k, sums, p.D)
        first = self.first_block_that_sees(tile)
        n_blocks = blocks(p.Tq, self.block)
        with counted(k, n_blocks - first, n_blocks) as j:
            block = j + first
            q, grad = self.rows(block)
            self.weigh(tile, block, q, grad)
            if p.pairs:
                q, grad = self.rows(block, across=True)
            self.add_to_keys(grad, self.w, dv_t)
            self.add_to_keys(q, self.ds, dk_t)
            if dq is not None:
                self.add_to_queries(tile, block, dq)
        self.write(tile, dk, dk_t, p.scale)
        self.write(tile, dv, dv_t, p.boost)

    def write(self, tile: UOp, gradient: Head, sums: Tile, factor: float) -> None:
        """A tile of the gradient of the keys or values, from its sums (D, lanes)."""

        def put(lane: Index, d: Index, value: UOp) -> None:
            gradient.put(self.key_row(tile, lane), d, value * factor)

        write_turned(self.k, sums, self.p.D, put)

    def take(self, tile: UOp) -> None:
        """Load a tile of keys and values, (D, lanes) each; the keys also row by row, for dQ."""
        k, p, row = self.k, self.p, functools.partial(self.key_row, tile)
        if p.pairs:
            self.key_rows = self.key.pairs_across(k, row, k.lanes, p.D)
            self.key.pairs_by_lane(k, row, p.D, self.key_t)
            self.value.pairs_by_lane(k, row, p.D, self.value_t)
        else:
            self.key_rows = self.key.rows(k, row, k.lanes, p.D)
            read_turned(k, self.key_t, p.D, lambda x, d: self.key_rows(x, d) * p.log2_scale)
            read_turned(k, self.value_t, p.D, lambda x, d: self.value[row(x), d] * p.boost)
        self.drop.take(row)

    def rows(self, block: UOp, across: bool = False) -> tuple[Matrix, Matrix]:
        """A block of queries, and of the gradient of their results; of pairs along or across."""
        k, p, row = self.k, self.p, functools.partial(self.query_row, block)

        def of(head: Head) -> Matrix:
            form = head.rows if not p.pairs else head.pairs_across if across else head.pairs_along
            return form(k, row, self.block, p.D)

        return of(self.q), of(self.grad)

    def weigh(self, tile: UOp, block: UOp, q: Matrix, grad: Matrix) -> None:
        """The weights W and their gradient dS of a block of queries and the tile of keys."""
        k, p = self.k, self.p

        def weights(x: UOp, dw: UOp, lane: UOp) -> None:
            t = self.first + self.query_row(block, x)
            score = self.scores[x, lane]
            if p.pairs:  # exact factors were multiplied, and are to be scaled
                score, dw = score * p.log2_scale, dw * p.boost
            score = score - self.lse[t]
            query = int32(block) * self.block + int32(x)
            seen = self.seen(query, tile, lane)
            weight = exp2(score if seen is None else seen.where(score, HIDDEN))
            self.w[x, lane] = self.drop(weight, lane, query)
            self.ds[x, lane] = weight * (self.drop(dw, lane, query) - self.delta[t])

        tiles, multiply = self.rows_of_tile, functools.partial(product, k, self.block, self.depth)
        for a, b, then in ((q, self.key_t, store(self.scores)), (grad, self.value_t, weights)):
            multiply(a, element(b), then, tile=tiles, in_pairs=p.pairs)

    def seen(self, query: UOp, tile: UOp, lane: UOp) -> UOp | None:
        """Whether a query sees a lane's key, None if all do. Queries beyond the last see none."""
        p = self.p
        exists = query < p.Tq if p.Tq % self.block else None
        if not p.causal:
            return exists
        before = int32(self.key_row(tile, lane)) < query + (p.ahead + 1)
        return before if exists is None else before & exists

    def add_to_keys(self, rows: Matrix, weights: Tile, sums: Tile) -> None:
        """sums (D, lanes) += rows (queries, D)ᵀ weights (queries, lanes)."""
        pairs = self.p.pairs
        product(
            self.k,
            self.p.D,
            self.block // 2 if pairs else self.block,
            lambda d, x: rows(x, d),
            pairs_of_rows(self.k, weights, self.block) if pairs else element(weights),
            store(sums),
            element(sums),
            tile=self.rows_of_tile,
            in_pairs=pairs,
        )

    def add_to_queries(self, tile: UOp, block: UOp, dq: Head) -> None:
        """dQ (queries, D) += scale dS (queries, keys) K (keys, D): lanes are dimensions here."""
        k, p, rows = self.k, self.p, self.ds

        def ds(x: Index, r: Index) -> UOp:
            value = self.ds[x, r]
            if p.Tk % k.lanes == 0:
                return value
            exists = int32(tile) * k.lanes + int32(r) < p.Tk
            return exists.where(value, as_uop(0.0, value.dtype))

        if p.pairs and p.Tk % k.lanes:  # the lanes behind the last key repeat it
            rows = k.tile(self.block, dtypes.bfloat16)
            with k.loop(self.block) as x, k.phase() as lane:
                rows[x, lane] = ds(x, lane)

        with k.loop(blocks(p.D, k.lanes)) as part:

            def add(x: UOp, value: UOp, lane: UOp) -> None:
                t, d = self.query_row(block, x), part * k.lanes + lane
                total = dq[t, minimum(d, p.D - 1)] + value * p.scale
                dq.put(t, d, total, self.inside(block, x, d))

            def keys(r: Index, lane: Index) -> UOp:
                d = part * k.lanes + lane
                return self.key_rows(r, d if p.pairs else minimum(d, p.D - 1))

            product(
                k,
                self.block,
                k.lanes // 2 if p.pairs else k.lanes,
                (lambda x, r: rows[x, as_index(r) * 2]) if p.pairs else ds,
                keys,
                add,
                tile=self.rows_of_tile,
                in_pairs=p.pairs,
            )

    def clear(self, block: UOp, dq: Head) -> None:
        """Zeros for a block of dQ."""
        k, p = self.k, self.p
        with k.loop(self.block) as x, k.loop(blocks(p.D, k.lanes)) as part, k.phase() as lane:
            d = part * k.lanes + lane
            dq.put(self.query_row(block, x), minimum(d, p.D - 1), 0.0)

    def inside(self, block: UOp, x: Index, d: Index) -> UOp | None:
        """Whether dQ has such an element; None if it surely has."""
        t = block * self.block + x
        gates = [t < self.p.Tq] if self.p.Tq % self.block else []
        gates += [as_index(d) < self.p.D] if self.p.D % self.k.lanes else []
        return functools.reduce(lambda a, b: a & b, gates) if gates else None

    def key_row(self, tile: UOp, lane: Index) -> UOp:
        """The position of a lane's key; lanes behind the last key repeat it."""
        at = tile * self.k.lanes + lane
        return at if self.p.Tk % self.k.lanes == 0 else minimum(at, self.p.Tk - 1)

    def query_row(self, block: UOp, x: Index) -> UOp:
        """The position of query x of a block; those behind the last repeat it."""
        at = block * self.block + x
        return at if self.p.Tq % self.block == 0 else minimum(at, self.p.Tq - 1)

    def first_block_that_sees(self, tile: UOp) -> Index:
        """The first block of queries of which one may see a key of the tile (causal: not all)."""
        if not self.p.causal:
            return 0
        query = tile * self.k.lanes - self.p.ahead  # the first that sees the tile's first key
        return (query < 0).where(as_index(0), query) // self.block

    def tiles_seen_by(self, block: UOp) -> Index:
        """How many tiles of keys, from the first on, the queries of a block may see."""
        if not self.p.causal:
            return blocks(self.p.Tk, self.k.lanes)
        last = minimum(block * self.block + (self.block - 1), self.p.Tq - 1) + self.p.ahead
        return last // self.k.lanes + 1
