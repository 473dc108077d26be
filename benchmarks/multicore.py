"""tinygrad's CPU kernels on every core, against tinygrad's own way, in one interleaved run.

    python benchmarks/multicore.py [--threads N] [--seconds S] [--hogs N] [--json FILE]

Three ways take turns, call by call, so that a noisy machine is noisy for all of them: ``tinygrad``
(its own launches), ``list`` (one call for all the kernels of a jit, one thread) and ``pool`` (the
same on N threads). Before the clock starts all three must return the same bits. ``--hogs`` starts
that many processes that only burn time, to see what a busy machine does.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

import tinygpt.multicore as multicore  # chooses the compiler, so before tinygrad
from tinygpt.runtime import cores

# isort: split
from tinygrad import Tensor, TinyJit
from tinygrad.helpers import Context

Work = Callable[[], Tensor]


def many_small() -> Work:
    """100 kernels that do next to nothing: what a launch costs."""
    x = Tensor.ones(64).clone().realize()

    @TinyJit
    def work(x: Tensor) -> Tensor:
        for _ in range(100):
            x = (x + 1).contiguous()
        return x.realize()

    return lambda: work(x)


def products() -> Work:
    """Eight matrix products of 256 x 256: what more cores bring at best."""
    Tensor.manual_seed(0)
    x, w = (Tensor.randn(256, 256).mul(0.06).contiguous().realize() for _ in range(2))

    @TinyJit
    def work(x: Tensor) -> Tensor:
        for _ in range(8):
            x = (x @ w).contiguous()
        return x.realize()

    return lambda: work(x)


def training() -> Work:
    """Gradients of a two-layer perceptron, 64 rows of 128, 512 hidden: kernels of all sizes."""
    Tensor.manual_seed(0)
    x = Tensor.randn(64, 128).realize()
    shapes = ((128, 512), (512, 128))
    weights = [Tensor.randn(*shape).mul(0.05).contiguous().realize() for shape in shapes]

    @TinyJit
    def work(x: Tensor) -> Tensor:
        up, down = weights
        loss = ((x @ up).gelu() @ down - x).square().mean()
        gradients = loss.gradient(up, down)
        return Tensor.cat(*(g.flatten() for g in gradients)).realize()

    return lambda: work(x)


WORKS = {"100 tiny kernels": many_small, "8 products": products, "training step": training}


def captured(make: Callable[[], Work], threads: int) -> Work:
    """A jit captured under ``threads`` (0: tinygrad's own way); captures keep their way."""
    multicore.install(threads)
    work = make()
    with Context(DEBUG=0):
        for _ in range(3):
            work()
    return work


def measure(ways: dict[str, Work], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each way's calls, the ways taking turns."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, work in ways.items():
            start = time.perf_counter()
            work()
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


@contextlib.contextmanager
def hogs(count: int) -> Iterator[None]:
    context = multiprocessing.get_context("spawn")
    running = [context.Process(target=_burn, daemon=True) for _ in range(count)]
    for process in running:
        process.start()
    yield
    for process in running:
        process.kill()


def _burn() -> None:
    while True:
        pass


def idle_cost(seconds: float = 0.5) -> float:
    """CPU time that the process uses while it has nothing to do, as a share of one core."""
    time.sleep(0.05)
    start = time.process_time()
    time.sleep(seconds)
    return (time.process_time() - start) / seconds


def summary(times: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    return {"median": middle, "low": low, "high": high, "calls": len(times)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--seconds", type=float, default=5.0, help="for each of the works")
    parser.add_argument("--hogs", type=int, default=0, help="other busy processes")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    result: dict[str, object] = {
        "machine": platform.platform(),
        "cores": cores(),
        "threads": options.threads,
        "hogs": options.hogs,
    }
    print(f"{cores()} cores, {options.threads} threads, {options.hogs} hogs; median ms (quartiles)")
    for title, make in WORKS.items():
        ways = {
            name: captured(make, threads)
            for name, threads in (("tinygrad", 0), ("list", 1), ("pool", options.threads))
        }
        outputs = [work().numpy() for work in ways.values()]
        assert all(np.array_equal(outputs[0], other) for other in outputs), title
        with hogs(options.hogs):
            rows = {name: summary(t) for name, t in measure(ways, options.seconds).items()}
        result[title] = rows
        cells = (
            f"{n} {r['median']:8.3f} ({r['low']:.3f}-{r['high']:.3f})" for n, r in rows.items()
        )
        ratio = rows["tinygrad"]["median"] / rows["pool"]["median"]
        print(f"{title:17} {'  '.join(cells)}  {ratio:5.2f} x")
    result["idle"] = idle_cost()
    print(f"CPU time while idle: {result['idle']:.2%} of one core")
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
