"""The forward kernel: online softmax, a tile of queries against block after block of keys."""

from __future__ import annotations

from tinygrad import UOp

from tinygpt.kernels.attention.tiles import (
    BLOCK,
    HIDDEN,
    Problem,
    blocks,
    clamp,
    counted,
    element,
    position,
    power,
    product,
    store,
)
from tinygpt.kernels.phases import Array, Index, Kernel, minimum


def forward(k: Kernel, out: Array, lse: Array, *inputs: Array, p: Problem) -> None:
    """out = softmax(scale q kᵀ) v, and lse (B, H, Tq), log2 of the softmax's denominators.

    Lanes are queries. For each block of keys, with m the largest score so far and l the sum of the
    weights 2 ** (score - m) so far:

        s = scale q kᵀ                  the new scores
        m' = max(m, s)                  per query
        w = 2 ** (s - m')               the new weights, at most 1
        l = l 2 ** (m - m') + Σ w       what was summed under the old m is scaled down
        o = o 2 ** (m - m') + w v

    At the end out = o / l and lse = m + log2(l). Scores are to the base 2.
    """
    n_tiles = blocks(p.Tq, k.lanes)
    unit = k.units(p.B * p.H * n_tiles)
    head, first = unit // n_tiles, unit % n_tiles * k.lanes
    q, key, value = p.heads(inputs, head)
    result, dtype, D = p.head(out, head, p.Tq), lse.dtype, p.D
    block = min(BLOCK, blocks(p.Tk, 4) * 4)

    def query(lane: Index) -> UOp:
        return clamp(first + lane, p.Tq)

    scaled, o, w = k.tile(D, dtype), k.tile(D, dtype), k.tile(block, dtype)
    m, m_new, total, shrink = (k.tile(1, dtype) for _ in range(4))
    with k.loop(D) as d, k.phase() as lane:
        scaled[d, lane] = q[query(lane), d] * p.log2_scale
        o[d, lane] = 0.0
    with k.phase() as lane:
        m[0, lane] = m_new[0, lane] = HIDDEN
        total[0, lane] = 0.0
    last = minimum(first + (k.lanes - 1), p.Tq - 1) + p.ahead
    n_blocks = blocks(p.Tk, block)
    with counted(k, last // block + 1 if p.causal else n_blocks, n_blocks) as j:

        def row(x: Index) -> UOp:
            at = j * block + x
            return at if p.Tk % block == 0 else clamp(at, p.Tk)

        def mask(x: UOp, score: UOp, lane: UOp) -> None:
            seen = position(query(lane)) + (p.ahead + 1) if p.causal else position(p.Tk)
            if p.causal or p.Tk % block:
                score = (position(x) < seen - position(j) * block).where(score, HIDDEN)
            w[x, lane] = score
            m_new[0, lane] = m_new[0, lane].maximum(score)

        key_rows = key.rows(k, row, block, D)
        product(k, block, D, key_rows, element(scaled), mask)
        with k.phase() as lane:
            shrink[0, lane] = power(m[0, lane] - m_new[0, lane])
            m[0, lane] = m_new[0, lane]
        with k.phase() as lane:
            total[0, lane] = total[0, lane] * shrink[0, lane]
        with k.loop(block) as x, k.phase() as lane:
            weight = power(w[x, lane] - m[0, lane])
            w[x, lane] = weight
            total[0, lane] = total[0, lane] + weight
        value_rows = value.rows(k, row, block, D)
        product(
            k,
            D,
            block,
            lambda d, x: value_rows(x, d),
            element(w),
            store(o),
            lambda d, lane: o[d, lane] * shrink[0, lane],
        )
    with k.phase() as lane:
        lse[head * p.Tq + query(lane)] = m[0, lane] + total[0, lane].log2()
    with k.loop(D) as d, k.phase() as lane:
        result.put(query(lane), d, o[d, lane] / total[0, lane])
