"""The kernels for tensor cores: a tile of rows for each warp, products of small matrices.

The formulas are those of `forward` and `backward`, and so is the order: tiles of queries against
blocks of keys for the result and for dQ, tiles of keys against blocks of queries for dK and dV. A
workgroup has up to `WARPS` warps with a tile of their own each; the block is copied into memory
that all of them share. Scores and sums are float32; the weights, and what comes of them in the
backward pass, are rounded to the inputs' type before the second product, as Dao et al. do.

A score's row lies in the fragments of four threads. They exchange two things, by way of shared
memory: the largest score of a row in a block, and at the end the sum of its weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from tinygrad import UOp, dtypes

from tinygpt.kernels.attention.tiles import HIDDEN, Head, Problem
from tinygpt.kernels.loops import blocks, counted, int32
from tinygpt.kernels.phases import Array, Index, Kernel, Tile, as_index, as_uop, minimum
from tinygpt.kernels.wmma import CORES, WARP, Core
from tinygpt.machine.tinygrad_internals import DType

WARPS = 4
"""Most tiles of a workgroup: so many share what is copied."""
BLOCK = 32
"""Rows of the other side that are copied at a time."""
VECTOR = 8
"""Numbers that a thread copies at a time: 16 bytes. So many more lie between rows of the copy, so
that the rows that a warp reads at once lie in different banks of the shared memory."""
KEPT = 64
"""Largest head whose fragments stay in registers all along; those of larger ones are read again."""


def warps(T: int, core: Core) -> int:
    """Warps of a workgroup, for T rows: no more than there are tiles."""
    return min(WARPS, blocks(T, core.m))


def fits(p: Problem, core: Core) -> bool:
    """Whether the kernels can take a problem: whole fragments, and no dropout."""
    return p.D % max(core.depth, VECTOR) == 0 and p.D <= 128 and not p.dropout


def forward(k: Kernel, out: Array, lse: Array, *inputs: Array, p: Problem, core: str) -> None:
    """out = softmax(scale q kᵀ) v, and lse (B, H, Tq), log2 of the softmax's denominators."""
    w = Warps(k, CORES[core], p.Tq)
    head, first = w.unit(p.B * p.H)
    (q, key, value), result = p.heads(inputs, head), p.head(out, head, p.Tq)
    D, core_ = p.D, w.core
    queries = w.left(q, first, D)
    keys, values = (w.block(x.array.dtype, D) for x in (key, value))
    scores, o = k.tile(BLOCK // core_.n * w.size, dtypes.float32), w.sums(D)
    m, total = (k.tile(core_.rows, dtypes.float32) for _ in range(2))
    exchange = k.tile(w.height, dtypes.float32, width=4, shared=True)
    with k.phase() as thread:
        for i in range(core_.rows):
            m[i, thread], total[i, thread] = HIDDEN, 0.0
    w.clear(o)
    n_blocks, last = blocks(p.Tk, BLOCK), minimum(first + (w.height - 1), p.Tq - 1) + p.ahead
    with counted(k, last // BLOCK + 1 if p.causal else n_blocks, n_blocks) as j:
        w.copy((keys, key), (values, value), D=D, start=j * BLOCK, T=p.Tk)
        with k.phase() as thread:
            found = list[list[UOp]]()
            for n in range(BLOCK // core_.n):
                sums = w.product(queries, w.across(keys, n, thread), D, thread)
                found.append([
                    w.masked(s * p.log2_scale, p, *w.element(e, n, first, j * BLOCK, thread))
                    for e, s in enumerate(sums)
                ])  # fmt: skip
            for n, e, s in _each(found):
                scores[n * w.size + e, thread] = s
            for i in range(core_.rows):
                mine = [s for _, e, s in _each(found) if core_.row(e) == i]
                exchange[w.row(i, thread), core_.quarter(thread % WARP)] = _largest(mine)
        with k.phase() as thread:
            new = [
                _largest([m[i, thread], *(exchange[w.row(i, thread), x] for x in range(4))])
                for i in range(core_.rows)
            ]
            shrink = [(m[i, thread] - new[i]).exp2() for i in range(core_.rows)]
            weights = [
                [(scores[n * w.size + e, thread] - new[core_.row(e)]).exp2() for e in range(w.size)]
                for n in range(BLOCK // core_.n)
            ]
            for i in range(core_.rows):
                mine = [x for _, e, x in _each(weights) if core_.row(e) == i]
                total[i, thread] = total[i, thread] * shrink[i] + functools.reduce(UOp.add, mine)
                m[i, thread] = new[i]
            w.add(o, weights, values, D, thread, lambda e, x: x * shrink[core_.row(e)])
    with k.phase() as thread:
        for i in range(core_.rows):
            exchange[w.row(i, thread), core_.quarter(thread % WARP)] = total[i, thread]
    with k.phase() as thread:
        sums = [
            functools.reduce(UOp.add, [exchange[w.row(i, thread), x] for x in range(4)])
            for i in range(core_.rows)
        ]
        for i in range(core_.rows):
            t = first + w.row(i, thread)
            lse.put(head * p.Tq + t, m[i, thread] + sums[i].log2(), w.exists(t, p.Tq))
        for n, e in w.elements(D):
            t, d = w.element(e, n, first, 0, thread)
            result.put(t, d, o[n * w.size + e, thread] / sums[core_.row(e)], w.exists(t, p.Tq))


def queries(k: Kernel, gradient: Array, *given: Array, p: Problem, core: str) -> None:
    """dQ, with some tiles of queries per unit. Inputs: dO, lse, delta, and those of `forward`."""
    w = Warps(k, CORES[core], p.Tq)
    head, first = w.unit(p.B * p.H)
    grad, lse, delta, *inputs = given
    (q, key, value), grad_rows = p.heads(inputs, head), p.head(grad, head, p.Tq)
    dq, D, rows = p.head(gradient, head, p.Tq, 0, 3), p.D, w.core.rows
    left, left_grad = w.left(q, first, D), w.left(grad_rows, first, D)
    keys, values = (w.block(x.array.dtype, D) for x in (key, value))
    sums, of_row = w.sums(D), k.tile(2 * rows, dtypes.float32)
    w.clear(sums)
    with k.phase() as thread:
        for i in range(rows):
            t = head * p.Tq + minimum(first + w.row(i, thread), p.Tq - 1)
            of_row[i, thread], of_row[rows + i, thread] = lse[t], delta[t]
    n_blocks, last = blocks(p.Tk, BLOCK), minimum(first + (w.height - 1), p.Tq - 1) + p.ahead
    with counted(k, last // BLOCK + 1 if p.causal else n_blocks, n_blocks) as j:
        w.copy((keys, key), (values, value), D=D, start=j * BLOCK, T=p.Tk)
        with k.phase() as thread:
            found = list[list[UOp]]()
            for n in range(BLOCK // w.core.n):
                s = w.product(left, w.across(keys, n, thread), D, thread)
                dw = w.product(left_grad, w.across(values, n, thread), D, thread)
                found.append([])
                for e, (score, gradient_of_weight) in enumerate(zip(s, dw, strict=True)):
                    i = w.core.row(e)
                    score = score * p.log2_scale - of_row[i, thread]
                    at = w.element(e, n, first, j * BLOCK, thread)
                    weight = w.masked(score, p, *at).exp2()
                    found[-1].append(weight * (gradient_of_weight - of_row[rows + i, thread]))
            w.add(sums, found, keys, D, thread)
    w.write(sums, dq, first, p.Tq, D, p.scale)


def keys(k: Kernel, *arrays: Array, p: Problem, core: str) -> None:
    """dK and dV, with some tiles of keys per unit; scores lie across, keys are their rows."""
    count = 1 if p.packed else 2
    gradients, (grad, lse, delta, *inputs) = arrays[:count], arrays[count:]
    w = Warps(k, CORES[core], p.Tk)
    head, first = w.unit(p.B * p.H)
    (q, key, value), grad_rows = p.heads(inputs, head), p.head(grad, head, p.Tq)
    dk, dv = p.heads(gradients if p.packed else (grad, *gradients), head)[1:]
    D = p.D
    left, left_value = w.left(key, first, D, p.Tk), w.left(value, first, D, p.Tk)
    rows, grads = (w.block(x.array.dtype, D) for x in (q, grad_rows))
    dk_sums, dv_sums = w.sums(D), w.sums(D)
    w.clear(dk_sums, dv_sums)
    n_blocks, begin = blocks(p.Tq, BLOCK), as_index(first) - p.ahead  # the first query that sees
    start = (begin < 0).where(as_index(0), begin) // BLOCK if p.causal else as_index(0)
    with counted(k, n_blocks - start if p.causal else n_blocks, n_blocks) as j:
        at = (j + start) * BLOCK
        w.copy((rows, q), (grads, grad_rows), D=D, start=at, T=p.Tq)
        with k.phase() as thread:
            weights, changes = list[list[UOp]](), list[list[UOp]]()
            for n in range(BLOCK // w.core.n):
                s = w.product(left, w.across(rows, n, thread), D, thread)
                dw = w.product(left_value, w.across(grads, n, thread), D, thread)
                weights.append([])
                changes.append([])
                for e, (score, gradient_of_weight) in enumerate(zip(s, dw, strict=True)):
                    t, query = w.element(e, n, first, at, thread)
                    of_query = head * p.Tq + minimum(query, p.Tq - 1)
                    score = score * p.log2_scale - lse[of_query]
                    weight = w.masked(score, p, query, t).exp2()
                    weights[-1].append(weight)
                    changes[-1].append(weight * (gradient_of_weight - delta[of_query]))
            w.add(dv_sums, weights, grads, D, thread)
            w.add(dk_sums, changes, rows, D, thread)
    w.write(dk_sums, dk, first, p.Tk, D, p.scale)
    w.write(dv_sums, dv, first, p.Tk, D, 1.0)


class Warps:
    """The warps of a workgroup, each with a tile of ``core.m`` rows of a unit."""

    def __init__(self, k: Kernel, core: Core, T: int) -> None:
        self.k, self.core, self.T = k, core, T
        self.height = k.lanes // WARP * core.m
        """Rows of a unit."""
        self.size = core.sizes[2]

    def unit(self, heads: int) -> tuple[UOp, UOp]:
        """-> the number of the head and the first row of the unit; the last rows come first.

        They see the most keys: what takes longest is begun first.
        """
        tiles = blocks(self.T, self.height)
        unit = self.k.units(heads * tiles)
        return unit // tiles, (tiles - 1 - unit % tiles) * self.height

    def row(self, i: int, thread: UOp) -> UOp:
        """The i-th row, within the unit, of which a thread has scores."""
        return thread // WARP * self.core.m + self.core.c(thread % WARP, 2 * i)[0]

    def element(self, e: int, n: int, row: Index, column: Index, thread: UOp) -> tuple[UOp, UOp]:
        """The row and the column of element e of a thread's n-th fragment of a result."""
        y, x = self.core.c(thread % WARP, e)
        y = thread // WARP * self.core.m + y
        return as_index(row) + y, as_index(column) + (n * self.core.n + x)

    def elements(self, D: int) -> list[tuple[int, int]]:
        """(fragment, element) of a thread's part of a result D wide."""
        return [(n, e) for n in range(D // self.core.n) for e in range(self.size)]

    def sums(self, D: int) -> Tile:
        """A thread's fragments of a result (rows, D)."""
        return self.k.tile(len(self.elements(D)), dtypes.float32)

    def block(self, dtype: DType, D: int) -> Tile:
        """A block of rows in shared memory."""
        return self.k.tile(BLOCK, dtype, width=D + VECTOR, shared=True)

    def clear(self, *sums: Tile) -> None:
        """Zeros."""
        with self.k.phase() as thread:
            for tile in sums:
                for i in range(tile.rows):
                    tile[i, thread] = 0.0

    def copy(self, *pairs: tuple[Tile, Head], D: int, start: UOp, T: int) -> None:
        """Copy the block of rows from ``start`` on; rows behind the last repeat it."""
        count = BLOCK * D // VECTOR
        with self.k.phase() as thread:
            for i in range(blocks(count, self.k.lanes)):
                at = i * self.k.lanes + thread
                if count % self.k.lanes:
                    at = minimum(at, count - 1)
                row, d = at // (D // VECTOR), at % (D // VECTOR) * VECTOR
                t = start + row if T % BLOCK == 0 else minimum(start + row, T - 1)
                for tile, head in pairs:
                    for x in range(VECTOR):
                        tile[row, d + x] = head.raw(t, d + x)

    def left(self, rows: Head, first: UOp, D: int, T: int | None = None) -> Fragments:
        """The unit's rows as left operands: for each step of depth a thread's fragment."""
        T, core = T or self.T, self.core

        def read(step: int, thread: UOp) -> list[UOp]:
            places = (core.a(thread % WARP, e) for e in range(core.sizes[0]))
            return [
                rows.raw(minimum(first + thread // WARP * core.m + y, T - 1), step * core.depth + x)
                for y, x in places
            ]

        if D > KEPT:
            return read
        size, steps = core.sizes[0], D // core.depth
        kept = self.k.tile(steps * size, rows.array.dtype)
        with self.k.phase() as thread:
            for step in range(steps):
                for e, value in enumerate(read(step, thread)):
                    kept[step * size + e, thread] = value
        return lambda step, thread: [kept[step * size + e, thread] for e in range(size)]

    def across(self, block: Tile, n: int, thread: UOp) -> Callable[[int], list[UOp]]:
        """A block (rows, D), transposed, as right operand: its rows are columns of the result."""
        core = self.core

        def read(step: int) -> list[UOp]:
            places = (core.b(thread % WARP, e) for e in range(core.sizes[1]))
            return [block[n * core.n + x, step * core.depth + y] for y, x in places]

        return read

    def product(
        self, left: Fragments, right: Callable[[int], list[UOp]], depth: int, thread: UOp
    ) -> list[UOp]:
        """A thread's fragment of the sum over the depth."""
        sums = [as_uop(0.0, dtypes.float32)] * self.size
        for step in range(depth // self.core.depth):
            sums = self.core.product(left(step, thread), right(step), sums)
        return sums

    def add(
        self,
        sums: Tile,
        weights: Sequence[Sequence[UOp]],
        block: Tile,
        D: int,
        thread: UOp,
        before: Callable[[int, UOp], UOp] = lambda e, x: x,
    ) -> None:
        """sums (rows, D) = before(sums) + weights (rows, block) @ block (block, D), in a phase."""
        core, each = self.core, self.core.depth // self.core.n
        flat = [x.cast(block.dtype) for fragment in weights for x in fragment]
        for n in range(D // core.n):
            found = [before(e, sums[n * self.size + e, thread]) for e in range(self.size)]
            for step in range(BLOCK // core.depth):
                left = flat[step * each * self.size : (step + 1) * each * self.size]
                places = (core.b(thread % WARP, e) for e in range(core.sizes[1]))
                right = [block[step * core.depth + y, n * core.n + x] for y, x in places]
                found = core.product(left, right, found)
            for e, value in enumerate(found):
                sums[n * self.size + e, thread] = value

    def write(self, sums: Tile, to: Head, first: UOp, T: int, D: int, scale: float) -> None:
        """The rows of a gradient, times ``scale``."""
        with self.k.phase() as thread:
            for n, e in self.elements(D):
                t, d = self.element(e, n, first, 0, thread)
                to.put(t, d, sums[n * self.size + e, thread] * scale, self.exists(t, T))

    def exists(self, t: UOp, T: int) -> UOp | None:
        """Whether there is a row t; None where there surely is."""
        return t < T if T % self.height else None

    def masked(self, score: UOp, p: Problem, query: UOp, key: UOp) -> UOp:
        """The score of a query and a key; HIDDEN where there is none or it may not be seen."""
        gates = [int32(key) < int32(query) + (p.ahead + 1)] if p.causal else []
        gates += [int32(key) < p.Tk] if p.Tk % BLOCK else []
        gates += [int32(query) < p.Tq] if p.Tq % BLOCK else []
        return functools.reduce(lambda a, b: a & b, gates).where(score, HIDDEN) if gates else score


Fragments = Callable[[int, UOp], list[UOp]]
"""(step of depth, thread) -> the thread's fragment."""


def _each(fragments: Sequence[Sequence[UOp]]) -> list[tuple[int, int, UOp]]:
    return [(n, e, x) for n, fragment in enumerate(fragments) for e, x in enumerate(fragment)]


def _largest(values: Sequence[UOp]) -> UOp:
    return functools.reduce(UOp.maximum, values)
