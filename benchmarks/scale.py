"""Steps of several ranks and devices, beside what a model of their parts foresees.

    python benchmarks/scale.py [--rounds R] [--smoke] [--cpu-time] [--write docs/scaling.md]
                               [--json FILE]

One model trains on one device, on two devices of one process, and on two and four ranks of this
host, which mpiexec starts (extra mpi; without it those rows are left out). Ranks sum in every step,
or meet every so many steps (``--sync-every``); with and without a link that is emulated, which adds
a delay to each half of an exchange. Every process has one thread.

Before the clock starts: ranks have the losses and the weights of one process, bit for bit; two
devices have its losses to 1e-5; ranks that meet have the same weights then, and a loss near to it.
Then parts and rows take turns. The parts, each by itself: a micro-batch, the update, what a step
costs beside, copies between devices, and exchanges of buffers of several sizes. `cost.py` adds them
up, round by round, and the last column has by how much it is off. ``--write`` puts the tables in
between the lines of a document that are made for them. ``--cpu-time``, for a busy machine, counts
processor time, which says something of one process only.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from common import PAUSE, Spread, arguments, machine, show_machine, write_json
from cost import FLOAT, Host, Link, Parts, Plan, foresee, sent
from scale_past import Measured, remarks, table

from tinygpt.config import PRESETS
from tinygpt.machine.resources import cores

CLOSE, NEAR = 1e-5, 0.05
"""By how much the losses of two devices may differ, and those of ranks that meet, as a part."""
SENT = 0.01
"""And the bytes that are sent: a buffer of weights is shorter than one of gradients by a loss."""
GOAL = 0.10
"""How far a row may be off."""
PATIENCE = 300.0
"""Seconds for an answer, most of which go into compiling."""
ANSWER = Path(__file__).with_name("scale_rank.py")


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    model: dict[str, Any]
    batch_size: int
    micro_batches: int
    worlds: tuple[int, ...]
    """Numbers of ranks."""
    sync_every: int
    delay: float
    checked: int
    """Steps whose losses are compared, a multiple of ``sync_every``."""
    turn: int
    """Steps of a turn, a multiple of ``sync_every``."""
    repeats: int
    """How often a part is timed in a turn."""
    rounds: int

    def plans(self) -> list[Plan]:
        """The rows: those of one process first."""
        M, every, delay = self.micro_batches, self.sync_every, self.delay
        ranks = [n for n in self.worlds if n > 1]
        return [
            Plan(M), Plan(M, devices=2),
            *(Plan(M, n) for n in ranks), *(Plan(M, n, delay=delay) for n in ranks),
            *(Plan(M, n, sync_every=every) for n in ranks),
            *(Plan(M, n, sync_every=every, delay=delay) for n in ranks),
        ]  # fmt: skip


BABY = PRESETS["baby"].model | {"vocab_size": 65}
TINY = BABY | {"n_layer": 1, "n_head": 1, "n_embd": 16, "block_size": 16}
FULL = Sizes(BABY, 12, 4, (1, 2, 4), 10, 0.01, checked=20, turn=10, repeats=7, rounds=20)
SMOKE = Sizes(TINY, 2, 4, (1, 2), 2, 0.001, checked=2, turn=2, repeats=1, rounds=1)


# Processes --------------------------------------------------------------------------------------


def mpiexec() -> str | None:
    """The launcher of the MPI that mpi4py finds, if there is one."""
    found = subprocess.run([sys.executable, "-c", "from mpi4py import MPI"], capture_output=True)
    if found.returncode:
        return None
    beside = Path(sys.prefix, "bin", "mpiexec")
    return str(beside) if beside.exists() else shutil.which("mpiexec")


class World:
    """Processes that train as so many ranks: ``world("method", *args)`` calls it on all of them."""

    def __init__(
        self, ranks: int, sizes: Sizes, launcher: str | None, cpu_time: bool, threads: int = 1
    ) -> None:
        self.folder = tempfile.TemporaryDirectory()  # which only its owner can open
        address = f"{self.folder.name}/{secrets.token_hex(4)}"
        train = {"batch_size": sizes.batch_size, "grad_accum_steps": sizes.micro_batches}
        given = {"model": sizes.model, "train": train, "cpu_time": cpu_time}
        settings = json.dumps(given)
        launch = [launcher or "", "--oversubscribe", "--bind-to", "none", "-n", str(ranks)]
        root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        one = dict.fromkeys(("TINYGPT_THREADS", "OMP_NUM_THREADS"), str(threads))
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(address)
            listening.listen(ranks)
            listening.settimeout(PATIENCE)
            self.process = subprocess.Popen(
                [*(launch if ranks > 1 else []), sys.executable, str(ANSWER), address, settings],
                env=os.environ | root | one | {"PYTHONSAFEPATH": "", "DEV": "CPU"},
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
            self.links = dict[int, Connection]()
            try:
                for _ in range(ranks):
                    link = Connection(listening.accept()[0].detach())
                    self.links[self._answer(link)] = link
            except BaseException:
                self.process.kill()
                raise

    def __call__(self, method: str, *args: Any) -> list[Any]:
        """The answers of all ranks, in order."""
        for link in self.links.values():
            link.send((method, args))
        return [self._answer(self.links[rank]) for rank in sorted(self.links)]

    def _answer(self, link: Connection) -> Any:
        if not link.poll(PATIENCE):
            raise SystemExit(f"A rank has not answered for {PATIENCE:.0f} s.")
        try:
            ok, value = link.recv()
        except EOFError:
            raise SystemExit("A rank has ended; its messages are above.") from None
        if not ok:
            raise SystemExit(value)
        return value

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        for link in self.links.values():
            link.close()  # upon which its process ends by itself
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.terminate()  # mpiexec ends its ranks
            self.process.wait(10)
        self.folder.cleanup()


# Right first ------------------------------------------------------------------------------------


def check(sizes: Sizes, worlds: dict[int, World]) -> list[str]:
    """What is wrong with the losses and weights of the first steps; the runs are made."""
    wrong, wanted, weights = list[str](), list[float](), ""
    for plan in rows(sizes, worlds):
        if plan.delay:
            continue  # the same run, with a delay
        found = worlds[plan.ranks]("losses", plan, sizes.checked)
        losses, hashes = found[0][0], {own for _, own in found}
        if plan == Plan(sizes.micro_batches):
            wanted, (weights,) = losses, hashes
        elif len(hashes) > 1:
            wrong.append(f"{plan.name}: the ranks have different weights")
        elif plan.sync_every:
            mean = sum(own[-1] for own, _ in found) / plan.ranks
            if off(mean, wanted[-1]) > NEAR:
                wrong.append(f"{plan.name}: the last loss is {mean}, and should be {wanted[-1]}")
        elif plan.devices > 1:
            if max(off(a, b) for a, b in zip(losses, wanted, strict=True)) > CLOSE:
                wrong.append(f"{plan.name}: the losses are {losses}, and should be {wanted}")
        elif (losses, hashes) != (wanted, {weights}):
            wrong.append(f"{plan.name}: losses or weights are not those of one device")
    return wrong


def check_traffic(sizes: Sizes, worlds: dict[int, World], size: int) -> list[str]:
    """Where ranks send other than what is foreseen: all of them together, for their shares differ
    by a number where the size does not divide."""
    wrong = []
    for plan in rows(sizes, worlds):
        if plan.ranks == 1 or plan.delay:
            continue
        found = sum(worlds[plan.ranks]("sent", plan, sizes.turn))
        if off(found, plan.ranks * sent(plan, size)) > SENT:
            wrong.append(f"{plan.name}: {found} bytes were sent in a step")
    return wrong


def off(found: float, wanted: float) -> float:
    return abs(found / wanted - 1)


def rows(sizes: Sizes, worlds: dict[int, World]) -> list[Plan]:
    return [plan for plan in sizes.plans() if plan.ranks in worlds]


# Then the clock ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Round:
    """What one round has measured: seconds of each part, of exchanges by size, and of steps."""

    parts: dict[int, dict[str, float]]
    """By how many ranks were at work at once."""
    exchanges: dict[int, dict[int, float]]
    between: dict[int, float]
    """Of 16 copies between devices there and back, by size."""
    steps: dict[Plan, float]

    def host(self, size: int, tensors: int) -> Host:
        return Host(
            cores(), size, tensors,
            {n: Parts(found["micro_batch"], found["carry"], found["update"], found["fixed"],
                      found["meeting"], {2: found[SPREAD]} if SPREAD in found else {})
             for n, found in self.parts.items()},
            {n: Link.of_ranks(n, dict(found)) for n, found in self.exchanges.items()},
            Link.fit(32, 32, dict(self.between)),
        )  # fmt: skip


SPREAD = "micro_batch 2"
PARTS = "micro_batch", SPREAD, "carry", "update", "fixed", "meeting"


def parts_of(ranks: int) -> list[str]:
    """The parts that matter for so many ranks: each of several has one device."""
    return [part for part in PARTS if part != SPREAD or ranks == 1]


def buffers(size: int) -> list[int]:
    """Sizes of the buffers that are exchanged: multiples of a float."""
    return [size // 64 // 4 * 4, size // 8 // 4 * 4, size // 2 // 4 * 4, 2 * size]


def measure(sizes: Sizes, worlds: dict[int, World], size: int) -> Iterator[Round]:
    """The rounds. What comes first in one is last in the next."""
    order = rows(sizes, worlds)
    for _ in range(sizes.rounds):
        parts = {
            n: {part: timed(sizes, worlds[n], n, part) for part in parts_of(n)}
            for n in worlds
            if n <= cores()
        }
        exchanges = {
            n: {s: timed(sizes, worlds[n], n, f"exchange {s}") for s in buffers(size)}
            for n in worlds
            if n > 1
        }
        spread = [size // 256 // 4 * 4, size // 16 // 4 * 4]
        between = {s: timed(sizes, worlds[1], 1, f"devices {s}") for s in spread}
        steps = {plan: slowest(worlds[plan.ranks], "seconds", plan, sizes.turn) for plan in order}
        order.append(order.pop(0))
        yield Round(parts, exchanges, between, steps)


def timed(sizes: Sizes, world: World, ranks: int, part: str) -> float:
    """Seconds of a part; of micro-batches as many in a row as a rank has in a step."""
    burst = sizes.micro_batches // ranks if part.startswith("micro_batch") else 1
    return slowest(world, "part", part, sizes.repeats, burst)


def slowest(world: World, *call: Any) -> float:
    time.sleep(PAUSE)
    return float(max(world(*call)))


# And the tables ---------------------------------------------------------------------------------


def table_of_rows(rounds: Sequence[Round], size: int, tensors: int) -> tuple[list[str], int]:
    """A row of Markdown for each plan, and how many are off by more than the goal."""
    lines, far = (
        [
            "| | measured | foreseen | computing | update | exchange | sent by a rank | off |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
        ],
        0,
    )
    hosts = [found.host(size, tensors) for found in rounds]
    for plan in rounds[0].steps:
        measured = Spread.of([1000 * found.steps[plan] for found in rounds])
        foreseen = [foresee(host, plan) for host in hosts]
        error = Spread.of(
            [f.seconds / r.steps[plan] - 1 for f, r in zip(foreseen, rounds, strict=True)]
        ).median
        far += abs(error) > GOAL
        parts = [
            1000 * Spread.of([getattr(step, name) for step in foreseen]).median
            for name in ("seconds", "compute", "update", "exchange")
        ]
        shown = [f"{ms:.1f}" for ms in parts]
        lines.append(
            f"| {plan.name} | {measured.show('.1f')} ms | {shown[0]} ms | {shown[1]} | {shown[2]} "
            f"| {shown[3]} | {sent(plan, size) / 1e6:.2f} MB | {error:+.0%} |"
        )
    return lines, far


def table_of_parts(rounds: Sequence[Round], size: int, tensors: int) -> list[str]:
    """What was measured of the parts."""
    lines = ["| part | by itself | with all cores at work |", "| --- | --- | --- |"]
    worlds = sorted(rounds[0].parts)
    for part in PARTS:
        shown = [
            Spread.of([1000 * found.parts[n][part] for found in rounds]).show(".2f") + " ms"
            if part in rounds[0].parts[n]
            else ""
            for n in (worlds[0], worlds[-1])
        ]
        lines.append(f"| {NAMES[part]} | {shown[0]} | {shown[1] if len(worlds) > 1 else ''} |")
    hosts = [found.host(size, tensors) for found in rounds]
    links = {f"between {n} ranks": [host.links[n] for host in hosts] for n in hosts[0].links}
    links["between two devices"] = [host.devices for host in hosts if host.devices]
    lines += ["", "| link | a message | its bytes |", "| --- | --- | --- |"]
    for name, found in links.items():
        latency = Spread.of([1e6 * link.latency for link in found])
        slowness = Spread.of([1e12 / link.bandwidth for link in found])  # ps/byte: 0 where noise is
        lines.append(f"| {name} | {latency.show('.0f')} µs | {slowness.show('.0f')} µs/MB |")
    return lines


NAMES = {
    "micro_batch": "a micro-batch, forward and backward",
    SPREAD: "the same, spread over two devices",
    "carry": "one buffer of gradients added to another",
    "update": "clipping and AdamW",
    "fixed": "what else there is in a step",
    "meeting": "a meeting without its exchange",
}


def fill(text: str, name: str, lines: Sequence[str]) -> str:
    """A document with these lines between the comments ``<!-- name -->`` and ``<!-- /name -->``."""
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise SystemExit(f"The document has no place for {name}: {begin.strip()} and {end}")
    pattern = re.escape(begin) + ".*?" + re.escape(end)
    filled = begin + "\n".join(lines) + "\n" + end
    return re.sub(pattern, lambda _: filled, text, flags=re.S)


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to try the program")
    parser.add_argument("--cpu-time", action="store_true", help="of one process: a busy machine")
    parser.add_argument("--write", type=Path, metavar="DOCUMENT", help="fill in its tables")
    options = parser.parse_args()
    sizes = SMOKE if options.smoke else FULL
    if options.rounds:
        sizes = Sizes(**{**asdict(sizes), "rounds": options.rounds})
    text = options.write.read_text("utf-8") if options.write else None
    launcher = None if options.cpu_time else mpiexec()
    if options.cpu_time:
        print("Processor time: without rows of several ranks, which also wait for one another.")
    elif launcher is None:
        print("Without mpi4py and mpiexec (extra mpi) there are no rows of several ranks.")
    with ExitStack() as stack:
        worlds = {
            n: stack.enter_context(World(n, sizes, launcher, options.cpu_time))
            for n in sizes.worlds
            if n == 1 or launcher
        }
        if wrong := check(sizes, worlds):
            print("\n".join(wrong))
            return 1
        size, tensors = worlds[1]("shape")[0]
        if wrong := check_traffic(sizes, worlds, size):
            print("\n".join(wrong))
            return 1
        found = machine()
        show_machine(found, 1)
        rounds = list(measure(sizes, worlds, size))
    if options.smoke:
        here = Measured(2.0, 0.1)
    else:
        with World(1, sizes, None, options.cpu_time, threads=options.threads) as world:
            here = Measured(*world("gpt2")[0])
    past = [*table(here), "", *remarks(here)]
    parts = table_of_parts(rounds, size, tensors)
    steps, far = table_of_rows(rounds, size, tensors)
    print("\n".join([*parts, "", *steps, "", *past]))
    if text is not None:
        caption = describe(found, sizes, size)
        text = fill(text, "scale: parts", [caption, "", *parts])
        text = fill(fill(text, "scale: rows", steps), "scale: past", past)
        options.write.write_text(text, "utf-8")
    write_json(
        options.json, {"machine": found, "sizes": sizes, "rounds": in_json(rounds), "gpt2": here}
    )
    return 1 if far and not options.smoke else 0


def describe(found: dict[str, Any], sizes: Sizes, size: int) -> str:
    return (
        f"{found['date']}: {found['processor']}, {found['cores']} cores, load {found['load'][0]}; "
        f"{size / FLOAT / 1e6:.2f} M parameters, {sizes.micro_batches} micro-batches of "
        f"{sizes.batch_size} x {sizes.model['block_size']} a step, one thread a process; medians "
        f"of {sizes.rounds} rounds, and quartiles in brackets."
    )


def in_json(rounds: Sequence[Round]) -> list[dict[str, Any]]:
    """JSON has only names for keys."""
    return [
        {
            "parts": {str(n): parts for n, parts in found.parts.items()},
            "exchanges": {
                str(n): {str(s): t for s, t in by_size.items()}
                for n, by_size in found.exchanges.items()
            },
            "devices": {str(s): t for s, t in found.between.items()},
            "steps": {plan.name: seconds for plan, seconds in found.steps.items()},
        }
        for found in rounds
    ]


if __name__ == "__main__":
    sys.exit(main())
