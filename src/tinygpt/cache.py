"""Keys and values of the positions already seen, so that each new token is computed once."""

from __future__ import annotations

from tinygrad import Tensor, dtypes
from tinygrad.uop.ops import UOp

from tinygpt.config import GPTConfig
from tinygpt.transfer import zeros


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
        shape = (batch_size, config.n_head, config.block_size, config.head_size)
        self.layers = [LayerCache(shape) for _ in range(config.n_layer)]
        self.position: int | UOp = 0
