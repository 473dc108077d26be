"""What the benchmarks share: the machine, sides that take turns, medians, ratios and JSON.

Each side of a comparison, such as ours and PyTorch's, lives in a process of its own and is asked
for one block of work after another, the sides taking turns. So a noisy machine is noisy for all of
them, each has its own peak of memory, and the threads of one, which spin for a while after their
work, are asleep when the other's turn comes. Only the standard library is imported here: it is
part of every start that is measured.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import statistics
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tinygpt.errors import UsageError
from tinygpt.files import strict_json
from tinygpt.files.atomic import check_overwritable, user_path
from tinygpt.machine import start
from tinygpt.machine.resources import cores, total_memory

start()  # every side runs as the product does; before it imports tinygrad

PAUSE = 0.02
"""Seconds between two turns, in which the threads of the one before fall asleep."""
MB = 2**20
CLOCKS = {False: time.perf_counter, True: time.process_time}
"""By whether processor time is asked for. That of other processes does not count in it."""


PROGRAM = "tinygpt benchmark"
MARK = f'"program": "{PROGRAM}"'
"""What each result begins with, by which it is known as one that may be overwritten."""


class SideError(Exception):
    """What went wrong in the process of a side, as text."""


class Side:
    """An object in a process of its own: ``side("method", *args)`` calls it there and waits.

    ``threads`` is the number that tinygpt, OpenMP and torch may use. ``environ`` is set for the
    process alone.
    """

    def __init__(
        self,
        make: Callable[..., Any],
        *args: Any,
        threads: int,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        names = ("TINYGPT_THREADS", "OMP_NUM_THREADS")
        changed = dict.fromkeys(names, str(threads)) | {"PYTHONSAFEPATH": "1", **(environ or {})}
        before = dict(os.environ)
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, args), daemon=True)
        try:
            os.environ.update(changed)
            self._process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        theirs.close()
        self._answer()

    def __call__(self, method: str, *args: Any) -> Any:
        self._pipe.send((method, args))
        return self._answer()

    def close(self) -> None:
        self._pipe.close()  # upon which the process ends by itself
        self._process.join(5)
        self._process.kill()

    def _answer(self) -> Any:
        try:
            ok, value = self._pipe.recv()
        except EOFError:
            raise SideError("the process ended; out of memory?") from None
        if not ok:
            raise SideError(value)
        return value


def _serve(pipe: Any, make: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """What the process of a side does: make the object, then answer calls until the pipe closes."""
    try:
        served = make(*args)
        pipe.send((True, None))
        while True:
            method, args = pipe.recv()
            pipe.send((True, getattr(served, method)(*args)))
    except EOFError:
        pass
    except Exception:
        pipe.send((False, traceback.format_exc()))


@dataclass(frozen=True)
class Spread:
    """The median of some measurements, and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def show(self, form: str = ".2f") -> str:
        return f"{self.median:{form}} ({self.low:{form}}-{self.high:{form}})"


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """How many times the one is the other, turn by turn."""
    return Spread.of([a / b for a, b in zip(numerators, denominators, strict=True)])


def take_turns(works: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each work measures in each round. Whoever was first in a round is last in the next."""
    found: dict[str, list[float]] = {name: [] for name in works}
    order = list(works)
    for _ in range(rounds):
        for name in order:
            time.sleep(PAUSE)
            found[name].append(works[name]())
        order.append(order.pop(0))
    return found


def machine() -> dict[str, Any]:
    """The processor, what runs on it, and how busy it is now."""
    packages = ("tinygpt", "tinygrad", "numpy", "torch", "transformers")
    return {
        "date": date.today().isoformat(),
        "processor": _processor(),
        "cores": cores(),
        "memory_gb": round(total_memory() / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: found for name in packages if (found := _version(name))},
        "load": [round(load, 2) for load in os.getloadavg()],
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    info = {name.strip(): value.strip() for name, _, value in (s.partition(":") for s in lines)}
    flags = info.get("flags", "").split()
    vectors = next((v for v in ("avx512f", "avx2", "avx") if v in flags), "")
    model = f"family {info.get('cpu family', '?')} model {info.get('model', '?')}"
    return f"{info.get('model name', platform.machine())}, {model}, {vectors}".rstrip(", ")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes."""
    parser = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    parser.add_argument("--threads", type=int, default=cores(), help="for each side")
    parser.add_argument(
        "--json", metavar="FILE", type=_json_file, help="write the result there, too"
    )
    return parser


def _json_file(name: str) -> Path:
    """Where a result may be written: argparse says before the first measurement if it may not."""
    try:
        check_overwritable(path := user_path(name), MARK.encode(), "a benchmark's result")
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return path


def add_cpu_time(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cpu-time", action="store_true", help="count processor time: one thread, a busy machine"
    )


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    options = parser.parse_args()
    if options.cpu_time and options.threads > 1:
        parser.error("--cpu-time means something for one thread only: add --threads 1")
    return options


def show_machine(found: Mapping[str, Any], threads: int) -> None:
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    print(
        f"{found['date']}: {found['processor']}; {found['cores']} cores, {threads} thread(s), "
        f"{found['memory_gb']} GB; load {found['load'][0]}"
    )
    print(f"Python {found['python']}, {versions}; medians, and quartiles in brackets")


def write_json(path: Path | None, result: Mapping[str, Any]) -> None:
    """Spreads become objects of their three numbers."""
    if path is not None:
        strict_json.write_json(path, {"program": PROGRAM, **result}, indent=1, other=vars)
