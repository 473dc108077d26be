"""Attention of texts that are decoded together, though each began at a time of its own.

Their keys and values lie in one cache (P, H, T, D) of P places. A row of a step says which place it
has and at which position it stands, both of which are data: one jitted function serves all.
"""

from __future__ import annotations

from tinygrad import Tensor

from tinygpt.kernels import reference
from tinygpt.kernels.attention.decode import decode_rows
from tinygpt.kernels.attention.tiles import at_most, blocks, tile_shape
from tinygpt.kernels.fallback import falls_back, obstacle
from tinygpt.kernels.norm import empty
from tinygpt.kernels.phases import Array, Kernel, contiguous, on_gpu, run


def rows_attention(
    qkv: Tensor, keys: Tensor, values: Tensor, places: Tensor, positions: Tensor
) -> Tensor:
    """The step of decoding, for n rows: qkv (n, 3C) -> (n, C).

    Each row's key and value are written into keys and values (P, H, T, D), in place, at the row's
    place and position; its query then sees the positions up to there. places and positions are
    int32 (n,). Two rows must not have the same place, unless they are alike. There is no gradient.
    """
    if falls_back("attention", obstacle(qkv, keys, values, ids=[places, positions])):
        return reference.rows_attention(qkv, keys, values, places, positions)
    (P, H, T, D), n = map(int, keys.shape), int(qkv.shape[0])
    return run(
        decode_rows,
        [empty(qkv, n, H * D), keys, values],
        [contiguous(qkv), contiguous(places), contiguous(positions)],
        lanes=tile_shape(on_gpu(qkv))[0],
        name=f"attention_rows_{n}_{P}_{H}_{T}_{D}",
        ops=4 * n * H * T * D,
        rows=n,
        P=P,
        H=H,
        T=T,
        D=D,
    )[0]


def keep(qkv: Tensor, keys: Tensor, values: Tensor, place: Tensor) -> list[Tensor]:
    """Write the keys and values of qkv (n, 3C) into a place (1,) of a cache (P, H, T, D), n <= T.

    They become its first positions. The caller realizes the keys and values that are returned.
    """
    if falls_back("attention", obstacle(qkv, keys, values, ids=[place])):
        return reference.keep(qkv, keys, values, place)
    (P, H, T, D), n = map(int, keys.shape), int(qkv.shape[0])
    return run(
        _keep,
        [keys, values],
        [contiguous(qkv), contiguous(place)],
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
    place: Array,
    *,
    rows: int,
    P: int,
    H: int,
    T: int,
    D: int,
) -> None:
    unit = k.units(rows * H)
    row, h = unit // H, unit % H
    start = ((at_most(place[0], P - 1) * H + h) * T + row) * D
    for part, cache in enumerate((keys, values), start=1):
        with k.loop(blocks(D, k.lanes)) as j, k.phase() as lane:
            d = j * k.lanes + lane
            inside = d < D
            new = qkv[((row * 3 + part) * H + h) * D + inside.where(d, D - 1)]
            cache.put(start + d, new, inside if D % k.lanes else None)
