"""int8 weights for generation: a quarter of the memory, and of the time that reading them takes.

The weight of a linear layer, and the token embedding, are rounded to whole numbers from -127 to
127, row by row: W ≈ scale q, where scale is the row's largest number / 127. So no weight is off by
more than half a scale. A row belongs to one output, which makes its scale one more factor at the
end of a sum; in the token embedding it belongs to a token, whether the row is looked up or, where
the embeddings are tied, compared with. Biases, norms and positions stay as they are: they are few.

int4 takes blocks of 32 numbers with a scale each in the place of rows: see `int4`.

Activations are rounded to int16 by the steps that decode, see `kernels.quantized`. A model that is
quantised can write and be measured, but not learn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
from tinygrad import Tensor, dtypes

from tinygpt import kernels
from tinygpt.config import GPTConfig
from tinygpt.config.weights import weights
from tinygpt.errors import DataError
from tinygpt.kernels.nibbles import BLOCK, unpacked
from tinygpt.machine.jit import jit
from tinygpt.machine.transfer import read, release_unused, write
from tinygpt.model import int4, lora
from tinygpt.model.transformer import INFERENCE, Embedding, Linear, Transformer
from tinygpt.text.tokens import Tokens

Array = npt.NDArray[Any]
Fetch = Callable[[str], Array]
"""From a parameter's name to its values."""
Model = TypeVar("Model", bound=Transformer)
Kind = Literal["int8", "int4"]
"""What weights can be rounded to."""

ROUNDED = ("tokens", "linear", "output")
"""The kinds of weights that are rounded."""
LARGEST = 127
"""The largest whole number: -128 has no counterpart."""
PIECE = 1 << 16
"""Weights that are rounded at a time."""
LOGITS = 1 << 23
"""Logits that are in memory at a time when a quantised model is measured."""
MEASURED = 1024
"""Tokens on which the losses before and after are compared."""


def quantize(model: Model, fetch: Fetch | None = None, kind: Kind = "int8") -> Model:
    """Round a model's weights to int8 or int4, in place, one layer after another; -> the model.

    With ``fetch`` they come from there, for a model that was made without any (``seed=None``): it
    never takes more memory than it has in the end, and its largest weight. Adapters are merged
    first. From now on the model is in inference mode. Raises DataError if a weight is not finite,
    and then a model that had its weights already is as it was.

    >>> model = quantize(load("runs/shakespeare")[0])
    """
    if model.quantized:
        return model
    model.check_exact()
    if fetch is None:
        Tensor.realize(*model.parameters().values())
        for name, parameter in model.parameters().items():
            _check_finite(name, read(parameter))
    lora.merge(model)
    parameters = model.parameters()
    for weight in weights(model.config):
        parameter = parameters.pop(weight.name)  # so that the memory of what is rounded is freed
        if weight.kind in ROUNDED:
            values = read(parameter) if fetch is None else fetch(weight.name)
            parts = _rounded_to(kind, values)
            q, scale = (_constant(part, parameter.device) for part in parts)
            _check_finite(weight.name, read(scale))
            bias = parameters.get(f"{weight.layer}.bias")
            tokens = weight.kind == "tokens"
            layer = QuantizedEmbedding(q, scale) if tokens else QuantizedLinear(q, scale, bias)
            model.replace(weight.layer, layer)
        elif fetch is not None:
            write(parameter, fetch(weight.name))
    model.integers = kind
    free_unused(model)
    return model.eval()


def _constant(values: Array, device: str | tuple[str, ...] | None) -> Tensor:
    """Values that do not learn, on a device."""
    tensor = Tensor.empty(*values.shape, dtype=getattr(dtypes, values.dtype.name), device=device)
    return write(tensor, values).is_param_(False)


def _check_finite(name: str, values: Array) -> None:
    if not np.isfinite(values).all():
        raise DataError(
            f"{name} holds values that are not finite, which cannot be rounded. Take an older "
            f"checkpoint; tinygpt verify RUN looks at all of a run's."
        )


def _rounded_to(kind: Kind, weight: Array) -> tuple[Array, Array]:
    """Whole numbers and scales. int4 wants blocks of 32: other rows are rounded to int8."""
    fits = kind == "int4" and weight.shape[1] % BLOCK == 0
    return int4.rounded(weight) if fits else rounded(weight)


def rounded(weight: Array) -> tuple[Array, Array]:
    """int8 q (O, I) and float32 scale (O,) with scale q ≈ weight (O, I), off by scale / 2 at most.

    >>> rounded(np.array([[1.0, -0.5, 0.0]]))[0].tolist()
    [[127, -64, 0]]
    """
    q, scale = np.empty(weight.shape, np.int8), np.empty(len(weight), np.float32)
    rows = max(1, PIECE // max(1, weight.shape[1]))
    for start in range(0, len(weight), rows):
        part = weight[start : start + rows].astype(np.float64)
        scale[start : start + rows] = np.abs(part).max(1) / LARGEST
        by = scale[start : start + rows, None].astype(np.float64)
        part = np.divide(part, by, out=np.zeros_like(part), where=(by > 0) & (by < np.inf))
        q[start : start + rows] = np.rint(part).clip(-LARGEST, LARGEST)
    return q, scale


class QuantizedLinear(Linear):
    """y = x Wᵀ + b, with W = scale q; a q of uint8 holds int4, see `kernels.nibbles`."""

    def __init__(self, q: Tensor, scale: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(q, bias)
        self.scale = scale

    def __call__(self, x: Tensor) -> Tensor:
        packed = self.weight.dtype == dtypes.uint8
        product = kernels.int4_linear if packed else kernels.quantized_linear
        return product(x, self.weight, self.scale, self.bias)

    def loss(self, x: Tensor, targets: Tensor, gradient: bool) -> Tensor:
        """Mean cross-entropy in nats of targets (N,), where y (N, V) are the logits."""
        rows = max(1, LOGITS // int(self.weight.shape[0]))
        sums, counts = [], []
        for start in range(0, int(targets.shape[0]), rows):
            t = targets[start : start + rows].contiguous()
            counts.append((t >= 0).cast(dtypes.int32).sum())
            sums.append(kernels.cross_entropy(self(x[start : start + rows]), t) * counts[-1])
        return Tensor.stack(*sums).sum() / Tensor.stack(*counts).sum().maximum(1)


class QuantizedEmbedding(Embedding):
    """A row of W = scale q for each token."""

    def __init__(self, q: Tensor, scale: Tensor) -> None:
        super().__init__(q)
        self.scale = scale

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        if self.weight.dtype != dtypes.uint8:
            return kernels.embedding(tokens, self.weight, positions, self.scale)
        packed, scale = (kernels.embedding(tokens, table) for table in (self.weight, self.scale))
        return unpacked(packed, scale) + positions[: tokens.shape[1]]

    def projection(self) -> Linear:
        return QuantizedLinear(self.weight, self.scale)


def sizes(model: Transformer) -> tuple[int, int]:
    """Bytes of a model's weights in float32, and as they are."""
    found = sum(p.nbytes() for p in model.parameters().values())
    return 4 * model.num_params(), int(found)


def free_unused(model: Transformer) -> None:
    """Give back to the system what tinygrad keeps of freed memory for the next Tensor like it."""
    for device in {p.device for p in model.parameters().values()}:
        if isinstance(device, str):
            release_unused(device)


# What rounding costs ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Losses in nats per token on the same ``tokens`` predictions, before and after."""

    tokens: int
    before: float
    after: float


def compare(model: Transformer, fetch: Fetch, tokens: Tokens) -> Comparison:
    """The loss of a quantised model and of the weights it was made of, on the text's beginning."""
    T = min(model.config.block_size, len(tokens) - 1)
    B = min(max(1, MEASURED // T), (len(tokens) - 1) // T)
    text = np.asarray(tokens[: B * T + 1])
    x, y = text[:-1].reshape(B, T), text[1:].reshape(B, T)
    after = float(jit(lambda x, y: model.loss(x, y, INFERENCE))(x, y))
    before = streamed_loss(model.config, fetch, x, y)
    free_unused(model)
    return Comparison(B * T, before, after)


def streamed_loss(config: GPTConfig, fetch: Fetch, tokens: Array, targets: Array) -> float:
    """The loss of float32 weights of which one block at a time is in memory, and the embeddings.

    tokens and targets are (B, T).
    """
    model = Transformer(replace(config, n_layer=1), seed=None).eval()
    [block] = model.h
    for name, parameter in model.parameters().items():
        if not name.startswith("h."):
            write(parameter, fetch(name))

    @jit  # which plans its memory
    def one_block(x: Tensor) -> Tensor:
        return block(x, INFERENCE, None)

    @jit
    def loss(x: Tensor, targets: Tensor) -> Tensor:
        rows = model.ln_f(x).reshape(-1, config.n_embd)  # (B, T, C) -> (B T, C)
        return model.output().loss(rows, targets.reshape(-1), gradient=False)

    x = jit(model.embed)(tokens)
    for i in range(config.n_layer):
        for name, parameter in model.parameters().items():
            if name.startswith("h.0."):
                write(parameter, fetch(name.replace("h.0.", f"h.{i}.")))
        x = one_block(x)
    return float(loss(x, targets))
