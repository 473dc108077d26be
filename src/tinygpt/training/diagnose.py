"""Where numbers went wrong: the first tensor of a step that is not finite.

The step is computed again, not in one jitted piece but a layer at a time: the weights first, then
each layer's output in the order of the forward pass, the loss, and the gradients in the order of
the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from tinygrad import Tensor

from tinygpt.config import TrainConfig
from tinygpt.config.weights import weights
from tinygpt.machine.tinygrad_internals import DType
from tinygpt.model.transformer import Dropout, Transformer

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Finding:
    """The first tensor that is not finite; as a string, a sentence."""

    text: str
    name: str | None = None
    """``h.1.mlp.c_fc output``, ``gradient of wte.weight``; None if all that was found is finite."""

    def __str__(self) -> str:
        return self.text.format(name=self.name)

    def advice(self, config: TrainConfig) -> str:
        """What to try, by what was found and how the run was set."""
        if self.name is not None and self.name.startswith("parameter"):
            return "A weight itself is damaged: go on from an earlier checkpoint."
        clip = "" if config.grad_clip else ", gradient clipping (grad_clip=1.0, now off)"
        spikes = "" if config.skip_spikes is None else ", a larger skip_spikes"
        return (
            f"Try a lower learning_rate (now {config.learning_rate:g}), a longer warm-up "
            f"(warmup_steps={max(2 * config.warmup_steps, 100)}, now {config.warmup_steps})"
            f"{clip}{spikes}, or look at the data of these steps."
        )


def diagnose(
    model: Transformer, x: Array, y: Array, keys: Sequence[Tensor], half: DType | None = None
) -> Finding:
    """What went wrong first in a step on micro-batches x and y (A, B, T), with dropout's keys.

    ``half`` is the type of its products, if it was half precision.
    """
    if bad := bad_parameter(model):
        return bad
    largest: dict[str, float] = {}
    for i, (inputs, targets, key) in enumerate(zip(x, y, keys, strict=True)):
        batch = Tensor(inputs.astype(np.int32)), Tensor(targets.astype(np.int32))
        loss = partial(model.loss, *batch, Dropout(model.config.dropout, key), half)
        found = _in_forward(model, loss) or _in_backward(model, loss, largest)
        if found and len(x) > 1:
            found = replace(found, name=f"{found.name} in micro-batch {i + 1} of {len(x)}")
        if found:
            return found
    name = max(largest, key=lambda name: largest[name])
    return Finding(
        f"Computed again, everything is finite; the largest gradient is that of {name}, with "
        f"values up to {largest[name]:.2g}."
    )


def bad_parameter(model: Transformer) -> Finding | None:
    """The first parameter that is not finite."""
    parameters = model.parameters().items()
    return next((f for name, p in parameters if (f := _look(f"parameter {name}", p))), None)


def _look(name: str, tensor: Tensor, before: str = "") -> Finding | None:
    values = tensor.float().numpy()
    nan, infinite = int(np.isnan(values).sum()), int(np.isinf(values).sum())
    if not nan and not infinite:
        return None
    counted = [f"{n:,} {word}" for n, word in ((nan, "NaN"), (infinite, "infinite")) if n]
    counts = f"{' and '.join(counted)} of {values.size:,} values"
    return Finding(f"The first tensor that is not finite: {{name}} ({counts}).{before}", name)


def _in_forward(model: Transformer, loss: Callable[[], Tensor]) -> Finding | None:
    found: list[Finding] = []
    before = ""

    def see(name: str, tensor: Tensor) -> None:
        nonlocal before
        if found:
            return
        if bad := _look(name, tensor, before):
            found.append(bad)
        else:
            before = f" The one before, {name}, reaches {_largest(tensor):.2g}."

    with watched(model, see):
        see("loss", loss().realize())
    return found[0] if found else None


def _in_backward(
    model: Transformer, loss: Callable[[], Tensor], largest: dict[str, float]
) -> Finding | None:
    """The gradient that is not finite, the last parameter's first; collects the ``largest``."""
    named = model.trainable()
    gradients = loss().gradient(*named.values())
    Tensor.realize(*gradients)  # together: what they share is computed once
    for name, gradient in reversed(list(zip(named, gradients, strict=True))):
        if found := _look(f"gradient of {name}", gradient):
            return found
        largest[name] = max(largest.get(name, 0.0), _largest(gradient))
    return None


class _Watched:
    """A layer whose outputs are computed at once and shown to ``see``, and its input on request."""

    def __init__(
        self, layer: Any, name: str, before: str | None, see: Callable[[str, Tensor], None]
    ) -> None:
        self.layer, self.name, self.before, self.see = layer, name, before, see

    def __call__(self, x: Tensor, *rest: Any, **options: Any) -> Tensor:
        if self.before is not None:
            self.see(self.before, x.realize())
        y: Tensor = self.layer(x, *rest, **options).realize()
        self.see(f"{self.name} output", y)
        return y

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)


@contextmanager
def watched(model: Transformer, see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """In this block ``see(name, tensor)`` is shown what every layer of ``model`` computes."""
    layers = {name: model.layer(name) for name in _layers(model)}
    try:
        for name, layer in layers.items():
            model.replace(name, _Watched(layer, name, _before(name), see))
        yield
    finally:
        for name, layer in layers.items():
            model.replace(name, layer)


def _layers(model: Transformer) -> list[str]:
    """The layers by name, in the order of the forward pass, without the ones at either end."""
    kinds = ("norm", "linear")
    return [w.layer for w in weights(model.config) if w.kind in kinds]


def _before(name: str) -> str | None:
    """What a layer's input is, where it is not simply the output of the layer before."""
    block, _, layer = name.rpartition(".")
    if name == "h.0.ln_1":
        return "sum of wte and wpe"
    names = {
        "c_proj": f"{block} output" if block.endswith("attn") else None,
        "ln_2": f"{block}.attn output and residual",
        "ln_f": "sum of all layers",
    }
    return names.get(layer)


def _largest(tensor: Tensor) -> float:
    return float(np.abs(tensor.float().numpy()).max())
