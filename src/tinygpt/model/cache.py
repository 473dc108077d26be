"""Keys and values of the positions already seen, so that each new token is computed once.

A `KVCache` holds the keys and values of several sequences, each in a slot of its own. A forward
pass takes one of its two views: `Prefill` for the first tokens of one sequence, `Step` for the next
token of each of several.
"""

from __future__ import annotations

from typing import Protocol

from tinygrad import Tensor, dtypes

from tinygpt import kernels
from tinygpt.config import GPTConfig
from tinygpt.machine.tinygrad_internals import DType
from tinygpt.machine.transfer import zeros


class Cache(Protocol):
    """What a model asks of a cache in a forward pass."""

    def positions(self, table: Tensor, T: int) -> Tensor:
        """The rows (T, C) of ``table``, the positions' embeddings, that belong to the T tokens."""

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        """Store the tokens' keys and values; -> attention (B, T, C) of their qkv (B, T, 3C)."""


class KVCache:
    """Keys and values of ``slots`` sequences, (slots, H, block_size, D) each, for every layer."""

    def __init__(self, config: GPTConfig, slots: int, dtype: DType = dtypes.float32) -> None:
        """``dtype`` is the type of the keys and values: that of the model's activations, or int8.

        With int8 a layer also has the scales of its keys and values, (slots, H, block_size, 1).
        """
        self.config = config
        vectors = (slots, config.n_head, config.block_size)
        kinds = [(dtype, config.head_size)] * 2
        if dtype == dtypes.int8:
            kinds += [(dtypes.float32, 1)] * 2
        self.layers = [
            tuple(zeros((*vectors, size), kind) for kind, size in kinds)
            for _ in range(config.n_layer)
        ]


def cache_bytes(config: GPTConfig, dtype: DType, slots: int = 1) -> int:
    """The memory of a `KVCache`."""
    vector = config.head_size * dtype.itemsize + (4 if dtype == dtypes.int8 else 0)
    return 2 * config.n_layer * slots * config.n_head * config.block_size * vector


class Prefill:
    """The view for the first tokens (1, T) of a sequence, whose slot (1,) is an int32 Tensor.

    They take the positions 0 to T - 1. Realize ``written`` along with the result.
    """

    def __init__(self, cache: KVCache, slot: Tensor) -> None:
        self._cache, self._slot = cache, slot
        self.written: list[Tensor] = []

    def positions(self, table: Tensor, T: int) -> Tensor:
        return table[:T]

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        config = self._cache.config
        keys, values, *scales = self._cache.layers[layer]
        self.written += kernels.keep(qkv.squeeze(0), keys, values, self._slot, scales)
        return kernels.self_attention(qkv, config.n_head)


class Step:
    """The view for the next token of n sequences, side by side: tokens (1, n).

    Token i takes ``positions[i]`` of ``slots[i]``, both int32 (n,).
    """

    def __init__(self, cache: KVCache, slots: Tensor, positions: Tensor) -> None:
        self._cache, self._slots, self._positions = cache, slots, positions

    def positions(self, table: Tensor, T: int) -> Tensor:
        return kernels.embedding(self._positions.reshape(1, T), table).squeeze(0)

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        keys, values, *scales = self._cache.layers[layer]
        where = self._slots, self._positions
        y = kernels.rows_attention(qkv.squeeze(0), keys, values, *where, scales)
        return y.unsqueeze(0)  # (n, C) -> (1, n, C)
