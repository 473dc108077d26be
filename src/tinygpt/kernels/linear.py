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

BLOCK = 256
"""Most steps of depth between two visits to ``out``: a panel of 32 lanes is then 32 KB."""
CHUNK = 128
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
        fewest = -(-self.depth // BLOCK)
        for count in range(fewest, 2 * fewest):
            if self.depth % count == 0:
                return [(0, count, self.depth // count)]
        whole, rest = divmod(self.depth, BLOCK)
        return [(0, whole, BLOCK), (whole * BLOCK, 1, rest)]

    def chunks(self, panels: int, threads: int) -> int:
        """Into how many pieces the rows are cut, so that there is work for every thread."""
        if self.packs_a:
            chunks = -(-max(self.m // CHUNK, 1) // threads) * threads
        else:
            chunks = 1 if panels % threads == 0 or panels >= 8 * threads else threads
        return max(1, min(chunks, self.m // self.rows))


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
        tiles, self.tail = divmod(plan.m, plan.rows)
        chunks = plan.chunks(self.panels, k.threads)
        per_chunk = -(-tiles // chunks)
        self.unit = k.units(chunks if plan.packs_a else chunks * self.panels)
        chunk = self.unit if plan.packs_a else self.unit // self.panels
        self.first_row: Index = 0
        self.tiles: Index = tiles
        self.tails: Index = 1 if self.tail else 0
        self.width = plan.m  # columns of dy copied for a chunk, from `kept` on
        self.kept: Index = 0
        if chunks > 1:
            self.first_row = chunk * (per_chunk * plan.rows)
            self.tiles = minimum(per_chunk, tiles - chunk * per_chunk)
            self.tails = chunk.eq(chunks - 1).where(self.tails, 0)
            self.width = per_chunk * plan.rows + self.tail
            self.kept = minimum(self.first_row, plan.m - self.width)

        self.real = dtypes.float64 if self.out.dtype == dtypes.float64 else dtypes.float32
        depth = max(block for _, _, block in plan.blocks)
        self.acc = k.tile(max(plan.rows, self.tail), self.real)
        self.b_block = k.tile(depth, self.real)
        if plan.packs_a:
            self.a_block = k.tile(depth, self.real, width=self.width)
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
            with k.loop(block) as d, k.phase() as lane:
                along, across = plan.b_strides
                b = self.b[(start + d) * along + self.column(lane) * across]
                self.b_block[d, lane] = b
            with k.loop(self.tiles) as t:
                self.write_tile(self.first_row + t * plan.rows, plan.rows, start, block, fresh)
            if self.tail:
                with k.loop(self.tails):
                    self.write_tile(plan.m - self.tail, self.tail, start, block, fresh)

    def copy_a(self, start: UOp, block: int) -> None:
        """Copy the chunk's columns of dy, which lie too far apart for the tiles; add them up."""
        with self.k.loop(block) as d, self.k.phase(self.width) as i:
            value = self.a[(start + d) * self.plan.a_strides[1] + self.kept + i].cast(self.real)
            self.a_block[d, i] = value
            if self.sums is not None:
                self.total[0, i] = self.total[0, i] + value

    def write_tile(
        self, row: Index, rows: int, start: UOp, block: int, fresh: UOp | bool
    ) -> None:
        """out[row : row + rows, panel] += a[..., start : start + block] @ b_block."""
        k, acc, stride = self.k, self.acc, self.plan.a_strides[0]
        with k.phase() as lane:
            for x in range(rows):
                acc[x, lane] = self.begin(row + x, lane, fresh)
        with k.loop(block) as d, k.phase() as lane:
            vector = self.b_block[d, lane]
            for x in range(rows):
                if self.plan.packs_a:
                    number = self.a_block[d, row - self.kept + x]
                else:
                    number = self.a[(row + x) * stride + start + d].cast(self.real)
                acc[x, lane] = acc[x, lane] + vector * number
        with k.phase() as lane:
            for x in range(rows):
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

    def put(self, array: Array, row: Index, lane: UOp, value: UOp) -> None:
        column = self.panel * self.k.lanes + lane
        gate = column < self.plan.n if self.plan.n % self.k.lanes else None
        array.put(row * self.plan.n + column, value, where=gate)


def product(k: Kernel, *arrays: Array, plan: Plan) -> None:
    Product(k, arrays, plan).write()
