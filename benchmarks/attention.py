"""Attention: our flash kernels against PyTorch's scaled_dot_product_attention, and the plain twin.

    python benchmarks/attention.py [--set usual|long|decode|all] [--threads N] [--rounds R]
                                   [--plain] [--cpu-time] [--json FILE]

Causal attention in float32, forward and forward with backward, in two forms: q, k and v as
(B, H, T, D), and as one (B, T, 3C) array with the result (B, T, C), which is what a model has and
gets; there PyTorch does what nanoGPT does. ``decode`` is one query against caches of some lengths,
twelve layers of it. Each side's results are first checked against float64 from numpy. ``--plain``
adds the formula written in tinygrad, for short sequences. ``--cpu-time`` counts the processes'
processor time instead of the clock on the wall, for one thread on a busy machine.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from common import (
    MB,
    Side,
    Spread,
    arguments,
    machine,
    ratio,
    show_machine,
    take_turns,
    write_json,
)

Shape = tuple[int, int, int, int]  # B, H, T, D

USUAL: list[Shape] = [(12, 4, 64, 32), (1, 12, 1024, 64), (1, 12, 4096, 64)]
LONG: list[Shape] = [(1, 4, 8192, 64), (1, 4, 16384, 64)]
DECODE = [64, 512, 1024]
CACHE: Shape = (1, 12, 1024, 64)
LAYERS = 12
TURN = 0.1
"""Seconds that a turn should take at least."""
TOLERANCE = 5e-5
"""Of the largest number of a result."""


def numbers(shape: Shape) -> list[np.ndarray]:
    """q, k, v and the gradient of the result."""
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape, np.float32) for _ in range(4)]


def pack(parts: list[np.ndarray]) -> np.ndarray:
    """Arrays (B, H, T, D) side by side: (B, T, parts * C)."""
    B, _, T, _ = parts[0].shape
    return np.stack(parts).transpose(1, 3, 0, 2, 4).reshape(B, T, -1).copy()


def unpack(x: np.ndarray, shape: Shape) -> list[np.ndarray]:
    B, H, T, D = shape
    return list(x.reshape(B, T, -1, H, D).transpose(2, 0, 3, 1, 4))


def exact(q: np.ndarray, k: np.ndarray, v: np.ndarray, grad: np.ndarray) -> list[np.ndarray]:
    """Result and gradients for one head (T, D) in float64, some rows at a time."""
    q, k, v, grad = (x.astype(np.float64) for x in (q, k, v, grad))
    out, dq, dk, dv = (np.zeros_like(x) for x in (q, q, k, v))
    scale = 1 / math.sqrt(q.shape[1])
    for first in range(0, len(q), 512):
        rows = slice(first, min(first + 512, len(q)))
        seen = slice(0, rows.stop)
        scores = q[rows] @ k[seen].T * scale
        scores[np.arange(rows.stop) > np.arange(first, rows.stop)[:, None]] = -np.inf
        weights = np.exp(scores - scores.max(1, keepdims=True))
        weights /= weights.sum(1, keepdims=True)
        dw = grad[rows] @ v[seen].T
        ds = weights * (dw - (dw * weights).sum(1, keepdims=True)) * scale
        out[rows], dq[rows] = weights @ v[seen], ds @ k[seen]
        dk[seen] += ds.T @ q[rows]
        dv[seen] += weights.T @ grad[rows]
    return [out, dq, dk, dv]


class Works:
    """One side: works by name, each a call that leaves nothing undone."""

    def __init__(self) -> None:
        self.works: dict[str, Callable[[], Any]] = {}

    def turn(self, name: str, calls: int, cpu_time: bool) -> float:
        """Seconds per call: by the clock on the wall, or the processor's time of this process."""
        clock = time.process_time if cpu_time else time.perf_counter
        start = clock()
        for _ in range(calls):
            self.works[name]()
        return (clock() - start) / calls

    def memory(self) -> int:
        """Bytes, the most that this process has held."""
        from tinygpt.machine.resources import peak_memory

        return peak_memory()


class Ours(Works):
    """The kernels, or with ``plain`` their twins, each work in a jit."""

    def __init__(self, shape: Shape, packed: bool, plain: bool) -> None:
        super().__init__()
        from tinygrad import Tensor, TinyJit

        from tinygpt.kernels.attention import (
            flash_attention,
            plain_attention,
            plain_self_attention,
            self_attention,
        )

        *inputs, grad = numbers(shape)
        heads = plain_attention if plain else flash_attention
        whole = plain_self_attention if plain else self_attention
        arrays = [pack(inputs)] if packed else inputs
        self.inputs = [Tensor(x).realize() for x in arrays]
        self.grad = Tensor(pack([grad]) if packed else grad).realize()

        def attention(*x: Tensor) -> Tensor:
            return whole(x[0], shape[1]) if packed else heads(*x, is_causal=True)

        def both(grad: Tensor, *x: Tensor) -> list[Tensor]:
            out = attention(*x)
            found = [out, *out.gradient(*x, gradient=grad)]
            Tensor.realize(*found)
            return found

        forward = TinyJit(lambda *x: attention(*x).realize())
        backward = TinyJit(both)
        self.works["forward"] = lambda: forward(*self.inputs)
        self.works["both"] = lambda: backward(self.grad, *self.inputs)
        for work in self.works.values():
            for _ in range(3):
                work()

    def results(self) -> list[np.ndarray]:
        return [x.numpy() for x in self.works["both"]()]


class Torch(Works):
    """PyTorch, eager."""

    def __init__(self, shape: Shape, packed: bool, threads: int) -> None:
        super().__init__()
        import torch

        torch.set_num_threads(threads)
        *inputs, grad = numbers(shape)
        B, H, T, D = shape
        arrays = [pack(inputs)] if packed else inputs
        self.inputs = [torch.from_numpy(x).requires_grad_() for x in arrays]
        grads = torch.from_numpy(pack([grad]) if packed else grad)
        sdpa = torch.nn.functional.scaled_dot_product_attention

        def attention() -> torch.Tensor:
            if not packed:
                return sdpa(*self.inputs, is_causal=True)
            parts = self.inputs[0].split(H * D, dim=2)
            q, k, v = (x.view(B, T, H, D).transpose(1, 2) for x in parts)
            return sdpa(q, k, v, is_causal=True).transpose(1, 2).contiguous().view(B, T, H * D)

        def forward() -> torch.Tensor:
            with torch.no_grad():
                return attention()

        def both() -> torch.Tensor:
            for x in self.inputs:
                x.grad = None
            out = attention()
            out.backward(grads)
            return out

        self.works = {"forward": forward, "both": both}
        for work in self.works.values():
            work()

    def results(self) -> list[np.ndarray]:
        out = self.works["both"]()
        return [out.detach().numpy(), *(x.grad.numpy() for x in self.inputs)]


class OurDecoding(Works):
    """A step of decoding in a jit: as many layers as a model has, with caches of their own."""

    def __init__(self) -> None:
        super().__init__()
        from tinygrad import Tensor, TinyJit, dtypes

        from tinygpt.kernels import rows_attention

        query, keys, values = caches()
        pairs = list(zip(keys, values, strict=True))
        cache = [(Tensor(k).realize(), Tensor(v).realize()) for k, v in pairs]
        slot = Tensor([0], dtype=dtypes.int32).realize()

        @TinyJit
        def step(position: Tensor, *qkv: Tensor) -> list[Tensor]:
            found = [
                rows_attention(x, k, v, slot, position)
                for x, (k, v) in zip(qkv, cache, strict=True)
            ]
            Tensor.realize(*found)
            return found

        for n in DECODE:  # the last key and value are given with the query, and written again
            last = [
                np.stack([query[:, :, 0], *(x[:, :, n - 1] for x in pair)], 1) for pair in pairs
            ]
            qkv = [Tensor(x.reshape(1, -1)).realize() for x in last]  # (B, 3, H, D)
            position = Tensor([n - 1], dtype=dtypes.int32).realize()
            self.works[str(n)] = lambda position=position, qkv=qkv: step(position, *qkv)
            for _ in range(3):
                self.works[str(n)]()

    def results(self, n: int) -> np.ndarray:
        return self.works[str(n)]()[-1].numpy().reshape(1, CACHE[1], 1, CACHE[3])


class TorchDecoding(Works):
    def __init__(self, threads: int) -> None:
        super().__init__()
        import torch

        torch.set_num_threads(threads)
        query, keys, values = caches()
        q = torch.from_numpy(query)
        pairs = [
            (torch.from_numpy(k), torch.from_numpy(v)) for k, v in zip(keys, values, strict=True)
        ]
        sdpa = torch.nn.functional.scaled_dot_product_attention

        def step(n: int) -> list[torch.Tensor]:
            with torch.no_grad():
                return [sdpa(q, k[:, :, :n], v[:, :, :n]) for k, v in pairs]

        self.works = {str(n): (lambda n=n: step(n)) for n in DECODE}
        for work in self.works.values():
            work()

    def results(self, n: int) -> np.ndarray:
        return self.works[str(n)]()[-1].numpy()


def caches() -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    rng = np.random.default_rng(0)
    B, H, _, D = CACHE
    arrays = [rng.standard_normal(CACHE, np.float32) for _ in range(2 * LAYERS)]
    return rng.standard_normal((B, H, 1, D), np.float32), arrays[:LAYERS], arrays[LAYERS:]


def check(side: Side, shape: Shape, packed: bool) -> float:
    """The largest error of the last head, as a part of the largest number of each array."""
    found = side("results")
    if packed:
        found = unpack(found[0], shape) + unpack(found[1], shape)
    wanted = exact(*(x[-1, -1] for x in numbers(shape)))
    return max(
        float(np.abs(a[-1, -1] - b).max() / np.abs(b).max())
        for a, b in zip(found, wanted, strict=True)
    )


def check_decoding(side: Side) -> float:
    query, keys, values = caches()
    worst = 0.0
    for n in DECODE:
        q, k, v = (x[-1, -1, :n].astype(np.float64) for x in (query, keys[-1], values[-1]))
        scores = q @ k.T / math.sqrt(q.shape[1])
        weights = np.exp(scores - scores.max())
        wanted = (weights / weights.sum()) @ v
        error = np.abs(side("results", n)[-1, -1] - wanted).max() / np.abs(wanted).max()
        worst = max(worst, float(error))
    return worst


def measure(sides: dict[str, Side], work: str, options: Any) -> dict[str, Any]:
    """Seconds of each side, and how many times as long as ours each of the others takes."""
    once = max(side("turn", work, 1, False) for side in sides.values())
    todo = (work, max(1, round(TURN / once)), options.cpu_time)
    turns = {name: (lambda s=side: s("turn", *todo)) for name, side in sides.items()}
    seconds = take_turns(turns, options.rounds)
    found: dict[str, Any] = {name: Spread.of(x) for name, x in seconds.items()}
    others = [name for name in sides if name != "ours"]
    return found | {f"{name}/ours": ratio(seconds[name], seconds["ours"]) for name in others}


def show(title: str, found: dict[str, Any]) -> None:
    columns = [f"{title:34}"]
    for name, spread in found.items():
        if "/" in name:
            columns.append(f"{name} {spread.show()}")
        else:
            ms = Spread(*(1e3 * x for x in (spread.median, spread.low, spread.high)))
            columns.append(f"{name} {ms.show('.3f')} ms")
    print("   ".join(columns), flush=True)


def training(options: Any, shape: Shape, packed: bool) -> list[dict[str, Any]]:
    sides = {
        "ours": Side(Ours, shape, packed, False, threads=options.threads),
        "torch": Side(Torch, shape, packed, options.threads, threads=options.threads),
    }
    if options.plain and shape[2] <= 1024:
        sides["plain"] = Side(Ours, shape, packed, True, threads=options.threads)
    errors = {name: check(side, shape, packed) for name, side in sides.items()}
    form = "packed" if packed else "heads"
    for name, error in errors.items():
        assert error < TOLERANCE, f"{name} is wrong by {error:.1e} at {shape}, {form}"
    rows = []
    for work, products in (("forward", 2), ("both", 7)):
        found = measure(sides, work, options)
        show(f"{shape} {form} {work}", found)
        B, H, T, D = shape
        gflops = products * B * H * T * (T + 1) * D / found["ours"].median / 1e9
        rows.append({"shape": shape, "form": form, "work": work, "gflops": gflops, **found})
    memory = {name: side("memory") for name, side in sides.items()}
    for side in sides.values():
        side.close()
    peak = ", ".join(f"{name} {size / MB:.0f} MB" for name, size in memory.items())
    worst = ", ".join(f"{name} {error:.0e}" for name, error in errors.items())
    print(f"    ours {rows[-1]['gflops']:.0f} GFLOPS; peak memory {peak}; error {worst}")
    return [row | {"memory": memory, "errors": errors} for row in rows]


def decoding(options: Any) -> list[dict[str, Any]]:
    sides = {
        "ours": Side(OurDecoding, threads=options.threads),
        "torch": Side(TorchDecoding, options.threads, threads=options.threads),
    }
    for name, side in sides.items():
        error = check_decoding(side)
        assert error < TOLERANCE, f"{name} is wrong by {error:.1e} in decoding"
    rows = []
    for n in DECODE:
        found = measure(sides, str(n), options)
        show(f"decode, {LAYERS} layers, {n} keys", found)
        rows.append({"shape": CACHE, "form": "decode", "work": n, **found})
    for side in sides.values():
        side.close()
    return rows


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--set", choices=["usual", "long", "decode", "all"], default="usual")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--plain", action="store_true", help="the formula in tinygrad, too")
    parser.add_argument("--cpu-time", action="store_true", help="for one thread, when busy")
    options = parser.parse_args()
    if options.cpu_time and options.threads > 1:
        parser.error("--cpu-time compares single threads: give --threads 1")
    found = machine()
    show_machine(found, options.threads)
    rows: list[dict[str, Any]] = []
    for name, shapes in (("usual", USUAL), ("long", LONG)):
        if options.set in (name, "all"):
            for shape in shapes:
                rows += training(options, shape, packed=False)
                rows += training(options, shape, packed=True) if name == "usual" else []
    if options.set in ("decode", "all"):
        rows += decoding(options)
    clock = {"clock": "cpu" if options.cpu_time else "wall"}
    write_json(options.json, {"machine": found, "threads": options.threads, "rows": rows} | clock)


if __name__ == "__main__":
    main()
