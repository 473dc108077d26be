"""int8 weights for generation: a quarter of the memory, and of the time that reading them takes.

The weight of a linear layer, and the token embedding, are rounded to whole numbers from -127 to
127, row by row: W ≈ scale q, where scale is the row's largest number / 127. So no weight is off by
more than half a scale. A row belongs to one output, which makes its scale one more factor at the
end of a sum; in the token embedding it belongs to a token, whether the row is looked up or, where
the embeddings are tied, compared with. Biases, norms and positions stay as they are: they are few.

Activations are not rounded. A model that is quantised can write and be measured, but not learn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
from tinygrad import Device, Tensor, dtypes

from tinygpt import kernels
from tinygpt.config import GPTConfig
from tinygpt.errors import DataError
from tinygpt.machine.jit import jit
from tinygpt.machine.transfer import read, write, zeros
from tinygpt.model import lora
from tinygpt.model.transformer import Embedding, Linear, Transformer, mode

Array = npt.NDArray[Any]
Fetch = Callable[[str], Array]
"""From a parameter's name to its values."""
Model = TypeVar("Model", bound=Transformer)

LARGEST = 127
"""The largest whole number: -128 has no counterpart."""
PIECE = 1 << 16
"""Weights that are rounded at a time."""
LOGITS = 1 << 23
"""Logits that are in memory at a time when a quantised model is measured."""
MEASURED = 1024
"""Tokens on which the losses before and after are compared."""


def quantize(model: Model, fetch: Fetch | None = None) -> Model:
    """Round the weights of a model to int8, in place, one layer after another; -> the model.

    With ``fetch`` they come from there, for a model that was made without any (``seed=None``): it
    never takes more memory than it has in the end, and its largest weight. Adapters are merged
    first. From now on the model is in inference mode. Raises DataError if a weight is not finite,
    and then a model that had its weights already is as it was.

    >>> model = quantize(load("runs/shakespeare")[0])
    """
    if model.quantized:
        return model
    if fetch is None:
        Tensor.realize(*model.parameters().values())
        for name, parameter in model.parameters().items():
            _check_finite(name, read(parameter))
    lora.merge(model)
    floats = model.parameters()
    for name, owner, attribute in layers(model):
        weight = floats.pop(f"{name}.weight")
        values = read(weight) if fetch is None else fetch(f"{name}.weight")
        layer = getattr(owner, attribute)
        kind = QuantizedEmbedding if isinstance(layer, Embedding) else QuantizedLinear
        setattr(owner, attribute, kind(name, values, layer.bias, weight.device))
    if fetch is not None:
        for name, parameter in floats.items():
            write(parameter, fetch(name))
    model.quantized = True
    _free_unused(model)
    return model.eval()


def _check_finite(name: str, values: Array) -> None:
    if not np.isfinite(values).all():
        raise DataError(
            f"{name} holds values that are not finite, which cannot be rounded. Take an older "
            f"checkpoint; tinygpt verify RUN looks at all of a run's."
        )


def layers(model: Transformer) -> Iterator[tuple[str, Any, str]]:
    """What is rounded: (name, owner, attribute), in the order of the forward pass."""
    yield "wte", model, "wte"
    for i, block in enumerate(model.h):
        for part in lora.LAYERS:
            owner, attribute = part.split(".")
            yield f"h.{i}.{part}", getattr(block, owner), attribute
    if not model.config.tie_embeddings:
        yield "lm_head", model, "lm_head"


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
    """y = x Wᵀ + b, with W = scale q; then GELU, or what was there before is added."""

    def __init__(
        self, name: str, weight: Array, bias: Tensor | None, device: str | tuple[str, ...] | None
    ) -> None:
        q, scale = rounded(weight)
        _check_finite(f"{name}.weight", scale)
        self.weight = write(Tensor.empty(*q.shape, dtype=dtypes.int8, device=device), q)
        self.scale = write(Tensor.empty(len(q), dtype=dtypes.float32, device=device), scale)
        self.bias = bias
        for tensor in (self.weight, self.scale):
            tensor.is_param_(False)

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        activation: Literal["gelu"] | None = None,
    ) -> Tensor:
        return kernels.quantized_linear(x, self.weight, self.scale, self.bias, residual, activation)

    def loss(self, x: Tensor, targets: Tensor, gradient: bool) -> Tensor:
        """Mean cross-entropy in nats of targets (N,), given logits = x Wᵀ for x (N, C)."""
        rows = max(1, LOGITS // int(self.weight.shape[0]))
        sums, counts = [], []
        for start in range(0, int(targets.shape[0]), rows):
            t = targets[start : start + rows].contiguous()
            counts.append((t >= 0).cast(dtypes.int32).sum())
            sums.append(kernels.cross_entropy(self(x[start : start + rows]), t) * counts[-1])
        return Tensor.stack(*sums).sum() / Tensor.stack(*counts).sum().maximum(1)


class QuantizedEmbedding(QuantizedLinear, Embedding):
    """A row of W = scale q for each id; as a layer it compares x with every row."""

    def rows(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        return kernels.embedding(tokens, self.weight, positions, self.scale)


def sizes(model: Transformer) -> tuple[int, int]:
    """Bytes of a model's weights in float32, and as they are."""
    found = sum(p.nbytes() for p in model.parameters().values())
    return 4 * model.num_params(), int(found)


def _free_unused(model: Transformer) -> None:
    """Give back to the system what tinygrad keeps of freed memory for the next Tensor like it."""
    for device in {p.device for p in model.parameters().values()}:
        if isinstance(device, str):
            getattr(Device[device].allocator, "free_cache", lambda: None)()


# What rounding costs ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Losses in nats per token on the same ``tokens`` predictions, before and after."""

    tokens: int
    before: float
    after: float


def compare(model: Transformer, fetch: Fetch, tokens: Array) -> Comparison:
    """The loss of a quantised model and of the weights it was made of, on the text's beginning."""
    T = min(model.config.block_size, len(tokens) - 1)
    B = min(max(1, MEASURED // T), (len(tokens) - 1) // T)
    x, y = (
        write(zeros((B, T), dtypes.int32), np.reshape(part, (B, T)))
        for part in (tokens[: B * T], tokens[1 : B * T + 1])
    )
    with mode(model, training=False):
        after = jit(lambda: model.loss(x, y).realize())().item()
    before = streamed_loss(model.config, fetch, x, y)
    _free_unused(model)
    return Comparison(B * T, before, after)


def streamed_loss(config: GPTConfig, fetch: Fetch, tokens: Tensor, targets: Tensor) -> float:
    """The loss of float32 weights of which one block at a time is in memory, and the embeddings.

    tokens and targets are (B, T).
    """
    model = Transformer(replace(config, n_layer=1), seed=None).eval()
    [block], (B, T) = model.h, map(int, tokens.shape)
    for name, parameter in model.parameters().items():
        if not name.startswith("h."):
            write(parameter, fetch(name))
    x = zeros((B, T, config.n_embd), dtypes.float32)

    def end() -> Tensor:
        rows = model.ln_f(x).reshape(B * T, config.n_embd)
        return model.output().loss(rows, targets.reshape(-1), gradient=False).realize()

    step = jit(lambda: block(x, None, None).realize())  # a jit plans its memory
    write(x, read(model.wte.rows(tokens, model.wpe.weight[:T]).realize()))
    for i in range(config.n_layer):
        for name, parameter in block.parameters(f"h.{i}").items():
            write(parameter, fetch(name))
        write(x, read(step()))
    return float(jit(end)().item())
