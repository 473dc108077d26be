"""Generation with a cache: ours against PyTorch's, and against the package ``transformers``.

    python benchmarks/generate.py [--config baby|gpt2] [--threads N] [--rounds R]
                                  [--cpu-time] [--json FILE]

Batch 1, greedy, float32, random weights, the same for all sides. A turn is one call that fills the
cache with a prompt and then yields token after token as a number in Python. First all sides must
agree on the logits of a text that is read token by token through the cache. The read bandwidth is
that of summing a large array, measured between the turns, and told for models
that no cache of the processor holds: each token reads every weight once.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    CLOCKS,
    MB,
    Side,
    SideError,
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

from tinygpt.config import PRESETS, GPTConfig, SampleConfig
from tinygpt.machine import resources

TOLERANCE = 1e-3
"""By which the logits of two sides may differ."""
CACHED = 256 * MB
"""Weights up to this size may stay in the processor's caches from one token to the next."""


@dataclass(frozen=True)
class Setting:
    """A model, the lengths of prompt and continuation, and the turns of each side."""

    model: GPTConfig
    prompt: int
    new: int
    rounds: int


SETTINGS = {
    "baby": Setting(GPTConfig(vocab_size=65, **PRESETS["baby"].model), 1, 63, 40),
    "gpt2": Setting(GPTConfig(**PRESETS["gpt2"].model), 16, 48, 8),
}


class Generator:
    """What the sides share: a prompt, and the clock."""

    def __init__(self, name: str) -> None:
        self.setting = SETTINGS[name]
        size = self.setting.prompt + 16
        self.text = np.random.default_rng(0).integers(0, self.setting.model.vocab_size, size)
        self.prompt = self.text[: self.setting.prompt].tolist()

    def greedy(self, count: int) -> list[int]:
        raise NotImplementedError

    def seconds(self, cpu_time: bool) -> float:
        """Of one call."""
        clock = CLOCKS[cpu_time]
        start = clock()
        ids = self.greedy(self.setting.new)
        assert len(ids) == self.setting.new
        return clock() - start

    def memory(self) -> int:
        return resources.peak_memory()


class Ours(Generator):
    def __init__(self, name: str) -> None:
        from tinygpt.generation.decoder import Decoder
        from tinygpt.generation.generate import generate_tokens
        from tinygpt.model.transformer import Transformer

        super().__init__(name)
        self.model = Transformer(self.setting.model).eval()
        self.decoder, self.generate = Decoder(self.model), generate_tokens

    def save_weights(self, folder: str) -> None:
        for name, parameter in self.model.parameters().items():
            np.save(Path(folder, f"{name}.npy"), parameter.numpy())

    def logits(self) -> np.ndarray:
        """(16, V): behind the prompt and behind the tokens after it, one by one."""
        from tinygpt.generation.decoder import Sequence

        sequence, found = Sequence(self.prompt), []
        for token in self.text[self.setting.prompt :]:
            found.append(self.decoder.next_logits([sequence])[0])
            sequence.ids.append(int(token))
        return np.stack(found)

    def greedy(self, count: int) -> list[int]:
        config = SampleConfig(temperature=0.0)
        tokens = self.generate(self.decoder, [self.prompt], count, config)
        return [int(token) for (token,) in tokens]


class Torch(Generator):
    def __init__(self, name: str, folder: str, threads: int) -> None:
        import torch
        import torch_gpt

        torch.set_num_threads(threads)
        super().__init__(name)
        self.torch = torch
        self.decoder = torch_gpt.Decoder(torch_gpt.GPT(self.setting.model).load(folder).eval())

    def logits(self) -> np.ndarray:
        first = self.setting.prompt
        found = [self.decoder.logits(self.torch.tensor([self.prompt]), 0)]
        for position in range(first, len(self.text) - 1):
            token = self.torch.from_numpy(self.text[None, position : position + 1])
            found.append(self.decoder.logits(token, position))
        return self.torch.cat(found).numpy()

    def greedy(self, count: int) -> list[int]:
        return self.decoder.greedy(self.prompt, count)


class Memory:
    """A large array, to be read."""

    def __init__(self, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.large = torch.ones(MB << 7)  # 512 MB

    def bandwidth(self) -> float:
        """Bytes read in a second, the best of three."""
        times = []
        for _ in range(3):
            start = time.perf_counter()
            self.large.sum().item()
            times.append(time.perf_counter() - start)
        return self.large.nbytes / min(times)


class Transformers(Generator):
    def __init__(self, name: str, folder: str, threads: int) -> None:
        import torch
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.set_num_threads(threads)
        super().__init__(name)
        self.torch, shape = torch, self.setting.model
        config = GPT2Config(
            vocab_size=shape.vocab_size,
            n_positions=shape.block_size,
            n_embd=shape.n_embd,
            n_layer=shape.n_layer,
            n_head=shape.n_head,
            bos_token_id=None,
            eos_token_id=None,
        )
        self.model = GPT2LMHeadModel(config).eval()
        for key, parameter in self.model.transformer.named_parameters():
            weight = np.load(Path(folder, f"{key}.npy"))
            turned = weight.ndim == 2 and key.startswith("h.")  # its layers hold (in, out)
            parameter.data.copy_(torch.from_numpy(weight.T if turned else weight))

    def logits(self) -> np.ndarray:
        with self.torch.inference_mode():
            out = self.model(self.torch.tensor([self.prompt]), use_cache=True)
            found = [out.logits[:, -1]]
            for token in self.text[self.setting.prompt : -1].tolist():
                tokens = self.torch.tensor([[token]])
                out = self.model(tokens, past_key_values=out.past_key_values, use_cache=True)
                found.append(out.logits[:, -1])
            return self.torch.cat(found).numpy()

    def greedy(self, count: int) -> list[int]:
        prompt = self.torch.tensor([self.prompt])
        ids = self.model.generate(
            prompt,
            attention_mask=self.torch.ones_like(prompt),
            max_new_tokens=count,
            do_sample=False,
            use_cache=True,
        )
        return ids[0, len(self.prompt) :].tolist()


def start(options: Any, folder: str) -> tuple[dict[str, Side], dict[str, float], dict[str, str]]:
    """The sides that work and agree; by how much they differ from ours; why others were left out.

    Raises SystemExit if logits differ.
    """
    name, threads = options.config, options.threads
    sides = {"ours": Side(Ours, name, threads=threads)}
    sides["ours"]("save_weights", folder)
    wanted = sides["ours"]("logits")
    differences, left_out = {}, {}
    for kind, make in (("torch", Torch), ("transformers", Transformers)):
        try:
            side = Side(make, name, folder, threads, threads=threads)
            difference = float(np.abs(side("logits") - wanted).max())
        except SideError as error:
            left_out[kind] = str(error).strip().splitlines()[-1]
            continue
        if not difference <= TOLERANCE:
            raise SystemExit(f"{kind}: the logits differ by {difference}")
        sides[kind], differences[kind] = side, difference
    return sides, differences, left_out


def measure(options: Any) -> dict[str, Any]:
    setting = SETTINGS[options.config]
    with tempfile.TemporaryDirectory() as folder:
        sides, differences, left_out = start(options, folder)
    for side in sides.values():
        side("greedy", min(4, setting.new))  # what is made on first use is there
    works = {name: partial(side, "seconds", options.cpu_time) for name, side in sides.items()}
    model = setting.model
    read = 4 * (model.num_params() - model.block_size * model.n_embd)  # bytes for each token
    if "torch" in sides and read > CACHED:
        works["bandwidth"] = partial(
            Side(Memory, options.threads, threads=options.threads), "bandwidth"
        )
    taken = take_turns(works, options.rounds or setting.rounds)
    rows = []
    for name, side in sides.items():
        speeds = [setting.new / s for s in taken[name]]
        row = {
            "side": name,
            "tokens_per_second": Spread.of(speeds),
            "ratio": ratio(taken[name], taken["ours"]),
            "peak_mb": side("memory") / MB,
            "logits_difference": differences.get(name, 0.0),
        }
        if "bandwidth" in taken:
            row["of_bandwidth"] = ratio([read * s for s in speeds], taken["bandwidth"])
        rows.append(row)
        side.close()
    bandwidth = [b / 1e9 for b in taken.get("bandwidth", [])]
    found = {"bandwidth_gb_per_second": Spread.of(bandwidth)} if bandwidth else {}
    return found | {"rows": rows, "left_out": left_out}


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
    read = found.get("bandwidth_gb_per_second")
    print(
        f"{options.config}: {setting.model.num_params() / 1e6:.1f} M parameters, prompt of "
        f"{setting.prompt}, {setting.new} new tokens"
        + (f"; memory is read at {read.show('.1f')} GB/s" if read else "")
    )
    for row in found["rows"]:
        share = f"   {row['of_bandwidth'].show('.0%')} of bandwidth" if read else ""
        print(
            f"{row['side']:12} {row['tokens_per_second'].show('.0f')} tokens/s   "
            f"{row['ratio'].show()} x the time of ours{share}   peak {row['peak_mb']:.0f} MB   "
            f"logits within {row['logits_difference']:.0e}"
        )
    for name, reason in found["left_out"].items():
        print(f"{name}: left out: {reason}")
    result = {"benchmark": "generate", "machine": where, "config": options.config}
    write_json(
        options.json, result | {"threads": options.threads, "cpu_time": options.cpu_time} | found
    )


if __name__ == "__main__":
    main()
