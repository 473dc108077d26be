"""The loss fused with the output projection: the logits are never whole in memory.

With V = 50257 the logits of a batch are larger than everything else in a small model, and so is
their gradient. But a row's loss needs no other row, so the rows are worked off in chunks. For each
chunk of rows X, with the weight W (V, C) and all of its logits S = W Xᵀ in one scratch buffer::

    scores     S, and for each block of the vocabulary the largest score m and Σ exp(S - m)
    losses     the blocks' m and sums combined, and from them each row's loss
    products   P = ∂loss/∂S = (softmax(S) - one-hot) / rows,  ∂loss/∂X += P W,  ∂loss/∂W += Pᵀ X

That is three matrix products. The usual other way, to keep nothing and compute the logits again in
the backward pass, takes four. If no gradient is wanted there is only the first.

A chunk's rows are the lanes of S, W is read as it lies, and nothing is ever summed across lanes but
in the end. A block of P, softmax and all, is made in a tile and used for both products while it is
in the cache. Blocks of the vocabulary are dealt out in a fixed number of parts, each with a
∂loss/∂X of its own, and these are added in order: the result does not depend on how many cores
there are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

from tinygrad import Tensor, UOp, dtypes

from tinygpt.kernels import reference
from tinygpt.kernels.cross_entropy import LOG2E, cross_entropy, row_loss, within
from tinygpt.kernels.linear import supported
from tinygpt.kernels.matmul import register_tile
from tinygpt.kernels.norm import empty, fill, share, sum_dtype
from tinygpt.kernels.phases import Array, Index, Kernel, Tile, as_index, as_uop, exp2, minimum, run

CHUNK = 256
"""About how many rows are worked off at a time."""
BLOCK = 48
"""Rows of the weight that are worked off at a time: a multiple of every tile's rows."""
PARTS = 16
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

    @property
    def name(self) -> str:
        return f"{self.N}x{self.V}x{self.C}"

    @property
    def chunks(self) -> int:
        return -(-self.N // CHUNK)

    @property
    def rows(self) -> int:
        """Rows of a chunk, a multiple of the lanes; those beyond N are zero and do not count."""
        return -(-self.N // (self.chunks * self.lanes)) * self.lanes

    @property
    def columns(self) -> int:
        """C, rounded up to a multiple of the lanes."""
        return -(-self.C // self.lanes) * self.lanes

    @property
    def parts(self) -> int:
        return min(PARTS, -(-self.V // BLOCK))

    @property
    def blocks(self) -> int:
        """Blocks of the vocabulary, the same number for each part; the last may lie beyond V."""
        return -(-self.V // (BLOCK * self.parts)) * self.parts

    @property
    def depth(self) -> int:
        """Steps of the sum over C between two visits to memory."""
        return next((d for d in range(DEPTH, DEPTH // 4, -1) if self.C % d == 0), self.C)


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, *, gradient: bool = False
) -> Tensor:
    """cross_entropy(x weightᵀ, targets) for x (N, C), weight (V, C), integer targets (N,) -> ().

    With ``gradient`` the gradients are computed along with the loss, which takes three matrix
    products; without, it takes one for the loss and three more when gradients are asked for. GPUs
    take the plain way.
    """
    if not supported(x, weight):
        return cross_entropy(reference.linear(x, weight), targets)
    (N, C), V = map(int, x.shape), int(weight.shape[0])
    x, weight = x.contiguous(), weight.contiguous()
    work = Work(x, weight, targets, Plan(N, C, V, *register_tile(CHUNK)))
    statistics = work.run(gradient)
    ready = gradient

    def backward(g: Tensor) -> list[Tensor | None]:
        nonlocal ready
        if not ready:  # not computed with the loss, or already scaled for another caller
            work.run(gradient=True)
        ready = False
        grads = work.scaled(g.contiguous())
        found = [d.reshape(t.shape).cast(t.dtype) for d, t in zip(grads, (x, weight), strict=True)]
        return [*(None for _ in (work.inverse, *statistics)), *found]

    out, inputs = [work.new(1)], [work.inverse, *statistics, x, weight]
    return work.launch(_loss, out, inputs, name="loss", backward=backward)[0].reshape(())


class Work:
    """The launches for all chunks, and the buffers that go from one to the next.

    Two buffers serve all chunks and are written in place: the scores and dweight. Whoever realizes
    one result after another must not make tinygrad run a launch again whose inputs are gone. So
    each launch depends on all that came before it, by inputs that it does not use if need be.
    """

    def __init__(self, x: Tensor, weight: Tensor, targets: Tensor, plan: Plan) -> None:
        self.plan, self.weight = plan, weight
        self.launch = partial(run, lanes=plan.lanes, plan=plan)
        self.new = partial(empty, x, dtype=sum_dtype(x))
        ids = partial(empty, x, dtype=dtypes.int32)
        rows = plan.chunks * plan.rows
        self.inverse, self.targets, *self.chunks = self.launch(
            _prepare,
            [self.new(1), ids(rows), *(ids(1) for _ in range(plan.chunks))],
            [targets.cast(dtypes.int32).contiguous()],
            name=f"loss_prepare_{plan.name}",
        )
        self.by_row, self.by_column = self.launch(
            _pack,
            [self.new(rows * plan.C), self.new(rows * plan.columns)],
            [x],
            name=f"loss_pack_{plan.name}",
        )

    def run(self, gradient: bool) -> list[Tensor]:
        """Work off all rows; -> each chunk's statistics. With ``gradient`` sets dx and dweight."""
        plan, new, launch = self.plan, self.new, self.launch
        scores = new(plan.blocks * BLOCK, plan.rows)
        self.dx, self.dweight = [], new(plan.V, plan.C)
        found: list[Tensor] = []
        before: list[Tensor] = []
        flops = 2 * plan.rows * plan.V * plan.C
        for chunk in self.chunks:
            outputs = [scores, new(plan.blocks, plan.rows), new(plan.blocks, plan.rows)]
            inputs = [chunk, self.by_row, self.weight, *before]
            scores, *sums = launch(
                _scores, outputs, inputs, name=f"loss_scores_{plan.name}", ops=flops
            )
            inputs = [chunk, *sums, scores, self.targets, self.inverse]
            out = [new(3, plan.rows)]
            before = launch(_statistics, out, inputs, name=f"loss_rows_{plan.name}")
            found += before
            if gradient:
                outputs = [self.dweight, new(plan.parts, plan.rows, plan.C)]
                inputs = [
                    chunk,
                    self.by_column,
                    scores,
                    found[-1],
                    self.targets,
                    self.inverse,
                    self.weight,
                ]
                self.dweight, parts = launch(
                    _products, outputs, inputs, name=f"loss_products_{plan.name}", ops=2 * flops
                )
                out, inputs = [new(plan.rows, plan.C)], [parts, self.dweight]
                before = launch(_add_parts, out, inputs, name=f"loss_dx_{plan.name}")
                self.dx += before
        return found

    def scaled(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """dx (N, C) and dweight (V, C), times the gradient of the loss."""
        plan = self.plan
        dx = self.launch(_collect, [self.new(plan.N, plan.C)], [g, *self.dx], name="loss_collect")
        inputs = [g, self.dx[-1]]
        return dx[0], self.launch(_scale, [self.dweight], inputs, name="loss_scale")[0]


def _prepare(k: Kernel, inverse: Array, padded: Array, *arrays: Array, plan: Plan) -> None:
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


def _pack(k: Kernel, by_row: Array, by_column: Array, x: Array, *, plan: Plan) -> None:
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


def _scores(
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
    """A block of S = W Xᵀ, and for each of its columns the largest m and the sum of exp(S - m)."""
    block, C, V, L, rows = k.units(plan.blocks), plan.C, plan.V, k.lanes, plan.rows
    kind = scores.dtype
    acc, m, z = k.tile(plan.tile, kind), k.tile(1, kind), k.tile(1, kind)
    with k.loop(rows // L) as j:
        panel = (as_index(chunk[0]) * (rows // L) + j) * C * L
        with k.loop(C // plan.depth) as part, k.loop(BLOCK // plan.tile) as t:
            first, start = block * BLOCK + t * plan.tile, part * plan.depth
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
        fill(k, -math.inf, 1, m)
        with k.loop(BLOCK) as v, k.phase() as lane:
            m[0, lane] = m[0, lane].maximum(scores[(block * BLOCK + v) * rows + j * L + lane])
        fill(k, 0.0, 1, z)
        with k.loop(BLOCK) as v, k.phase() as lane:
            score = scores[(block * BLOCK + v) * rows + j * L + lane]
            z[0, lane] = z[0, lane] + exp2((score - m[0, lane]) * LOG2E)
        with k.phase() as lane:
            largest[block * rows + j * L + lane] = m[0, lane]
            # a block that lies beyond V has no exp(S - m), only -inf - -inf
            sums[block * rows + j * L + lane] = (m[0, lane] > -math.inf).where(z[0, lane], 0.0)


def _statistics(
    k: Kernel,
    out: Array,
    chunk: Array,
    largest: Array,
    sums: Array,
    scores: Array,
    targets: Array,
    inverse: Array,
    *,
    plan: Plan,
) -> None:
    """Each row's loss, its m, and 1 / (z · the number of rows), 0 if the row does not count."""
    first, rows, kind = k.units(plan.rows // k.lanes) * k.lanes, plan.rows, out.dtype
    m, z = k.tile(1, kind), k.tile(1, kind)
    fill(k, -math.inf, 1, m)
    with k.loop(plan.blocks) as b, k.phase() as lane:
        m[0, lane] = m[0, lane].maximum(largest[b * rows + first + lane])
    fill(k, 0.0, 1, z)
    with k.loop(plan.blocks) as b, k.phase() as lane:
        at = b * rows + first + lane
        z[0, lane] = z[0, lane] + sums[at] * exp2((largest[at] - m[0, lane]) * LOG2E)
    with k.phase() as lane:
        at = first + lane
        target = targets[as_index(chunk[0]) * rows + at]
        logit = scores[as_index(within(target, plan.V).where(target, 0)) * rows + at]
        out[at] = row_loss(target, plan.V, logit, m[0, lane], z[0, lane])
        out[rows + at] = m[0, lane]
        out[2 * rows + at] = (target < 0).where(as_uop(0.0, kind), inverse[0] / z[0, lane])


def _products(
    k: Kernel,
    dweight: Array,
    dx_parts: Array,
    chunk: Array,
    by_column: Array,
    scores: Array,
    statistics: Array,
    targets: Array,
    inverse: Array,
    weight: Array,
    *,
    plan: Plan,
) -> None:
    """This part's blocks of the vocabulary: P, what it adds to dx, and its rows of dweight."""
    part, C, V, L, rows, kind = (
        k.units(plan.parts),
        plan.C,
        plan.V,
        k.lanes,
        plan.rows,
        scores.dtype,
    )
    number = as_index(chunk[0])
    # columns of these tiles are read one behind the other: a width that is no power of two
    # keeps them from falling on the same few lines of the cache
    p, w = k.tile(BLOCK, kind, width=rows + L), k.tile(C, kind, width=BLOCK)
    with k.loop(rows * C // L) as j, k.phase() as lane:
        dx_parts[(part * rows * C + j * L) + lane] = 0.0
    with k.loop(plan.blocks // plan.parts) as i:
        first = (part * (plan.blocks // plan.parts) + i) * BLOCK
        with k.loop(BLOCK) as v:
            with k.loop(rows // L) as j, k.phase() as lane:
                at = j * L + lane
                power = exp2((scores[(first + v) * rows + at] - statistics[rows + at]) * LOG2E)
                hit = as_index(targets[number * rows + at]).eq(first + v)
                p[v, at] = power * statistics[2 * rows + at] - hit.where(inverse[0], 0.0)
            with k.phase(C) as c:
                w[c, v] = weight[minimum(first + v, V - 1) * C + c].cast(kind)
        with k.loop(rows // L) as j:
            out = (part * (rows // L) + j) * C
            tiles, rest = divmod(C, plan.tile)
            if tiles:
                with k.loop(tiles) as t:
                    _add_dx(k, dx_parts, out, t * plan.tile, plan.tile, p, w, j * L)
            if rest:
                _add_dx(k, dx_parts, out, C - rest, rest, p, w, j * L)
        with k.loop(plan.columns // L) as j, k.loop(BLOCK // plan.tile) as t:
            _add_dweight(k, dweight, first, t, j, number, p, by_column, plan)


def _add_dx(
    k: Kernel,
    dx: Array,
    out: Index,
    c: Index,
    tile: int,
    p: Tile,
    w: Tile,
    row: Index,
) -> None:
    """Columns c, c + 1, ... of dx for one vector of rows += P W over a block of the vocabulary."""
    acc = k.tile(tile, dx.dtype)
    with k.phase() as lane:
        for u in range(tile):
            acc[u, lane] = dx[(out + c + u) * k.lanes + lane]
    with k.loop(BLOCK) as v, k.phase() as lane:
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
    ragged = plan.columns != C or plan.blocks * BLOCK != V
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


def _add_parts(k: Kernel, dx: Array, parts: Array, *unused: Array, plan: Plan) -> None:
    """dx of a chunk, row by row: the sum of all parts, which lie in panels."""
    C, L, panels = plan.C, k.lanes, plan.rows // k.lanes
    panel = k.units(panels)
    with k.loop(C) as c, k.phase() as lane:
        value = parts[(panel * C + c) * L + lane]
        for part in range(1, plan.parts):
            value = value + parts[((part * panels + panel) * C + c) * L + lane]
        dx[(panel * L + lane) * C + c] = value


def _collect(k: Kernel, dx: Array, g: Array, *chunks: Array, plan: Plan) -> None:
    """dx of all rows, times the gradient of the loss."""
    unit = k.units(k.threads)
    for i, rows in enumerate(chunks):
        start = i * plan.rows * plan.C
        size = min(plan.rows, plan.N - i * plan.rows) * plan.C
        for at, _, inside in share(k, size, unit, k.threads):
            dx.put(start + at, rows[at] * g[0].cast(dx.dtype), where=inside)


def _scale(k: Kernel, dweight: Array, g: Array, *unused: Array, plan: Plan) -> None:
    """Multiply by the gradient of the loss; nothing to do if that is 1, as it mostly is."""
    unit = k.units(k.threads)
    with k.loop(g[0].ne(1.0).where(1, 0)):
        for at, _, inside in share(k, plan.V * plan.C, unit, k.threads):
            dweight.put(at, dweight[at] * g[0].cast(dweight.dtype), where=inside)


def _loss(k: Kernel, loss: Array, inverse: Array, *arrays: Array, plan: Plan) -> None:
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
