"""The decoding kernel: one query per head against a cache whose length is data."""

from __future__ import annotations

import functools
import math

from tinygrad import UOp

from tinygpt.kernels.attention.tiles import HIDDEN, at_most, blocks, clamp, power, sum_dtype
from tinygpt.kernels.phases import Array, Index, Kernel, Tile, minimum

BLOCK = 64
"""Keys between two rescalings of the sum."""

ROWS = 16
"""Keys whose scores are added up across the lanes at a time: so many additions overlap."""

STEP = 4
"""Values that are added at a time to a sum that lies in memory."""


def decode(
    k: Kernel,
    out: Array,
    q: Array,
    keys: Array,
    values: Array,
    length: Array,
    *,
    heads: int,
    T: int,
    D: int,
) -> None:
    """out = softmax(q kᵀ / √D) v over the first ``length[0]`` of T keys, for each head.

    Online softmax, as in `forward`. Reading the cache is all the work there is, so lanes are the
    head's dimensions, in which it is read in order; the scores are added up across the lanes.
    """
    head = k.units(heads)
    dtype, W, parts = sum_dtype(q.dtype), k.lanes, range(blocks(D, k.lanes))
    scaled, o = k.tile(len(parts), dtype), k.tile(len(parts), dtype)
    products, w = k.tile(ROWS, dtype, shared=True), k.tile(1, dtype, width=BLOCK, shared=True)
    lanes = k.tile(1, dtype, shared=True)
    sums, m, m_new, total, shrink = (k.tile(n, dtype, width=1) for n in (ROWS, 1, 1, 1, 1))
    n, groups = at_most(length[0], T), range(BLOCK // W)

    def number(cache: Array, t: Index, part: Index, lane: Index) -> UOp:
        return cache[(head * T + minimum(t, n - 1)) * D + clamp(part * W + lane, D)].cast(dtype)

    with k.loop(len(parts)) as part, k.phase() as lane:
        d = part * W + lane
        query = q[head * D + clamp(d, D)].cast(dtype) * (math.log2(math.e) / math.sqrt(D))
        scaled[part, lane] = (d < D).where(query, 0.0)
        o[part, lane] = 0.0
    with k.phase(1):
        m[0, 0], total[0, 0] = HIDDEN, 0.0
    with k.loop((n + (BLOCK - 1)) // BLOCK) as j:
        with k.loop(BLOCK // ROWS) as i:
            first = j * BLOCK + i * ROWS
            with k.loop(ROWS) as x, k.phase() as lane:
                terms = [scaled[part, lane] * number(keys, first + x, part, lane) for part in parts]
                products[x, lane] = functools.reduce(UOp.add, terms)
            _add_across(k, sums, products, ROWS)
            with k.loop(ROWS) as x, k.phase(1):
                w[0, i * ROWS + x] = (first + x < n).where(sums[x, 0], HIDDEN)
        with k.phase() as lane:
            lanes[0, lane] = functools.reduce(UOp.maximum, [w[0, g * W + lane] for g in groups])
        with k.phase(1):
            m_new[0, 0] = m[0, 0]
        with k.loop(W) as lane, k.phase(1):
            m_new[0, 0] = m_new[0, 0].maximum(lanes[0, lane])
        with k.phase(1):
            m[0, 0], shrink[0, 0] = m_new[0, 0], power(m[0, 0] - m_new[0, 0])
        with k.loop(len(groups)) as g, k.phase() as lane:
            w[0, g * W + lane] = power(w[0, g * W + lane] - m[0, 0])
        with k.phase() as lane:
            lanes[0, lane] = functools.reduce(UOp.add, [w[0, g * W + lane] for g in groups])
        _add_across(k, sums, lanes, 1)
        with k.phase(1):
            total[0, 0] = total[0, 0] * shrink[0, 0] + sums[0, 0]
        with k.loop(len(parts)) as part, k.phase() as lane:
            o[part, lane] = o[part, lane] * shrink[0, 0]
        with k.loop(BLOCK // STEP) as i, k.loop(len(parts)) as part, k.phase() as lane:
            sum_so_far = o[part, lane]
            for step in range(STEP):
                value = number(values, j * BLOCK + i * STEP + step, part, lane)
                sum_so_far = sum_so_far + w[0, i * STEP + step] * value
            o[part, lane] = sum_so_far
    with k.loop(len(parts)) as part, k.phase() as lane:
        d = part * W + lane
        out.put(head * D + d, o[part, lane] / total[0, 0], d < D if D % W else None)


def _add_across(k: Kernel, sums: Tile, tile: Tile, rows: int) -> None:
    """sums[x, 0] = the sum of tile[x, lane] over the lanes."""
    with k.phase(1):
        for x in range(rows):
            sums[x, 0] = 0.0
    with k.loop(k.lanes) as lane, k.phase(1):
        for x in range(rows):
            sums[x, 0] = sums[x, 0] + tile[x, lane]
