"""A machine with a GPU: is everything right there, and how fast is it, beside PyTorch compiled?

    python benchmarks/gpu.py [--minutes 8] [--only STAGE ...] [--no-peer] [--smoke] [--json FILE]

Without arguments it takes at most eight minutes: the kernels against float64, a large product,
attention forward and backward, training of GPT-2 124M and 350M in bfloat16, and generation. What
was measured until the time is over is printed as the table for benchmarks/README.md. Each stage is
a process of its own with a limit: one that fails or takes too long is a row that says so. The peer
is PyTorch where it is installed with CUDA; its losses and ours must agree.

The share of the peak counts 6 operations for each parameter and token, and those of attention, as
if nothing were skipped, against the peak in ``PEAKS``; for other cards the large product counts.

``--smoke`` takes tiny sizes on whatever device there is, to try the program itself.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from common import arguments, machine, show_machine, write_json

PEAKS = {
    "B200": 2250, "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362,
    "RTX 6000 Ada": 364, "A6000": 155, "RTX 4090": 165, "RTX 3090": 71, "A10": 125, "L4": 121,
}  # fmt: skip
"""Makers' TFLOPS of dense bfloat16 products with sums in float32, by a part of the card's name."""
CLOSE = 0.03
"""By how much both sides' losses may differ, as a part: bfloat16 rounds twice."""
LEFT = 5.0
"""Seconds that are kept for the table."""


@dataclass(frozen=True)
class Model:
    """A GPT-2 and what it is trained with."""

    n_layer: int
    n_head: int
    n_embd: int
    batches: tuple[int, ...]
    """Sequences of a batch: the first number that fits into the card's memory."""
    block_size: int = 1024
    vocab_size: int = 50257

    @property
    def shape(self) -> dict[str, int]:
        names = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
        return {name: getattr(self, name) for name in names}

    def operations(self) -> float:
        """Of a token, forward and backward, without those that a causal mask saves."""
        C, T, V = self.n_embd, self.block_size, self.vocab_size
        return 6 * (12 * self.n_layer * C * C + V * C) + 12 * self.n_layer * C * T


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    models: dict[str, Model]
    attention: tuple[tuple[int, int, int, int], ...]
    """(B, H, T, D)"""
    product: int
    """Rows and columns of both factors."""
    prompt: int
    new: int
    seconds: float
    """For how long steps are repeated."""
    kernels: tuple[str, ...]
    """Those that are checked."""


FULL = Sizes(
    {"124M": Model(12, 12, 768, (16, 8, 4, 1)), "350M": Model(24, 16, 1024, (8, 4, 2, 1))},
    ((16, 12, 1024, 64), (4, 12, 4096, 64), (4, 16, 4096, 128)),
    product=8192, prompt=64, new=256, seconds=12.0,
    kernels=("attention", "linear", "gelu", "norm", "embedding", "loss", "adamw"),
)  # fmt: skip
SMOKE = Sizes(
    {"tiny": Model(1, 2, 32, (2,), block_size=32, vocab_size=130)}, ((1, 2, 32, 16),),
    product=64, prompt=4, new=4, seconds=0.0, kernels=("gelu",),
)  # fmt: skip


# What a stage measures, in a process of its own ------------------------------------------------


def dtype_here() -> Any:
    """bfloat16, or float32 where the device has no such numbers."""
    from tinygpt.machine import precision

    return "bfloat16" if "bfloat16" in precision.available() else "float32"


def timed(work: Callable[[], Any], wait: Callable[[], Any], seconds: float) -> float:
    """The median seconds of a call, after three that compile and allocate."""
    for _ in range(3):
        work()
        wait()
    times, end = list[float](), time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def smaller(sizes: tuple[int, ...], measure: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
    """What is measured with the first of the sizes for which there is memory."""
    for size, following in zip(sizes, [*sizes[1:], None], strict=True):
        try:
            return measure(size)
        except (MemoryError, RuntimeError) as error:
            if following is None or "memory" not in f"{type(error).__name__} {error}".lower():
                raise
    raise AssertionError("there is a last size")


def learnable(model: Model, batch: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """A batch x and y of tokens, some of which are frequent."""
    powers = np.random.default_rng(step).random((batch, model.block_size + 1)) ** 3
    tokens = (powers * model.vocab_size).astype(np.int32)
    return tokens[:, :-1], tokens[:, 1:]


class Ours:
    """Our side of every stage."""

    def __init__(self, sizes: Sizes) -> None:
        from tinygrad import Device

        self.sizes, self.device = sizes, Device[Device.DEFAULT]

    def check(self) -> dict[str, Any]:
        """Every kernel against its twin and float64."""
        from tinygpt.kernels.check import check_kernel

        reports = [check_kernel(name, timed=False) for name in self.sizes.kernels]
        wrong = {
            report.kernel: [row.shape + row.failure for row in report.rows if not row.passed]
            for report in reports
            if not report.ok
        }
        return {"checked": len(reports), "wrong": wrong, "worst": max(r.worst for r in reports)}

    def product(self) -> dict[str, Any]:
        from tinygrad import Tensor, TinyJit

        from tinygpt.kernels import linear

        n = self.sizes.product
        x, w = (Tensor.randn(n, n).cast(dtype_here()).contiguous().realize() for _ in range(2))
        jitted = TinyJit(lambda x, w: linear(x, w).realize())
        seconds = timed(lambda: jitted(x, w), self.device.synchronize, self.sizes.seconds / 4)
        return {"tflops": 2 * n**3 / seconds / 1e12}

    def attention(self) -> dict[str, Any]:
        from tinygrad import Tensor, TinyJit

        from tinygpt.kernels import self_attention

        found = {}
        for B, H, T, D in self.sizes.attention:
            qkv, grad = (
                Tensor.randn(B, T, width).cast(dtype_here()).contiguous().realize()
                for width in (3 * H * D, H * D)
            )
            forward = TinyJit(lambda x, H=H: self_attention(x, H).realize())

            def both(x: Tensor, g: Tensor, H: int = H) -> Tensor:
                return self_attention(x, H).gradient(x, gradient=g)[0].realize()

            backward, wait, budget = TinyJit(both), self.device.synchronize, self.sizes.seconds / 8
            found[f"{B} x {H} x {T} x {D}"] = [
                timed(lambda: forward(qkv), wait, budget),  # noqa: B023
                timed(lambda: backward(qkv, grad), wait, budget),  # noqa: B023
            ]
        return found

    def train(self, name: str) -> dict[str, Any]:
        return smaller(self.sizes.models[name].batches, lambda batch: self._train(name, batch))

    def _train(self, name: str, batch: int) -> dict[str, Any]:
        from tinygpt.config import GPTConfig, TrainConfig
        from tinygpt.model.transformer import Transformer
        from tinygpt.training.optim import make_optimizer
        from tinygpt.training.step import make_train_step

        model, dtype = self.sizes.models[name], dtype_here()
        config = TrainConfig(batch_size=batch, dtype=dtype, learning_rate=3e-4, weight_decay=0.1)
        gpt = Transformer(GPTConfig(**model.shape))
        step = make_train_step(gpt, make_optimizer(gpt.parameters(), config), config)

        def take(number: int) -> float:
            x, y = learnable(model, batch, number)
            return float(step(x[None], y[None], config.learning_rate, (0, number)).loss)

        losses = [take(number) for number in range(4)]
        seconds = timed(lambda: take(4), self.device.synchronize, self.sizes.seconds)
        return {
            "batch": batch, "dtype": dtype, "losses": losses,
            "tokens_per_second": batch * model.block_size / seconds,
        }  # fmt: skip

    def generate(self) -> dict[str, Any]:
        from tinygpt.config import GPTConfig, SampleConfig
        from tinygpt.generation.decoder import Decoder
        from tinygpt.generation.generate import generate_tokens
        from tinygpt.model.half import halve
        from tinygpt.model.transformer import Transformer

        model, n = next(iter(self.sizes.models.values())), self.sizes.new
        gpt = halve(Transformer(GPTConfig(**model.shape)), dtype_here())
        greedy = SampleConfig(temperature=0.0)
        prompt = [list(range(self.sizes.prompt))]
        decoder = Decoder(gpt)
        work = lambda: list(generate_tokens(decoder, prompt, n, greedy))  # noqa: E731
        work()
        start = time.perf_counter()
        work()
        return {"tokens_per_second": n / (time.perf_counter() - start)}


class Torch:
    """The same in PyTorch: compiled on a GPU, eager in the smoke test on a processor."""

    def __init__(self, sizes: Sizes) -> None:
        import torch

        self.torch, self.sizes, self.smoke = torch, sizes, sizes is SMOKE
        if not (torch.cuda.is_available() or self.smoke):
            raise SystemExit("this PyTorch has no CUDA")
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.set_float32_matmul_precision("high")
        self.wait = torch.cuda.synchronize if self.device == "cuda" else lambda: None

    def compiled(self, f: Any) -> Any:
        return f if self.smoke else self.torch.compile(f)

    def random(self, *shape: int) -> Any:
        return self.torch.randn(*shape, device=self.device, dtype=self.torch.bfloat16)

    def product(self) -> dict[str, Any]:
        n = self.sizes.product
        x, w = self.random(n, n), self.random(n, n)
        work = lambda: self.torch.nn.functional.linear(x, w)  # noqa: E731
        return {"tflops": 2 * n**3 / timed(work, self.wait, self.sizes.seconds / 4) / 1e12}

    def attention(self) -> dict[str, Any]:
        attend = self.torch.nn.functional.scaled_dot_product_attention
        found = {}
        for B, H, T, D in self.sizes.attention:
            qkv, grad = self.random(B, T, 3, H, D).requires_grad_(), self.random(B, T, H * D)

            def forward(x: Any, B: int = B, H: int = H, T: int = T, D: int = D) -> Any:
                q, k, v = x.permute(2, 0, 3, 1, 4)
                return attend(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, H * D)

            run, budget = self.compiled(forward), self.sizes.seconds / 8

            def both() -> None:
                qkv.grad = None  # noqa: B023
                run(qkv).backward(grad)  # noqa: B023

            with self.torch.no_grad():
                first = timed(lambda: run(qkv), self.wait, budget)  # noqa: B023
            found[f"{B} x {H} x {T} x {D}"] = [first, timed(both, self.wait, budget)]
        return found

    def train(self, name: str) -> dict[str, Any]:
        return smaller(self.sizes.models[name].batches, lambda batch: self._train(name, batch))

    def _train(self, name: str, batch: int) -> dict[str, Any]:
        import torch_gpt

        from tinygpt.config import GPTConfig

        torch, model = self.torch, self.sizes.models[name]
        gpt = torch_gpt.GPT(GPTConfig(**model.shape)).to(self.device)
        matrices = [p for p in gpt.parameters() if p.dim() >= 2]
        others = [p for p in gpt.parameters() if p.dim() < 2]
        groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
        adamw = torch.optim.AdamW(
            groups, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=self.device == "cuda"
        )
        run = self.compiled(gpt)

        def take(number: int) -> float:
            x, y = (
                torch.from_numpy(a).to(self.device).long() for a in learnable(model, batch, number)
            )
            with torch.autocast(self.device, torch.bfloat16):
                loss = run(x, y)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
            adamw.step()
            adamw.zero_grad(set_to_none=True)
            return float(loss)

        losses = [take(number) for number in range(4)]
        seconds = timed(lambda: take(4), self.wait, self.sizes.seconds)
        return {
            "batch": batch, "dtype": "bfloat16", "losses": losses,
            "tokens_per_second": batch * model.block_size / seconds,
        }  # fmt: skip

    def generate(self) -> dict[str, Any]:
        import torch_gpt

        from tinygpt.config import GPTConfig

        model, n = next(iter(self.sizes.models.values())), self.sizes.new
        with self.torch.device(self.device):
            gpt = torch_gpt.GPT(GPTConfig(**model.shape)).eval().to(self.device)
            gpt.hidden = self.compiled(gpt.hidden)
            decoder = torch_gpt.Decoder(gpt)
            with self.torch.autocast(self.device, self.torch.bfloat16):
                prompt = list(range(self.sizes.prompt))
                decoder.greedy(prompt, n)
                start = time.perf_counter()
                decoder.greedy(prompt, n)
        return {"tokens_per_second": n / (time.perf_counter() - start)}


SIDES = {"ours": Ours, "torch": Torch}


# The program -----------------------------------------------------------------------------------


@dataclass
class Found:
    """What the stages of both sides have measured, by (stage, side), and why others did not."""

    results: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    failures: dict[tuple[str, str], str] = field(default_factory=dict)


def stages(sizes: Sizes) -> dict[str, int]:
    """Their names, the most important first, and the seconds that a side may take."""
    training = {f"train {name}": 100 for name in sizes.models}
    return {"check": 120, "product": 40, **training, "attention": 70, "generate": 60}


def run_stage(stage: str, side: str, smoke: bool, seconds: float) -> dict[str, Any]:
    """What a stage measures, in a process of its own. Raises RuntimeError if it does not."""
    command = [sys.executable, __file__, "--stage", stage, "--side", side, *["--smoke"] * smoke]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"not done in {seconds:.0f} s") from None
    if done.returncode:
        last = done.stderr.strip().splitlines()
        raise RuntimeError(last[-1][:200] if last else f"ended with {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(options: argparse.Namespace, sizes: Sizes, sides: list[str]) -> Found:
    """Run the stages until the time is over."""
    end, found = time.monotonic() + 60 * options.minutes - LEFT, Found()
    for stage, limit in stages(sizes).items():
        if options.only and stage.split()[0] not in options.only:
            continue
        for side in sides:
            if side == "torch" and stage == "check":
                continue
            left = min(limit, end - time.monotonic())
            try:
                if left <= 0:
                    raise RuntimeError("the time was over")
                found.results[stage, side] = run_stage(stage, side, options.smoke, left)
                print(f"{stage}, {side}: {json.dumps(found.results[stage, side])}", flush=True)
            except RuntimeError as error:
                found.failures[stage, side] = str(error)
                print(f"{stage}, {side}: {error}", flush=True)
    return found


def card_name() -> str | None:
    """The card as its driver calls it; None without one of NVIDIA's."""
    try:
        asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.splitlines()[0].strip() if done.stdout.strip() else None


def peak_of(card: str | None, found: Found) -> tuple[float, str]:
    """(TFLOPS, where the number is from)."""
    for name, peak in PEAKS.items():
        if card and name in card:
            return peak, f"the maker's peak of {name}"
    products = [r["tflops"] for (stage, _), r in found.results.items() if stage == "product"]
    return max(products, default=0.0), "the large product that was measured"


def table(sizes: Sizes, found: Found, peak: float) -> list[list[str]]:
    """The rows: what was done, ours, PyTorch's, how many times as fast, share of the peak."""
    rows = []

    def row(what: str, stage: str, of: Callable[[Any], float], unit: str, ops: float = 0) -> None:
        """``of`` picks a rate from a result; each of its units takes ``ops`` operations."""
        ours, torch = (found.results.get((stage, side)) for side in ("ours", "torch"))
        if ours is None and torch is None:
            return
        a, b = (None if r is None else of(r) for r in (ours, torch))
        share = f"{100 * a * ops / (1e12 * peak):.1f} %" if a and ops and peak else ""
        cells = ["" if x is None else f"{x:,.1f} {unit}" for x in (a, b)]
        rows.append([what, *cells, f"{a / b:.2f}" if a and b else "", share])

    row(f"product of {sizes.product}²", "product", lambda r: r["tflops"], "TFLOPS", 1e12)
    for name, model in sizes.models.items():
        result = found.results.get((f"train {name}", "ours"), {})
        what = f"training {name}, {result.get('batch')} x {model.block_size} {result.get('dtype')}"
        stage, ops = f"train {name}", model.operations()
        row(what, stage, lambda r: r["tokens_per_second"], "tokens/s", ops)
    for B, H, T, D in sizes.attention:
        key, products = f"{B} x {H} x {T} x {D}", 2 * B * H * T * T * D  # of which half are hidden
        for i, (what, count) in enumerate((("forward", 1), ("forward and backward", 3.5))):
            ops = count * products

            def rate(r: Any, key: str = key, i: int = i, ops: float = ops) -> float:
                return ops / float(r[key][i]) / 1e12

            row(f"attention {key}, {what}", "attention", rate, "TFLOPS", 1e12)
    row("generation, one sequence", "generate", lambda r: r["tokens_per_second"], "tokens/s")
    return rows


def disagreements(found: Found) -> list[str]:
    """What is wrong: kernels, and losses that differ from PyTorch's."""
    wrong = found.results.get(("check", "ours"), {}).get("wrong", {})
    told = [f"the kernel {name} is wrong: {rows}" for name, rows in wrong.items()]
    for (stage, side), result in found.results.items():
        peer = found.results.get((stage, "torch"))
        if side == "ours" and peer and "losses" in peer and peer["batch"] == result["batch"]:
            pairs = zip(result["losses"], peer["losses"], strict=True)
            if not all(abs(a - b) <= CLOSE * abs(b) for a, b in pairs):
                told.append(f"{stage}: losses {result['losses']}, PyTorch's {peer['losses']}")
    return told


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--minutes", type=float, default=8.0, help="at most")
    parser.add_argument(
        "--only", nargs="+", choices=("check", "product", "train", "attention", "generate")
    )
    parser.add_argument("--no-peer", action="store_true", help="without PyTorch")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, on any device")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = SMOKE if options.smoke else FULL
    if options.stage:
        method, *names = options.stage.split()
        print(json.dumps(getattr(SIDES[options.side](sizes), method)(*names)))
        return 0

    from tinygrad import Device

    from tinygpt.kernels.phases import is_gpu
    from tinygpt.machine.choice import opencl_accelerators

    card, device = card_name(), Device.DEFAULT
    where = machine()
    show_machine(where, options.threads)
    if not (there := is_gpu(device) and (device != "CL" or bool(opencl_accelerators()))):
        print(f"There is no GPU here: kernels run on {device}. Nothing below measures a card.")
        if not options.smoke:
            print("Use --smoke to try the program itself.")
            return 2
    print(f"device {device}, {card or 'no NVIDIA card'}; {options.minutes:g} minutes at most")
    peer = not options.no_peer and importlib.util.find_spec("torch") is not None
    found = measure(options, sizes, ["ours", *["torch"] * peer])
    peak, source = peak_of(card, found)
    print(f"\n{card or device}: {peak:,.1f} TFLOPS, {source}\n")
    print("| work | ours | PyTorch compiled | times as fast | share of the peak |")
    print("| --- | --- | --- | --- | --- |")
    for cells in table(sizes, found, peak):
        print(f"| {' | '.join(cells)} |")
    wrong = disagreements(found)
    for (stage, side), why in found.failures.items():
        print(f"left out: {stage}, {side}: {why}")
    print("\n".join(wrong) if wrong else "everything that was compared agrees")
    result = {"benchmark": "gpu", "machine": where, "card": card, "device": device, "gpu": there}
    measured = {f"{stage}, {side}": r for (stage, side), r in found.results.items()}
    failed = {f"{stage}, {side}": why for (stage, side), why in found.failures.items()}
    write_json(options.json, result | {"peak": peak, "measured": measured, "failed": failed})
    ours_failed = any(side == "ours" for _, side in found.failures)
    return 1 if wrong or ours_failed else 0


if __name__ == "__main__":
    sys.exit(main())
