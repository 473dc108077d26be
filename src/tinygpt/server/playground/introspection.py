"""A look inside a model: what else it weighed for the next token, and where its heads look.

Both are forward passes of their own, so they touch tinygrad: only the thread that owns it may call
``next_token`` and ``AttentionLook.weights``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tinygrad import Tensor

from tinygpt import kernels
from tinygpt.config import GPTConfig, SampleConfig
from tinygpt.generation.decoder import Decoder, padded_length
from tinygpt.generation.sample import filter_logits, likeliest, softmax
from tinygpt.machine.jit import jit
from tinygpt.model.transformer import Transformer

Ids = Sequence[int]
Weights = npt.NDArray[np.float32]
Probabilities = npt.NDArray[np.float64]


@dataclass(frozen=True)
class NextToken:
    """Probabilities (V,) of the token after a text."""

    model: Probabilities
    """The model's own."""
    sampled: Probabilities
    """After the filters of sampling: those that a token is drawn from."""

    def likeliest(self, count: int) -> list[int]:
        """The ``count`` likeliest ids by the model's own reckoning; of equals the lower first."""
        return likeliest(self.model, count)

    def rank(self, token: int) -> int:
        """1 for the likeliest token."""
        return 1 + int((self.model > self.model[token]).sum())

    @property
    def kept(self) -> int:
        """How many tokens the filters leave."""
        return int(np.count_nonzero(self.sampled))


def next_token(decoder: Decoder, ids: Ids, config: SampleConfig, vocab_size: int) -> NextToken:
    """What may follow ``ids``, of which there is at least one; ids from vocab_size on are out."""
    _, [logits] = decoder.states([ids[-decoder.model.config.block_size :]])
    logits = logits[:vocab_size]
    filtered = filter_logits(logits, np.array(ids), config)
    if config.temperature == 0:
        sampled = np.zeros(vocab_size)
        sampled[filtered.argmax()] = 1
    else:
        sampled = softmax(filtered)
    return NextToken(softmax(np.array(logits, np.float64)), sampled)


class AttentionLook:
    """Where the heads of a layer look, by a forward pass that is jitted for a few lengths."""

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self._qkv = jit(self._qkv_of, short=True)

    def weights(self, ids: Ids, layer: int, last: int) -> Weights:
        """(H, q, T): the weights of the last q <= ``last`` positions.

        T is the number of ids, of which the model sees the last block_size. Row i belongs to
        position T - q + i; it sums to 1, and is 0 behind that position.
        """
        ids = ids[-self.model.config.block_size :]
        q, k = self._queries_and_keys(ids, layer)  # (H, T, D)
        return causal_weights(q[:, -last:], k)

    def _queries_and_keys(self, ids: Ids, layer: int) -> tuple[Weights, Weights]:
        """Queries and keys (H, T, D) of a layer.

        Behind the text stands padding, which no position of the text can see.
        """
        length = padded_length(len(ids), self.model.config.block_size)
        padded = [*ids, *[0] * (length - len(ids))]
        qkv = self._qkv([padded], [[[layer]]])[0, : len(ids)]  # (T, 3C)
        q, k, _ = (_heads(part, self.model.config.n_head) for part in np.split(qkv, 3, axis=1))
        return q, k

    def _qkv_of(self, tokens: Tensor, layer: Tensor) -> Tensor:
        """Queries, keys and values (1, T, 3C) of one layer (1, 1, 1), for tokens (1, T)."""
        seen = _Seen(self.model.config, layer)
        self.model.hidden(tokens, seen)
        return seen.qkv.float()


def causal_weights(q: Weights, k: Weights) -> Weights:
    """softmax(q kᵀ / √D) of the last positions q (H, q, D) among all k (H, T, D) -> (H, q, T)"""
    scores = q @ k.swapaxes(1, 2) / math.sqrt(q.shape[2])  # (H, q, T)
    rows, columns = scores.shape[1:]
    seen = np.tri(rows, columns, columns - rows, dtype=bool)
    scores = np.where(seen, scores, -np.inf)
    powers: Weights = np.exp(scores - scores.max(-1, keepdims=True))
    total: Weights = powers.sum(-1, keepdims=True)
    return powers / total


class _Seen:
    """A `Cache` that stores the queries, keys and values of one layer and changes nothing else.

    The number of the layer is an input, so that one jitted function serves all layers.
    """

    def __init__(self, config: GPTConfig, layer: Tensor) -> None:
        self.config = config
        self.layer = layer
        self.qkv = layer  # until the first one is there

    def positions(self, table: Tensor, T: int) -> Tensor:
        return table[:T]

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        self.qkv = qkv if layer == 0 else (self.layer == layer).where(qkv, self.qkv)
        return kernels.self_attention(qkv, self.config.n_head)


def _heads(x: Weights, n_head: int) -> Weights:
    """(T, C) -> (H, T, D)"""
    return x.reshape(len(x), n_head, -1).swapaxes(0, 1)
