"""tinygrad's CPU kernels on every core, against tinygrad's own way, in one interleaved run.

    python benchmarks/multicore.py [--threads N] [--seconds S] [--hogs N] [--json FILE]
    python benchmarks/multicore.py --simulate baby|seeds|gpt2 [--json FILE]

Three ways take turns, call by call, so that a noisy machine is noisy for all of them: ``tinygrad``
(its own launches), ``list`` (one call for all the kernels of a jit, one thread) and ``pool`` (the
same on N threads). Before the clock starts all three must return the same bits. ``--hogs`` starts
that many processes that only burn time, to see what a busy machine does.

``--simulate`` says how busy a training step would keep 2 to 128 cores. Each piece of each of its
kernels is timed on one thread of this machine, in processor time; then the pieces are dealt out as
the pool does, a kernel after the other, to so many cores. Memory that cores share is not simulated,
nor how long it takes to wake them, but for DEAL for each piece.
"""

from __future__ import annotations

import contextlib
import heapq
import math
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from common import arguments, write_json

import tinygpt.machine.pool as multicore
from tinygpt.machine.resources import cores

# isort: split
from tinygrad import Tensor, TinyJit
from tinygrad.helpers import Context

from tinygpt.machine.pool.runner import UNSPLIT
from tinygpt.machine.pool.workers import command, command_list

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


CORES = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
DEAL = 0.2e-6
"""Seconds that it takes to take a piece: two words that all cores change."""


def pieces_of_a_step(name: str) -> list[tuple[str, list[float]]]:
    """Each kernel of a captured training step, and the seconds that its pieces take."""
    import train_step

    from tinygpt.machine.pool import runner

    graphs: list[runner.PoolGraph] = []

    class Seen(runner.PoolGraph):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            graphs.append(self)

    runner.PoolGraph = Seen
    multicore.install(1)
    train_step.Ours(name).losses(4)
    return [kernel for graph in graphs for kernel in timed_pieces(graph)]


def timed_pieces(graph: Any) -> Iterator[tuple[str, list[float]]]:
    words, at = list(graph.commands), 0
    for call in graph.linear.src:
        kernel, shape = words[at : at + 2]
        pieces, slot, count = shape & 0xFFFF, shape >> 16 & 0xFFFF, shape >> 32
        arguments = words[at + 2 : at + 2 + count]
        at += 2 + count
        best = [math.inf] * pieces
        for _ in range(3):
            for piece in range(pieces):
                given = [piece if i == slot else word for i, word in enumerate(arguments)]
                commands = command_list(command(kernel, 1, UNSPLIT, given))
                start = time.thread_time()
                graph.pool.run(commands, 1)
                best[piece] = min(best[piece], time.thread_time() - start)
        yield call.src[0].arg.function_name, best


def makespan(pieces: list[float], cores: int) -> float:
    """Seconds until all pieces are done that are dealt out, in their order, to so many cores."""
    free = [0.0] * min(cores, len(pieces))
    for seconds in pieces:
        heapq.heapreplace(free, free[0] + seconds + DEAL)
    return max(free)


def simulate(name: str) -> dict[str, float]:
    """The share of so many cores that a training step keeps busy."""
    kernels = pieces_of_a_step(name)
    one = sum(sum(pieces) for _, pieces in kernels)
    found = {}
    print(f"{name}: {len(kernels)} kernels, {1e3 * one:.1f} ms on one core of this machine")
    for count in CORES:
        step = sum(makespan(pieces, count) for _, pieces in kernels)
        found[str(count)] = one / (count * step)
        print(f"{count:4} cores: {found[str(count)]:4.0%} busy, {one / step:5.1f} times one core")
    idle: dict[str, float] = {}
    for kernel, pieces in kernels:
        lost = makespan(pieces, 64) - sum(pieces) / 64
        idle[kernel] = idle.get(kernel, 0.0) + lost
    worst = sorted(idle, key=lambda kernel: -idle[kernel])[:6]
    print("most idle on 64:", ", ".join(f"{k} {1e6 * idle[k]:.0f} us" for k in worst))
    return found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each of the works")
    parser.add_argument("--hogs", type=int, default=0, help="other busy processes")
    parser.add_argument("--simulate", choices=("baby", "seeds", "gpt2"))
    options = parser.parse_args()
    if options.simulate:
        write_json(options.json, simulate(options.simulate))
        return
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
    write_json(options.json, result)


if __name__ == "__main__":
    main()
