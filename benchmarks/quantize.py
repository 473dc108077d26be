"""Generation with rounded weights, of 16 bits and int8: against our own float32, and their memory.

    python benchmarks/quantize.py [--config baby|gpt2] [--threads N] [--rounds R]
                                  [--cpu-time] [--json FILE]

Batch 1, greedy, random weights from one checkpoint, the same for both sides. A turn is one call
that fills the cache with a prompt and then yields token after token as a number in Python. First
the int8 side has to agree on the logits of a text, read token by token through the cache, with its
plain twins and with a float32 model of the numbers that its int8 ones stand for; and the sides of
16 bits, whose activations are rounded too, with such a model more coarsely. The memory is the peak
of a process that loads the checkpoint and generates.
"""

from __future__ import annotations

import tempfile
from functools import partial
from typing import Any

import numpy as np
from common import (
    MB,
    Side,
    Spread,
    add_cpu_time,
    arguments,
    machine,
    parse,
    ratio,
    show_machine,
    take_turns,
    write_json,
)
from generate import SETTINGS, Generator

from tinygpt.config import SampleConfig

TOLERANCE = 1e-3
"""By which the logits may differ, of a text of random weights: they are about 1. Activations that
are rounded to int16 change them by some 1e-4."""
HALF_TOLERANCE = 0.03
"""The same where activations have 16 bits."""


KINDS = ("float32", "bfloat16", "float16", "int8")


class Loaded(Generator):
    """A checkpoint as it is, or rounded while it is read."""

    def __init__(self, name: str, path: str, kind: str) -> None:
        from tinygpt.api import load
        from tinygpt.generation.decoder import Decoder
        from tinygpt.generation.generate import generate_tokens

        super().__init__(name)
        int8 = kind == "int8"
        self.model, _ = load(path, "int8" if int8 else None, "float32" if int8 else kind)
        self.decoder, self.generate = Decoder(self.model), generate_tokens

    def logits(self) -> np.ndarray:
        """(16, V): behind the prompt and behind the tokens after it, one by one."""
        from tinygpt.generation.decoder import Sequence

        sequence, found = Sequence(self.prompt), []
        for token in self.text[self.setting.prompt :]:
            found.append(self.decoder.next_logits([sequence])[0])
            sequence.ids.append(int(token))
        return np.stack(found)

    def greedy(self, count: int) -> list[int]:
        tokens = self.generate(self.decoder, [self.prompt], count, SampleConfig(temperature=0.0))
        return [int(token) for (token,) in tokens]

    def weights(self) -> int:
        from tinygpt.model.int8 import sizes

        return sizes(self.model)[1]


class Twin(Loaded):
    """The same int8 weights, computed with by the plain twins."""

    def logits(self) -> np.ndarray:
        from tinygpt import kernels

        with kernels.plain():
            return super().logits()


class Dequantised(Loaded):
    """A float32 model of the numbers that rounded ones stand for."""

    def __init__(self, name: str, path: str, kind: str) -> None:
        from tinygpt.generation.decoder import Decoder
        from tinygpt.machine.transfer import write
        from tinygpt.model.transformer import Transformer

        super().__init__(name, path, kind)
        values = {name: p.numpy() for name, p in self.model.parameters().items()}
        plain = Transformer(self.model.config, seed=None).eval()
        for key, parameter in plain.parameters().items():
            scale = values.get(f"{key.removesuffix('.weight')}.scale")
            write(parameter, values[key] * (1 if scale is None else scale[:, None]))
        self.decoder = Decoder(plain)


class Saver:
    """Writes the checkpoint, in a process that then goes away."""

    def save(self, name: str, folder: str) -> str:
        from tinygpt.api import GPT

        return str(GPT(SETTINGS[name].model).save_checkpoint(1, folder=folder))


def differences(
    name: str, path: str, threads: int, logits: dict[str, np.ndarray]
) -> dict[str, float]:
    """By how much the logits of rounded weights differ from what they have to be; SystemExit."""
    found = {}
    for what, make, kind, allowed in (
        ("twin", Twin, "int8", TOLERANCE),
        ("dequantised", Dequantised, "int8", TOLERANCE),
        ("bfloat16 in float32", Dequantised, "bfloat16", HALF_TOLERANCE),
        ("float16 in float32", Dequantised, "float16", HALF_TOLERANCE),
    ):
        side = Side(make, name, path, kind, threads=threads)
        found[what] = float(np.abs(side("logits") - logits[kind]).max())
        side.close()
        if not found[what] <= allowed:
            raise SystemExit(f"{what}: the logits differ by {found[what]}")
    return found


def measure(options: Any) -> dict[str, Any]:
    name, setting = options.config, SETTINGS[options.config]
    with tempfile.TemporaryDirectory() as folder:
        saver = Side(Saver, threads=options.threads)
        path = saver("save", name, folder)
        saver.close()
        sides = {kind: Side(Loaded, name, path, kind, threads=options.threads) for kind in KINDS}
        for side in sides.values():
            side("greedy", min(4, setting.new))  # what is made on first use is there
        peaks = {kind: side("memory") for kind, side in sides.items()}
        logits = {kind: side("logits") for kind, side in sides.items()}
        checked = differences(name, path, options.threads, logits)
    works = {kind: partial(side, "seconds", options.cpu_time) for kind, side in sides.items()}
    taken = take_turns(works, options.rounds or setting.rounds)
    rows = [
        {
            "side": kind,
            "tokens_per_second": Spread.of([setting.new / s for s in taken[kind]]),
            "ratio": ratio(taken["float32"], taken[kind]),
            "peak_mb": peaks[kind] / MB,
            "weights_mb": side("weights") / MB,
        }
        for kind, side in sides.items()
    ]
    for side in sides.values():
        side.close()
    rounding = float(np.abs(logits["int8"] - logits["float32"]).max())
    return {"rows": rows, "differences": checked, "rounding": rounding}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--config", choices=SETTINGS, default="baby")
    parser.add_argument("--rounds", type=int, help="turns of each side")
    add_cpu_time(parser)
    options = parse(parser)
    where = machine()
    show_machine(where, options.threads)
    found = measure(options)
    setting = SETTINGS[options.config]
    print(f"{options.config}: prompt of {setting.prompt}, {setting.new} new tokens")
    for row in found["rows"]:
        print(
            f"{row['side']:8} {row['tokens_per_second'].show('.0f')} tokens/s   "
            f"{row['ratio'].show()} x as fast as float32   peak {row['peak_mb']:.0f} MB   "
            f"weights {row['weights_mb']:.1f} MB"
        )
    listed = ", ".join(f"{kind} {value:.0e}" for kind, value in found["differences"].items())
    print(f"logits of int8 differ from: {listed}, float32 {found['rounding']:.0e} (rounding)")
    result = {"benchmark": "quantize", "machine": where, "config": options.config}
    write_json(
        options.json, result | {"threads": options.threads, "cpu_time": options.cpu_time} | found
    )


if __name__ == "__main__":
    main()
