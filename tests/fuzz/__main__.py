"""Fuzz the loaders: ``python -m tests.fuzz --minutes 10 [--plain] [target …]``.

With atheris the mutations are led by coverage; without it, or with --plain, they are drawn from a
seed. The time is shared out among the targets, which run one after another in processes of their
own. What is found is kept in --keep, and makes the exit code 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

MEMORY = 4 << 30
"""Bytes of address space for a process: what no tracemalloc sees is limited as well."""
LONGEST = 1 << 13
KEEP = Path(tempfile.gettempdir()) / "tinygpt-fuzz-findings"
HANG = 300
"""Seconds that a process may take beyond its time: to start, and for its last file."""


@dataclass
class Outcome:
    """What became of one target."""

    name: str
    executions: int
    edges: int | None
    """Branches reached, as libFuzzer counts them; None without it."""
    finding: str


def main() -> int:
    options = _options()
    if options.worker:
        (target,) = options.targets
        return _work(target, options)
    names = options.targets or _names()
    seconds = max(1, round(options.minutes * 60 / len(names)))
    how = "plain mutations" if options.plain else "atheris"
    print(f"{how}, {len(names)} targets of {seconds} s each", flush=True)
    outcomes = []
    for name in names:
        outcomes.append(_run(name, seconds, options))
        print(_line(outcomes[-1]), flush=True)
    found = [o for o in outcomes if o.finding]
    total = sum(o.executions for o in outcomes)
    print(f"{total:,} executions, {len(found)} targets with a finding")
    if found:
        print(f"The files are in {options.keep}; add them to tests/fuzz/corpus.py.")
    return 1 if found else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", help="which loaders; all of them if none is named")
    parser.add_argument("--minutes", type=float, default=1.0, help="for all targets together")
    parser.add_argument("--plain", action="store_true", help="no atheris")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, default=KEEP, help="folder for what is found")
    parser.add_argument("--worker", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.plain = options.plain or importlib.util.find_spec("atheris") is None
    return options


def _names() -> list[str]:
    from tests.fuzz.targets import TARGETS

    return list(TARGETS)


def _run(name: str, seconds: int, options: argparse.Namespace) -> Outcome:
    """One target in a process of its own, which a crash in C may end."""
    words = [sys.executable, "-m", "tests.fuzz", name, "--worker", str(seconds)]
    words += ["--seed", str(options.seed), "--keep", str(options.keep)]
    words += ["--plain"] if options.plain else []
    try:
        process = subprocess.run(words, capture_output=True, text=True, timeout=seconds + HANG)
    except subprocess.TimeoutExpired:
        return Outcome(name, 0, None, "hangs, and not in Python")
    text = process.stdout + process.stderr
    executions = re.findall(r"number_of_executed_units: *(\d+)", text)
    edges = re.findall(r"cov: (\d+)", text)
    finding = ""
    if process.returncode:
        told = re.findall(r"Finding: (.*)", text)
        finding = told[-1] if told else f"ended with {process.returncode}: {text[-2000:]}"
    return Outcome(
        name,
        int(executions[-1]) if executions else 0,
        int(edges[-1]) if edges else None,
        finding,
    )


def _line(outcome: Outcome) -> str:
    edges = "" if outcome.edges is None else f"{outcome.edges:>8,} edges"
    finding = f"  FOUND {outcome.finding}" if outcome.finding else ""
    return f"{outcome.name:<12} {outcome.executions:>10,} executions {edges}{finding}"


# In the process of one target ---------------------------------------------------------------------


def _work(name: str, options: argparse.Namespace) -> int:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    options.keep.mkdir(parents=True, exist_ok=True)
    return _plain(name, options) if options.plain else _guided(name, options)


def _plain(name: str, options: argparse.Namespace) -> int:
    from tests.fuzz.mutation import mutated
    from tests.fuzz.targets import TARGETS

    seeds, function = _seeds(TARGETS[name][0]), TARGETS[name][1]
    rng = random.Random(options.seed)
    end, count = time.monotonic() + options.worker, 0
    while time.monotonic() < end:
        data = mutated(rng, seeds)
        try:
            function(data)
        except BaseException:
            (options.keep / f"{name}-{options.seed}-{count}").write_bytes(data)
            raise
        count += 1
    print(f"number_of_executed_units: {count}")
    return 0


def _guided(name: str, options: argparse.Namespace) -> int:
    import atheris

    with atheris.instrument_imports(include=["tinygpt", "tomllib", "json"]):
        from tests.fuzz.targets import TARGETS
    kind, function = TARGETS[name]
    with tempfile.TemporaryDirectory() as temporary:
        for number, seed in enumerate(_seeds(kind)):
            (Path(temporary) / str(number)).write_bytes(seed)
        atheris.Setup(
            [
                sys.argv[0],
                f"-max_total_time={options.worker:.0f}",
                f"-max_len={LONGEST}",
                f"-seed={options.seed}",
                f"-artifact_prefix={options.keep}/{name}-",
                "-rss_limit_mb=4096",
                "-timeout=60",
                "-print_final_stats=1",
                temporary,
            ],
            function,
        )
        atheris.Fuzz()
    return 0


def _seeds(kind: str) -> list[bytes]:
    from tests.fuzz.corpus import GOOD, cases

    bad = [case.content for case in cases() if case.kind == kind and case.content is not None]
    return [GOOD[kind], *(content for content in bad if len(content) <= LONGEST)]


if __name__ == "__main__":
    sys.exit(main())
