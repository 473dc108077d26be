"""Analytic gradients held against numeric ones, parameter by parameter, in float64.

The slope of the loss L in a direction d is ∇L·d, with the gradient that backpropagation gives. It is
also the limit of (L(w + εd) - L(w - εd)) / 2ε, which takes nothing but forward passes. For each
parameter a random direction tests all elements at once, and a few single elements are tested besides.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tinygrad import Tensor, TinyJit

from tinygpt.errors import UsageError
from tinygpt.model import Transformer
from tinygpt.train import mode

Vector = npt.NDArray[np.float64]
TOLERANCE = 1e-5


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

    def to_json(self) -> str:
        """The report as one line of JSON."""
        return json.dumps(self.to_dict())

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
        failed = sum(not row.passed for row in self.rows)
        verdict = f"{failed} of {len(self.rows)} gradients are wrong" if failed else "all agree"
        lines.append(
            f"{verdict}: the largest relative error is {self.worst:.1e}, {self.tolerance:.0e} is allowed"
        )
        return "\n".join(lines)


def gradcheck(
    model: Transformer,
    idx: Tensor,
    targets: Tensor,
    *,
    epsilon: float = 3e-4,
    samples: int = 2,
    seed: int = 0,
    tolerance: float = TOLERANCE,
) -> GradcheckReport:
    """Check the gradient of ``model.loss(idx, targets)`` with respect to every parameter.

    ``epsilon`` is the length of the step in weight space, ``samples`` the number of single elements
    tried per parameter. Everything is done in float64, with the model's weights and without dropout,
    and the model is left as it was found. It costs 4 · (samples + 1) forward passes per parameter:
    take a small model. Raises UsageError for settings that cannot work.

    >>> report = gradcheck(model, idx, targets)
    >>> print(report.table())
    >>> assert report.ok
    """
    _check_settings(epsilon, samples, tolerance)
    rng, rows, start = np.random.default_rng(seed), [], 0
    with mode(model, training=False), _Probe.of(model, idx, targets) as probe:
        loss, gradient = probe.loss(probe.weights), probe.gradient()
        # Slopes below this cannot be compared: of the loss no more than 16 digits are known.
        floor = 8 * float(np.finfo(np.float64).eps) * abs(loss) / epsilon / tolerance
        for name, parameter in model.parameters().items():
            size = math.prod(parameter.shape)
            own = gradient[start : start + size]
            norm = float(np.linalg.norm(own))
            # One slope may vanish by chance, so errors are relative to the parameter's typical one.
            scale = max(norm / math.sqrt(size), floor)
            errors = []
            for direction in _directions(rng, size, samples):
                step = np.zeros_like(gradient)
                step[start : start + size] = epsilon * direction
                slope, wanted = probe.difference(step) / epsilon, float(own @ direction)
                errors.append(abs(slope - wanted) / max(scale, abs(slope), abs(wanted)))
            worst = max(errors[1:], default=0.0)
            passed = all(error <= tolerance for error in errors)
            rows.append(GradcheckRow(name, parameter.shape, norm, errors[0], worst, passed))
            start += size
    return GradcheckReport(tuple(rows), tolerance, epsilon, loss)


class _Probe:
    """The model's loss as a function of all its weights, one float64 vector of numpy.

    The vector goes to the device as the one input of a jitted function, in which the parameters are
    views of it, so that a perturbed weight costs a forward pass and no compilation.
    """

    def __init__(self, model: Transformer, idx: Tensor, targets: Tensor) -> None:
        self._model, self._idx, self._targets = model, idx, targets
        self._parameters = list(model.parameters().values())
        self.weights: Vector = np.concatenate(
            [p.numpy().astype(np.float64).reshape(-1) for p in self._parameters]
        )
        self._loss = TinyJit(lambda flat: self._loss_at(flat).realize())

    @classmethod
    @contextmanager
    def of(cls, model: Transformer, idx: Tensor, targets: Tensor) -> Iterator[_Probe]:
        """A probe that gives the model its own weights back in the end."""
        found = [(p, Tensor(p.uop)) for p in model.parameters().values()]
        try:
            yield cls(model, idx, targets)
        finally:
            for parameter, own in found:
                parameter.replace(own)

    def loss(self, weights: Vector) -> float:
        return float(self._loss(Tensor(weights).realize()).item())

    def difference(self, step: Vector) -> float:
        """The loss's slope along ``step``, times its length: central differences of fourth order."""
        near = self.loss(self.weights + step) - self.loss(self.weights - step)
        far = self.loss(self.weights + 2 * step) - self.loss(self.weights - 2 * step)
        return (8 * near - far) / 12

    def gradient(self) -> Vector:
        """What backpropagation says, at the model's weights."""
        loss = self._loss_at(Tensor(self.weights).realize())
        parts = loss.gradient(*self._parameters)
        Tensor.realize(*parts)  # together: what they share is computed once
        return np.concatenate([part.numpy().reshape(-1) for part in parts])

    def _loss_at(self, flat: Tensor) -> Tensor:
        start = 0
        for p in self._parameters:
            end = start + math.prod(p.shape)
            p.replace(flat[start:end].reshape(p.shape))
            start = end
        return self._model.loss(self._idx, self._targets)


def _directions(rng: np.random.Generator, size: int, samples: int) -> Iterator[Vector]:
    """A random unit vector, then unit vectors along different axes."""
    random = rng.standard_normal(size)
    yield random / np.linalg.norm(random)
    for i in rng.choice(size, min(samples, size), replace=False):
        axis = np.zeros(size)
        axis[i] = 1
        yield axis


def _check_settings(epsilon: float, samples: int, tolerance: float) -> None:
    if not 0 < epsilon < 1 or not 0 < tolerance < 1:
        raise UsageError(
            f"epsilon={epsilon!r} and tolerance={tolerance!r} must lie between 0 and 1; "
            f"3e-4 and 1e-5 are good values."
        )
    if not isinstance(samples, int) or samples < 0:
        raise UsageError(f"samples={samples!r} is not a whole number from 0 up.")
