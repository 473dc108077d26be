"""Attention of sequences that are decoded together, each at a position of its own.

One query per head leaves nothing to share: the time goes into reading the cache once. Keys and
values of all sequences lie in one cache (P, H, T, D) of P slots. The slot and the position of each
row of a step are data, so that one jitted function serves all.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from tinygrad import Tensor, UOp

from tinygpt.kernels.attention.tiles import HIDDEN, tile_shape
from tinygpt.kernels.dispatch import operation
from tinygpt.kernels.loops import add_across, at_most, blocks, counted
from tinygpt.kernels.phases import (
    LOG2E,
    Array,
    Index,
    Kernel,
    contiguous,
    empty,
    exp2,
    minimum,
    on_gpu,
    run,
    wide,
)

BLOCK = 64
"""Keys between two rescalings of the sum."""

ROWS = 16
"""Keys whose scores are added up across the lanes at a time: so many additions overlap."""

STEP = 4
"""Values that are added at a time to a sum that lies in memory."""


def plain_rows_attention(
    qkv: Tensor, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor
) -> Tensor:
    """Every row attends to its whole slot, behind a mask."""
    (P, H, T, D), n = map(int, keys.shape), int(qkv.shape[0])
    q, k, v = (part.reshape(n, H, 1, D) for part in qkv.chunk(3, dim=1))
    times = Tensor.arange(T).reshape(1, T)
    positions = positions.reshape(n, 1)
    here = (Tensor.arange(P).reshape(1, P) == slots.reshape(n, 1)).reshape(n, P, 1)
    here = (here & (times == positions).reshape(n, 1, T)).reshape(n, P, 1, T, 1)

    def own_slot(cache: Tensor, new: Tensor) -> Tensor:
        """The slots (n, H, T, D) of the rows, after these wrote what is new."""
        put = here.where(new.reshape(n, 1, H, 1, D), 0).sum(0)
        return _in_place(cache, here.any(0).where(put, cache))[slots].cast(wide(cache.dtype))

    q = q.cast(wide(q.dtype))
    scores = q @ own_slot(keys, k).transpose(-2, -1) * (1 / math.sqrt(D))  # (n, H, 1, T)
    seen = (times <= positions).reshape(n, 1, 1, T)
    weights = seen.where(scores, -math.inf).softmax(-1)
    y = weights @ seen.reshape(n, 1, T, 1).where(own_slot(values, v), 0)  # (n, H, 1, D)
    return y.cast(qkv.dtype).reshape(n, H * D)


def plain_keep(qkv: Tensor, keys: Tensor, values: Tensor, slot: Tensor) -> list[Tensor]:
    """The whole cache is written, mostly with what it holds."""
    (P, H, T, D), n = map(int, keys.shape), int(qkv.shape[0])
    here = (Tensor.arange(P) == slot).reshape(P, 1, 1, 1)
    here = here & (Tensor.arange(T) < n).reshape(1, 1, T, 1)
    _, *new = (part.reshape(1, n, H, D).transpose(1, 2) for part in qkv.chunk(3, dim=1))
    padded = (x.pad((None, None, (0, T - n), None)) for x in new)
    return [_in_place(c, here.where(x, c)) for c, x in zip((keys, values), padded, strict=True)]


def _in_place(buffer: Tensor, value: Tensor) -> Tensor:
    """The buffer after the value is stored in it; the value may depend on it. To be realized."""
    return Tensor(buffer.uop.after(buffer.uop.store(value.cast(buffer.dtype).uop)))


@operation("attention", plain_rows_attention, integers=("slots", "positions"))
def rows_attention(
    qkv: Tensor, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor
) -> Tensor:
    """The step of decoding, for n rows: qkv (n, 3C) -> (n, C).

    Each row's key and value are written into keys and values (P, H, T, D), in place, at the row's
    slot and position; its query then sees the positions up to there. slots and positions are
    int32 (n,). Two rows must not have the same slot, unless they are alike. There is no gradient.
    """
    s = Cache(int(qkv.shape[0]), *map(int, keys.shape))
    return run(
        decode_rows,
        [empty(qkv, s.n, s.H * s.D), keys, values],
        [contiguous(qkv), contiguous(slots), contiguous(positions)],
        lanes=tile_shape(on_gpu(qkv))[0],
        name="attention_rows_" + "_".join(map(str, s)),
        ops=4 * s.n * s.H * s.T * s.D,
        s=s,
    )[0]


@operation("attention", plain_keep, integers=("slot",))
def keep(qkv: Tensor, keys: Tensor, values: Tensor, slot: Tensor) -> list[Tensor]:
    """Write the keys and values of qkv (n, 3C) into a slot (1,) of a cache (P, H, T, D), n <= T.

    They become its first positions. The caller realizes the keys and values that are returned.
    """
    s = Cache(int(qkv.shape[0]), *map(int, keys.shape))
    inputs, name = [contiguous(qkv), contiguous(slot)], "attention_keep_" + "_".join(map(str, s))
    lanes = tile_shape(on_gpu(qkv))[0]
    return run(keep_rows, [keys, values], inputs, lanes=lanes, name=name, s=s)


class Cache(NamedTuple):
    """The sizes of a step of n rows and of its cache, whose keys and values are (P, H, T, D)."""

    n: int
    P: int
    H: int
    T: int
    D: int


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
    _attend(k, (out, qkv, keys, values), (query, start, unit * D), position + 1, T, D)


def _attend(
    k: Kernel, arrays: tuple[Array, ...], at: tuple[UOp, UOp, UOp], n: UOp, T: int, D: int
) -> None:
    """The result of one head, which sees the first n of T keys.

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
    with counted(k, (n + (BLOCK - 1)) // BLOCK, blocks(T, BLOCK)) as j:
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
