"""The most multiply-adds a second that this machine's processor does: what a share of it is of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from common import CLOCKS

# isort: split
from tinygrad import Tensor, TinyJit

import tinygpt.machine.pool as multicore
from tinygpt.kernels.matmul import register_tiles
from tinygpt.kernels.phases import Array, Kernel, run

Work = Callable[[], Any]


def multiply_adds(k: Kernel, out: Array, x: Array, *, cores: int, rows: int, steps: int) -> None:
    """As many independent multiply-adds as the registers hold, in every core, ``steps`` times."""
    core = k.units(cores)
    acc = k.tile(rows)
    with k.phase() as lane:
        for r in range(rows):
            acc[r, lane] = x[lane] + float(r)
    with k.loop(steps), k.phase() as lane:
        for r in range(rows):
            acc[r, lane] = acc[r, lane] * x[0] + x[1]
    with k.phase() as lane:
        for r in range(rows):
            out[(core * rows + r) * k.lanes + lane] = acc[r, lane]


def peak(threads: int, steps: int = 2_000_003) -> tuple[Work, float]:
    """A work that runs at the machine's peak, and its floating-point operations.

    The number of steps is prime so that the compiler does not unroll: it then reverses every
    second step, and each sum waits for itself.
    """
    lanes, rows = next(iter(register_tiles().items()))
    x = Tensor([0.5, 1.0, *[0.25] * (lanes - 2)]).realize()
    out = Tensor.empty(threads * rows * lanes)

    @TinyJit
    def work(x: Tensor) -> Tensor:
        options = {"cores": threads, "rows": rows, "steps": steps}
        ops = 2 * threads * rows * lanes * steps  # many enough for a piece to each thread
        return run(multiply_adds, [out], [x], lanes=lanes, ops=ops, **options)[0].realize()

    for _ in range(3):
        work(x)
    return lambda: work(x), 2.0 * threads * rows * lanes * steps


class Peak:
    """The peak as a side of a comparison, in a process of its own."""

    def __init__(self, threads: int) -> None:
        multicore.install(threads)
        self.work, self.operations = peak(threads)

    def per_second(self, cpu_time: bool) -> float:
        """Floating-point operations, the best of five calls of some milliseconds."""
        times, clock = [], CLOCKS[cpu_time]
        for _ in range(5):
            start = clock()
            self.work()
            times.append(clock() - start)
        return self.operations / min(times)
