"""What is checked: for each kernel shapes that are usual, odd and small, and a typical one to time.

A case computes an operation in three ways from the same inputs: by its kernel, by its plain twin
and in float64. Every operation of ``dispatch.OPERATIONS`` needs one: see `check.unchecked`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tinygrad import Tensor

from tinygpt import kernels
from tinygpt.kernels.attention import flash_attention
from tinygpt.kernels.check import exact

Array = npt.NDArray[Any]
Function = Callable[..., Tensor]
Results = Callable[..., list[Tensor]]
Formula = Callable[..., list[exact.Array]]


@dataclass(frozen=True)
class Case:
    """One operation at one shape."""

    operation: str
    """Its name in ``OPERATIONS``."""
    shape: str
    inputs: tuple[Array, ...]
    ours: Results
    """Of the inputs as Tensors."""
    twin: Results
    exact: Formula
    """Of the inputs, of which the floating ones are float64."""
    results: int
    """How many of the computed arrays are results; the others are gradients."""


def case(
    operation: Callable[..., object],
    shape: str,
    inputs: Sequence[Array],
    compute: Results,
    formula: Formula,
    results: int = 1,
) -> Case:
    """A case of an operation that ``compute`` calls: its twin is the same within ``plain()``."""

    def twin(*given: Tensor) -> list[Tensor]:
        with kernels.plain():
            return compute(*given)

    return Case(operation.__name__, shape, tuple(inputs), compute, twin, formula, results)


def attention_cases() -> Iterator[Case]:
    for B, H, Tq, Tk, D, causal in (
        (2, 2, 1, 1, 16, True),
        (1, 3, 7, 7, 32, True),
        (2, 2, 64, 64, 32, True),
        (2, 1, 257, 257, 64, True),
        (1, 2, 1000, 1000, 16, True),
        (1, 2, 20, 100, 64, True),
        (1, 2, 33, 50, 128, False),
    ):
        sizes = f"T{Tq}" if Tq == Tk else f"Tq{Tq} Tk{Tk}"
        yield _attention(f"B{B} H{H} {sizes} D{D}", B, H, Tq, Tk, D, causal)
    yield _packed("packed B2 H4 T40 D32", 2, 4, 40, 32)
    yield _rows("rows n2 of 2 H4 T300 D64", 2, 2, 4, 300, 64)
    yield _rows("rows n3 of 5 H2 T100 D32", 3, 5, 2, 100, 32)
    yield _keep("keep 7 of 5 H2 T20 D24", 7, 5, 2, 20, 24)


def attention_timed() -> Case:
    return _packed("packed B2 H4 T256 D32", 2, 4, 256, 32)


def _attention(shape: str, B: int, H: int, Tq: int, Tk: int, D: int, causal: bool) -> Case:
    q, grad = numbers(B, H, Tq, D), numbers(B, H, Tq, D, seed=3)
    k, v = numbers(B, H, Tk, D, seed=1), numbers(B, H, Tk, D, seed=2)
    return case(
        flash_attention,
        f"{shape} causal" if causal else f"{shape} all to all",
        (q, k, v, grad),
        with_gradients(lambda q, k, v: flash_attention(q, k, v, causal), 3),
        lambda q, k, v, grad: exact.attention(q, k, v, causal, grad),
    )


def _packed(shape: str, B: int, H: int, T: int, D: int) -> Case:
    """As the model calls it."""
    return case(
        kernels.self_attention,
        f"{shape} causal",
        (numbers(B, T, 3 * H * D), numbers(B, T, H * D, seed=1)),
        with_gradients(lambda qkv: kernels.self_attention(qkv, H), 1),
        lambda qkv, grad: exact.packed_attention(qkv, H, grad),
    )


def _rows(shape: str, n: int, P: int, H: int, T: int, D: int) -> Case:
    """A step of n sequences in a cache of P slots."""
    slots, positions = np.arange(P, dtype=np.int32)[::-1][:n].copy(), np.arange(n, dtype=np.int32)
    positions *= T // n
    inputs = (numbers(n, 3 * H * D), *_cache(P, H, T, D), slots, positions)

    def compute(qkv: Tensor, keys: Tensor, values: Tensor, *where: Tensor) -> list[Tensor]:
        keys, values = keys.clone().realize(), values.clone().realize()
        out = kernels.rows_attention(qkv, keys, values, *where).realize()
        return [out, keys, values]

    return case(kernels.rows_attention, shape, inputs, compute, exact.rows_attention, results=3)


def _keep(shape: str, n: int, P: int, H: int, T: int, D: int) -> Case:
    """The keys and values of a prompt, written into slot 1."""
    inputs = (numbers(n, 3 * H * D), *_cache(P, H, T, D), np.array([1], np.int32))

    def compute(qkv: Tensor, keys: Tensor, values: Tensor, slot: Tensor) -> list[Tensor]:
        return kernels.keep(qkv, keys.clone().realize(), values.clone().realize(), slot)

    return case(kernels.keep, shape, inputs, compute, exact.keep, results=2)


def _cache(P: int, H: int, T: int, D: int) -> tuple[Array, Array]:
    return numbers(P, H, T, D, seed=1), numbers(P, H, T, D, seed=2)


def linear_cases() -> Iterator[Case]:
    for rows, n_in, n_out in ((1, 64, 192), (24, 96, 160), (65, 33, 17)):
        yield _linear(rows, n_in, n_out)


def linear_timed() -> Case:
    return _linear(768, 128, 512)


def _linear(rows: int, n_in: int, n_out: int) -> Case:
    inputs = [numbers(rows, n_in), numbers(n_out, n_in, seed=1), numbers(n_out, seed=2)]
    return case(
        kernels.linear,
        f"{rows}x{n_in} to {n_out}",
        (*inputs, numbers(rows, n_out, seed=4)),
        with_gradients(kernels.linear, 3),
        exact.linear,
    )


def gelu_cases() -> Iterator[Case]:
    for rows, width in ((1, 1), (7, 33), (96, 128)):
        yield _gelu(rows, width)


def gelu_timed() -> Case:
    return _gelu(768, 512)


def _gelu(rows: int, width: int) -> Case:
    inputs = numbers(rows, width), numbers(rows, width, seed=1)
    compute = with_gradients(kernels.gelu, 1)
    return case(kernels.gelu, f"{rows}x{width}", inputs, compute, exact.gelu)


def int8_cases() -> Iterator[Case]:
    for rows, n_in, n_out in ((1, 64, 192), (3, 33, 17), (24, 96, 160)):
        yield _int8(rows, n_in, n_out)


def int8_timed() -> Case:
    return _int8(1, 768, 3072)


def _int8(rows: int, n_in: int, n_out: int) -> Case:
    """A layer whose weights are int8, which only generates and has no gradients."""
    weight = np.random.default_rng(1).integers(-127, 128, (n_out, n_in), np.int8)
    scale = np.abs(numbers(n_out, seed=2)) / 127
    return case(
        kernels.quantized_linear,
        f"{rows}x{n_in} to {n_out}",
        (numbers(rows, n_in), weight, scale, numbers(n_out, seed=3)),
        lambda *given: [kernels.quantized_linear(*given)],
        exact.quantized_linear,
    )


def norm_cases() -> Iterator[Case]:
    for rows, width in ((1, 16), (7, 33), (96, 128), (5, 768)):
        yield _norm(rows, width)


def norm_timed() -> Case:
    return _norm(768, 128)


def _norm(rows: int, width: int) -> Case:
    x = numbers(rows, width) * 3 + 1
    inputs = (x, numbers(width, seed=1), numbers(width, seed=2), numbers(rows, width, seed=3))
    compute = with_gradients(kernels.layer_norm, 3)
    return case(kernels.layer_norm, f"{rows}x{width}", inputs, compute, exact.layer_norm)


def dropout_cases() -> Iterator[Case]:
    for rows, width in ((1, 1), (7, 33), (96, 128)):
        yield _dropout(rows, width)


def dropout_timed() -> Case:
    return _dropout(768, 128)


def _dropout(rows: int, width: int) -> Case:
    x, grad = (numbers(rows, width, seed=i) for i in range(2))
    key, p = np.array([1337, 42], np.uint32), 0.3
    return case(
        kernels.dropout,
        f"{rows}x{width}",
        (x, key, grad),
        with_gradients(lambda x, key: kernels.dropout(x, p, key), 1),
        lambda x, key, grad: exact.dropout(x, key, p, grad),
    )


def embedding_cases() -> Iterator[Case]:
    for B, T, V, C in ((1, 1, 5, 16), (2, 7, 11, 33), (3, 40, 300, 64)):
        yield _embedding(B, T, V, C)


def embedding_timed() -> Case:
    return _embedding(12, 64, 512, 128)


def _embedding(B: int, T: int, V: int, C: int) -> Case:
    tokens = np.random.default_rng(0).integers(0, V, (B, T), np.int32)
    return case(
        kernels.embedding,
        f"{B}x{T} of {V}x{C}",
        (numbers(V, C), numbers(T, C, seed=1), tokens, numbers(B, T, C, seed=2)),
        with_gradients(lambda weight, at, tokens: kernels.embedding(tokens, weight, at), 2),
        exact.embedding,
    )


def loss_cases() -> Iterator[Case]:
    for rows, C, V in ((1, 16, 5), (7, 33, 300), (300, 64, 1000)):
        yield _loss(rows, C, V)
    yield _cross_entropy(7, 300)


def loss_timed() -> Case:
    return _loss(768, 128, 1024)


def _loss(rows: int, C: int, V: int) -> Case:
    def compute(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return kernels.loss(x, weight, targets, gradient=True)

    inputs = (numbers(rows, C), numbers(V, C, seed=1), *_targets(rows, V))
    shape = f"{rows}x{C} to {V}"
    return case(kernels.loss, shape, inputs, with_gradients(compute, 2), exact.loss)


def _cross_entropy(rows: int, V: int) -> Case:
    """Of logits that exist."""
    inputs = (numbers(rows, V), *_targets(rows, V))
    compute = with_gradients(kernels.cross_entropy, 1)
    return case(
        kernels.cross_entropy, f"{rows} logits of {V}", inputs, compute, exact.cross_entropy
    )


def _targets(rows: int, V: int) -> tuple[Array, Array]:
    """Targets, some left out, and a gradient: those of a mean are small; so they are about 1."""
    targets = np.random.default_rng(0).integers(0, V, rows).astype(np.int32)
    targets[1::5] = -1
    return targets, np.array([rows], np.float32)


def adamw_cases() -> Iterator[Case]:
    yield _adamw("one number", (1,))
    yield _adamw("33x7 and 7", (33, 7), (7,))
    yield _adamw("three matrices and a vector", (64, 64), (64, 64), (300, 64), (64,))


def adamw_timed() -> Case:
    return _adamw("four layers", *[(384, 128), (128, 128), (512, 128), (128, 512)] * 4)


def _adamw(name: str, *shapes: tuple[int, ...]) -> Case:
    """The third step, with weight decay, and clipped."""
    n, step = len(shapes), 3
    rates: dict[str, Any] = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "clip": 1.0}
    kinds = [[numbers(*s, seed=4 * i + j) for i, s in enumerate(shapes)] for j in range(4)]
    kinds[3] = [v**2 for v in kinds[3]]
    scalars = [np.array([x], np.float32) for x in (0.1, 0.9 ** (step - 1), 0.99 ** (step - 1))]

    def compute(*inputs: Tensor) -> list[Tensor]:
        p, g, m, v = (list(inputs[i : i + n]) for i in range(0, 4 * n, n))
        p, m, v = ([t.clone() for t in ts] for ts in (p, m, v))
        lr, *powers = (t.clone() for t in inputs[4 * n :])
        report = kernels.adamw_update(p, g, m, v, lr, *powers, decay=[0.1] * n, **rates)
        return [report[1], *(t for part in zip(p, m, v, strict=True) for t in part)]

    def formula(*inputs: exact.Array) -> list[exact.Array]:
        parts = list(zip(*(inputs[i : i + n] for i in range(0, 4 * n, n)), strict=True))
        return exact.adamw(parts, step, lr=0.1, decay=0.1, **rates)

    inputs = (*kinds[0], *kinds[1], *kinds[2], *kinds[3], *scalars)
    return case(kernels.adamw_update, name, inputs, compute, formula, results=1 + 3 * n)


def muon_cases() -> Iterator[Case]:
    yield _muon("99x33 in three and 33x48", (99, 33, 3), (33, 48, 1))
    yield _muon("192x64 in three and 64x256", (192, 64, 3), (64, 256, 1))


def muon_timed() -> Case:
    return _muon("384x128 in three and 512x128", (384, 128, 3), (512, 128, 1))


def _muon(name: str, *shapes: tuple[int, int, int]) -> Case:
    """Clipped, with weight decay, of weights (rows, columns, matrices one above the other)."""
    n, counts, norm = len(shapes), [count for *_, count in shapes], 4.0
    rates: dict[str, Any] = {"momentum": 0.95, "decay": 0.1, "clip": 1.0}
    kinds = [[numbers(*s[:2], seed=3 * i + j) for i, s in enumerate(shapes)] for j in range(3)]
    scalars = [np.array(x, np.float32) for x in ([0.01], [1.0, norm, 1.0])]

    def compute(*inputs: Tensor) -> list[Tensor]:
        p, g, m = (list(inputs[i : i + n]) for i in range(0, 3 * n, n))
        p, m = ([t.clone() for t in ts] for ts in (p, m))
        kernels.muon_update(p, g, m, counts, *inputs[3 * n :], ratio=2.0, **rates)
        return [t for part in zip(p, m, strict=True) for t in part]

    def formula(*inputs: exact.Array) -> list[exact.Array]:
        parts = list(zip(*(inputs[i : i + n] for i in range(0, 3 * n, n)), strict=True))
        return exact.muon(parts, counts, lr=0.02, norm=norm, **rates)

    inputs = (*kinds[0], *kinds[1], *kinds[2], *scalars)
    return case(kernels.muon_update, name, inputs, compute, formula, results=2 * n)


def with_gradients(function: Function, count: int) -> Results:
    """The function's result and the gradients of its first ``count`` inputs.

    The gradient of the result is one more input, the last.
    """

    def results(*inputs: Tensor) -> list[Tensor]:
        *given, gradient = inputs
        out = function(*given)
        return [out, *out.gradient(*given[:count], gradient=gradient.reshape(out.shape))]

    return results


def numbers(*shape: int, seed: int = 0) -> npt.NDArray[np.float32]:
    """Normal random numbers."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


KERNELS: dict[str, tuple[Callable[[], Iterator[Case]], Callable[[], Case]]] = {
    "attention": (attention_cases, attention_timed),
    "linear": (linear_cases, linear_timed),
    "gelu": (gelu_cases, gelu_timed),
    "int8": (int8_cases, int8_timed),
    "norm": (norm_cases, norm_timed),
    "dropout": (dropout_cases, dropout_timed),
    "embedding": (embedding_cases, embedding_timed),
    "loss": (loss_cases, loss_timed),
    "adamw": (adamw_cases, adamw_timed),
    "muon": (muon_cases, muon_timed),
}
"""What can be checked: its cases, and the one that is timed."""
