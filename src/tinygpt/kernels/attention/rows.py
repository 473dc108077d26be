"""Attention of sequences that are decoded together, each at a position of its own.

Their keys and values lie in one cache (P, H, T, D) of P slots. The slot and the position of each
row of a step are data, so that one jitted function serves all.
"""

from __future__ import annotations

import math

from tinygrad import Tensor

from tinygpt.kernels.attention.decode import Cache, decode_rows, keep_rows
from tinygpt.kernels.attention.tiles import tile_shape
from tinygpt.kernels.dispatch import operation
from tinygpt.kernels.phases import contiguous, empty, on_gpu, run


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
        return _in_place(cache, here.any(0).where(put, cache))[slots]

    scores = q @ own_slot(keys, k).transpose(-2, -1) * (1 / math.sqrt(D))  # (n, H, 1, T)
    seen = (times <= positions).reshape(n, 1, 1, T)
    weights = seen.where(scores, -math.inf).softmax(-1)
    return (weights @ seen.reshape(n, 1, T, 1).where(own_slot(values, v), 0)).reshape(n, H * D)


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
