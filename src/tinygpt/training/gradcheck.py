"""Analytic gradients held against numeric ones, parameter by parameter, in float64.

The slope of the loss L in a direction d is ∇L·d, with the gradient that backpropagation gives. It
is also the limit of (L(w + εd) - L(w - εd)) / 2ε, which takes nothing but forward passes. For each
parameter a random direction tests all elements at once; a few single elements are tested besides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tinygrad import Context, Tensor, dtypes

from tinygpt.config import Precision
from tinygpt.errors import UsageError
from tinygpt.machine import precision
from tinygpt.machine.jit import jit
from tinygpt.machine.tinygrad_internals import DType
from tinygpt.machine.transfer import write
from tinygpt.model.transformer import INFERENCE, Dropout, Transformer
from tinygpt.training.scaling import FIRST

Array = npt.NDArray[np.float64]
TOLERANCE = 1e-5
HALF_TOLERANCES = {"bfloat16": 0.1, "float16": 0.02}
"""Of gradients that were computed in half precision: some hundred of its roundings."""


@dataclass(frozen=True)
class GradcheckRow:
    """One parameter's largest relative errors."""

    name: str
    shape: tuple[int, ...]
    gradient_norm: float
    direction_error: float
    """Of the slope in a random direction."""
    coordinate_error: float
    """Of the worst among the sampled elements."""
    passed: bool


@dataclass(frozen=True)
class GradcheckReport:
    """A row for every parameter, in the model's order."""

    rows: tuple[GradcheckRow, ...]
    tolerance: float
    epsilon: float
    loss: float

    @property
    def ok(self) -> bool:
        """Whether every parameter passed."""
        return all(row.passed for row in self.rows)

    @property
    def worst(self) -> float:
        """The largest relative error of all; NaN if there is one."""
        errors = [e for r in self.rows for e in (r.direction_error, r.coordinate_error)]
        return math.nan if any(map(math.isnan, errors)) else max(errors)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {"ok": self.ok, "worst": self.worst, **asdict(self)}

    def table(self) -> str:
        """The report as text, a line per parameter and a verdict."""
        width = max(len(row.name) for row in self.rows)
        lines = [f"{'parameter':<{width}}  {'shape':>12}  {'|grad|':>8}  direction  coordinate"]
        for row in self.rows:
            shape = "x".join(map(str, row.shape))
            lines.append(
                f"{row.name:<{width}}  {shape:>12}  {row.gradient_norm:8.1e}  "
                f"{row.direction_error:9.1e}  {row.coordinate_error:10.1e}"
                f"{'' if row.passed else '  WRONG'}"
            )
        wrong = sum(not row.passed for row in self.rows)
        verdict = f"{wrong} of {len(self.rows)} gradients are wrong" if wrong else "all agree"
        limit = f"{self.tolerance:.0e} is allowed"
        lines.append(f"{verdict}: the largest relative error is {self.worst:.1e}, {limit}")
        return "\n".join(lines)


def gradcheck(
    model: Transformer,
    idx: Tensor,
    targets: Tensor,
    *,
    epsilon: float = 3e-4,
    samples: int = 2,
    seed: int = 0,
    tolerance: float | None = None,
    dropout_key: tuple[int, int] | None = None,
    dtype: Precision = "float32",
) -> GradcheckReport:
    """Check the gradient of ``model.loss(idx, targets)`` of every parameter that learns.

    ``epsilon`` is the length of the step in weight space, ``samples`` the number of single elements
    tried per parameter. With ``dropout_key``, two numbers below 2³², the model is checked as it is
    trained, by the dropout masks of that key; without it there is no dropout. Everything is done in
    float64, with the model's weights, and the model is left as it was found; but with a ``dtype``
    of bfloat16 or float16 the gradients are those of a training step in that type. It costs
    4 · (samples + 1) forward passes per parameter: take a small model. ``tolerance`` is 1e-5 if it
    is not given, in bfloat16 0.1 and in float16 0.02. Raises UsageError for settings that cannot
    work.

    >>> report = gradcheck(model, idx, targets)
    >>> print(report.table())
    >>> assert report.ok
    """
    tolerance = HALF_TOLERANCES.get(dtype, TOLERANCE) if tolerance is None else tolerance
    _check_settings(epsilon, samples, tolerance)
    precision.require(dtype)
    half = precision.half_of(dtype)
    trained = None if half is None else _half_gradients(model, idx, targets, half, dropout_key)
    idx, targets = _realized(idx), _realized(targets)
    rng, rows = np.random.default_rng(seed), list[GradcheckRow]()
    # A small model spends its time on making kernels, which is three times quicker unoptimised.
    with Context(NOOPT=1), float64_weights(model) as weights:
        key = Tensor(dropout_key or (0, 0), dtype=dtypes.uint32).realize()

        def mean_loss() -> Tensor:
            drop = Dropout(model.config.dropout, key) if dropout_key else INFERENCE
            return model.loss(idx, targets, drop)

        loss = jit(mean_loss)
        value, gradients = float(loss()), trained or _gradients(model, mean_loss())
        # Slopes below this cannot be compared: of the loss no more than 16 digits are known.
        floor = 8 * float(np.finfo(np.float64).eps) * abs(value) / epsilon / tolerance
        for name, parameter in model.trainable().items():
            weight, gradient = weights[name], gradients[name]
            norm = float(np.linalg.norm(gradient))
            # One slope may vanish by chance, so errors are relative to the parameter's typical one.
            typical = max(norm / math.sqrt(gradient.size), floor)
            errors = []
            for direction in _directions(rng, gradient.shape, samples):
                numeric = _slope(loss, parameter, weight, direction, epsilon)
                analytic = float((gradient * direction).sum())
                errors.append(abs(numeric - analytic) / max(typical, abs(numeric), abs(analytic)))
            worst = float(np.max(errors[1:], initial=0.0))
            passed = all(error <= tolerance for error in errors)
            rows.append(GradcheckRow(name, weight.shape, norm, errors[0], worst, passed))
    return GradcheckReport(tuple(rows), tolerance, epsilon, value)


@contextmanager
def float64_weights(model: Transformer) -> Iterator[dict[str, Array]]:
    """Give the model float64 buffers with the same values, and its own ones back in the end."""
    parameters = model.parameters()
    own = {name: Tensor(p.uop) for name, p in parameters.items()}
    weights = {name: p.numpy().astype(np.float64) for name, p in parameters.items()}
    try:
        for name, p in parameters.items():
            p.replace(Tensor(weights[name]).to(p.device).realize())
        yield weights
    finally:
        for name, p in parameters.items():
            p.replace(own[name])


def _realized(tokens: Tensor) -> Tensor:
    return Tensor(tokens.numpy().astype(np.int32)).realize()


def _gradients(model: Transformer, loss: Tensor) -> dict[str, Array]:
    """What backpropagation says, by parameter."""
    parameters = model.trainable()
    gradients = loss.gradient(*parameters.values())
    Tensor.realize(*gradients)  # together: what they share is computed once
    return {name: g.numpy() for name, g in zip(parameters, gradients, strict=True)}


def _half_gradients(
    model: Transformer, idx: Tensor, targets: Tensor, half: DType, key: tuple[int, int] | None
) -> dict[str, Array]:
    """What a step of training in half precision takes for the gradients, by parameter."""
    drop = Dropout(model.config.dropout, Tensor(key, dtype=dtypes.uint32)) if key else Dropout(0)
    scale = FIRST if half == dtypes.float16 else 1.0
    found = _gradients(model, model.loss(idx, targets, drop, half) * scale)
    return {name: gradient.astype(np.float64) / scale for name, gradient in found.items()}


def _slope(
    loss: Callable[[], Array], parameter: Tensor, weight: Array, direction: Array, epsilon: float
) -> float:
    """The loss's slope along a direction by central differences of fourth order.

    They bear a longer step than the simple ones, at which rounding matters less.
    """

    def at(steps: int) -> float:
        write(parameter, weight + steps * epsilon * direction)
        return float(loss())

    near, far = at(1) - at(-1), at(2) - at(-2)
    write(parameter, weight)
    return (8 * near - far) / (12 * epsilon)


def _directions(rng: np.random.Generator, shape: tuple[int, ...], samples: int) -> Iterator[Array]:
    """A random unit vector, then unit vectors along different axes."""
    random = rng.standard_normal(shape)
    yield random / np.linalg.norm(random)
    for i in rng.choice(random.size, min(samples, random.size), replace=False):
        axis = np.zeros(shape)
        axis.flat[i] = 1
        yield axis


def _check_settings(epsilon: float, samples: int, tolerance: float) -> None:
    if not 0 < epsilon < 1 or not 0 < tolerance < 1:
        raise UsageError(
            f"epsilon={epsilon!r} and tolerance={tolerance!r} must lie between 0 and 1; "
            f"3e-4 and 1e-5 are good values."
        )
    if not isinstance(samples, int) or samples < 0:
        raise UsageError(f"samples={samples!r} is not a whole number from 0 up.")
