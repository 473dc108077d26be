"""Linear layers: our kernels against PyTorch, and both against the peak of this machine.

    python benchmarks/linear.py [--set baby|gpt2|decode|all] [--threads N] [--repeats R]
                                [--cpu-time] [--json FILE]

For each layer three products: y = x Wᵀ + b, dx = dy W, and dW = dyᵀ x with db. Ours are first
checked against numpy in float64. Then a kernel that does nothing but multiply-adds (the peak), our
product and PyTorch's take turns, so that a noisy machine is noisy for all of them. A turn is one
call of a captured jit with as many equal products as take a few milliseconds, and PyTorch's eager
calls in a loop. ``--cpu-time`` counts this thread's processor time instead of the clock on the
wall, for one thread on a busy machine.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from common import arguments, write_json
from peak import Work, peak

import tinygpt.machine.pool as multicore
from tinygpt.machine.resources import cores, peak_memory

# isort: split
from tinygrad import Tensor, TinyJit

from tinygpt.kernels.linear import FEW, linear
from tinygpt.kernels.matmul import matmul

try:
    import torch
except ImportError:
    torch = None

BABY = [(768, 128, 384), (768, 128, 128), (768, 128, 512), (768, 512, 128), (768, 128, 65)]
GPT2 = [(1024, 768, 768), (1024, 768, 2304), (1024, 768, 3072), (1024, 3072, 768)]
HEAD = [(512, 128, 50257)]
DECODE = [(1, 128, 384), (1, 768, 2304), (1, 768, 768), (1, 3072, 768), (1, 768, 50257)]
SETS = {"baby": BABY, "gpt2": GPT2 + HEAD, "decode": DECODE, "all": BABY + GPT2 + HEAD + DECODE}
"""(rows of x, inputs, outputs) of the layers of a training step, or of one generated token."""


@dataclass
class Case:
    """One product: the two ways to do it, and how long the turns took."""

    name: str
    flops: float  # of one product
    ours: Work
    theirs: Work | None
    repeats: int  # products in a turn
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"ours": [], "theirs": []})
    peaks: list[float] = field(default_factory=list)


def cases(m: int, i: int, o: int) -> list[Case]:
    """The products of a layer; only the forward one for the few rows of generation."""
    rng = np.random.default_rng(0)
    x, w, b, dy = (rng.standard_normal(s, np.float32) for s in ((m, i), (o, i), o, (m, o)))
    tx, tw, tb, tdy = (Tensor(t).realize() for t in (x, w, b, dy))
    kinds: dict[str, tuple[list[Tensor], Callable[..., list[Tensor]], list[np.ndarray]]] = {
        "y": (
            [tx, tw, tb],
            lambda x, w, b: [linear(x, w, b)],
            [x.astype(np.float64) @ w.T + b],
        ),
        "dx": (
            [tdy, tw],
            lambda dy, w: matmul(dy, w, (m, i, o), (o, 1), (i, 1)),
            [dy.astype(np.float64) @ w],
        ),
        "dw": (
            [tdy, tx],
            lambda dy, x: matmul(dy, x, (o, i, m), (1, o), (i, 1), sums=True),
            [dy.T.astype(np.float64) @ x, dy.sum(0, dtype=np.float64)],
        ),
    }
    if m <= FEW:
        kinds = {"y": kinds["y"]}
    flops = 2.0 * m * i * o
    repeats = max(1, min(16, int(3e8 / flops)))
    theirs = pytorch(x, w, b, dy, repeats)
    return [
        Case(
            f"{kind:2} {m}x{i}->{o}",
            flops,
            captured(args, product, wanted, repeats),
            theirs.get(kind),
            repeats,
        )
        for kind, (args, product, wanted) in kinds.items()
    ]


def captured(
    args: list[Tensor],
    product: Callable[..., list[Tensor]],
    wanted: list[np.ndarray],
    repeats: int,
) -> Work:
    """A jit of ``repeats`` products, checked."""

    @TinyJit
    def work(*args: Tensor) -> list[Tensor]:
        results = [t for _ in range(repeats) for t in product(*args)]
        Tensor.realize(*results)
        return results

    for _ in range(3):
        results = work(*args)
    for got, want in zip(results[-len(wanted) :], wanted, strict=True):
        error = np.abs(got.numpy() - want).max() / np.abs(want).max()
        assert error < 1e-5, f"wrong by {error:.1e}"
    return lambda: work(*args)


def pytorch(
    x: np.ndarray, w: np.ndarray, b: np.ndarray, dy: np.ndarray, repeats: int
) -> dict[str, Work]:
    """The same in PyTorch, if it is there."""
    if torch is None:
        return {}
    tx, tw, tb, tdy = (torch.from_numpy(t) for t in (x, w, b, dy))

    def turns(work: Work) -> Work:
        def turn() -> list[Any]:  # the results are kept, like ours
            with torch.no_grad():
                return [work() for _ in range(repeats)]

        turn()
        return turn

    return {
        "y": turns(lambda: torch.nn.functional.linear(tx, tw, tb)),
        "dx": turns(lambda: tdy @ tw),
        "dw": turns(lambda: (tdy.T @ tx, tdy.sum(0))),
    }


def measure(works: list[Case], threads: int, repeats: int, clock: Callable[[], float]) -> None:
    reference, flops = peak(threads)

    def timed(work: Work) -> float:
        start = clock()
        work()
        return clock() - start

    for _ in range(repeats):
        for case in works:
            case.peaks.append(flops / timed(reference))
            case.seconds["ours"].append(timed(case.ours) / case.repeats)
            if case.theirs is not None:
                case.seconds["theirs"].append(timed(case.theirs) / case.repeats)


def row(case: Case) -> dict[str, Any]:
    """What the turns of a case say: medians, and the ratio's quartiles."""
    ours, theirs = case.seconds["ours"], case.seconds["theirs"]
    shares = [case.flops / t / p for t, p in zip(ours, case.peaks, strict=True)]
    found: dict[str, Any] = {
        "name": case.name,
        "ms": 1e3 * statistics.median(ours),
        "gflops": case.flops / statistics.median(ours) / 1e9,
        "best_gflops": case.flops / min(ours) / 1e9,
        "of_peak": statistics.median(shares),
        "peak_gflops": statistics.median(case.peaks) / 1e9,
    }
    if theirs:
        ratios = [t / o for t, o in zip(theirs, ours, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        found |= {
            "torch_ms": 1e3 * statistics.median(theirs),
            "torch_gflops": case.flops / statistics.median(theirs) / 1e9,
            "torch_best_gflops": case.flops / min(theirs) / 1e9,
            "ratio": middle,
            "ratio_quartiles": [low, high],
        }
    return found


def line(found: dict[str, Any]) -> str:
    text = (
        f"{found['name']:20} {found['ms']:9.3f} ms {found['gflops']:6.1f} GFLOPS "
        f"(best {found['best_gflops']:6.1f}) {found['of_peak']:5.0%} of peak"
    )
    if "ratio" in found:
        low, high = found["ratio_quartiles"]
        text += (
            f"   torch {found['torch_ms']:9.3f} ms {found['torch_gflops']:6.1f} GFLOPS"
            f" (best {found['torch_best_gflops']:6.1f})"
            f"   {found['ratio']:5.2f} x ({low:.2f}-{high:.2f})"
        )
    return text


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(threads=1)
    parser.add_argument("--set", choices=SETS, default="baby")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--cpu-time", action="store_true")
    options = parser.parse_args()
    if options.cpu_time and options.threads > 1:
        parser.error("--cpu-time counts one thread only: leave out --threads")
    multicore.install(options.threads)
    if torch is not None:
        torch.set_num_threads(options.threads)
    works = [case for shape in SETS[options.set] for case in cases(*shape)]
    clock = time.thread_time if options.cpu_time else time.perf_counter
    measure(works, options.threads, max(options.repeats, 2), clock)
    rows = [row(case) for case in works]
    machine = f"{platform.machine()}, {cores()} cores, {options.threads} thread(s)"
    print(f"{machine}; peak {rows[0]['peak_gflops']:.0f} GFLOPS; medians, ratio with its quartiles")
    for found in rows:
        print(line(found))
    print(f"peak memory {peak_memory() / 2**20:.0f} MB")
    result = {
        "machine": platform.platform(),
        "cores": cores(),
        "threads": options.threads,
        "clock": "cpu" if options.cpu_time else "wall",
        "torch": None if torch is None else torch.__version__,
        "rows": rows,
    }
    write_json(options.json, result)


if __name__ == "__main__":
    main()
