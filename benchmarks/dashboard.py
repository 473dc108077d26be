"""The dashboard: how soon a page shows ten long runs, and what it costs a training to be watched.

    python benchmarks/dashboard.py [--rounds R] [--threads N] [--cpu-time] [--json FILE]

First: ten runs of 10,000 steps, in a server that has just started, whose first page this is, and in
one that has read them. Two times of a page in headless Chromium: the first paint, and when all
curves are there. Then the steps of `baby` in turns: with nobody watching, and with a page that
listens. It draws nothing, as one on another machine: what Chromium needs for that it takes from
the training only where both have the same cores.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import Spread, add_cpu_time, arguments, machine, parse, ratio, show_machine, write_json

RUNS, STEPS = 10, 10_000
TURN = 5.0
"""Seconds of training in one turn."""
CHROMIUM = "/usr/bin/chromium"


def make_runs(folder: Path) -> None:
    """Runs as training writes them."""
    for i in range(RUNS):
        draw, run = random.Random(i), folder / f"run-{i}"
        run.mkdir()
        settings = f"[model]\nn_layer = 4\n\n[train]\nmax_iters = {STEPS}\nseed = {i}\n"
        (run / "config.toml").write_text(settings)
        with (run / "metrics.jsonl").open("w") as file:
            for step in range(1, STEPS + 1):
                file.write(json.dumps(_row(step, draw)) + "\n")


def _row(step: int, draw: random.Random) -> dict[str, Any]:
    loss = 1.5 + 2.5 * math.exp(-step / 900) + draw.gauss(0, 0.07)
    norm = 0.4 + abs(draw.gauss(0, 0.1))
    validation = {"val_loss": loss + 0.1, "best": False} if step % 250 == 0 else {}
    layers = {name: round(norm * draw.random(), 4) for name in ("wte", "wpe", "h.0", "h.1", "ln_f")}
    return {"iter": step, "train_loss": loss, **validation, "lr": 1e-3, "grad_norm": norm,
            "tokens_per_second": draw.gauss(16_000, 500), "elapsed": step * 0.05,
            "memory": 320_000_000, "grad_norms": layers}  # fmt: skip


@contextlib.contextmanager
def said_address(*words: object, threads: int) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run the program; -> the link of its dashboard, as soon as it says one."""
    command = [sys.executable, "-P", "-m", "tinygpt", *map(str, words), "--threads", str(threads)]
    own = {name: value for name, value in os.environ.items() if name != "TINYGPT_API_KEY"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=own)
    assert process.stderr is not None
    try:
        found = (_address(line) for line in iter(process.stderr.readline, ""))
        address = next((match[1] for match in found if match), None)
        if address is None:
            sys.exit(f"{' '.join(command)} did not begin.")
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield address, process
    finally:
        process.terminate()
        process.wait()


def _address(line: str) -> re.Match[str] | None:
    return re.search(r"dashboard: (http://\S+#key=\S+)", line)


def paints(address: str, rounds: int) -> dict[str, list[float]]:
    """Milliseconds from asking for the page to its first paint, and to all of its curves."""
    from playwright.sync_api import sync_playwright

    times: dict[str, list[float]] = {"first paint": [], "all curves": []}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        browser.new_page().goto("about:blank")  # the browser's own start is not the page's
        for _ in range(rounds):
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.goto(address, wait_until="commit")
            page.wait_for_selector("html[data-ready]")
            page.wait_for_function("document.querySelectorAll('#settings thead th').length > 10")
            now, painted = page.evaluate(
                "() => [performance.now(), performance.getEntriesByType('paint')[0].startTime]"
            )
            times["first paint"].append(painted)
            times["all curves"].append(now)
            page.close()
        browser.close()
    return times


class Listener:
    """A page that takes every event and draws nothing."""

    def __init__(self, link: str) -> None:
        address, _, key = link.partition("/#key=")

        def ask(path: str, **headers: str) -> Any:
            given = {"Authorization": f"Bearer {key}", **headers}
            return urllib.request.urlopen(urllib.request.Request(address + path, headers=given))

        with ask("/dashboard/runs") as answer:
            run = json.load(answer)["runs"][0]["id"]
        with ask(f"/dashboard/runs/{run}/curves") as answer:
            curves = json.load(answer)
        cursor = f"{run}:{curves['rows']}:{curves['mark']}"
        self.stream = ask("/dashboard/events", **{"Last-Event-ID": cursor})
        self.heard = 0
        self.over = False
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        with contextlib.suppress(Exception):
            while not self.over and (line := self.stream.readline()):
                self.heard += len(line)
        self.stream.close()


def watched(rounds: int, threads: int, cpu_time: bool, folder: Path) -> dict[str, list[float]]:
    """Milliseconds of a step, alone and watched, in turns; processor time counts the server's."""
    words = ["train", "auto", "--preset", "baby", "--max-iters", "1000000"]
    words += ["--eval-interval", "100000", "--out", folder, "--dashboard"]
    times: dict[str, list[float]] = {"alone": [], "watched": []}
    with said_address(*words, "--dashboard-port", "0", threads=threads) as (address, process):
        metrics = folder / "metrics.jsonl"
        while not metrics.exists() or _rows(metrics) < 100:
            time.sleep(0.5)  # compiling
        for i in range(2 * rounds):
            name = ("alone", "watched", "watched", "alone")[i % 4]
            listener = Listener(address) if name == "watched" else None
            before, clock = _rows(metrics), _clock(process.pid, cpu_time)
            time.sleep(TURN)
            seconds = _clock(process.pid, cpu_time) - clock
            times[name].append(1000 * seconds / (_rows(metrics) - before))
            if listener is not None:
                assert listener.heard > 0, "nothing was sent"
                listener.over = True
                time.sleep(1.0)  # it hears that it is over with the next event
    return times


def _rows(metrics: Path) -> int:
    return metrics.read_bytes().count(b"\n")


def _clock(pid: int, cpu_time: bool) -> float:
    """Seconds now, or those that the processors have spent on a process."""
    if not cpu_time:
        return time.perf_counter()
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = arguments(__doc__)
    add_cpu_time(parser)
    parser.add_argument("--rounds", type=int, default=6, help="turns of each (default: 6)")
    options = parse(parser)
    found = machine()
    show_machine(found, options.threads)
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_runs(folder)
        with said_address("dashboard", folder, "--port", "0", threads=1) as (address, _):
            result["page"] = paints(address, options.rounds)
        result["step"] = watched(
            options.rounds, options.threads, options.cpu_time, folder / "training"
        )
    for name, values in result["page"].items():
        again = Spread.of(values[1:])
        print(f"{name}: {values[0]:.0f} ms, again {again.show('.0f')} ms")
    for name, values in result["step"].items():
        print(f"step, {name}: {Spread.of(values).show()} ms")
    print(f"watched/alone: {ratio(result['step']['watched'], result['step']['alone']).show('.3f')}")
    write_json(options.json, {"machine": found, **result})


if __name__ == "__main__":
    main()
