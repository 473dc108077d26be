"""The forward kernel: online softmax, a tile of queries against block after block of keys."""

from __future__ import annotations

import functools

from tinygrad import UOp, dtypes

from tinygpt.kernels.attention.tiles import (
    HIDDEN,
    Dropout,
    Problem,
    block_size,
    pairs_of_rows,
    tile_shape,
)
from tinygpt.kernels.loops import (
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
from tinygpt.kernels.phases import Array, Index, Kernel, as_index, exp2, minimum

GROUP = 4
"""Tiles of queries that share a block of keys, so that copying it costs next to nothing."""


def forward(k: Kernel, out: Array, lse: Array, *inputs: Array, p: Problem) -> None:
    """out = softmax(scale q kᵀ) v, and lse (B, H, Tq), log2 of the softmax's denominators.

    Lanes are queries. For each block of keys, with m the largest score so far and l the sum of the
    weights 2 ** (score - m) so far:

        s = scale q kᵀ                  the new scores
        m' = max(m, s)                  per query
        w = 2 ** (s - m')               the new weights, at most 1
        l = l 2 ** (m - m') + Σ w       what was summed under the old m is scaled down
        o = o 2 ** (m - m') + w v       where dropout has put zeros into w, but not into l

    At the end out = o / l and lse = m + log2(l). Scores are to the base 2. In pairs s is scaled and
    not q, which stays exact, and w is rounded to bfloat16 where it meets v, but not in l. A unit is
    a group of tiles, which take turns with a block of keys while it is at hand.
    """
    size, block = 1 if k.gpu else min(GROUP, blocks(p.Tq, k.lanes)), block_size(p.Tk)
    n_groups, n_blocks = blocks(p.Tq, size * k.lanes), blocks(p.Tk, block)
    unit = k.units(p.B * p.H * n_groups)
    head, first = unit // n_groups, unit % n_groups * (size * k.lanes)
    q, key, value = p.heads(inputs, head)
    result, dtype, D = p.head(out, head, p.Tq), lse.dtype, p.D

    def query(tile: Index, lane: Index) -> UOp:
        return minimum(first + tile * k.lanes + lane, p.Tq - 1)

    depth = D // 2 if p.pairs else D  # steps along the head
    scaled = k.tile(size * depth, dtypes.uint32 if p.pairs else dtype)
    o, w = k.tile(size * D, dtype), k.tile(block, dtype)
    m, total = k.tile(size, dtype), k.tile(size, dtype)
    m_new, shrink = k.tile(1, dtype), k.tile(1, dtype)
    drop, rows = Dropout(k, p, head, inputs, block), tile_shape(k.gpu)[1]
    with k.loop(size) as tile:
        if p.pairs:
            q.pairs_by_lane(k, functools.partial(query, tile), D, scaled, tile * depth)
        else:

            def scaled_query(lane: Index, d: Index) -> UOp:
                return q[query(tile, lane), d] * p.log2_scale

            read_turned(k, scaled, D, scaled_query, tile * D)
        with k.phase() as lane:
            m[tile, lane] = HIDDEN
            total[tile, lane] = 0.0
    clear(k, o, size * D)
    last = minimum(first + (size * k.lanes - 1), p.Tq - 1) + p.ahead
    with counted(k, last // block + 1 if p.causal else n_blocks, n_blocks) as j:

        def row(x: Index) -> UOp:
            at = j * block + x
            return at if p.Tk % block == 0 else minimum(at, p.Tk - 1)

        if p.pairs:
            keys, values = key.pairs_along(k, row, block, D), value.pairs_across(k, row, block, D)
        else:
            keys, values = key.rows(k, row, block, D), value.rows(k, row, block, D)
        drop.take(row)
        hidden = j * block - p.ahead - first  # queries of the group that see nothing of the block
        skipped = (hidden < 0).where(as_index(0), hidden) // k.lanes if p.causal and size > 1 else 0
        with counted(k, size - skipped, size) as i:
            tile = i + skipped

            def mask(x: UOp, score: UOp, lane: UOp) -> None:
                score = score * p.log2_scale if p.pairs else score
                seen = int32(query(tile, lane)) + (p.ahead + 1) if p.causal else int32(p.Tk)
                if p.causal or p.Tk % block:
                    score = (int32(x) < seen - int32(j) * block).where(score, HIDDEN)
                w[x, lane] = score
                m_new[0, lane] = m_new[0, lane].maximum(score)

            with k.phase() as lane:
                m_new[0, lane] = m[tile, lane]
            queries = element(scaled, tile * depth)
            product(k, block, depth, keys, queries, mask, tile=rows, in_pairs=p.pairs)
            with k.phase() as lane:
                shrink[0, lane] = exp2(m[tile, lane] - m_new[0, lane])
                m[tile, lane] = m_new[0, lane]
            with k.phase() as lane:
                total[tile, lane] = total[tile, lane] * shrink[0, lane]
            with k.loop(block) as x, k.phase() as lane:
                weight = exp2(w[x, lane] - m_new[0, lane])
                w[x, lane] = drop(weight, x, int32(query(tile, lane)))
                total[tile, lane] = total[tile, lane] + weight
            product(
                k,
                D,
                block // 2 if p.pairs else block,
                lambda d, x: values(x, d),
                pairs_of_rows(k, w, block) if p.pairs else element(w),
                store(o, tile * D),
                lambda d, lane: o[tile * D + d, lane] * shrink[0, lane],
                tile=rows,
                in_pairs=p.pairs,
            )
    with k.loop(size) as tile, k.phase() as lane:
        lse[head * p.Tq + query(tile, lane)] = m[tile, lane] + total[tile, lane].log2()
    # A loop of its own: what two loops inside one share, tinygrad may leave inside the first.
    with k.loop(size) as tile:
        with k.loop(D) as d, k.phase() as lane:
            o[tile * D + d, lane] = o[tile * D + d, lane] / total[tile, lane] * p.boost

        def put(lane: Index, d: Index, mean: UOp) -> None:
            result.put(query(tile, lane), d, mean)

        write_turned(k, o, D, put, tile * D)
