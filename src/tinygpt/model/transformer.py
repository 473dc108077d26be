"""GPT-2: parameters and a forward pass, nothing else.

Radford et al., "Language Models are Unsupervised Multitask Learners" (2019). Names are GPT-2's own.
B is the batch, T the number of positions, C = n_embd, H = n_head, D = C / H, V = vocab_size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, Literal, Self, cast

import numpy as np
from tinygrad import Tensor, dtypes
from tinygrad.uop.ops import sint

from tinygpt import kernels
from tinygpt.config import GPTConfig
from tinygpt.errors import UsageError
from tinygpt.machine.transfer import write
from tinygpt.model.cache import Cache

Attend = Callable[[Tensor, int], Tensor]
"""A layer's part of a cache: attention (B, T, C) of qkv (B, T, 3C) and n_head."""


class Noise:
    """Keys of dropout's masks, which depend on nothing but a first key and the order of the draws.

    ``key`` is a (2,) uint32 Tensor. The same key gives the same masks, in a jit as outside, so a
    resumed run draws what the uninterrupted one would have drawn.
    """

    def __init__(self, key: Tensor) -> None:
        self.key = key

    def draw(self) -> Tensor:
        """The key (2,) of the next mask."""
        self.key = kernels.next_key(self.key)
        return self.key


class Linear:
    """y = x Wᵀ + b, weight (out, in); then GELU, or what was there before is added."""

    def __init__(self, n_in: int, n_out: int, bias: bool) -> None:
        self.weight = _parameter(n_out, n_in)
        self.bias = _parameter(n_out) if bias else None

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        activation: Literal["gelu"] | None = None,
    ) -> Tensor:
        return kernels.linear(x, self.weight, self.bias, residual, activation)

    def loss(self, x: Tensor, targets: Tensor, gradient: bool) -> Tensor:
        """Mean cross-entropy in nats of targets (N,), given logits = x Wᵀ for x (N, C)."""
        frozen = not self.weight.is_param
        return kernels.loss(x, self.weight, targets, gradient=gradient, frozen=frozen)


class LayerNorm:
    """Layer normalisation of the last axis."""

    def __init__(self, n: int, bias: bool) -> None:
        self.weight = _parameter(n)
        self.bias = _parameter(n) if bias else None

    def __call__(self, x: Tensor) -> Tensor:
        return kernels.layer_norm(x, self.weight, self.bias)


class Embedding(Linear):
    """A row of weight (rows, C) for each id; as a layer it compares x with every row."""

    def __init__(self, rows: int, n_embd: int) -> None:
        super().__init__(n_embd, rows, bias=False)

    def rows(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """The rows of tokens (B, T), plus the first T of positions -> (B, T, C)."""
        return kernels.embedding(tokens, self.weight, positions)


class CausalSelfAttention:
    """Every position gathers from itself and the positions before it."""

    def __init__(self, config: GPTConfig) -> None:
        C = config.n_embd
        self.c_attn = Linear(C, 3 * C, config.bias)
        self.c_proj = Linear(C, C, config.bias)
        self.n_head = config.n_head
        self.p = config.dropout
        self.method = config.attention

    def __call__(
        self, x: Tensor, residual: Tensor, noise: Noise | None, attend: Attend | None
    ) -> Tensor:
        qkv = self.c_attn(x)  # (B, T, C) -> (B, T, 3C)
        with kernels.use(self.method):
            if attend is not None:
                y = attend(qkv, self.n_head)
            elif noise is not None:
                y = kernels.self_attention(qkv, self.n_head, self.p, noise.draw())
            else:
                y = kernels.self_attention(qkv, self.n_head)  # (B, T, C)
        return add(self.c_proj, y, residual, self.p, noise)


class MLP:
    """Two linear layers around a GELU, four times as wide inside."""

    def __init__(self, config: GPTConfig) -> None:
        C = config.n_embd
        self.c_fc = Linear(C, 4 * C, config.bias)
        self.c_proj = Linear(4 * C, C, config.bias)
        self.p = config.dropout

    def __call__(self, x: Tensor, residual: Tensor, noise: Noise | None) -> Tensor:
        y = self.c_fc(x, activation="gelu")
        return add(self.c_proj, y, residual, self.p, noise)


class Block:
    """Attention, then the MLP, each normalised before and added to the residual stream."""

    def __init__(self, config: GPTConfig) -> None:
        self.ln_1 = LayerNorm(config.n_embd, config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd, config.bias)
        self.mlp = MLP(config)

    def __call__(self, x: Tensor, noise: Noise | None, attend: Attend | None) -> Tensor:
        x = self.attn(self.ln_1(x), x, noise, attend)
        return self.mlp(self.ln_2(x), x, noise)

    def parameters(self, name: str) -> dict[str, Tensor]:
        """Every parameter by its name, which begins with the block's ``name``, such as h.0."""
        named = _named(f"{name}.ln_1", self.ln_1)
        named |= _named(f"{name}.attn.c_attn", self.attn.c_attn)
        named |= _named(f"{name}.attn.c_proj", self.attn.c_proj)
        named |= _named(f"{name}.ln_2", self.ln_2)
        named |= _named(f"{name}.mlp.c_fc", self.mlp.c_fc)
        return named | _named(f"{name}.mlp.c_proj", self.mlp.c_proj)


def add(layer: Linear, x: Tensor, residual: Tensor, p: float, noise: Noise | None) -> Tensor:
    """residual + layer(x), the latter with dropout in training."""
    if noise is None:
        return layer(x, residual)
    return kernels.dropout(layer(x), p, noise.draw(), residual)


class Transformer:
    """A decoder-only transformer.

    >>> model = Transformer(GPTConfig(vocab_size=65))
    >>> logits = model(Tensor([[1, 2, 3]], dtype="int32"))  # (1, 3, 65)
    """

    def __init__(self, config: GPTConfig, seed: int | None = 1337) -> None:
        """Without a seed the weights are left undefined: for whoever puts others there."""
        self.config = config
        self._training = True
        self.quantized = False
        self.read_from: tuple[dict[str, Any], dict[str, str]] | None = None
        """Origin and hashes of the weights that were read last; ask ``checkpoint.origin_of``."""
        self.wte = Embedding(config.vocab_size, config.n_embd)
        self.wpe = Embedding(config.block_size, config.n_embd)
        self.h = [Block(config) for _ in range(config.n_layer)]
        self.ln_f = LayerNorm(config.n_embd, config.bias)
        if not config.tie_embeddings:
            self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        if seed is not None:
            initialise(self, seed)

    def hidden(
        self, tokens: Tensor, cache: Cache | None = None, noise: Noise | None = None
    ) -> Tensor:
        """The normalised residual stream (B, T, C) behind the last block, for tokens (B, T)."""
        _, T = tokens.shape
        table = self.wpe.weight
        positions = table[:T] if cache is None else cache.positions(table, int(T))
        x = self.wte.rows(tokens, positions)  # (B, T, C)
        if noise is not None:
            x = kernels.dropout(x, self.config.dropout, noise.draw())
        for i, block in enumerate(self.h):
            x = block(x, noise, None if cache is None else partial(cache.attend, i))
        return self.ln_f(x)

    def __call__(
        self, tokens: Tensor, cache: Cache | None = None, noise: Noise | None = None
    ) -> Tensor:
        """Logits (B, T, V) for int32 tokens (B, T), T at most block_size.

        With a cache the tokens continue where it stands. ``noise`` seeds dropout; without it
        a model in training mode draws from tinygrad's global generator.
        """
        self._check(tokens)
        return self.unembed(self.hidden(tokens, cache, self._noise(noise)))

    def unembed(self, x: Tensor) -> Tensor:
        """Logits (..., V) of the residual stream x (..., C)."""
        return self.output()(x)

    def loss(self, tokens: Tensor, targets: Tensor, noise: Noise | None = None) -> Tensor:
        """Mean cross-entropy in nats of targets (B, T) given tokens (B, T); < 0 is left out."""
        self._check(tokens)
        if targets.shape != tokens.shape:
            raise UsageError(
                f"targets of shape {targets.shape} do not match tokens of shape {tokens.shape}: "
                f"each position has one target, the next token."
            )
        x = self.hidden(tokens, noise=self._noise(noise)).reshape(-1, self.config.n_embd)
        return self.output().loss(x, targets.reshape(-1), gradient=self.training)

    def parameters(self) -> dict[str, Tensor]:
        """Every parameter once, by GPT-2's name, in the order of the forward pass."""
        named = _named("wte", self.wte) | _named("wpe", self.wpe)
        for i, block in enumerate(self.h):
            named |= block.parameters(f"h.{i}")
        named |= _named("ln_f", self.ln_f)
        return named if self.config.tie_embeddings else named | _named("lm_head", self.lm_head)

    def trainable(self) -> dict[str, Tensor]:
        """The parameters that learn: those that nobody has frozen, which ``lora.prepare`` does."""
        return {name: p for name, p in self.parameters().items() if p.is_param}

    def num_params(self) -> int:
        """Number of parameters; tied embeddings count once, the scales of int8 weights do not."""
        named = self.parameters().items()
        return sum(math.prod(_numbers(p.shape)) for name, p in named if not name.endswith(".scale"))

    @property
    def training(self) -> bool:
        """Whether dropout is on: what ``train`` set, or ``mode`` within its block."""
        return (_modes.get() or {}).get(id(self), self._training)

    def train(self, mode: bool = True) -> Self:
        """Training mode: dropout is on. Raises UsageError for a model of int8 weights."""
        if mode:
            self.check_can_learn()
        self._training = mode
        return self

    def check_can_learn(self) -> None:
        """Raise UsageError for a model of int8 weights."""
        if self.quantized:
            raise UsageError(
                "This model was quantised: its weights are int8, for generation only, and cannot "
                "learn. Train the model it was made of, and quantise that one afterwards."
            )

    def eval(self) -> Self:
        """Inference mode: dropout is off."""
        return self.train(False)

    def output(self) -> Linear:
        """The layer that makes logits of the residual stream."""
        return self.wte if self.config.tie_embeddings else self.lm_head

    def _noise(self, noise: Noise | None) -> Noise | None:
        if not self.training or self.config.dropout == 0:
            return None
        if noise is not None:
            return noise
        return Noise(Tensor.randint(2, low=0, high=2**31 - 1).cast(dtypes.uint32))

    def _check(self, tokens: Tensor) -> None:
        if len(tokens.shape) != 2 or not dtypes.is_int(tokens.dtype):
            raise UsageError(
                f"tokens of shape {tokens.shape} and dtype {tokens.dtype.name} were given; wanted "
                f"integers of shape (batch, time), for example Tensor([ids], dtype='int32')."
            )
        if not 1 <= tokens.shape[1] <= self.config.block_size:
            raise UsageError(
                f"{tokens.shape[1]} positions were given; this model takes from 1 to "
                f"block_size={self.config.block_size}. generate() slides over longer texts."
            )


def initialise(model: Transformer, seed: int) -> None:
    """GPT-2's initial weights: deviation 0.02, for residual projections 0.02 / √(2·n_layer).

    They come from numpy, so that a seed gives the same weights on every device.
    """
    rng = np.random.default_rng(seed)
    residual = 0.02 / math.sqrt(2 * model.config.n_layer)
    for name, parameter in model.parameters().items():
        shape = _numbers(parameter.shape)
        if name.endswith("bias"):
            value = np.zeros(shape, np.float32)
        elif ".ln_" in f".{name}":
            value = np.ones(shape, np.float32)
        else:
            deviation = residual if name.endswith("c_proj.weight") else 0.02
            value = rng.standard_normal(shape, np.float32) * np.float32(deviation)
        write(parameter, value)


def _numbers(shape: tuple[sint, ...]) -> tuple[int, ...]:
    """A shape without symbols, which is what all but a cache's has; for the type checker."""
    return cast("tuple[int, ...]", shape)


def _parameter(*shape: int) -> Tensor:
    return Tensor.empty(*shape, dtype=dtypes.float32)


def _named(prefix: str, layer: Linear | LayerNorm) -> dict[str, Tensor]:
    """The Tensors of a layer, whatever its kind."""
    return {f"{prefix}.{name}": t for name, t in vars(layer).items() if isinstance(t, Tensor)}


_modes: ContextVar[Mapping[int, bool] | None] = ContextVar("modes", default=None)
"""By their ids, the models that are within a block of ``mode`` in this thread."""


@contextmanager
def mode(model: Transformer, training: bool) -> Iterator[None]:
    """Within this block the model is in a mode, for this thread; other threads keep theirs."""
    if training:
        model.check_can_learn()
    before = _modes.get()
    _modes.set({**(before or {}), id(model): training})
    try:
        yield
    finally:
        _modes.set(before)
