"""The decoding kernels: one query per head against a cache whose length is data.

In `decode` all sequences of a batch have the same length. In `decode_rows` each has its own, and
its own place in a cache that has slots for more: texts that began at different times.
"""

from __future__ import annotations

import functools
import math
from contextlib import AbstractContextManager
from dataclasses import dataclass

from tinygrad import UOp

from tinygpt.kernels.attention.tiles import HIDDEN
from tinygpt.kernels.loops import add_across, at_most, blocks, counted
from tinygpt.kernels.phases import LOG2E, Array, Index, Kernel, exp2, minimum, wide

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
    """out = softmax(q kᵀ / √D) v over the first ``length[0]`` of T keys, for each head."""
    head = k.units(heads)
    n = at_most(length[0], T)
    at = Head(query=head * D, cache=head * (T * D), result=head * D)
    _attend(k, out, q, keys, values, at, n, k.loop((n + (BLOCK - 1)) // BLOCK), D)


def decode_rows(
    k: Kernel,
    out: Array,
    keys: Array,
    values: Array,
    qkv: Array,
    slots: Array,
    positions: Array,
    *,
    rows: int,
    P: int,
    H: int,
    T: int,
    D: int,
) -> None:
    """Each row's own key and value into the cache, then out = softmax(q kᵀ / √D) v up to there.

    qkv is (rows, 3, H, D), out (rows, H, D), keys and values are (P, H, T, D). A row has the place
    ``slots[row]`` there, and stands at ``positions[row]``.
    """
    unit = k.units(rows * H)
    row, h = unit // H, unit % H
    position = at_most(positions[row], T - 1)
    query = row * (3 * H * D) + h * D
    at = Head(query, (at_most(slots[row], P - 1) * H + h) * (T * D), unit * D)
    for part, cache in enumerate((keys, values), start=1):
        with k.loop(blocks(D, k.lanes)) as j, k.phase() as lane:
            d = j * k.lanes + lane
            new = qkv[query + part * (H * D) + minimum(d, D - 1)]
            cache.put(at.cache + position * D + d, new, d < D if D % k.lanes else None)
    n = position + 1
    loop = counted(k, (n + (BLOCK - 1)) // BLOCK, blocks(T, BLOCK))
    _attend(k, out, qkv, keys, values, at, n, loop, D)


@dataclass(frozen=True)
class Head:
    """Where a head's query, keys and values, and result begin."""

    query: UOp
    cache: UOp
    result: UOp


def _attend(
    k: Kernel,
    out: Array,
    q: Array,
    keys: Array,
    values: Array,
    at: Head,
    n: UOp,
    each_block: AbstractContextManager[UOp],
    D: int,
) -> None:
    """The result of one head, which sees the first n keys: so many blocks of them.

    Online softmax, as in `forward`. Reading the cache is all the work there is, so lanes are the
    head's dimensions, in which it is read in order; the scores are added up across the lanes.
    """
    dtype, W, parts = wide(q.dtype), k.lanes, range(blocks(D, k.lanes))
    scaled, o = k.tile(len(parts), dtype), k.tile(len(parts), dtype)
    products, w = k.tile(ROWS, dtype, shared=True), k.tile(1, dtype, width=BLOCK, shared=True)
    lanes = k.tile(1, dtype, shared=True)
    sums, m, m_new, total, shrink = (k.tile(n, dtype, width=1) for n in (ROWS, 1, 1, 1, 1))
    groups = range(BLOCK // W)

    def number(cache: Array, t: Index, part: Index, lane: Index) -> UOp:
        return cache[at.cache + minimum(t, n - 1) * D + minimum(part * W + lane, D - 1)].cast(dtype)

    with k.loop(len(parts)) as part, k.phase() as lane:
        d = part * W + lane
        query = q[at.query + minimum(d, D - 1)].cast(dtype) * (LOG2E / math.sqrt(D))
        scaled[part, lane] = (d < D).where(query, 0.0)
        o[part, lane] = 0.0
    with k.phase(1):
        m[0, 0], total[0, 0] = HIDDEN, 0.0
    with each_block as j:
        with k.loop(BLOCK // ROWS) as i:
            first = j * BLOCK + i * ROWS
            with k.loop(ROWS) as x, k.phase() as lane:
                terms = [scaled[part, lane] * number(keys, first + x, part, lane) for part in parts]
                products[x, lane] = functools.reduce(UOp.add, terms)
            add_across(k, sums, products, ROWS)
            with k.loop(ROWS) as x, k.phase(1):
                w[0, i * ROWS + x] = (first + x < n).where(sums[x, 0], HIDDEN)
        with k.phase() as lane:
            lanes[0, lane] = functools.reduce(UOp.maximum, [w[0, g * W + lane] for g in groups])
        with k.phase(1):
            m_new[0, 0] = m[0, 0]
        with k.loop(W) as lane, k.phase(1):
            m_new[0, 0] = m_new[0, 0].maximum(lanes[0, lane])
        with k.phase(1):
            m[0, 0], shrink[0, 0] = m_new[0, 0], exp2(m[0, 0] - m_new[0, 0])
        with k.loop(len(groups)) as g, k.phase() as lane:
            w[0, g * W + lane] = exp2(w[0, g * W + lane] - m[0, 0])
        with k.phase() as lane:
            lanes[0, lane] = functools.reduce(UOp.add, [w[0, g * W + lane] for g in groups])
        add_across(k, sums, lanes, 1)
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
        out.put(at.result + d, o[part, lane] / total[0, 0], d < D if D % W else None)
