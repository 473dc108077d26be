"""What bfloat16 gains or costs on this device, measured: a line of `tinygpt doctor`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

from tinygrad import Device, Tensor, TinyJit, dtypes

from tinygpt import kernels
from tinygpt.kernels import pairs
from tinygpt.kernels.dispatch import on_cpu
from tinygpt.machine import precision

ROUNDS = 5
"""Timings of each type, taken in turns, of which the median counts."""
LAYER = 512, 768, 768
"""Rows, inputs and outputs of the layer whose forward and backward passes are timed."""
WEIGHTS = 8, 2048, 1024
"""Weights (O, I), and how many, that one row meets: 67 MB in float32, more than most caches."""


class Gains(NamedTuple):
    """How many times the speed of float32 bfloat16 has, and how it is computed."""

    training: float
    """Of the products of a layer, forward and backward."""
    decoding: float
    """Of reading weights for a single row."""
    way: str

    def __str__(self) -> str:
        return (
            f"{self.training:.1f} times the speed of float32 in the products of training, "
            f"{self.decoding:.1f} times in reading weights to decode; {self.way}"
        )


def gains() -> Gains | None:
    """Time both types on tinygrad's default device; None where it has no bfloat16."""
    if "bfloat16" not in precision.available():
        return None
    why = pairs.obstacle(Device.DEFAULT)
    way = f"by way of float32: {why}" if why else "by the processor's own products of pairs"
    if not on_cpu(Tensor([0.0])):
        way = "by tinygrad's own products"
    return Gains(_ratio(_layer), _ratio(_reading), way)


def _ratio(prepare: Callable[[bool], Callable[[], float]]) -> float:
    """float32's seconds / bfloat16's."""
    timers = [prepare(half) for half in (False, True)]
    rounds = [[timer() for timer in timers] for _ in range(ROUNDS)]
    wide, half = (statistics.median(times) for times in zip(*rounds, strict=True))
    return float(wide / half)


def _layer(half: bool) -> Callable[[], float]:
    """A layer as in training, where weights are float32 and activations of the type."""
    rows, n_in, n_out = LAYER
    x, weight = _numbers(half, rows, n_in), _numbers(False, n_out, n_in)

    def step(x: Tensor) -> Tensor:
        y = kernels.linear(x, weight)
        dx, dw = y.gradient(x, weight, gradient=y)
        return y.realize(dx, dw)

    return _timer(step, x)


def _reading(half: bool) -> Callable[[], float]:
    """One row through several layers, as in decoding, where weights too are of the type."""
    count, n_out, n_in = WEIGHTS
    x, weights = _numbers(half, 1, n_in), [_numbers(half, n_out, n_in) for _ in range(count)]

    def step(x: Tensor) -> Tensor:
        first, *rest = [kernels.linear(x, weight) for weight in weights]
        return first.realize(*rest)

    return _timer(step, x)


def _numbers(half: bool, *shape: int) -> Tensor:
    """Ones: the time does not depend on the numbers."""
    return Tensor.ones(*shape, dtype=dtypes.bfloat16 if half else dtypes.float32).clone().realize()


def _timer(step: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], float]:
    """Captures the step; -> a function that runs it once and returns the seconds it took."""
    jitted, device = TinyJit(step), Device[Device.DEFAULT]

    def seconds() -> float:
        device.synchronize()
        start = time.perf_counter()
        jitted(x)
        device.synchronize()
        return time.perf_counter() - start

    for _ in range(3):  # eagerly, to capture it, and to warm up
        seconds()
    return seconds
