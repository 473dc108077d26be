"""Making tokens of a large text: our shards against tiktoken's own speed, on one core and on more.

    python benchmarks/tokenize_texts.py [--megabytes N] [--processes P] [--rounds R] [--json FILE]

Three ways take turns on the same text of N MB, made of passages of Python's language reference:
tiktoken alone, which reads the file and encodes it with GPT-2's vocabulary in pieces of 1 MB, in
one process; ours in one process; ours in P processes. Ours writes shards with their hashes, and is
checked before: the ids of one and of P processes are equal, and they decode to the text. The peak
of the memory of any process is printed too, for the text and for one four times as long: it is the
same.

Seconds are those of the clock, and in brackets those of the processors, which say more on a machine
with other work.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from common import Spread, arguments, machine, ratio, show_machine, take_turns, write_json

from tinygpt.machine.resources import cores
from tinygpt.text.documents import python_topics
from tinygpt.text.shards import open_shards
from tinygpt.text.tokenizers import BPETokenizer

PIECE = 1 << 20
PASSAGE = 3000
THEIRS = """
import sys
from tinygpt.text.tokenizers import BPETokenizer
encoding = BPETokenizer("gpt2")._encoding
with open(sys.argv[1], encoding="utf-8") as file:
    while piece := file.read(int(sys.argv[2])):
        encoding.encode_ordinary(piece)
"""


def make_text(path: Path, size: int) -> None:
    """About ``size`` bytes of passages in an order of their own."""
    whole, rng = "".join(python_topics()), random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < size:
            at = rng.randrange(len(whole) - PASSAGE)
            file.write(whole[at : at + PASSAGE] + "\n")


def timed(*command: str) -> tuple[float, float]:
    """Seconds of the clock and of the processors that a command takes, children included."""
    before, began = os.times(), time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    after = os.times()
    used = after.children_user + after.children_system
    return time.perf_counter() - began, used - before.children_user - before.children_system


def ours(text: Path, out: Path, processes: int) -> tuple[float, float]:
    shutil.rmtree(out, ignore_errors=True)
    return timed(
        *(sys.executable, "-m", "tinygpt", "tokenize", str(text), "--out", str(out)),
        *("--tokenizer", "gpt2", "--threads", str(processes)),
    )


def peak(text: Path, out: Path) -> int:
    """Bytes of memory that a process takes at most to make the shards of a text."""
    code = (
        "import sys; from tinygpt.cli import main; from tinygpt.machine import resources; "
        "main(sys.argv[1:]); print(resources.peak_memory())"
    )
    words = ["tokenize", str(text), "--out", str(out), "--tokenizer", "gpt2", "--threads", "1"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], check=True, capture_output=True, text=True
    )
    return int(done.stdout)


def check(text: Path, folder: Path, processes: int) -> None:
    """The ids are those of the text, whatever the number of processes."""
    found = []
    for count in (1, processes):
        ours(text, folder / f"check{count}", count)
        found.append(np.asarray(open_shards(folder / f"check{count}")))
    np.testing.assert_array_equal(*found)
    tokenizer = BPETokenizer("gpt2")
    decoded = tokenizer.decode_bytes(found[0][:-1])  # but for the end of the text
    assert decoded == text.read_bytes(), "the ids do not decode to the text"


def main(options: argparse.Namespace) -> None:
    found = machine()
    show_machine(found, options.processes)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text, longer = folder / "text.txt", folder / "longer.txt"
        make_text(text, options.megabytes * 1_000_000)
        check(text, folder, options.processes)
        before = peak(text, folder / "peak")
        make_text(longer, 4 * options.megabytes * 1_000_000)
        after = peak(longer, folder / "longer")
        used: dict[str, list[float]] = {}

        def turn(way: str, run: Callable[[], tuple[float, float]]) -> float:
            clock, processor = run()
            used.setdefault(way, []).append(processor)
            return clock

        many = f"ours, {options.processes} processes"
        ways: dict[str, Callable[[], tuple[float, float]]] = {
            "tiktoken": lambda: timed(sys.executable, "-c", THEIRS, str(text), str(PIECE)),
            "ours": lambda: ours(text, folder / "one", 1),
            many: lambda: ours(text, folder / "many", options.processes),
        }
        seconds = take_turns({n: partial(turn, n, run) for n, run in ways.items()}, options.rounds)
    for way, values in seconds.items():
        rate = options.megabytes / Spread.of(values).median
        processor = Spread.of(used[way])
        print(f"{way:20s} {Spread.of(values).show()} s ({processor.show()}), {rate:.1f} MB/s")
    of_core = ratio(used["tiktoken"], used["ours"])
    scaling = ratio(seconds["ours"], seconds[many])
    print(f"ours, of tiktoken's speed on a core: {of_core.show()}")
    print(f"{many} against one: {scaling.show()} times as fast")
    print(f"memory: {before / 1e6:.0f} MB, and {after / 1e6:.0f} MB for a text four times as long")
    write_json(
        options.json,
        {
            "machine": found,
            "megabytes": options.megabytes,
            "seconds": seconds,
            "processor_seconds": used,
            "of_tiktoken": of_core,
            "scaling": scaling,
            "peak_bytes": [before, after],
        },
    )


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--processes", type=int, default=cores())
    parser.add_argument("--rounds", type=int, default=3)
    main(parser.parse_args())
