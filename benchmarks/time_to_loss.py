"""How much of a text each side has learned after so many seconds, from the start of its process.

    python benchmarks/time_to_loss.py [TEXT ...] [--budgets 15 75 600] [--seeds 3] [--sides S ...]
                                      [--goals] [--ours FLAGS] [--threads N] [--json FILE]

TEXT is shakespeare, pydocs, code, chinese (``texts.py`` says what they are), NAME=PATH for one of
them that lies elsewhere, or the path of another text; without any, all four. One that is not here
is left out, with a line that says how to get it.

A side is ``ours``, which is ``tinygpt train TEXT --minutes BUDGET``, or a recipe of ``peers.py``.
The last tenth of the text is held out, and all of it is read once training is over and the clock
has stopped: bits per byte, which do not depend on the tokenizer. The time counts from before the
process exists: imports, reading the text, making a tokenizer, compiling. Caches of compiled code
are warm on every side. A peer gets as many steps as fit, by its pace measured in a process of its
own and corrected by each run, eager or compiled, whichever fits more; its schedule ends with them.

``--goals`` runs nanoGPT's recipe for a CPU to its end, in both ways and with its evaluations; then
ours for a tenth of the time that the faster way took, and for as long.
"""

from __future__ import annotations

import json
import math
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common import (
    Side,
    SideError,
    Spread,
    arguments,
    machine,
    show_machine,
    write_json,
)
from peers import RECIPES, Peer
from texts import READERS, MissingError, Text, read

from tinygpt.text.tokenizers import load_tokenizer

OURS = "ours"
FEWEST_STEPS = 10
"""A peer of which not even so many fit into a budget is left out."""
SHORT = 60.0
"""Seconds of a budget below which compiling counts: ours then runs once before it counts."""
SOONER = 10
"""In one of so many parts of its time the loss of nanoGPT's recipe should be reached."""


@dataclass(frozen=True)
class Outcome:
    """What one run came to."""

    seconds: float
    """From before its process existed until it had trained."""
    bits_per_byte: float
    """Over the whole held-out part."""
    steps: int
    how: str = ""
    """The way of a peer, or the settings of ours."""


class OurSide:
    """``tinygpt train``, as a user runs it."""

    def __init__(self, text: Text, path: Path, options: Any) -> None:
        self.text, self.path, self.options = text, path, options
        self.warm: set[str] = set()

    def run(self, budget: float, seed: int) -> Outcome:
        flags = self.options.ours or f"--minutes {budget:g}s"
        if budget < SHORT and flags not in self.warm:
            self.with_flags(flags, seed)
            self.warm.add(flags)
        return self.with_flags(flags, seed)

    def with_flags(self, flags: str, seed: int) -> Outcome:
        with tempfile.TemporaryDirectory() as folder:
            out, held_out = Path(folder, "run"), Path(folder, "held-out.txt")
            start = time.perf_counter()
            given = [str(self.path), "--out", str(out), "--seed", str(seed), *shlex.split(flags)]
            found = self._tinygpt("train", *given)
            seconds = time.perf_counter() - start
            held_out.write_bytes(self.text.text[self._cut(out) :].encode())
            read = self._tinygpt("eval", str(out), "--data", str(held_out))
            settings = (out / "config.toml").read_text("utf-8")
        return Outcome(seconds, read["bits_per_byte"], found["iter"], settings)

    def _cut(self, out: Path) -> int:
        """The first character that the run did not train on, or later: it holds out tokens."""
        tokenizer = load_tokenizer(out / "tokenizer.json")
        tokens = tokenizer.encode(self.text.text)
        return max(self.text.cut, len(tokenizer.decode(tokens[: int(len(tokens) * 0.9)])))

    def _tinygpt(self, *words: str) -> dict[str, Any]:
        threads = ("--threads", str(self.options.threads), "--json")
        command = [sys.executable, "-m", "tinygpt", *words, *threads]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SideError(f"{shlex.join(command)}\n{done.stderr}")
        return json.loads(done.stdout)


class PeerSide:
    """A recipe in PyTorch; what its start and a step take is measured once for each way."""

    def __init__(self, name: str, text: Text, path: Path, options: Any) -> None:
        self.args = (name, str(path), text.cut, options.threads)
        self.threads = options.threads
        self.measured: dict[bool, tuple[float, float]] = {}
        """Whether it is compiled → seconds to the first steps' end, and seconds a step."""

    def run(self, budget: float, seed: int) -> Outcome | None:
        """None where no run fits."""
        if not self.measured:
            self.measured = {compiled: self._probe(compiled) for compiled in (False, True)}
        steps = {way: int((budget - begin) / step) for way, (begin, step) in self.measured.items()}
        compiled = max(steps, key=lambda way: steps[way])
        if steps[compiled] < FEWEST_STEPS:
            return None
        found = self.train(compiled, seed, steps[compiled])
        begin = self.measured[compiled][0]
        self.measured[compiled] = begin, (found.seconds - begin) / found.steps
        return found

    def train(self, compiled: bool, seed: int, steps: int, evaluating: bool = False) -> Outcome:
        start = time.perf_counter()
        side = Side(Peer, *self.args, threads=self.threads)
        side("prepare", compiled, seed)
        side("train", steps, evaluating)
        seconds = time.perf_counter() - start
        nats, size = side("nats")
        side.close()
        way = "compiled" if compiled else "eager"
        return Outcome(seconds, nats / size / math.log(2), steps, way)

    def _probe(self, compiled: bool) -> tuple[float, float]:
        """The second start counts: then what was compiled is in its cache."""
        for _ in range(1 + compiled):
            start = time.perf_counter()
            side = Side(Peer, *self.args, threads=self.threads)
            side("prepare", compiled, 0)
            begin = time.perf_counter() - start
            step = side("pace")
            side.close()
        return begin, step


def sides(text: Text, path: Path, options: Any) -> dict[str, OurSide | PeerSide]:
    return {
        name: OurSide(text, path, options) if name == OURS else PeerSide(name, text, path, options)
        for name in options.sides
    }


def row(text: str, budget: float, side: str, outcomes: list[Outcome]) -> dict[str, Any]:
    bits = [outcome.bits_per_byte for outcome in outcomes]
    return {
        "text": text, "budget": budget, "side": side,
        "seconds": Spread.of([outcome.seconds for outcome in outcomes]),
        "bits_per_byte": Spread.of(bits), "least": min(bits), "most": max(bits),
        "runs": [asdict(outcome) for outcome in outcomes],
    }  # fmt: skip


def show(found: dict[str, Any]) -> None:
    runs = found["runs"]
    steps = statistics.median(run["steps"] for run in runs)
    how = runs[0]["how"] if found["side"] in RECIPES else ""
    print(
        f"{found['text']:12} {found['budget']:5g} s  {found['side']:12} {steps:6g} steps  "
        f"{found['seconds'].show('.1f')} s  {found['bits_per_byte'].median:.4f} bits per byte "
        f"({found['least']:.4f}-{found['most']:.4f})  {how}",
        flush=True,
    )


def measure(text: Text, path: Path, options: Any) -> Iterator[dict[str, Any]]:
    """A row for each budget and side. The sides take turns, one run at a time."""
    lanes = sides(text, path, options)
    for budget in options.budgets:
        outcomes: dict[str, list[Outcome]] = {name: [] for name in lanes}
        for seed in range(options.seeds):
            for name, lane in lanes.items():
                try:
                    if found := lane.run(budget, seed):
                        outcomes[name].append(found)
                except SideError as error:  # the others, and the hours before, still count
                    print(f"{text.name:12} {budget:5g} s  {name:12} failed: {error}", flush=True)
        for name, found in outcomes.items():
            if found:
                yield row(text.name, budget, name, found)
            else:
                print(f"{text.name:12} {budget:5g} s  {name:12} no run: see above, or too short")
        medians = {name: median(found) for name, found in outcomes.items() if found}
        if OURS in medians and len(medians) > 1:
            ours, best = medians.pop(OURS), min(medians, key=lambda name: medians[name])
            print(f"{'':12} {1 - ours / medians[best]:.1%} fewer bits than the best peer, {best}")


def median(outcomes: list[Outcome]) -> float:
    return statistics.median(outcome.bits_per_byte for outcome in outcomes)


def goals(text: Text, path: Path, options: Any) -> Iterator[dict[str, Any]]:
    """nanoGPT's recipe to its end, ours in a tenth of that time, and ours in the same time."""
    peer, ours = PeerSide("nanogpt-cpu", text, path, options), OurSide(text, path, options)
    steps, seeds = RECIPES["nanogpt-cpu"].train["max_iters"], range(options.seeds)
    peer.train(True, 0, FEWEST_STEPS)  # for the caches
    ways = [[peer.train(way, seed, steps, True) for seed in seeds] for way in (False, True)]
    for way in ways:
        yield row(text.name, 0, "nanogpt-cpu", way)
    whole = min(statistics.median(run.seconds for run in way) for way in ways)
    for share in (SOONER, 1):
        found = [ours.run(whole / share, seed) for seed in seeds]
        yield row(text.name, whole / share, OURS, found)
        took = statistics.median(run.seconds for run in found) / whole
        print(f"{'':12} {took:.1%} of nanoGPT's time: its loss {nats(ways[0])}, ours {nats(found)}")


def nats(outcomes: list[Outcome]) -> str:
    """The loss where a character is a byte."""
    return f"{median(outcomes) * math.log(2):.3f} nats per byte"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("texts", nargs="*", default=list(READERS), metavar="TEXT")
    parser.add_argument("--budgets", nargs="+", type=float, default=[15, 75, 600])
    parser.add_argument("--seeds", type=int, default=3)
    names = [OURS, *RECIPES]
    parser.add_argument("--sides", nargs="+", choices=names, default=names)
    parser.add_argument("--ours", metavar="FLAGS", help="of tinygpt train, instead of --minutes")
    parser.add_argument("--goals", action="store_true", help="measure what nanoGPT's recipe takes")
    options = parser.parse_args()
    where = machine()
    show_machine(where, options.threads)
    result = {"benchmark": "time_to_loss", "machine": where, "threads": options.threads}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for word in options.texts:
            try:
                text = read(word)
            except MissingError as error:
                print(f"{word} is left out. {error}")
                continue
            path = Path(folder, f"{text.name}.txt")
            path.write_bytes(text.text.encode())
            try:
                for found in (goals if options.goals else measure)(text, path, options):
                    rows.append(found)
                    show(found)
                    write_json(options.json, result | {"rows": rows})
            except SideError as error:
                raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
