"""Linear layers: y = x Wᵀ + b with its gradients, as one kind of kernel.

All three products of a linear layer are ``out = a @ b``, and differ in how the operands lie:

====== ============ ============================= =============================
out    (m, n)       a (m, depth)                  b (depth, n)
====== ============ ============================= =============================
y      (M, O)       x (M, I)                      Wᵀ, where W is (O, I)
dx     (M, I)       dy (M, O)                     W (O, I)
dW     (O, I)       dyᵀ, where dy is (M, O)       x (M, I)
====== ============ ============================= =============================

The innermost step adds one number of ``a`` times one vector of ``b`` to a tile of rows x lanes of
``out``, for every row of the tile:

    for d in depth:  for row in rows:  acc[row, lane] += a[row, d] * b[d, lane]

The tile stays in the vector registers (`TILES`), so a step costs rows + lanes/width loads for
rows x lanes/width multiply-adds. Around it, what each level of cache should hold:

- a *panel*, ``lanes`` columns of ``b`` over a *block* of the depth, is copied to where the vectors
  lie one behind the other: 32 KB at most, read once for every tile of rows;
- ``a`` is read in order of depth, a few rows at a time, which the hardware foresees, except in dW,
  where it lies the other way: there a *chunk* of its columns is copied too, and the copying adds
  up the columns, which is the bias's gradient, for nothing;
- beyond the first block ``out`` itself holds the sum so far.

A unit is one chunk of rows by one or all panels. The order of every sum depends only on the shapes,
so results are bitwise the same for any number of threads.
"""

from __future__ import annotations

import functools
import math
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tinygrad import Device, Tensor, UOp, dtypes

from tinygpt.kernels import reference
from tinygpt.kernels.phases import Array, Index, Kernel, Value, as_uop, exp2, minimum, run

UN=4
BLOCK = 512
"""Most steps of depth between two visits to ``out``: a panel of 32 lanes is then 32 KB."""
A_BLOCK = 128
LINE = 16
CHUNK = 384
"""About how many columns of dy are copied at a time for dW."""


@functools.cache
def tiles() -> dict[int, int]:
    """Lanes -> rows of the register tiles that suit this machine, the best first.

    A step needs rows x vectors accumulators, a broadcast number for each row (the compiler loads
    them all at once) and a vector of ``b``; one register too many and the tile is spilled, which
    costs more than half the speed: AVX2's 16 registers of 8 floats take 3 x 4 + 3 + 1. AVX-512 has
    32 of 16 floats, NEON 32 of 4. At least 8 accumulators hide the latency of a multiply-add.
    """
    if platform.machine().lower() in ("arm64", "aarch64"):
        return {16: 4, 8: 8}
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:  # no Linux
        flags = ""
    return {32: 8, 16: 8} if "avx512f" in flags else {32: 3, 24: 3, 16: 4, 8: 4}


def tile_for(n: int) -> tuple[int, int]:
    """(lanes, rows) for n columns: the least columns beyond n, then the best tile."""
    lanes = min(tiles(), key=lambda w: -(-n // w) * w)
    return lanes, tiles()[lanes]


@dataclass(frozen=True)
class Plan:
    """One product out (m, n) = a (m, depth) @ b (depth, n) and what is done on the way."""

    m: int
    n: int
    depth: int
    a_strides: tuple[int, int]  # of row and depth
    b_strides: tuple[int, int]  # of depth and column
    rows: int  # of a register tile
    bias: bool = False  # (n,), added to every row
    residual: bool = False  # (m, n), added
    gelu: bool = False  # another output: the GELU of the sum
    sums: bool = False  # another output: a summed over the depth (m,)

    @property
    def name(self) -> str:
        kind = "dw" if self.packs_a else "y" if self.b_strides[0] == 1 else "dx"
        return f"linear_{kind}_{self.m}x{self.n}x{self.depth}"

    @property
    def packs_a(self) -> bool:
        return self.a_strides[1] != 1

    @property
    def blocks(self) -> list[tuple[int, int, int]]:
        """(first step, number of blocks, steps of each): the loops over the depth."""
        most = A_BLOCK if self.packs_a else BLOCK
        fewest = -(-self.depth // most)
        for count in range(fewest, 2 * fewest):
            if self.depth % count == 0:
                return [(0, count, self.depth // count)]
        whole, rest = divmod(self.depth, most)
        return [(0, whole, most), (whole * most, 1, rest)]

    def chunks(self, panels: int, threads: int) -> int:
        """Into how many pieces the rows are cut, so that there is work for every thread."""
        if self.packs_a:
            return -(-max(self.m // CHUNK, 1) // threads) * threads
        return 1 if panels % threads == 0 or panels >= 8 * threads else threads


class Product:
    """Writes a plan's kernel. Outputs: [GELU,] out, [sums]; inputs: a, b, [bias,] [residual]."""

    def __init__(self, k: Kernel, arrays: tuple[Array, ...], plan: Plan) -> None:
        self.k, self.plan = k, plan
        left = iter(arrays)
        self.activated = next(left) if plan.gelu else None
        self.out = next(left)
        self.sums = next(left) if plan.sums else None
        self.a, self.b = next(left), next(left)
        self.bias = next(left) if plan.bias else None
        self.residual = next(left) if plan.residual else None

        self.panels = -(-plan.n // k.lanes)
        self.chunks = plan.chunks(self.panels, k.threads)
        self.tiles = -(-plan.m // (self.chunks * plan.rows))  # in a chunk
        height = self.tiles * plan.rows
        self.ragged = self.chunks * height != plan.m
        self.unit = k.units(self.chunks * (1 if plan.packs_a else self.panels))
        self.first_row = (self.unit if plan.packs_a else self.unit // self.panels) * height
        # the columns of dy that are copied for a chunk: whole cache lines, and all inside dy
        self.width = min(-(-height // LINE) * LINE + (LINE if height % LINE else 0), plan.m)
        self.kept = minimum(self.first_row // LINE * LINE, plan.m - self.width)

        self.real = dtypes.float64 if self.out.dtype == dtypes.float64 else dtypes.float32
        depth = max(block for _, _, block in plan.blocks)
        self.acc = k.tile(plan.rows, self.real)
        self.b_block = k.tile(depth, self.real)
        if plan.packs_a:
            # an odd number of cache lines from step to step: powers of two would share a few sets
            stride = (-(-self.width // LINE) | 1) * LINE
            self.a_block = k.tile(depth, self.real, width=stride)
            self.total = k.tile(1, self.real, width=self.width)

    def write(self) -> None:
        """All of a unit: blocks of depth, panels of columns, tiles of rows."""
        k = self.k
        if self.sums is not None:
            with k.phase(self.width) as i:
                self.total[0, i] = 0.0
        for start, count, block in self.plan.blocks:
            with k.loop(count) as index:
                fresh = False if start else True if count == 1 else index.eq(0)
                self.write_block(index * block + start, block, fresh)
        if self.sums is not None:
            with k.phase(self.width) as i:
                self.sums[self.kept + i] = self.total[0, i]

    def write_block(self, start: UOp, block: int, fresh: UOp | bool) -> None:
        """Add ``block`` steps of depth to every tile of the unit."""
        k, plan = self.k, self.plan
        if plan.packs_a:
            self.copy_a(start, block)
        with k.loop(self.panels if plan.packs_a else 1) as panel:
            self.panel = panel if plan.packs_a else self.unit % self.panels
            unrolled = next(u for u in (UN, 2, 1) if block % u == 0) if plan.b_strides[0] == 1 else 1
            with k.loop(block // unrolled) as d, k.phase() as lane:
                for u in range(unrolled):
                    step = d * unrolled + u
                    along, across = plan.b_strides
                    b = self.b[(start + step) * along + self.column(lane) * across]
                    self.b_block[step, lane] = b
            with k.loop(self.tiles) as t:
                self.write_tile(self.first_row + t * plan.rows, start, block, fresh)

    def copy_a(self, start: UOp, block: int) -> None:
        """Copy the chunk's columns of dy, which lie too far apart for the tiles; add them up."""
        with self.k.loop(block) as d, self.k.phase(self.width) as i:
            value = self.a[(start + d) * self.plan.a_strides[1] + self.kept + i].cast(self.real)
            self.a_block[d, i] = value
            if self.sums is not None:
                self.total[0, i] = self.total[0, i] + value

    def write_tile(self, row: UOp, start: UOp, block: int, fresh: UOp | bool) -> None:
        """out[row : row + rows, panel] += a[..., start : start + block] @ b_block."""
        k, acc, plan = self.k, self.acc, self.plan
        last = plan.m - 1  # rows beyond it compute it again, and write nothing
        rows = [minimum(row + x, last) if self.ragged else row + x for x in range(plan.rows)]
        with k.phase() as lane:
            for x, i in enumerate(rows):
                acc[x, lane] = self.begin(i, lane, fresh)
        with k.loop(block) as d, k.phase() as lane:
            vector = self.b_block[d, lane]
            for x, i in enumerate(rows):
                if plan.packs_a:
                    number = self.a_block[d, i - self.kept]
                else:
                    number = self.a[i * plan.a_strides[0] + start + d].cast(self.real)
                acc[x, lane] = acc[x, lane] + vector * number
        with k.phase() as lane:
            for x in range(plan.rows):
                self.put(self.out, row + x, lane, acc[x, lane])

    def begin(self, row: Index, lane: UOp, fresh: UOp | bool) -> Value:
        """What an element of ``out`` starts from: bias and residual, or the sum so far."""
        column = self.column(lane)
        so_far = self.out[row * self.plan.n + column].cast(self.real)
        if fresh is False:
            return so_far
        first = as_uop(0.0, self.real)
        if self.bias is not None:
            first = self.bias[column].cast(self.real)
        if self.residual is not None:
            first = first + self.residual[row * self.plan.n + column].cast(self.real)
        return first if fresh is True else fresh.where(first, so_far)

    def column(self, lane: UOp) -> UOp:
        """The lane's column. Lanes beyond the last one compute it again, and write nothing."""
        column = self.panel * self.k.lanes + lane
        return minimum(column, self.plan.n - 1) if self.plan.n % self.k.lanes else column

    def put(self, array: Array, row: UOp, lane: UOp, value: UOp) -> None:
        """Write one element, if it is inside the array."""
        n, column = self.plan.n, self.panel * self.k.lanes + lane
        gates = [column < n] if n % self.k.lanes else []
        gates += [row < self.plan.m] if self.ragged else []
        where = functools.reduce(lambda p, q: p & q, gates) if gates else None
        array.put(row * n + column, value, where)


def product(k: Kernel, *arrays: Array, plan: Plan) -> None:
    Product(k, arrays, plan).write()
