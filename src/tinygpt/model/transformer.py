"""GPT-2: parameters and a forward pass, nothing else.

Radford et al., "Language Models are Unsupervised Multitask Learners" (2019). Names are GPT-2's own.
B is the batch, T the number of positions, C = n_embd, H = n_head, D = C / H, V = vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
from tinygrad import Tensor, dtypes

from tinygpt import kernels
from tinygpt.config import GPTConfig
from tinygpt.config.weights import Weight, weights
from tinygpt.errors import UsageError
from tinygpt.kernels.phases import wide
from tinygpt.machine.precision import name_of
from tinygpt.machine.tinygrad_internals import DType
from tinygpt.machine.transfer import write
from tinygpt.model.cache import Cache

Tensors = dict[str, Any]
"""Tensors by the parts of their names, see ``make_tensors``."""
Attend = Callable[[Tensor], Tensor]
"""Attention (B, T, C) of queries, keys and values (B, T, 3C) by way of a cache."""


class Dropout:
    """Dropout with probability p (Srivastava et al., 2014): every call drops other elements.

    ``key`` (2,) uint32 seeds the masks, which depend on nothing else but the order of the calls, in
    a jit as outside: a resumed run draws what the uninterrupted one would have drawn.
    """

    def __init__(self, p: float, key: Tensor | None = None) -> None:
        self.p, self.key = p, key if p else None

    def __call__(self, x: Tensor) -> Tensor:
        """x, of which each element is 0 with probability p, and the rest divided by 1 - p."""
        key = self.draw()
        return x if key is None else kernels.dropout(x, self.p, key)

    def draw(self) -> Tensor | None:
        """The key (2,) of the next mask; None if p is 0."""
        if self.key is not None:
            self.key = kernels.next_key(self.key)
        return self.key


INFERENCE = Dropout(0)
"""The ``drop`` of a forward pass that is no part of training: the identity."""


class Linear:
    """y = x Wᵀ + b for x (..., I), weight (O, I) and bias (O,)."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return kernels.linear(x, self.weight, self.bias)

    def loss(self, x: Tensor, targets: Tensor, gradient: bool) -> Tensor:
        """Mean cross-entropy in nats of targets (N,), where y (N, V) are the logits.

        They never exist as a whole. With ``gradient`` the gradients are computed along with them.
        """
        frozen = not self.weight.is_param
        return kernels.loss(x, self.weight, targets, gradient=gradient, frozen=frozen)


class LayerNorm:
    """Layer normalisation of the last axis (Ba et al., 2016)."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor, half: DType | None = None) -> Tensor:
        """x normalised; what comes out is of the type ``half``, or of that of x."""
        return kernels.layer_norm(x, self.weight, self.bias, half or x.dtype)


class Embedding:
    """A row of weight (V, C) for each token."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """The rows of tokens (B, T), plus the first T rows of positions -> (B, T, C)."""
        return kernels.embedding(tokens, self.weight, positions)

    def projection(self) -> Linear:
        """The layer that compares x (..., C) with every row -> (..., V)."""
        return Linear(self.weight)


class CausalSelfAttention:
    """Every position gathers from itself and the positions before it."""

    def __init__(self, config: GPTConfig, tensors: Tensors) -> None:
        self.c_attn = Linear(**tensors["c_attn"])
        self.c_proj = Linear(**tensors["c_proj"])
        self.n_head, self.method = config.n_head, config.attention

    def __call__(self, x: Tensor, drop: Dropout, attend: Attend | None) -> Tensor:
        qkv = self.c_attn(x)  # (B, T, C) -> (B, T, 3C)
        with kernels.use(self.method):
            if attend is None:
                y = kernels.self_attention(qkv, self.n_head, drop.p, drop.draw())
            else:
                y = attend(qkv)  # (B, T, 3C) -> (B, T, C)
        return self.c_proj(y)


class MLP:
    """Two linear layers around a GELU, four times as wide inside."""

    def __init__(self, tensors: Tensors) -> None:
        self.c_fc = Linear(**tensors["c_fc"])
        self.c_proj = Linear(**tensors["c_proj"])

    def __call__(self, x: Tensor) -> Tensor:
        return self.c_proj(kernels.gelu(self.c_fc(x)))  # (B, T, C) -> (B, T, 4C) -> (B, T, C)


class Block:
    """Attention, then the MLP, each normalised before and added to the residual stream."""

    def __init__(self, config: GPTConfig, tensors: Tensors) -> None:
        self.ln_1 = LayerNorm(**tensors["ln_1"])
        self.attn = CausalSelfAttention(config, tensors["attn"])
        self.ln_2 = LayerNorm(**tensors["ln_2"])
        self.mlp = MLP(tensors["mlp"])

    def __call__(
        self, x: Tensor, drop: Dropout, attend: Attend | None, half: DType | None = None
    ) -> Tensor:
        """The residual stream (B, T, C), to which attention and MLP, computed in ``half``, add."""
        x = x + drop(self.attn(self.ln_1(x, half), drop, attend))
        return x + drop(self.mlp(self.ln_2(x, half)))


LAYERS = (Linear, LayerNorm, Embedding, CausalSelfAttention, MLP, Block)
"""What a Transformer is made of: Tensors, and other layers."""


class Transformer:
    """A decoder-only transformer.

    >>> model = Transformer(GPTConfig(vocab_size=65))
    >>> logits = model(Tensor([[1, 2, 3]], dtype="int32"))  # (1, 3, 65)
    """

    def __init__(self, config: GPTConfig, seed: int | None = 1337) -> None:
        """``seed=None`` leaves the weights uninitialised: loaders fill them."""
        self.config = config
        self.training = True
        self.integers: Literal["int8", "int4"] | None = None
        self.half: DType | None = None
        """Of weights that were rounded to 16 bits, their type, see ``half``; else None."""
        self.cache_type: DType | None = None
        """Of the keys and values that decoders keep: int8, or None for that of the activations."""
        self.read_from: tuple[dict[str, Any], dict[str, str]] | None = None
        """Origin and hashes of the weights that were read last; ask ``checkpoint.origin_of``."""
        tensors = make_tensors(config, seed)
        self.wte = Embedding(**tensors["wte"])
        self.wpe = Embedding(**tensors["wpe"])
        self.h = [Block(config, tensors["h"][str(i)]) for i in range(config.n_layer)]
        self.ln_f = LayerNorm(**tensors["ln_f"])
        if not config.tie_embeddings:
            self.lm_head = Linear(**tensors["lm_head"])

    def hidden(
        self,
        tokens: Tensor,
        cache: Cache | None = None,
        drop: Dropout = INFERENCE,
        half: DType | None = None,
    ) -> Tensor:
        """The normalised residual stream (B, T, C) behind the last block, for tokens (B, T).

        With a cache the tokens continue where it stands, and attention is the cache's. ``half`` is
        bfloat16 or float16, or else the model's own type. The norms cast to it, so that linear
        layers and attention compute in it; the residual stream stays as wide as it is.
        """
        half = half or self.half
        x = drop(self.embed(tokens, cache))
        for i, block in enumerate(self.h):
            x = block(x, drop, None if cache is None else partial(cache.attend, i), half)
        return self.ln_f(x, half)

    def embed(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """The embeddings (B, T, C) of tokens (B, T) and their positions."""
        table, T = self.wpe.weight, int(tokens.shape[1])
        return self.wte(tokens, table[:T] if cache is None else cache.positions(table, T))

    def unembed(self, x: Tensor) -> Tensor:
        """Logits (..., V) of the residual stream x (..., C): float32, of whatever type x is."""
        return self.output()(x.cast(wide(x.dtype)))

    def output(self) -> Linear:
        """The layer that makes logits of the residual stream."""
        return self.wte.projection() if self.config.tie_embeddings else self.lm_head

    def __call__(
        self, tokens: Tensor, cache: Cache | None = None, drop: Dropout | None = None
    ) -> Tensor:
        """Logits (B, T, V) for int32 tokens (B, T), T at most block_size.

        ``drop`` is the dropout of a step of training, or INFERENCE. Without it the model's mode
        decides, and masks come from tinygrad's global generator.
        """
        self._check(tokens)
        return self.unembed(self.hidden(tokens, cache, drop or self._dropout()))

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        drop: Dropout | None = None,
        half: DType | None = None,
    ) -> Tensor:
        """Mean cross-entropy in nats of targets (B, T) given tokens (B, T); < 0 is left out.

        Unless ``drop`` is INFERENCE the gradients are prepared with it, see ``kernels.loss``. For
        ``half`` see ``hidden``; the loss itself is float32.
        """
        self._check(tokens)
        if targets.shape != tokens.shape:
            raise UsageError(
                f"targets of shape {targets.shape} do not match tokens of shape {tokens.shape}: "
                f"each position has one target, the next token."
            )
        drop = drop or self._dropout()
        x = self.hidden(tokens, drop=drop, half=half)
        return self.loss_of(x, targets, gradient=drop is not INFERENCE)

    def loss_of(self, x: Tensor, targets: Tensor, gradient: bool) -> Tensor:
        """The loss () of targets (B, T), given the residual stream x (B, T, C), normalised."""
        x = x.reshape(-1, self.config.n_embd)  # (B, T, C) -> (N, C)
        return self.output().loss(x, targets.reshape(-1), gradient=gradient)

    def layer(self, name: str) -> Any:
        """The layer of a name of the table of weights, such as ``h.0.attn.c_attn``."""
        return reduce(_part, name.split("."), self)

    def replace(self, name: str, layer: Any) -> None:
        """Put another layer in the place of the one with this name."""
        owner, _, attribute = name.rpartition(".")
        setattr(self.layer(owner) if owner else self, attribute, layer)

    def parameters(self) -> dict[str, Tensor]:
        """Every parameter once, by GPT-2's name, in the order of the forward pass."""
        layers = dict.fromkeys(weight.layer for weight in weights(self.config))
        return {
            f"{name}.{attribute}": value
            for name in layers
            for attribute, value in vars(self.layer(name)).items()
            if isinstance(value, Tensor)
        }

    def trainable(self) -> dict[str, Tensor]:
        """The parameters that learn: those that are not frozen, see ``lora.prepare``."""
        return {name: p for name, p in self.parameters().items() if p.is_param}

    def num_params(self) -> int:
        """Number of parameters; tied embeddings count once, scales of rounded weights do not."""
        named = self.parameters().items()
        return sum(  # a byte holds two of int4
            int(p.numel()) * (2 if p.dtype == dtypes.uint8 else 1)
            for name, p in named
            if not name.endswith(".scale")
        )

    def train(self, mode: bool = True) -> Self:
        """Training mode: dropout is on. Raises UsageError for a model of rounded weights."""
        if mode:
            self.check_can_learn()
        self.training = mode
        return self

    def eval(self) -> Self:
        """Inference mode: dropout is off."""
        return self.train(False)

    @property
    def quantized(self) -> bool:
        """Whether the weights were rounded to whole numbers, see ``int8.quantize``."""
        return self.integers is not None

    @property
    def rounded_to(self) -> str | None:
        """The type that the weights were rounded to, for generation only; None if to none."""
        return self.integers or (None if self.half is None else name_of(self.half))

    def check_can_learn(self) -> None:
        """Raise UsageError for a model of quantised weights, or of weights of 16 bits."""
        if self.quantized:
            raise UsageError(
                f"This model was quantised: its weights are {self.integers}, for generation only, "
                f"and cannot learn. Train the model it was made of, and quantise that one "
                f"afterwards."
            )
        if self.half is not None:
            raise UsageError(
                f"The weights of this model were rounded to {self.rounded_to}, for generation "
                f"only, and cannot learn. Train the model it was made of: "
                f'TrainConfig(dtype="{self.rounded_to}") computes in that type with exact weights.'
            )

    def check_exact(self) -> None:
        """Raise UsageError if the weights were rounded, and are wanted as they were."""
        if self.rounded_to is not None:
            raise UsageError(
                f"The weights of this model were rounded to {self.rounded_to}. Take the model, or "
                f"the checkpoint, that it was made of."
            )

    def _dropout(self) -> Dropout:
        """What the mode says, with masks from tinygrad's global generator."""
        if not self.training:
            return INFERENCE
        if not (p := self.config.dropout):
            return Dropout(p)
        return Dropout(p, Tensor.randint(2, low=0, high=2**31 - 1).cast(dtypes.uint32))

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


def make_tensors(config: GPTConfig, seed: int | None) -> Tensors:
    """The tensors of all weights as a tree of their names: ``tree["h"]["0"]["ln_1"]["weight"]``.

    Initial values come from numpy, so that a seed gives the same ones on every device.
    """
    tree: Tensors = {}
    rng = None if seed is None else np.random.default_rng(seed)
    for weight in weights(config):
        tensor = Tensor.empty(*weight.shape, dtype=dtypes.float32)
        if rng is not None:
            write(tensor, initial(weight, rng))
        *path, last = weight.name.split(".")
        reduce(lambda branch, name: branch.setdefault(name, {}), path, tree)[last] = tensor
    return tree


def initial(weight: Weight, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """Normal random numbers with a weight's mean and deviation; constants draw none."""
    if not weight.deviation:
        return np.full(weight.shape, weight.mean, np.float32)
    return rng.standard_normal(weight.shape, np.float32) * np.float32(weight.deviation)


def _part(owner: Any, name: str) -> Any:
    return owner[int(name)] if name.isdigit() else getattr(owner, name)


BESIDE = {"read_from", "decoder", "limit", "ends"}
"""Attributes of a model that its forward pass does not look at."""


def description(*parts: object) -> str | None:
    """All that models, and what else is given, depend on besides our source and values of Tensors.

    None if there is a part that is not known, such as a class of the user's or a function.
    """
    try:
        return _described(parts)
    except TypeError:
        return None


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.shape} {value.dtype} {value.is_param}"
    if value is None or isinstance(value, (int, float, str, DType, GPTConfig)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_described, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key!r}: {_described(v)}' for key, v in value.items())}}}"
    kind = type(value)
    if kind.__module__.partition(".")[0] != __name__.partition(".")[0]:
        raise TypeError(f"{kind} is not known")
    parts = (f"{k}={_described(v)}" for k, v in vars(value).items() if k not in BESIDE)
    return f"{kind.__module__}.{kind.__qualname__}({', '.join(parts)})"
