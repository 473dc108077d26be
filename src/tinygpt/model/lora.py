"""Fine-tuning: which weights learn, and adapters of low rank beside those that do not.

A model that has learned much and is to learn a little more changes little: what its weights W
(O, I) change by has a low rank r (Hu et al., "LoRA", 2021). So W stays as it is, and only the
factors of the change are learned, two thin matrices::

    W' = W + (alpha / r) B A,     A (r, I) at random,  B (O, r) zero

Gradients and moments are needed for A and B alone, a hundredth of the parameters. As B begins with
zeros, the model begins as the one it was; in the end ``merge`` adds the change to W, and the model
is a plain one again.

Rows of the embedding for new tokens have no meaning to keep. With ``lora_rows`` the last rows of
the embedding, and of the output projection, are trained in full in a small table of their own,
which takes the place of these rows; the other rows are frozen.

In half precision the weights that stay as they are take 16 bits each: nothing would read more of
them. They are rounded once, when the adapters are made, and what is saved and merged begins with
the rounded ones.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from tinygrad import Tensor, dtypes

from tinygpt import kernels
from tinygpt.config import ADAPTERS, GPTConfig, TrainConfig, check_together
from tinygpt.config.weights import Weight, weights
from tinygpt.machine.precision import half_of
from tinygpt.machine.tinygrad_internals import DType
from tinygpt.machine.transfer import read, release_unused, write
from tinygpt.model.rounding import HALVED, put
from tinygpt.model.transformer import Embedding, Linear, Transformer

Array = npt.NDArray[Any]


class LoRALinear(Linear):
    """y = x Wᵀ + b + scale (x Aᵀ) Bᵀ, with the weight and bias of the layer that it replaces."""

    def __init__(self, layer: Linear, rank: int, alpha: float, rng: np.random.Generator) -> None:
        super().__init__(layer.weight, layer.bias)
        self.scale = alpha / rank
        n_out, n_in = map(int, layer.weight.shape)
        device = layer.weight.device
        self.lora_a = Tensor.empty(rank, n_in, device=device)
        self.lora_b = Tensor.empty(n_out, rank, device=device)
        # x has been normalised: at this deviation A x has about the size of x
        write(self.lora_a, rng.standard_normal((rank, n_in), np.float32) / np.sqrt(n_in))
        write(self.lora_b, np.zeros((n_out, rank)))

    def __call__(self, x: Tensor) -> Tensor:
        narrow = kernels.linear(x, self.lora_a) * self.scale  # (B, T, I) -> (B, T, r)
        return super().__call__(x) + kernels.linear(narrow, self.lora_b)  # -> (B, T, O)

    def merged(self) -> Linear:
        """The plain layer that computes the same, in the memory of this one's float32 weight."""
        a, b = read(self.lora_a), read(self.lora_b)
        write(self.weight, merged(read(self.weight), a, b, self.scale))
        return Linear(self.weight, self.bias)


class RowsLinear(Linear):
    """y = x Wᵀ, with the last rows of W (V, C) in a table of their own, lora_rows (n, C)."""

    def __init__(self, weight: Tensor, rows: Tensor) -> None:
        super().__init__(weight)
        self.lora_rows = rows

    def __call__(self, x: Tensor) -> Tensor:
        return kernels.linear(x, with_rows(self.weight, self.lora_rows))

    def loss(self, x: Tensor, targets: Tensor, gradient: bool) -> Tensor:
        table = with_rows(self.weight, self.lora_rows)
        return kernels.loss(x, table, targets, gradient=gradient)

    def merged(self) -> Linear:
        return Linear(_merge_rows(self.weight, self.lora_rows))


class RowsEmbedding(Embedding):
    """An embedding with its last rows in a table of their own, lora_rows (n, C)."""

    def __init__(self, weight: Tensor, rows: Tensor) -> None:
        super().__init__(weight)
        self.lora_rows = rows

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return kernels.embedding(tokens, with_rows(self.weight, self.lora_rows), positions)

    def projection(self) -> Linear:
        return RowsLinear(self.weight, self.lora_rows)

    def merged(self) -> Embedding:
        return Embedding(_merge_rows(self.weight, self.lora_rows))


def with_rows(weight: Tensor, rows: Tensor) -> Tensor:
    """A weight (V, C) whose last rows are others (n, C), in the type of these."""
    kept = weight[: int(weight.shape[0]) - int(rows.shape[0])].cast(rows.dtype)
    return kept.cat(rows).contiguous()


def _merge_rows(weight: Tensor, rows: Tensor) -> Tensor:
    """The same in numbers, in the memory of the weight."""
    values = np.array(read(weight))
    values[len(values) - int(rows.shape[0]) :] = read(rows)
    return write(weight, values)


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
    rng = np.random.default_rng(config.seed)
    if config.lora_rank is not None:
        for weight in adapted(model.config, config):
            layer = model.layer(weight.layer)
            adapter = LoRALinear(layer, config.lora_rank, config.lora_alpha, rng)
            model.replace(weight.layer, adapter)
    for weight in learned_in_rows(model.config, config):
        layer = model.layer(weight.layer)
        rows = np.array(read(layer.weight)[config.lora_rows :])
        table = write(Tensor.empty(*rows.shape, device=layer.weight.device), rows)
        kind = RowsEmbedding if weight.kind == "tokens" else RowsLinear
        model.replace(weight.layer, kind(layer.weight, table))
    chosen = learning(model.config, config)
    for name, parameter in model.parameters().items():
        parameter.is_param_(name in chosen)
    if config.lora_rank is not None and (half := half_of(config.dtype)) is not None:
        _set_types(model, half)


def merge(model: Transformer) -> None:
    """Add to the weights what the adapters have learned; then there are none, and all may learn."""
    if model.rounded_to is None:
        _set_types(model, dtypes.float32)
    for weight in weights(model.config):
        layer = model.layer(weight.layer)
        if isinstance(layer, (LoRALinear, RowsLinear, RowsEmbedding)):
            model.replace(weight.layer, layer.merged())
    for parameter in model.parameters().values():
        parameter.is_param_(True)


def _set_types(model: Transformer, dtype: DType) -> None:
    """Round the weights that can be rounded to a type, or make them float32 again, one by one."""
    parameters = model.parameters()
    for weight in weights(model.config):
        parameter = parameters.pop(weight.name)
        if weight.kind in HALVED and parameter.dtype != dtype and parameter.dtype.itemsize <= 4:
            device = str(parameter.device)
            put(model, weight.name, parameter.realize(), dtype)
            del parameter
            release_unused(device)  # before the next one is made


def linear(model: GPTConfig) -> list[Weight]:
    """The weights that can have adapters: those of the blocks' linear layers."""
    return [weight for weight in weights(model) if weight.kind == "linear"]


def adapted(model: GPTConfig, train: TrainConfig) -> list[Weight]:
    """The weights that get adapters."""
    first, parts = train.freeze or 0, train.lora_layers
    return [
        weight
        for weight in linear(model)
        if weight.block >= first and parts in ("all", weight.name.split(".")[2])
    ]


def learned_in_rows(model: GPTConfig, train: TrainConfig) -> list[Weight]:
    """The weights of which only the last rows learn: those with a row for each token."""
    if train.lora_rows is None:
        return []
    return [weight for weight in weights(model) if weight.kind in ("tokens", "output")]


def learning(model: GPTConfig, train: TrainConfig) -> dict[str, int]:
    """The parameters that learn, and how many numbers each of them is."""
    if (rank := train.lora_rank) is not None:
        rows = {
            w.layer + ADAPTERS[2]: (w.shape[0] - (train.lora_rows or 0)) * w.shape[1]
            for w in learned_in_rows(model, train)
        }
        return rows | {
            w.layer + end: rank * width
            for w in adapted(model, train)
            for end, width in zip(ADAPTERS[:2], reversed(w.shape), strict=True)  # (r, I), (O, r)
        }
    frozen = -1 if train.freeze is None else train.freeze  # of -1 not even the embeddings
    return {w.name: w.size for w in weights(model) if w.block >= frozen}


def count_trainable(model: GPTConfig, train: TrainConfig) -> tuple[int, int]:
    """How many parameters will learn, and how many of them are in adapters."""
    check_together(model, train)
    count = sum(learning(model, train).values())
    return count, 0 if train.lora_rank is None else count
