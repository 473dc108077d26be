"""The fast kernels, held against their plain twins and against float64, on the device at hand.

``tinygpt doctor --kernels`` prints it. Results and gradients are compared at a handful of shapes,
and both ways are timed at a typical one.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from tinygrad import Context, Device, Tensor, TinyJit

from tinygpt.errors import KernelError
from tinygpt.kernels.check.cases import KERNELS, TOLERANCE, Array, Case, Results
from tinygpt.kernels.dispatch import OPERATIONS, falls_back, obstacle, on_cpu

ROUNDS = 3
"""Timings of each way, of which the median counts."""


@dataclass(frozen=True)
class Row:
    """One shape: the largest absolute errors against float64, of our kernel and of its twin."""

    shape: str
    forward: float | None
    """None if nothing could be computed."""
    twin_forward: float | None
    gradients: float | None
    """Of all gradients; None if there are none."""
    twin_gradients: float | None
    passed: bool
    failure: str = ""
    """Why nothing could be computed."""


@dataclass(frozen=True)
class Speed:
    """Seconds of a typical case, forward and backward, as captured in a jit."""

    shape: str
    ours: float
    twin: float

    @property
    def ratio(self) -> float:
        """How many times as fast as the twin."""
        return self.twin / self.ours


@dataclass(frozen=True)
class KernelReport:
    """What was found out about one kernel."""

    kernel: str
    device: str
    rows: tuple[Row, ...]
    speed: Speed | None
    note: str = ""
    tolerance: float = TOLERANCE

    @property
    def ok(self) -> bool:
        """Whether every shape passed."""
        return all(row.passed for row in self.rows)

    @property
    def worst(self) -> float:
        """Our largest error of all; NaN if there is one, or nothing to compare."""
        found = [e for row in self.rows for e in (row.forward, row.gradients) if e is not None]
        return float(np.max(found)) if found else math.nan

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values."""
        return {"ok": self.ok, **asdict(self)}


def check_kernel(kernel: str, timed: bool = True) -> KernelReport:
    """Check one of ``KERNELS`` on tinygrad's default device, and time it unless told otherwise.

    Where the device cannot run the kernels there is nothing to check: the note says why, or a
    KernelError if ``--strict`` is on.
    """
    cases, typical = KERNELS[kernel]
    probe = Tensor([0.0])
    if falls_back(kernel, why := obstacle(probe)):
        return KernelReport(kernel, Device.DEFAULT, (), None, f"not checked: {why}")
    note = ""
    if kernel == "linear" and not on_cpu(probe):
        note = "on this device linear layers are tinygrad's own products: both ways are the same"
    made = [make() for make in cases]
    rows, tolerance = tuple(map(check_case, made)), max(case.tolerance for case in made)
    speed = time_case(typical()) if timed and all(row.passed for row in rows) else None
    return KernelReport(kernel, Device.DEFAULT, rows, speed, note, tolerance)


def unchecked() -> list[str]:
    """The operations that no case of their kernel checks; there should be none."""
    checked = {
        (kernel, make().operation) for kernel, (cases, _) in KERNELS.items() for make in cases
    }
    return [name for name, kernel in OPERATIONS.items() if (kernel, name) not in checked]


def check_case(case: Case) -> Row:
    """Compare one case's three ways."""
    wanted = case.exact(*map(_wide, case.inputs))
    try:
        ours, twin = (_computed(way, case.inputs) for way in (case.ours, case.twin))
    except KernelError:  # --strict
        raise
    except Exception as error:  # whatever a device's compiler or driver raises
        return Row(case.shape, None, None, None, None, False, _first_line(error))
    halves = slice(case.results), slice(case.results, None)  # results, gradients
    a, b, c, d = (_error(way[half], wanted[half]) for half in halves for way in (ours, twin))
    passed = all(_near(way, wanted, case.tolerance) for way in (ours, twin))
    return Row(case.shape, a, b, c, d, passed)


def time_case(case: Case) -> Speed:
    """The medians of several timings of both ways, taken in turns."""
    timers = [_timer(way, case.inputs) for way in (case.ours, case.twin)]
    rounds = [[timer() for timer in timers] for _ in range(ROUNDS)]
    ours, twin = map(statistics.median, zip(*rounds, strict=True))
    return Speed(case.shape, ours, twin)


def _timer(way: Results, inputs: Sequence[Array]) -> Callable[[], float]:
    """Captures ``way``; -> a function that runs it once and returns the seconds it took."""
    tensors = [Tensor(x).realize() for x in inputs]
    jitted = TinyJit(lambda *given: _realized(way(*given)))
    device = Device[Device.DEFAULT]

    def seconds() -> float:
        device.synchronize()
        start = time.perf_counter()
        jitted(*tensors)
        device.synchronize()
        return time.perf_counter() - start

    for _ in range(2):  # eagerly, and to capture it
        seconds()
    return seconds


def _computed(way: Results, inputs: Sequence[Array]) -> list[Array]:
    # Without its optimiser, tinygrad makes the twins' many kernels several times as quickly.
    with Context(NOOPT=1):
        results = _realized(way(*(Tensor(x).realize() for x in inputs)))
    return [x.numpy() for x in results]


def _realized(results: list[Tensor]) -> list[Tensor]:
    Tensor.realize(*results)  # together: what they share is computed once
    return results


def _wide(x: Array) -> Array:
    return x.astype(np.float64) if x.dtype == np.float32 else x


def _error(found: Sequence[Array], wanted: Sequence[Array]) -> float | None:
    """The largest absolute error of all; NaN if there is one, None if there is nothing."""
    errors = [float(np.max(np.abs(a - b))) for a, b in zip(found, wanted, strict=True)]
    return float(np.max(errors)) if errors else None


def _near(found: Sequence[Array], wanted: Sequence[Array], tolerance: float) -> bool:
    """Whether each result is right, measured by its own largest number; NaN is not."""
    return all(
        bool(np.max(np.abs(a - b)) <= tolerance * max(1.0, float(np.max(np.abs(b)))))
        for a, b in zip(found, wanted, strict=True)
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]
