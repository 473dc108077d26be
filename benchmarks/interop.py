"""What it takes to bring GPT-2 in from a Hugging Face folder and out again: time and memory.

    python benchmarks/interop.py [--config tiny|gpt2] [--folder DIR] [--threads N] [--rounds R]
                                 [--json FILE]

The folder holds random weights in the shape of GPT-2 124M. Every turn is a process of its own, and
its time counts from before it exists; memory is the most that it ever held (VmHWM). First the way
in and out must give back the tensors bit for bit. Export includes reading the folder back: by
transformers, or by numpy where that is hidden.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import MB, Spread, arguments, machine, show_machine, take_turns, write_json

from tinygpt.config import PRESETS, GPTConfig
from tinygpt.interop.hf.hf_config import config_to_hf
from tinygpt.interop.hf.layout import all_weights, stored_shape
from tinygpt.interop.hf.weight_files import write_file

CONFIGS = {
    "tiny": GPTConfig(vocab_size=512, block_size=32, n_layer=2, n_head=2, n_embd=32),
    "gpt2": GPTConfig(**PRESETS["gpt2"].model),
}
CHILD = """
import sys
hidden, *words = sys.argv[1:]
if hidden == "hidden":
    sys.modules["transformers"] = None
if words[0] == "load":
    from tinygpt import GPT
    model, code = GPT.from_pretrained(words[1]), 0
else:
    from tinygpt.cli import main
    code = main(words)
status = open("/proc/self/status").read()
print(int(status.split("VmHWM:")[1].split()[0]) * 1024, file=sys.__stdout__)
sys.exit(code)
"""


class Turns:
    """Each method is one process; -> its seconds. The memory of the last one is kept."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.folder, self.threads, self.count = folder, threads, 0
        self.peaks: dict[str, int] = {}

    def new(self) -> Path:
        self.count += 1
        return self.folder / f"out{self.count}"

    def process(self, name: str, *words: object, hidden: bool = False) -> float:
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-P", "-c", CHILD, "hidden" if hidden else "", *map(str, words)],
            capture_output=True,
            text=True,
            env=os.environ | {"TINYGPT_THREADS": str(self.threads)},
        )
        seconds = time.perf_counter() - start
        if done.returncode:
            raise SystemExit(f"{name}: {done.stderr}")
        self.peaks[name] = max(self.peaks.get(name, 0), int(done.stdout.split()[-1]))
        return seconds

    def bring_in(self) -> float:
        return self.process("import", "import", "hf", self.folder / "hf", "--out", self.new())

    def bring_in_checked(self) -> float:
        source = self.folder / "hf"
        return self.process(
            "import --check", "import", "hf", source, "--check", "--out", self.new()
        )

    def load(self) -> float:
        return self.process("GPT.from_pretrained", "load", self.folder / "hf")

    def take_out(self, hidden: bool) -> float:
        name = "export, read by numpy" if hidden else "export, read by transformers"
        words = ("export", "hf", self.folder / "run", "--tokenizer", "none", "--out", self.new())
        return self.process(name, *words, hidden=hidden)


def make_folder(folder: Path, config: GPTConfig) -> None:
    """A Hugging Face folder with random weights."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    stored = {name: stored_shape(weight) for name, weight in all_weights(config).items()}
    write_file(
        folder / "model.safetensors",
        stored,
        lambda name: rng.standard_normal(stored[name], np.float32) * np.float32(0.02),
    )
    (folder / "config.json").write_text(json.dumps(config_to_hf(config, None)))


def check(turns: Turns) -> None:
    """In and out again is bit for bit what it was. Raises SystemExit if it is not."""
    folder = turns.folder
    turns.process("", "import", "hf", folder / "hf", "--out", folder / "run")
    turns.process("", "export", "hf", folder / "run", "--tokenizer", "none", "--out", folder / "b")
    name = "model.safetensors"
    if (folder / "hf" / name).read_bytes() != (folder / "b" / name).read_bytes():
        raise SystemExit("the tensors that come out are not those that went in")


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    config = CONFIGS[options.config]
    make_folder(folder / "hf", config)
    turns = Turns(folder, options.threads)
    check(turns)
    works = {
        "import": turns.bring_in,
        "import --check": turns.bring_in_checked,
        "GPT.from_pretrained": turns.load,
        "export, read by transformers": lambda: turns.take_out(hidden=False),
        "export, read by numpy": lambda: turns.take_out(hidden=True),
    }
    found = take_turns(works, options.rounds)
    size = 4 * config.num_params()
    return {
        "bytes": size,
        "turns": {
            name: {
                "seconds": Spread.of(times),
                "peak": turns.peaks[name],
                "models": turns.peaks[name] / size,
            }
            for name, times in found.items()
        },
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--config", choices=CONFIGS, default="gpt2")
    parser.add_argument("--folder", help="on the disk to measure [default: a temporary one]")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each kind")
    options = parser.parse_args()
    where = machine()
    show_machine(where, options.threads)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = measure(options, Path(folder))
    print(f"{options.config}: {found['bytes'] / MB:.0f} MB of weights in float32")
    for name, turn in found["turns"].items():
        print(
            f"{name:30} {turn['seconds'].show()} s, {turn['peak'] / MB:5.0f} MB: "
            f"{turn['models']:.2f} x the weights"
        )
    write_json(
        options.json,
        {"benchmark": "interop", "machine": where, "config": options.config} | found,
    )


if __name__ == "__main__":
    main()
