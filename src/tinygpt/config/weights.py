"""Every weight of the model once: its name, its shape, what kind it is and how it begins.

All else that needs to know the weights is a comprehension over this table: the model itself, its
counts, what LoRA adapts and int8 rounds, the names and layouts in other tools' files. It stands
beside the configs because a config counts its parameters when it is made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from tinygpt.config import GPTConfig

Kind = Literal["tokens", "positions", "norm", "linear", "output", "bias"]
"""An embedding of tokens (V, C) or positions (T, C); a layer norm's scale (C,); a block's linear
layer (O, I); the projection onto the vocabulary (V, C) where it is not the tokens' embedding; what
a norm or a linear layer adds (O,)."""


class Weight(NamedTuple):
    """One tensor of the model."""

    name: str
    """GPT-2's: that of its layer, and ``.weight`` or ``.bias``."""
    shape: tuple[int, ...]
    kind: Kind
    block: int
    """The number of its transformer block; -1 for embeddings, n_layer for what follows the last."""
    mean: float = 0.0
    """Where it begins."""
    deviation: float = 0.0
    """The deviation of the normal distribution around the mean that it begins with."""

    @property
    def layer(self) -> str:
        """``wte``, ``h.0.attn.c_attn``, …"""
        return self.name.rpartition(".")[0]

    @property
    def size(self) -> int:
        """How many parameters it has."""
        return math.prod(self.shape)


def matrices_in(name: str) -> int:
    """How many matrices of a block stand one above the other in a weight of this name.

    >>> [matrices_in(name) for name in ("h.0.attn.c_attn.weight", "h.0.mlp.c_fc.weight")]
    [3, 1]
    >>> [matrices_in(name) for name in ("wte.weight", "h.0.ln_1.weight", "h.0.mlp.c_fc.lora_a")]
    [0, 0, 0]
    """
    if not (name.startswith("h.") and name.endswith(".weight")) or ".ln_" in name:
        return 0
    return 3 if name.endswith(".c_attn.weight") else 1  # queries, keys and values


def weights(config: GPTConfig) -> Iterator[Weight]:
    """GPT-2's weights in the order of the forward pass.

    They begin with a deviation of 0.02; layers that add to the residual stream with 0.02 / √(2 L),
    so that its variance does not grow with the number L of blocks, each of which has two.

    >>> [weight.name for weight in weights(GPTConfig(n_layer=1, bias=False))][:3]
    ['wte.weight', 'wpe.weight', 'h.0.ln_1.weight']
    """
    C, V, L = config.n_embd, config.vocab_size, config.n_layer
    usual, residual = 0.02, 0.02 / math.sqrt(2 * L)

    def layer(
        name: str, shape: tuple[int, ...], kind: Kind, block: int, *begin: float
    ) -> Iterator[Weight]:
        yield Weight(f"{name}.weight", shape, kind, block, *begin)
        if config.bias:
            yield Weight(f"{name}.bias", shape[:1], "bias", block)

    yield Weight("wte.weight", (V, C), "tokens", -1, 0.0, usual)
    yield Weight("wpe.weight", (config.block_size, C), "positions", -1, 0.0, usual)
    for i in range(L):
        yield from layer(f"h.{i}.ln_1", (C,), "norm", i, 1.0)
        yield from layer(f"h.{i}.attn.c_attn", (3 * C, C), "linear", i, 0.0, usual)
        yield from layer(f"h.{i}.attn.c_proj", (C, C), "linear", i, 0.0, residual)
        yield from layer(f"h.{i}.ln_2", (C,), "norm", i, 1.0)
        yield from layer(f"h.{i}.mlp.c_fc", (config.n_inner, C), "linear", i, 0.0, usual)
        yield from layer(f"h.{i}.mlp.c_proj", (C, config.n_inner), "linear", i, 0.0, residual)
    yield from layer("ln_f", (C,), "norm", L, 1.0)
    if not config.tie_embeddings:
        yield Weight("lm_head.weight", (V, C), "output", L, 0.0, usual)
