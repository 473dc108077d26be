"""Fine-tuning: which weights learn, and adapters of low rank beside those that do not.

A model that has learned much and is to learn a little more changes little: what its weights W
(O, I) change by has a low rank r (Hu et al., "LoRA", 2021). So W stays as it is, and only the
factors of the change are learned, two thin matrices::

    W' = W + (alpha / r) B A,     A (r, I) at random,  B (O, r) zero

Gradients and moments are needed for A and B alone, a hundredth of the parameters. As B begins with
zeros, the model begins as the one it was; in the end ``merge`` adds the change to W, and the model
is a plain one again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from tinygrad import Tensor

from tinygpt import kernels
from tinygpt.config import ADAPTERS, AdaptedLayers, GPTConfig, TrainConfig, check_together
from tinygpt.machine.transfer import read, write
from tinygpt.model.transformer import Linear, Transformer

Array = npt.NDArray[Any]

LAYERS = {"attn.c_attn": (1, 3), "attn.c_proj": (1, 1), "mlp.c_fc": (1, 4), "mlp.c_proj": (4, 1)}
"""The linear layers of a block, and how many times n_embd their inputs and outputs are."""


class LoRALinear(Linear):
    """y = x Wᵀ + b + scale (x Aᵀ) Bᵀ, the weight and bias of a layer that was there before."""

    def __init__(self, layer: Linear, rank: int, alpha: float, rng: np.random.Generator) -> None:
        self.weight, self.bias, self.scale = layer.weight, layer.bias, alpha / rank
        n_out, n_in = map(int, layer.weight.shape)
        device = layer.weight.device
        self.lora_a = Tensor.empty(rank, n_in, device=device)
        self.lora_b = Tensor.empty(n_out, rank, device=device)
        # x has been normalised: at this deviation A x has about the size of x
        write(self.lora_a, rng.standard_normal((rank, n_in), np.float32) / np.sqrt(n_in))
        write(self.lora_b, np.zeros((n_out, rank)))

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        activation: Literal["gelu"] | None = None,
    ) -> Tensor:
        narrow = kernels.linear(x, self.lora_a) * self.scale  # (B, T, I) -> (B, T, r)
        change = kernels.linear(narrow, self.lora_b, residual=residual)  # -> (B, T, O)
        return super().__call__(x, change, activation)

    def merged(self) -> Linear:
        """The plain layer that computes the same, in the memory of this one's weight."""
        a, b = read(self.lora_a), read(self.lora_b)
        write(self.weight, merged(read(self.weight), a, b, self.scale))
        plain = object.__new__(Linear)
        plain.weight, plain.bias = self.weight, self.bias
        return plain


def merged(weight: Array, a: Array, b: Array, scale: float) -> Array:
    """The weight (O, I) with what its adapter A (r, I), B (O, r) has learned."""
    return weight + np.float32(scale) * (b @ a)


def prepare(model: Transformer, config: TrainConfig) -> None:
    """Let learn what the config says, and freeze the rest; adapters that are there are merged.

    >>> prepare(model, TrainConfig(lora_rank=8))
    >>> optimizer = make_optimizer(model.parameters(), config)  # holds what learns
    """
    check_together(model.config, config)
    merge(model)
    if config.lora_rank is not None:
        rng = np.random.default_rng(config.seed)
        for part, attribute in linear_layers(model, config.freeze or 0, config.lora_layers):
            layer = getattr(part, attribute)
            adapter = LoRALinear(layer, config.lora_rank, config.lora_alpha, rng)
            setattr(part, attribute, adapter)
    chosen = learning(model, config)
    for name, parameter in model.parameters().items():
        parameter.is_param_(name in chosen)


def learning(model: Transformer, config: TrainConfig) -> set[str]:
    """The names of the parameters that learn, of a model that has its adapters."""
    everything = set(model.parameters())
    if config.lora_rank is not None:
        return {name for name in everything if name.endswith(ADAPTERS)}
    if config.freeze is None:
        return everything
    frozen = ("wte.", "wpe.", *(f"h.{i}." for i in range(config.freeze)))
    return {name for name in everything if not name.startswith(frozen)}


def merge(model: Transformer) -> None:
    """Add to the weights what the adapters have learned; then there are none, and all may learn."""
    for part, attribute in linear_layers(model):
        layer = getattr(part, attribute)
        if isinstance(layer, LoRALinear):
            setattr(part, attribute, layer.merged())
    for parameter in model.parameters().values():
        parameter.is_param_(True)


def linear_layers(
    model: Transformer, first: int = 0, kind: AdaptedLayers = "all"
) -> Iterator[tuple[Any, str]]:
    """Where the linear layers are, of the blocks from the ``first`` on: (owner, attribute)."""
    for block in model.h[first:]:
        for name in names(kind):
            part, attribute = name.split(".")
            yield getattr(block, part), attribute


def names(kind: AdaptedLayers) -> list[str]:
    """The linear layers of a block that are of this kind."""
    return [name for name in LAYERS if kind in ("all", name.split(".")[0])]


def count_trainable(model: GPTConfig, train: TrainConfig) -> tuple[int, int]:
    """How many parameters will learn, and how many of them are in adapters."""
    check_together(model, train)
    C, frozen = model.n_embd, train.freeze or 0
    if train.lora_rank is not None:
        widths = sum(sum(LAYERS[name]) for name in names(train.lora_layers))  # of A and B
        count = (model.n_layer - frozen) * train.lora_rank * widths * C
        return count, count
    if train.freeze is None:
        return model.num_params(), 0
    embeddings = (model.vocab_size + model.block_size) * C
    return model.num_params() - embeddings - frozen * model.block_params(), 0
