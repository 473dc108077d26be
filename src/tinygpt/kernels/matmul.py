"""Matrix products on a CPU: out = a @ b, whichever way the operands lie.

The innermost step takes a vector of ``b`` and, for each row of a tile of rows x lanes of ``out``,
adds one number of ``a`` times that vector:

    for d in depth:  for row in rows:  acc[row, lane] += a[row, d] * b[d, lane]

The tile stays in the vector registers (`register_tiles`): each step loads one vector and a few
numbers for rows x vectors multiply-adds, so that the arithmetic is the limit and not the loads.
Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008), have the general
idea. Around the tile, what each cache should hold:

- A *panel*, ``lanes`` columns of ``b`` over a *block* of the depth, is copied to where its vectors
  lie one behind the other. It is read once for every tile of rows.
- ``a`` is read along the depth, a few rows at a time, which the hardware foresees. If it lies the
  other way (``dyᵀ`` in the gradient of a weight), a *chunk* of its rows is copied too, and the
  copying adds them up over the depth: the gradient of the bias, almost for nothing.
- From one block of depth to the next, ``out`` itself holds the sum so far.

A unit is a chunk of rows by one panel, or by a group of panels if ``a`` is copied (`Plan.split`).
How every sum is formed follows from the shapes alone, and so is the same for any number of cores.

Where the shape is no multiple of the tile, rows and columns beyond the end repeat the last ones:
the same number is then computed twice and written twice, which is cheaper than not to write it.
Only where that would add to ``out`` twice, the writes are gated.
"""

from __future__ import annotations

import functools
import itertools
import math
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tinygrad import Tensor, UOp, dtypes

from tinygpt.kernels import pairs
from tinygpt.kernels.dispatch import first_device
from tinygpt.kernels.loops import divisors
from tinygpt.kernels.phases import Array, Backward, Kernel, as_uop, minimum, run, wide
from tinygpt.machine.tinygrad_internals import DType, least_upper_dtype

BLOCK = 512
"""Most steps of depth between two visits to ``out``: a panel of 32 lanes is 64 KB, for level 2."""
PAIRS_BLOCK = 2048
"""The same for pairs of numbers: 256 KB, for level 2, which has 1 MB at least beside such units."""
COPIED_BLOCK = 128
"""The same where ``a`` is copied: a panel and a tile's rows of the copy fit level 1, 32 KB."""
COPIED_ROWS = 576
"""Most rows of ``a`` in a copied chunk: with its block of depth, 288 KB of level 2."""
COPY, COPY_ACROSS = 4, 16
"""What it takes to copy a number of an operand, and one that lies across, in multiply-adds."""
UNIT = 20_000
"""What a unit takes besides, being dealt out for instance; in multiply-adds too."""
GATED = 1.1
"""How much longer a unit takes whose writes are gated: where chunks reach behind the last row."""
CORES = {1: 25} | dict.fromkeys((2, 3, 4, 6, 8, 12, 16), 1)
"""Numbers of cores that products are cut up for -> how much a percent of the time counts there.

Cut for many cores a product copies more, which every core pays: one core counts so much that it
loses 2 % or 3 % of the small products of a model like ``baby``, and 1 % of ``gpt2``'s.
"""
PAIRS_ROWS = 8
"""Rows of a register tile of pairs."""
LINE = 16
"""Numbers in a cache line of 64 bytes."""


@functools.cache
def register_tiles() -> dict[int, int]:
    """Lanes -> rows of the register tiles for this machine's vectors, the best first."""
    try:
        processor = Path("/proc/cpuinfo").read_text()
    except OSError:  # no Linux: a Mac, whose Intel processors have AVX2
        processor = "avx2"
    return tiles_of(platform.machine(), processor)


def tiles_of(machine: str, processor: str) -> dict[int, int]:
    """The same for a machine as Python names it, and what Linux says of its processor.

    A step needs rows x vectors accumulators, a register for each row's number (the compiler loads
    them all first) and one for the vector of ``b``. One too many and the tile is spilled, at less
    than half the speed. Under 8 accumulators, the multiply-adds would wait for one another.

    ============ ============ ============ ===========================================
    vectors      registers    lanes x rows
    ============ ============ ============ ===========================================
    AVX-512      32 of 8      32 x 5       4 vectors: compilers avoid the wide ones,
    on AMD       32 of 16     32 x 8       2 vectors, but not there
    AVX2         16 of 8      32 x 3       4 vectors
    SSE          16 of 4      16 x 2       4 vectors; a product needs a register as well
    NEON         32 of 4      16 x 4       4 vectors
    ============ ============ ============ ===========================================
    """
    if machine.lower() in ("arm64", "aarch64"):
        return {16: 4, 8: 6}
    flags = processor.split()
    if "avx512f" in flags:
        return {32: 8, 16: 8} if "AuthenticAMD" in flags else {32: 5, 16: 8}
    return {32: 3, 24: 3, 16: 4, 8: 4} if "avx2" in flags else {16: 2, 8: 4}


def register_tile(n: int) -> tuple[int, int]:
    """(lanes, rows) for n columns: the fewest columns beyond n, then the best tile."""
    tiles = register_tiles()
    lanes = min(tiles, key=lambda width: -(-n // width) * width)
    return min(lanes, n), tiles[lanes]


@dataclass(frozen=True)
class Plan:
    """One product, out (m, n) = a (m, depth) @ b (depth, n), and what is done on the way."""

    m: int
    n: int
    depth: int
    a_strides: tuple[int, int]  # of row and depth; one of them is 1
    b_strides: tuple[int, int]  # of depth and column
    rows: int  # of a register tile
    scale: bool = False  # (n,), each column of b is multiplied by its number
    bias: bool = False  # (n,), added to every row
    sums: bool = False  # another output: the rows of a, summed over the depth (m,)
    pairs: bool = False  # in bfloat16, two steps of the depth at a time

    @property
    def name(self) -> str:
        kind = "tn" if self.copies_a else "nt" if self.b_strides[0] == 1 else "nn"
        sort = "_scaled" * self.scale + "_bfloat16" * self.pairs
        return f"matmul_{kind}_{self.m}x{self.n}x{self.depth}{sort}"

    @property
    def copies_a(self) -> bool:
        return self.sums or self.a_strides[1] != 1

    @property
    def steps(self) -> int:
        """Steps along the depth: numbers, or pairs of them."""
        return -(-self.depth // 2) if self.pairs else self.depth

    def blocks(self) -> list[tuple[int, int, int]]:
        """(first step, number of blocks, steps of each): the loops that make up the depth."""
        most = COPIED_BLOCK if self.copies_a else PAIRS_BLOCK if self.pairs else BLOCK
        fewest = -(-self.steps // most)
        for count in range(fewest, 2 * fewest):
            if self.steps % count == 0:
                return [(0, count, self.steps // count)]
        most -= self.pairs and self.steps % most == 1  # pairs.add_products takes no single step
        whole, rest = divmod(self.steps, most)
        return [(0, whole, most), (whole * most, 1, rest)]

    @property
    def once(self) -> bool:
        """Whether every sum is written once, when it is complete."""
        return [count for _, count, _ in self.blocks()] == [1]

    def copied_rows(self, height: int, chunks: int) -> int:
        """Rows of ``a`` that a chunk copies, in whole cache lines, wherever the chunk begins."""
        return -(-height // LINE) * LINE + (LINE if chunks > 1 and height % LINE else 0)

    def split(self, panels: int, lanes: int) -> tuple[int, int]:
        """(chunks of rows, groups of panels): the units that suit one core, some, and many.

        More units copy more, and waste rows where the last chunk is not full; fewer leave cores
        with nothing to do. What each choice takes on each of CORES is estimated, in multiply-adds;
        logarithms make a percent of it count the same whether the product is large or small.
        """
        tiles = -(-self.m // self.rows)
        fewest = -(-tiles * self.rows // COPIED_ROWS) if self.copies_a else 1

        def cost(choice: tuple[int, int]) -> float:
            chunks, groups = choice
            height, width = -(-tiles // chunks) * self.rows, panels // groups * lanes
            copied = (COPY_ACROSS if self.b_strides[0] == 1 else COPY) * width
            copied += COPY * self.copied_rows(height, chunks) if self.copies_a else 0
            unit: float = UNIT + (height * width + copied) * self.steps
            unit *= GATED if tiles % chunks else 1
            times = {cores: -(-chunks * groups // cores) * unit for cores in CORES}
            return sum(weight * math.log(times[cores]) for cores, weight in CORES.items())

        chunks = sorted({-(-tiles // height) for height in range(1, tiles + 1)})
        groups = [panels] if not self.copies_a else divisors(panels)
        return min(itertools.product([c for c in chunks if c >= fewest], groups), key=cost)


class Product:
    """Writes a plan's kernel.

    Outputs: out, [sums]; inputs: a, b, [scale,] [bias].
    """

    def __init__(self, k: Kernel, arrays: tuple[Array, ...], plan: Plan) -> None:
        self.k, self.plan = k, plan
        left = iter(arrays)  # in the order of the docstring
        self.out = next(left)
        self.sums = next(left) if plan.sums else None
        self.a, self.b = next(left), next(left)
        self.scale = next(left) if plan.scale else None
        self.bias = next(left) if plan.bias else None
        self.real = wide(self.out.dtype)
        copy = dtypes.uint32 if plan.pairs else self.real  # of an operand

        self.blocks = plan.blocks()
        self.once = plan.once
        panels = -(-plan.n // k.lanes)
        chunks, groups = plan.split(panels, k.lanes)
        self.tiles = -(-plan.m // (chunks * plan.rows))  # of a chunk
        self.panels = panels // groups  # of a group
        height = self.tiles * plan.rows
        self.beyond = chunks * height - plan.m  # rows after the last
        unit = k.units(chunks * groups)
        self.first_row, self.group = unit // groups * height, unit % groups

        depth = max(block for _, _, block in self.blocks)
        # acc: (rows, lanes), the register tile; panel: (steps of depth, lanes), a copy of b
        self.acc = k.tile(plan.rows, self.real)
        self.panel = k.tile(depth, copy)
        if plan.copies_a:
            # the copy starts at the start of a cache line and stays inside a
            self.width = min(plan.copied_rows(height, chunks), plan.m)
            self.copied = minimum(self.first_row // LINE * LINE, plan.m - self.width)
            # an odd number of lines from step to step: powers of two would share a few cache sets
            self.chunk = k.tile(depth, copy, width=(-(-self.width // LINE) | 1) * LINE)
            self.total = k.tile(1, self.real, width=self.width)

    def write(self) -> None:
        """All of a unit: blocks of depth, panels of columns, tiles of rows."""
        k = self.k
        if self.sums is not None:
            with k.phase(self.width) as i:
                self.total[0, i] = 0.0
        for start, count, block in self.blocks:
            with k.loop(count) as index:
                fresh = False if start else True if count == 1 else index.eq(0)
                self.write_block(index * block + start, block, fresh)
        if self.sums is not None:
            with k.phase(self.width) as i:
                self.sums[self.copied + i] = self.total[0, i]

    def write_block(self, start: UOp, block: int, fresh: UOp | bool) -> None:
        """Add ``block`` steps of the depth, from ``start`` on, to every tile of the unit."""
        k, plan = self.k, self.plan
        if plan.copies_a:
            self.copy_a(start, block)
        with k.loop(self.panels) as p:
            column = (self.group * self.panels + p) * k.lanes
            if self.once:  # the last panel may overlap the one before
                column = minimum(column, plan.n - k.lanes)
            self.copy_b(column, start, block)
            with k.loop(self.tiles) as t:
                self.write_tile(self.first_row + t * plan.rows, column, start, block, fresh)

    def copy_a(self, start: UOp, block: int) -> None:
        """Copy the chunk's rows, which lie across, and add them up."""
        stride = self.plan.a_strides[1]
        with self.k.loop(block) as d, self.k.phase(self.width) as i:
            *numbers, copy = self.operand(lambda t: self.a[t * stride + self.copied + i], start + d)
            self.chunk[d, i] = copy
            if self.sums is not None:
                self.total[0, i] = functools.reduce(UOp.add, numbers, self.total[0, i])

    def operand(self, element: Callable[[UOp], UOp], step: UOp) -> list[UOp]:
        """The numbers that an operand has at a step of the depth, and their copy, which may be a
        pair of them."""
        depth = self.plan.depth
        if not self.plan.pairs:
            number = element(step).cast(self.real)
            return [number, number]
        both = [element(step * 2), element(minimum(step * 2 + 1, depth - 1))]
        if depth % 2:  # the last pair ends with 0
            both[1] = (step * 2 + 1 < depth).where(both[1], as_uop(0.0, both[1].dtype))
        return [*(x.cast(self.real) for x in both), pairs.joined(*both)]

    def copy_b(self, column: UOp, start: UOp, block: int) -> None:
        """Copy a panel; where ``b`` lies across, several steps at a time from each cache line."""
        along, across = self.plan.b_strides
        steps = math.gcd(block, 4) if along == 1 else 1
        with self.k.loop(block // steps) as d, self.k.phase() as lane:
            for s in range(steps):
                step = d * steps + s
                at = self.inside(column, lane)
                *_, value = self.operand(self.b_at(at * across, along), start + step)
                if self.scale is not None:
                    value = value * self.scale[at].cast(self.real)
                self.panel[step, lane] = value

    def b_at(self, first: UOp, along: int) -> Callable[[UOp], UOp]:
        """The elements of a column of ``b``."""
        return lambda t: self.b[first + t * along]

    def write_tile(self, row: UOp, column: UOp, start: UOp, block: int, fresh: UOp | bool) -> None:
        """out[row : row + rows, panel] += a[..., start : start + block] @ panel."""
        k, acc, plan = self.k, self.acc, self.plan
        # rows behind the last one repeat it: the same number is written twice
        rows = [row + x for x in range(plan.rows)]
        if self.beyond:
            rows = [minimum(i, plan.m - 1) for i in rows]
        with k.phase() as lane:
            for x, i in enumerate(rows):
                acc[x, lane] = self.begin(i, self.inside(column, lane), fresh)
        if plan.pairs:
            numbers = lambda d: [self.number(i, start, d) for i in rows]  # noqa: E731
            pairs.add_products(k, block, acc, lambda d: self.panel[d, 0], numbers)
        else:
            with k.loop(block) as d, k.phase() as lane:
                vector = self.panel[d, lane]
                for x, i in enumerate(rows):
                    acc[x, lane] = acc[x, lane] + vector * self.number(i, start, d)
        with k.phase() as lane:
            for x, i in enumerate(rows):
                gate = self.gate(row + x, column + lane)
                self.out.put(i * plan.n + column + lane, acc[x, lane], gate)

    def number(self, row: UOp, start: UOp, d: UOp) -> UOp:
        """a[row, start + d], or the place of a pair of numbers"""
        if self.plan.copies_a:
            return self.chunk[d, row - self.copied]
        if self.plan.pairs:
            return self.a[row * self.plan.a_strides[0] + (start + d) * 2]
        return self.a[row * self.plan.a_strides[0] + start + d].cast(self.real)

    def begin(self, row: UOp, column: UOp, fresh: UOp | bool) -> UOp:
        """What an element of ``out`` starts from: the bias, or the sum so far."""
        at = row * self.plan.n + column
        if fresh is False:
            return self.out[at]
        bias = None if self.bias is None else self.bias[column].cast(self.real)
        value = as_uop(0.0, self.real) if bias is None else bias
        return value if fresh is True else fresh.where(value, self.out[at])

    def inside(self, column: UOp, lane: UOp) -> UOp:
        """The lane's column, or the last one if it is beyond."""
        ragged = self.plan.n % self.k.lanes and not self.once
        return minimum(column + lane, self.plan.n - 1) if ragged else column + lane

    def gate(self, row: UOp, column: UOp) -> UOp | None:
        """Where to write, if not everywhere."""
        if self.once:
            return None
        gates = [column < self.plan.n] if self.plan.n % self.k.lanes else []
        if self.beyond >= self.plan.rows:  # a whole tile would add to the last row again
            gates.append(row < self.plan.m)
        return functools.reduce(lambda p, q: p & q, gates) if gates else None


def product(k: Kernel, *arrays: Array, plan: Plan) -> None:
    """The kernel function of a plan."""
    Product(k, arrays, plan).write()


def matmul(
    a: Tensor,
    b: Tensor,
    shape: tuple[int, int, int],
    a_strides: tuple[int, int],
    b_strides: tuple[int, int],
    *,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    sums: bool = False,
    dtype: DType | None = None,
    backward: Backward | None = None,
) -> list[Tensor]:
    """out (m, n) = a (m, depth) @ b (depth, n) + bias [, sums].

    ``shape`` is (m, n, depth); the strides say where the operands' elements lie in memory, which
    must be contiguous. With ``scale`` (n,) each column of ``b``, which may then be integers, is
    multiplied by its number. The sums are float64 if an operand is, and float32 otherwise; ``out``
    is of that type, or of ``dtype`` (None: the same) if it need not hold sums on the way.

    If ``a`` is bfloat16, ``b`` is rounded to it where the processor multiplies such pairs.
    """
    m, n, depth = shape
    real = wide(least_upper_dtype(a.dtype, a.dtype if scale is not None else b.dtype))
    lanes, rows = register_tile(n)
    in_pairs = (
        scale is None
        and a.dtype == dtypes.bfloat16
        and real == dtypes.float32
        and n >= pairs.VECTOR
        and depth > 2
        and (depth % 2 == 0 or sums or a_strides[1] != 1)
        and pairs.available(first_device(a))
    )
    if in_pairs:
        lanes, rows = lanes // pairs.VECTOR * pairs.VECTOR, PAIRS_ROWS
    elif a.dtype != real:  # the innermost step would convert its numbers again and again
        a = a.cast(real).contiguous()
    extra = [t for t in (scale, bias) if t is not None]
    parts = scale is not None, bias is not None, sums
    plan = Plan(*shape, a_strides, b_strides, min(rows, m), *parts, pairs=in_pairs)
    new = functools.partial(Tensor.empty, dtype=real, device=a.device)
    outputs = [new(m, n, dtype=dtype if dtype and plan.once else real)]
    outputs += [new(m) for _ in range(sums)]
    return run(
        product,
        outputs,
        [a, b, *extra],
        lanes=lanes,
        name=plan.name,
        ops=2 * m * n * depth,
        backward=backward,
        plan=plan,
    )
