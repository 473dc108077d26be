"""A model's next-token logits with a cache: prefill, then one position at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from tinygrad import Tensor, TinyJit, UOp, Variable, dtypes

from tinygpt.machine.transfer import read, write, zeros
from tinygpt.model.cache import KVCache
from tinygpt.model.transformer import Transformer

Ids = npt.NDArray[np.int32]
Logits = npt.NDArray[np.float32]
Compute = Callable[[Tensor, UOp], Tensor]
"""Token ids (B, T) and a bound variable -> logits (B, V)."""

SMALLEST_BUCKET = 16
LIVE_BATCH_SIZES = 4


class Decoder:
    """A model's next-token logits, with a cache, so that each position is computed once.

    Prompts are padded on the right to a few lengths and decoding is one jitted function for all
    positions, so nothing is compiled twice. Weights may change between generations.
    """

    # Without a __dict__, tinygrad's get_parameters(model) never finds the caches in here.
    __slots__ = ("_batches", "_weights", "model")

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self._batches: dict[int, _Batch] = {}
        self._weights: list[UOp] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return Decoder, (self.model,)  # a copy of a model starts with empty caches

    def next_logits(self, context: Ids, owner: object) -> Logits:
        """Logits (B, V) of the token that follows each row of context (B, n); n may be any length.

        ``owner`` identifies one generation: its contexts grow by one token per call. Several may
        take turns; whoever finds the cache in other hands fills it anew. Beyond block_size only the
        last block_size tokens count, and as they then move under their learned positions, nothing
        that is cached holds any longer: each token costs a forward pass of the whole window.
        """
        block_size = self.model.config.block_size
        n = context.shape[1]
        batch = self._batches.get(len(context))
        if batch is not None and batch.holds(owner, n - 1) and n <= block_size:
            logits = batch.decode_step(context[:, -1:], n - 1)
        else:
            self._forget_replaced_weights()
            batch = self._batch(len(context))
            logits = batch.prefill(context[:, -block_size:])
        batch.owner, batch.length = owner, n
        return logits

    def _batch(self, size: int) -> _Batch:
        batch = self._batches.pop(size, None) or _Batch(self.model, size)
        self._batches[size] = batch  # last in line
        if len(self._batches) > LIVE_BATCH_SIZES:
            del self._batches[next(iter(self._batches))]
        return batch

    def _forget_replaced_weights(self) -> None:
        """A jit keeps the buffers it was captured with: it must go when ``replace`` swaps one."""
        weights = list(self.model.parameters().values())
        Tensor.realize(*weights)
        buffers = [w.uop.base for w in weights]
        if len(buffers) != len(self._weights) or any(
            new is not old for new, old in zip(buffers, self._weights, strict=True)
        ):
            self._batches.clear()
            self._weights = buffers


class _Batch:
    """Cache and jitted functions for B sequences that move in step."""

    def __init__(self, model: Transformer, size: int) -> None:
        self.owner: object = None
        self.length = 0
        self._model, self._cache = model, KVCache(model.config, size)
        self._size, self._block_size = size, model.config.block_size
        position = Variable("position", 0, self._block_size - 1)
        self._decode = _Forward(self._one_position, size, 1, position)
        self._prefill: dict[int, _Forward] = {}  # by padded length

    def holds(self, owner: object, length: int) -> bool:
        """Whether the cache stands right before position ``length`` of this owner's sequences."""
        return self.owner is owner and self.length == length

    def prefill(self, context: Ids) -> Logits:
        """Fill the cache with context (B, n), n <= block_size; -> logits (B, V) of what follows.

        The padding comes after the context, where causal attention does not look, and leaves keys
        and values that are overwritten before they are read.
        """
        n = context.shape[1]
        length = padded_length(n, self._block_size)
        if length not in self._prefill:
            last = Variable("last", 0, length - 1)
            self._prefill[length] = _Forward(self._whole_context, self._size, length, last)
        self.owner = None  # until the cache is whole again
        padded = np.pad(context, ((0, 0), (0, length - n)))
        return self._prefill[length](padded, n - 1)

    def decode_step(self, tokens: Ids, position: int) -> Logits:
        """Append tokens (B, 1) at ``position``; -> logits (B, V) of what follows."""
        self.owner = None
        return self._decode(tokens, position)

    def _whole_context(self, tokens: Tensor, last: UOp) -> Tensor:
        self._cache.position = 0
        x = self._model.hidden(tokens, self._cache)  # (B, T, C)
        return self._logits(x[:, last : last + 1])

    def _one_position(self, tokens: Tensor, position: UOp) -> Tensor:
        self._cache.position = position
        return self._logits(self._model.hidden(tokens, self._cache))

    def _logits(self, x: Tensor) -> Tensor:
        """(B, 1, C) -> (B, V)"""
        return self._model.unembed(x).squeeze(1).float().realize()


def padded_length(n: int, block_size: int) -> int:
    """The length that a prompt of n <= block_size tokens is padded to: one of a few."""
    return min(block_size, max(SMALLEST_BUCKET, 1 << (n - 1).bit_length()))


class _Forward:
    """Logits (B, V) of ids (B, T) and a position, from numpy to numpy, jitted.

    The ids are written into a buffer that the jit knows from the start: to hand a Tensor to a jit
    costs more than the whole forward pass of a small model.
    """

    def __init__(self, compute: Compute, size: int, length: int, position: UOp) -> None:
        ids = zeros((size, length), dtypes.int32)
        self._ids, self._position = ids, cache(position.bind)
        self._logits = TinyJit(lambda position: compute(ids, position))
        self._logits.cnt = 1  # captured at the first call

    def __call__(self, ids: Ids, position: int) -> Logits:
        write(self._ids, ids)
        return read(self._logits(self._position(position)))
