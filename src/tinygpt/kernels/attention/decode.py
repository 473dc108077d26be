"""The decoding kernels: one query per head against a cache whose length is data.

In `decode` all sequences of a batch have the same length. In `decode_rows` each has its own, and
its own place in a cache that has slots for more: texts that began at different times. `keep_rows`
fills such a place with the keys and values of a prompt.
"""

from __future__ import annotations

import functools
import math
from contextlib import AbstractContextManager
from typing import NamedTuple

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


Loop = AbstractContextManager[UOp]


class Cache(NamedTuple):
    """The sizes of a step of n rows and of its cache, whose keys and values are (P, H, T, D)."""

    n: int
    P: int
    H: int
    T: int
    D: int


def decode(
    k: Kernel, out: Array, q: Array, keys: Array, values: Array, length: Array, *, s: Cache
) -> None:
    """out = softmax(q kᵀ / √D) v over the first ``length[0]`` of T keys, for each head."""
    head = k.units(s.n * s.H)
    n = at_most(length[0], s.T)
    at = head * s.D, head * (s.T * s.D), head * s.D
    _attend(k, (out, q, keys, values), at, n, k.loop((n + (BLOCK - 1)) // BLOCK), s.D)


def decode_rows(k: Kernel, out: Array, keys: Array, values: Array, *given: Array, s: Cache) -> None:
    """Each row's own key and value into the cache, then out = softmax(q kᵀ / √D) v up to there.

    out is (n, H, D). Inputs: qkv (n, 3, H, D), slots and positions (n,). A row has the place
    ``slots[row]`` in the cache, and stands at ``positions[row]``.
    """
    (qkv, slots, positions), (_, P, H, T, D) = given, s
    unit = k.units(s.n * H)
    row, h = unit // H, unit % H
    position = at_most(positions[row], T - 1)
    query, start = row * (3 * H * D) + h * D, (at_most(slots[row], P - 1) * H + h) * (T * D)
    copy_row(k, (keys, values), start + position * D, qkv, query, s)
    n = position + 1
    loop = counted(k, (n + (BLOCK - 1)) // BLOCK, blocks(T, BLOCK))
    _attend(k, (out, qkv, keys, values), (query, start, unit * D), n, loop, D)


def keep_rows(k: Kernel, keys: Array, values: Array, qkv: Array, slot: Array, *, s: Cache) -> None:
    """The keys and values of qkv (n, 3, H, D) become the first n positions of one slot."""
    unit = k.units(s.n * s.H)
    row, h = unit // s.H, unit % s.H
    at = ((at_most(slot[0], s.P - 1) * s.H + h) * s.T + row) * s.D
    copy_row(k, (keys, values), at, qkv, (row * 3 * s.H + h) * s.D, s)


def copy_row(
    k: Kernel, caches: tuple[Array, Array], at: UOp, qkv: Array, query: UOp, s: Cache
) -> None:
    """One head's key and value, which follow its ``query`` in qkv, go into the caches at ``at``."""
    for part, cache in enumerate(caches, start=1):
        with k.loop(blocks(s.D, k.lanes)) as j, k.phase() as lane:
            d = j * k.lanes + lane
            new = qkv[query + part * (s.H * s.D) + minimum(d, s.D - 1)]
            cache.put(at + d, new, d < s.D if s.D % k.lanes else None)


def _attend(
    k: Kernel, arrays: tuple[Array, ...], at: tuple[UOp, UOp, UOp], n: UOp, each_block: Loop, D: int
) -> None:
    """The result of one head, which sees the first n keys: so many blocks of them.

    The arrays are out, q, keys, values. The head's query, its keys and values, and its result begin
    ``at`` these places.

    Online softmax, as in `forward`. Reading the cache is all the work there is, so lanes are the
    head's dimensions, in which it is read in order; the scores are added up across the lanes.
    """
    out, q, keys, values = arrays
    dtype, W, parts = wide(q.dtype), k.lanes, range(blocks(D, k.lanes))
    scaled, o = k.tile(len(parts), dtype), k.tile(len(parts), dtype)
    products, w = k.tile(ROWS, dtype, shared=True), k.tile(1, dtype, width=BLOCK, shared=True)
    lanes = k.tile(1, dtype, shared=True)
    sums, m, m_new, total, shrink = (k.tile(n, dtype, width=1) for n in (ROWS, 1, 1, 1, 1))
    groups, (start, cached, result) = range(BLOCK // W), at

    def number(cache: Array, t: Index, part: Index, lane: Index) -> UOp:
        return cache[cached + minimum(t, n - 1) * D + minimum(part * W + lane, D - 1)].cast(dtype)

    with k.loop(len(parts)) as part, k.phase() as lane:
        d = part * W + lane
        query = q[start + minimum(d, D - 1)].cast(dtype) * (LOG2E / math.sqrt(D))
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
        out.put(result + d, o[part, lane] / total[0, 0], d < D if D % W else None)
