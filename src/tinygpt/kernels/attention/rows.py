"""Attention of sequences that are decoded together, each at a position of its own.

Their keys and values lie in one cache (P, H, T, D) of P slots. The slot and the position of each
row of a step are data, so that one jitted function serves all.
"""

from __future__ import annotations

import math

from tinygrad import Tensor

from tinygpt.kernels.attention.decode import decode_rows
from tinygpt.kernels.attention.tiles import tile_shape
from tinygpt.kernels.dispatch import operation
from tinygpt.kernels.loops import at_most, blocks
from tinygpt.kernels.phases import Array, Kernel, contiguous, empty, minimum, on_gpu, run


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
    (P, H, T, D), n = map(int, keys.shape), int(qkv.shape[0])
    return run(
        decode_rows,
        [empty(qkv, n, H * D), keys, values],
        [contiguous(qkv), contiguous(slots), contiguous(positions)],
        lanes=tile_shape(on_gpu(qkv))[0],
        name=f"attention_rows_{n}_{P}_{H}_{T}_{D}",
        ops=4 * n * H * T * D,
        rows=n,
        P=P,
        H=H,
        T=T,
        D=D,
    )[0]


@operation("attention", plain_keep, integers=("slot",))
def keep(qkv: Tensor, keys: Tensor, values: Tensor, slot: Tensor) -> list[Tensor]:
    """Write the keys and values of qkv (n, 3C) into a slot (1,) of a cache (P, H, T, D), n <= T.

    They become its first positions. The caller realizes the keys and values that are returned.
    """
    (P, H, T, D), n = map(int, keys.shape), int(qkv.shape[0])
    return run(
        _keep,
        [keys, values],
        [contiguous(qkv), contiguous(slot)],
        lanes=tile_shape(on_gpu(qkv))[0],
        name=f"attention_keep_{n}_{P}_{H}_{T}_{D}",
        rows=n,
        P=P,
        H=H,
        T=T,
        D=D,
    )


def _keep(
    k: Kernel,
    keys: Array,
    values: Array,
    qkv: Array,
    slot: Array,
    *,
    rows: int,
    P: int,
    H: int,
    T: int,
    D: int,
) -> None:
    unit = k.units(rows * H)
    row, h = unit // H, unit % H
    start = ((at_most(slot[0], P - 1) * H + h) * T + row) * D
    for part, cache in enumerate((keys, values), start=1):
        with k.loop(blocks(D, k.lanes)) as j, k.phase() as lane:
            d = j * k.lanes + lane
            new = qkv[((row * 3 + part) * H + h) * D + minimum(d, D - 1)]
            cache.put(start + d, new, d < D if D % k.lanes else None)
