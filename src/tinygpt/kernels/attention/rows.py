"""Attention of sequences that are decoded together, each at a position of its own.

One query per head leaves nothing to share: the time goes into reading the cache once. Keys and
values of all sequences lie in one cache (P, H, T, D) of P slots. The slot and the position of each
row of a step are data, so that one jitted function serves all.

The cache may be int8: each vector of D numbers then has a scale, its largest number / 127, and the
scales (P, H, T, 1) stand beside keys and values. A vector is rounded once, when it is written. Its
scale is a factor of the key's score, and of the value's weight.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

from tinygrad import Tensor, UOp, dtypes

from tinygpt.kernels.attention.tiles import HIDDEN, tile_shape
from tinygpt.kernels.dispatch import operation
from tinygpt.kernels.loops import add_across, at_most, blocks, counted, fill
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

LARGEST = 127
"""The largest number of an int8 cache: -128 has no counterpart."""

STEP = 4
"""Values that are added at a time to a sum that lies in memory."""


def plain_rows_attention(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    positions: Tensor,
    scales: Sequence[Tensor] = (),
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
        put = here.where(new.reshape(n, 1, H, 1, -1), 0).sum(0)
        return _in_place(cache, here.any(0).where(put, cache))[slots].cast(wide(cache.dtype))

    def vectors(cache: Tensor, new: Tensor, *scale: Tensor) -> Tensor:
        """The same as numbers, with a ``scale`` too."""
        if not scale:
            return own_slot(cache, new)
        whole, factor = rounded(new)
        return own_slot(cache, whole) * own_slot(scale[0], factor)

    q = q.cast(wide(q.dtype))
    scores = (
        q @ vectors(keys, k, *scales[:1]).transpose(-2, -1) * (1 / math.sqrt(D))
    )  # (n, H, 1, T)
    seen = (times <= positions).reshape(n, 1, 1, T)
    weights = seen.where(scores, -math.inf).softmax(-1)
    y = weights @ seen.reshape(n, 1, T, 1).where(vectors(values, v, *scales[1:]), 0)  # (n, H, 1, D)
    return y.cast(qkv.dtype).reshape(n, H * D)


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., D) as whole numbers (..., D) up to 127 times scales (..., 1), to half a scale."""
    x = x.cast(wide(x.dtype))
    largest = x.abs().max(-1, keepdim=True)
    factor = (largest > 0).where(LARGEST / largest, 0)
    return (x * factor + (LARGEST + 1.5)).cast(dtypes.int32) - (LARGEST + 1), largest / LARGEST


def plain_keep(
    qkv: Tensor, keys: Tensor, values: Tensor, slot: Tensor, scales: Sequence[Tensor] = ()
) -> list[Tensor]:
    """The whole cache is written, mostly with what it holds."""
    (P, H, T, D), n = map(int, keys.shape), int(qkv.shape[0])
    here = (Tensor.arange(P) == slot).reshape(P, 1, 1, 1)
    here = here & (Tensor.arange(T) < n).reshape(1, 1, T, 1)
    _, *new = (part.reshape(1, n, H, D).transpose(1, 2) for part in qkv.chunk(3, dim=1))
    if scales:
        new = [part for parts in zip(*map(rounded, new), strict=True) for part in parts]
    padded = (x.pad((None, None, (0, T - n), None)) for x in new)
    caches = (keys, values, *scales)
    return [_in_place(c, here.where(x, c)) for c, x in zip(caches, padded, strict=True)]


def _in_place(buffer: Tensor, value: Tensor) -> Tensor:
    """The buffer after the value is stored in it; the value may depend on it. To be realized."""
    return Tensor(buffer.uop.after(buffer.uop.store(value.cast(buffer.dtype).uop)))


@operation("attention", plain_rows_attention, integers=("keys", "values", "slots", "positions"))
def rows_attention(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    positions: Tensor,
    scales: Sequence[Tensor] = (),
) -> Tensor:
    """The step of decoding, for n rows: qkv (n, 3C) -> (n, C).

    Each row's key and value are written into keys and values (P, H, T, D), in place, at the row's
    slot and position; its query then sees the positions up to there. slots and positions are
    int32 (n,). Two rows must not have the same slot, unless they are alike. There is no gradient.
    Keys and values of int8 have ``scales``, those of the keys and those of the values.
    """
    P, H, T, D = map(int, keys.shape)
    s = Cache(int(qkv.shape[0]), P, H, T, D, bool(scales))
    return run(
        decode_rows,
        [empty(qkv, s.n, s.H * s.D), keys, values, *scales],
        [contiguous(qkv), contiguous(slots), contiguous(positions)],
        lanes=tile_shape(on_gpu(qkv))[0],
        name=s.name("rows"),
        ops=4 * s.n * s.H * s.T * s.D,
        s=s,
    )[0]


@operation("attention", plain_keep, integers=("keys", "values", "slot"))
def keep(
    qkv: Tensor, keys: Tensor, values: Tensor, slot: Tensor, scales: Sequence[Tensor] = ()
) -> list[Tensor]:
    """Write the keys and values of qkv (n, 3C) into a slot (1,) of a cache (P, H, T, D), n <= T.

    They become its first positions. The caller realizes what is returned: the keys, the values, and
    their ``scales`` if they are int8.
    """
    P, H, T, D = map(int, keys.shape)
    s = Cache(int(qkv.shape[0]), P, H, T, D, bool(scales))
    inputs, lanes = [contiguous(qkv), contiguous(slot)], tile_shape(on_gpu(qkv))[0]
    return run(keep_rows, [keys, values, *scales], inputs, lanes=lanes, name=s.name("keep"), s=s)


class Cache(NamedTuple):
    """The sizes of a step of n rows and of its cache, whose keys and values are (P, H, T, D)."""

    n: int
    P: int
    H: int
    T: int
    D: int
    int8: bool = False

    def name(self, kind: str) -> str:
        """A kernel's name, for profiles."""
        return "_".join(["attention", kind, *map(str, self[:-1]), *["int8"] * self.int8])


def keep_rows(k: Kernel, keys: Array, values: Array, *given: Array, s: Cache) -> None:
    """The keys and values of qkv (n, 3, H, D) become the first n positions of one slot.

    More outputs: the scales; inputs: qkv, the slot.
    """
    *scales, qkv, slot = given
    unit = k.units(s.n * s.H)
    row, h = unit // s.H, unit % s.H
    vector = (at_most(slot[0], s.P - 1) * s.H + h) * s.T + row
    at = vector * s.D
    query = (row * 3 * s.H + h) * s.D
    for part, cache in enumerate((keys, values), start=1):
        first = query + part * (s.H * s.D)
        if s.int8:
            round_row(k, cache, at, scales[part - 1], vector, qkv, first, s.D)
        else:
            copy_row(k, cache, at, qkv, first, s.D)


def copy_row(k: Kernel, cache: Array, at: UOp, qkv: Array, first: UOp, D: int) -> None:
    """One head's key or value, which begins at ``first`` in qkv, goes into the cache at ``at``."""
    with k.loop(blocks(D, k.lanes)) as j, k.phase() as lane:
        d = j * k.lanes + lane
        cache.put(at + d, qkv[first + minimum(d, D - 1)], d < D if D % k.lanes else None)


def decode_rows(k: Kernel, out: Array, keys: Array, values: Array, *given: Array, s: Cache) -> None:
    """Each row's own key and value into the cache, then out = softmax(q kᵀ / √D) v up to there.

    out is (n, H, D). More outputs: the scales. Inputs: qkv (n, 3, H, D), slots and positions (n,).
    A row has the place ``slots[row]`` in the cache, and stands at ``positions[row]``.
    """
    (*scales, qkv, slots, positions), (_, P, H, T, D, _) = given, s
    unit = k.units(s.n * H)
    row, h = unit // H, unit % H
    position = at_most(positions[row], T - 1)
    head = at_most(slots[row], P - 1) * H + h
    query, start = row * (3 * H * D) + h * D, head * (T * D)
    for part, cache in enumerate((keys, values), start=1):
        first = query + part * (H * D)
        if s.int8:
            scale, vector = scales[part - 1], head * T + position
            round_row(k, cache, start + position * D, scale, vector, qkv, first, D)
        else:
            copy_row(k, cache, start + position * D, qkv, first, D)
    places = query, start, unit * D, head * T
    _attend(k, (out, qkv, keys, values, *scales), places, position + 1, T, D)


def round_row(
    k: Kernel, cache: Array, at: UOp, scales: Array, vector: UOp, qkv: Array, first: UOp, D: int
) -> None:
    """`copy_row` into an int8 cache, and the scale of this ``vector`` of it; see `rounded`."""
    kind, steps = wide(qkv.dtype), blocks(D, k.lanes)
    lanes, largest = k.tile(1, kind, shared=True), k.tile(1, kind, width=1)

    def number(d: UOp) -> UOp:
        return qkv[first + minimum(d, D - 1)].cast(kind)

    fill(k, 0.0, 1, lanes)
    with k.loop(steps) as j, k.phase() as lane:
        value = number(j * k.lanes + lane)
        lanes[0, lane] = lanes[0, lane].maximum(value.maximum(-value))
    k.fold(largest, lanes, 1, UOp.maximum)
    with k.phase(1):
        scales[vector] = largest[0, 0] * (1 / LARGEST)
    with k.loop(steps) as j, k.phase() as lane:
        d = j * k.lanes + lane
        factor = (largest[0, 0] > 0).where(LARGEST / largest[0, 0], 0.0)
        whole = (number(d) * factor + (LARGEST + 1.5)).cast(dtypes.int32) - (LARGEST + 1)
        cache.put(at + d, whole, d < D if D % k.lanes else None)


def _attend(
    k: Kernel, arrays: tuple[Array, ...], at: tuple[UOp, ...], n: UOp, T: int, D: int
) -> None:
    """The result of one head, which sees the first n of T keys.

    The arrays are out, q, keys, values, and the scales of these two if they are int8. The head's
    query, its keys and values, its result and its scales begin ``at`` these places.

    Online softmax, as in `forward`. Reading the cache is all the work there is, so lanes are the
    head's dimensions, in which it is read in order; the scores are added up across the lanes.
    """
    out, q, keys, values, *scales = arrays
    dtype, W, parts = wide(q.dtype), k.lanes, range(blocks(D, k.lanes))
    scaled, o = k.tile(len(parts), dtype), k.tile(len(parts), dtype)
    products, w = k.tile(ROWS, dtype, shared=True), k.tile(1, dtype, width=BLOCK, shared=True)
    lanes = k.tile(1, dtype, shared=True)
    sums, m, m_new, total, shrink = (k.tile(n, dtype, width=1) for n in (ROWS, 1, 1, 1, 1))
    groups, (start, cached, result, vectors) = range(BLOCK // W), at

    def number(cache: Array, t: Index, part: Index, lane: Index) -> UOp:
        return cache[cached + minimum(t, n - 1) * D + minimum(part * W + lane, D - 1)].cast(dtype)

    def times_scale(value: UOp, which: int, t: Index) -> UOp:
        """A number times the scale of key or value t."""
        return value * scales[which][vectors + minimum(t, n - 1)].cast(dtype) if scales else value

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
                score = times_scale(sums[x, 0], 0, first + x)
                w[0, i * ROWS + x] = (first + x < n).where(score, HIDDEN)
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
        if scales:
            with k.loop(len(groups)) as g, k.phase() as lane:
                at_lane = g * W + lane
                w[0, at_lane] = times_scale(w[0, at_lane], 1, j * BLOCK + at_lane)
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
