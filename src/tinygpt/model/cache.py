"""Keys and values of the positions already seen, so that each new token is computed once.

A model is handed something that looks like `Cache`: a `KVCache`, for sequences that move in step,
or one of two views of `Places`, where each text has a place and a position of its own.
"""

from __future__ import annotations

from typing import Protocol

from tinygrad import Tensor, UOp, dtypes

from tinygpt import kernels
from tinygpt.config import GPTConfig
from tinygpt.kernels.attention import merge_heads, split_heads
from tinygpt.machine.transfer import zeros


class Cache(Protocol):
    """What a model asks of a cache in a forward pass."""

    def positions(self, table: Tensor, T: int) -> Tensor:
        """The rows of ``table``, the positions' embeddings, that belong to the T tokens."""

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        """Keep the tokens' keys and values; -> attention (B, T, C) of their qkv (B, T, 3C)."""


class LayerCache:
    """Keys and values of one layer, both (B, H, block_size, D)."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.keys, self.values = zeros(shape, dtypes.float32), zeros(shape, dtypes.float32)

    def append(self, k: Tensor, v: Tensor, position: int | UOp) -> tuple[Tensor, Tensor]:
        """Write k and v (B, H, T, D) at ``position``; -> keys and values, (B, H, block_size, D)."""
        return _write(self.keys, k, position), _write(self.values, v, position)


def _write(buffer: Tensor, new: Tensor, start: int | UOp) -> Tensor:
    end = start + new.shape[2]
    store = buffer[:, :, start:end].uop.store(new.cast(buffer.dtype).uop)
    return Tensor(buffer.uop.after(store))


class KVCache:
    """The caches of all layers for a batch of B sequences that move in step.

    ``position`` is where the next token goes: a number, or a bound Variable so that one jitted
    function serves every position. The caller sets it; the model only reads it.
    """

    def __init__(self, config: GPTConfig, batch_size: int) -> None:
        self.config = config
        shape = (batch_size, config.n_head, config.block_size, config.head_size)
        self.layers = [LayerCache(shape) for _ in range(config.n_layer)]
        self.position: int | UOp = 0

    def positions(self, table: Tensor, T: int) -> Tensor:
        return table[self.position : self.position + T]

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        q, k, v = (
            split_heads(part, self.config.n_head) for part in qkv.chunk(3, dim=2)
        )  # (B, H, T, D)
        keys, values = self.layers[layer].append(k, v, self.position)  # (B, H, block_size, D)
        length = self.position + q.shape[2]
        return merge_heads(kernels.cached_attention(q, keys, values, length))


class Places:
    """Room for the keys and values of P texts, whatever their lengths: (P, H, block_size, D)."""

    def __init__(self, config: GPTConfig, places: int) -> None:
        self.config = config
        shape = (places, config.n_head, config.block_size, config.head_size)
        self.layers = [LayerCache(shape) for _ in range(config.n_layer)]


class OnePlace:
    """A view of ``Places`` for the beginning of one text, tokens (1, T), in a place (1,) int32.

    After the forward pass ``kept`` has to be realized along with the result.
    """

    def __init__(self, cache: Places, place: Tensor) -> None:
        self._cache, self._place = cache, place
        self.kept: list[Tensor] = []

    def positions(self, table: Tensor, T: int) -> Tensor:
        return table[:T]

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        cache, config = self._cache.layers[layer], self._cache.config
        self.kept += kernels.keep(qkv[0], cache.keys, cache.values, self._place)
        return kernels.self_attention(qkv, config.n_head)


class Rows:
    """A view of ``Places`` for the next token of each of n texts, tokens (1, n).

    Row i goes to position ``at[i]`` of place ``places[i]``, both int32 (n,).
    """

    def __init__(self, cache: Places, places: Tensor, at: Tensor) -> None:
        self._cache, self._places, self._at = cache, places, at

    def positions(self, table: Tensor, T: int) -> Tensor:
        return kernels.embedding(self._at.reshape(1, T), table).squeeze(0)

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        cache = self._cache.layers[layer]
        return kernels.rows_attention(
            qkv.squeeze(0), cache.keys, cache.values, self._places, self._at
        ).unsqueeze(0)
