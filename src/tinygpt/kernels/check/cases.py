"""What is checked: for each kernel shapes that are usual, odd and small, and a typical one to time.

A case computes an operation in three ways from the same inputs: by its kernel, by its plain twin
and in float64. Every operation of ``dispatch.OPERATIONS`` needs one: see `check.unchecked`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from tinygrad import Tensor, dtypes

from tinygpt import kernels
from tinygpt.kernels.attention import flash_attention
from tinygpt.kernels.check import exact

Array = npt.NDArray[Any]
Results = Callable[..., list[Tensor]]
Formula = Callable[..., list[exact.Array]]

TOLERANCE = 2e-5
"""The largest error that passes, as a part of the largest number of a result, or of 1."""
BFLOAT16 = 2.0**-7
"""The same for results that are rounded to bfloat16, which has 8 bits: two roundings."""


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
    tolerance: float = TOLERANCE


def case(
    operation: Callable[..., Any],
    shape: str,
    inputs: Sequence[Array],
    formula: Formula,
    compute: Callable[..., Any] | None = None,
    gradients: int = 0,
    results: int = 1,
) -> Case:
    """A case of an operation, which ``compute`` calls if its arguments are not just the inputs.

    With ``gradients`` those of so many inputs are computed too, from one more input, the last: the
    gradient of the result. The twin is the same within ``plain()``.
    """

    def ours(*given: Tensor) -> list[Tensor]:
        found = (compute or operation)(*(given[:-1] if gradients else given))
        if not gradients:
            return list(found) if isinstance(found, (list, tuple)) else [found]
        last = given[-1].reshape(found.shape)
        return [found, *found.gradient(*given[:gradients], gradient=last)]

    def twin(*given: Tensor) -> list[Tensor]:
        with kernels.plain():
            return ours(*given)

    return Case(operation.__name__, shape, tuple(inputs), ours, twin, formula, results)


def several(*shapes: tuple[int, ...]) -> list[npt.NDArray[np.float32]]:
    """Normal random numbers in each of the shapes."""
    return [
        np.random.default_rng(seed).standard_normal(shape, np.float32)
        for seed, shape in enumerate(shapes)
    ]


def _attention(B: int, H: int, Tq: int, Tk: int, D: int, causal: bool) -> Case:
    sizes = f"T{Tq}" if Tq == Tk else f"Tq{Tq} Tk{Tk}"
    return case(
        flash_attention,
        f"B{B} H{H} {sizes} D{D} {'causal' if causal else 'all to all'}",
        several((B, H, Tq, D), (B, H, Tk, D), (B, H, Tk, D), (B, H, Tq, D)),
        lambda q, k, v, grad: exact.attention(q, k, v, causal, grad),
        lambda q, k, v: flash_attention(q, k, v, causal),
        gradients=3,
    )


def _packed(B: int, H: int, T: int, D: int) -> Case:
    """As the model calls it."""
    return case(
        kernels.self_attention,
        f"packed B{B} H{H} T{T} D{D} causal",
        several((B, T, 3 * H * D), (B, T, H * D)),
        lambda qkv, grad: exact.packed_attention(qkv, H, grad),
        lambda qkv: kernels.self_attention(qkv, H),
        gradients=1,
    )


def _rows(n: int, P: int, H: int, T: int, D: int) -> Case:
    """A step of n sequences in a cache of P slots."""
    slots = np.arange(P, dtype=np.int32)[::-1][:n].copy()
    positions = np.arange(n, dtype=np.int32) * (T // n)
    inputs = [*several((n, 3 * H * D), (P, H, T, D), (P, H, T, D)), slots, positions]

    def compute(
        qkv: Tensor, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor
    ) -> list[Tensor]:
        keys, values = keys.clone().realize(), values.clone().realize()
        y = kernels.rows_attention(qkv, keys, values, slots, positions)
        return [y.realize(), keys, values]

    shape = f"rows n{n} of {P} H{H} T{T} D{D}"
    return case(kernels.rows_attention, shape, inputs, exact.rows_attention, compute, results=3)


def _rows_int8(n: int, P: int, H: int, T: int, D: int) -> Case:
    """The same in an int8 cache, which is exact where every number is a multiple of its scale."""
    slots = np.arange(P, dtype=np.int32)[::-1][:n].copy()
    positions = np.arange(n, dtype=np.int32) * (T // n)
    rng = np.random.default_rng(0)
    whole = [rng.integers(-127, 128, s) for s in ((n, 3, H, D), (P, H, T, D), (P, H, T, D))]
    for x in whole:
        x[..., 0] = 127  # so that the scale is the unit that follows
    units = [rng.uniform(0.002, 0.02, (*x.shape[:-1], 1)).astype(np.float32) for x in whole]
    qkv = (whole[0] * units[0]).astype(np.float32).reshape(n, 3 * H * D)
    caches = [x.astype(np.int8) for x in whole[1:]]

    def compute(qkv: Tensor, keys: Tensor, values: Tensor, *rest: Tensor) -> list[Tensor]:
        slots, positions, *scales = rest
        keys, values, *scales = (t.clone().realize() for t in (keys, values, *scales))
        y = kernels.rows_attention(qkv, keys, values, slots, positions, scales).realize()
        return [y, keys * scales[0], values * scales[1]]

    def formula(qkv: Any, keys: Any, values: Any, *rest: Any) -> list[exact.Array]:
        *where, key_scales, value_scales = rest
        return exact.rows_attention(qkv, keys * key_scales, values * value_scales, *where)

    inputs: list[Array] = [qkv, *caches, slots, positions, *units[1:]]
    shape = f"int8 rows n{n} of {P} H{H} T{T} D{D}"
    return case(kernels.rows_attention, shape, inputs, formula, compute, results=3)


def _keep(n: int, P: int, H: int, T: int, D: int) -> Case:
    """The keys and values of a prompt, written into slot 1."""
    inputs = [*several((n, 3 * H * D), (P, H, T, D), (P, H, T, D)), np.array([1], np.int32)]

    def compute(qkv: Tensor, keys: Tensor, values: Tensor, slot: Tensor) -> list[Tensor]:
        return kernels.keep(qkv, keys.clone().realize(), values.clone().realize(), slot)

    shape = f"keep {n} of {P} H{H} T{T} D{D}"
    return case(kernels.keep, shape, inputs, exact.keep, compute, results=2)


def _linear(rows: int, n_in: int, n_out: int) -> Case:
    inputs = several((rows, n_in), (n_out, n_in), (n_out,), (rows, n_out))
    return case(kernels.linear, f"{rows}x{n_in} to {n_out}", inputs, exact.linear, gradients=3)


def _half_linear(rows: int, n_in: int, n_out: int) -> Case:
    """As in training: x and y are bfloat16, the weights float32."""
    inputs = [rounded(x) for x in several((rows, n_in), (n_out, n_in), (n_out,), (rows, n_out))]

    def compute(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return kernels.linear(x.cast(dtypes.bfloat16), weight, bias).float()

    made = case(
        kernels.linear, f"{rows}x{n_in} to {n_out}", inputs, exact.linear, compute, gradients=3
    )
    return replace(made, tolerance=BFLOAT16)


def _half_attention(B: int, H: int, T: int, D: int) -> Case:
    """As in training: queries, keys and values are bfloat16; on GPUs by tensor cores."""
    inputs = [rounded(x) for x in several((B, T, 3 * H * D), (B, T, H * D))]

    def compute(qkv: Tensor) -> Tensor:
        return kernels.self_attention(qkv.cast(dtypes.bfloat16), H).float()

    made = case(
        kernels.self_attention,
        f"attention B{B} H{H} T{T} D{D}",
        inputs,
        lambda qkv, grad: exact.packed_attention(qkv, H, grad),
        compute,
        gradients=1,
    )
    return replace(made, tolerance=BFLOAT16)


def rounded(x: Array) -> Array:
    """float32 numbers rounded to those of bfloat16, which are the upper halves of some."""
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32)


def _gelu(rows: int, width: int) -> Case:
    inputs = several((rows, width), (rows, width))
    return case(kernels.gelu, f"{rows}x{width}", inputs, exact.gelu, gradients=1)


def _int8(rows: int, n_in: int, n_out: int) -> Case:
    """A layer whose weights are int8, which only generates and has no gradients."""
    x, scale, bias = several((rows, n_in), (n_out,), (n_out,))
    weight = np.random.default_rng(1).integers(-127, 128, (n_out, n_in), np.int8)
    inputs, shape = [x, weight, np.abs(scale) / 127, bias], f"{rows}x{n_in} to {n_out}"
    return case(kernels.quantized_linear, shape, inputs, exact.quantized_linear)


def _int4(rows: int, n_in: int, n_out: int) -> Case:
    """A layer whose weights are int4 in blocks of 32."""
    x, bias = several((rows, n_in), (n_out,))
    rng = np.random.default_rng(1)
    weight = rng.integers(0, 256, (n_out, n_in // 2), np.uint8)
    scale = rng.uniform(-0.1, 0.1, (n_out, n_in // 32)).astype(np.float16).astype(np.float32)
    inputs, shape = [x, weight, scale, bias], f"{rows}x{n_in} to {n_out} int4"
    return case(kernels.int4_linear, shape, inputs, exact.int4_linear)


def _norm(rows: int, width: int) -> Case:
    inputs = several((rows, width), (width,), (width,), (rows, width))
    inputs[0] = inputs[0] * 3 + 1
    return case(kernels.layer_norm, f"{rows}x{width}", inputs, exact.layer_norm, gradients=3)


def _dropout(rows: int, width: int) -> Case:
    (x, grad), p = several((rows, width), (rows, width)), 0.3
    return case(
        kernels.dropout,
        f"{rows}x{width}",
        [x, np.array([1337, 42], np.uint32), grad],
        lambda x, key, grad: exact.dropout(x, key, p, grad),
        lambda x, key: kernels.dropout(x, p, key),
        gradients=1,
    )


def _embedding(B: int, T: int, V: int, C: int) -> Case:
    weight, positions, grad = several((V, C), (T, C), (B, T, C))
    return case(
        kernels.embedding,
        f"{B}x{T} of {V}x{C}",
        [weight, positions, np.random.default_rng(0).integers(0, V, (B, T), np.int32), grad],
        exact.embedding,
        lambda weight, positions, tokens: kernels.embedding(tokens, weight, positions),
        gradients=2,
    )


def _loss(rows: int, C: int, V: int) -> Case:
    inputs, shape = [*several((rows, C), (V, C)), *_targets(rows, V)], f"{rows}x{C} to {V}"
    compute = partial(kernels.loss, gradient=True)
    return case(kernels.loss, shape, inputs, exact.loss, compute, gradients=2)


def _half_loss(rows: int, C: int, V: int) -> Case:
    """As in training: x is bfloat16, the weight float32. Their products are of the order of 1."""
    x, weight = map(rounded, several((rows, C), (V, C)))
    inputs = [x, rounded(weight / np.float32(C) ** 0.5), *_targets(rows, V)]

    def compute(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return kernels.loss(x.cast(dtypes.bfloat16), weight, targets, gradient=True)

    made = case(kernels.loss, f"{rows}x{C} to {V}", inputs, exact.loss, compute, gradients=2)
    return replace(made, shape=f"loss {made.shape}", tolerance=BFLOAT16)


def _cross_entropy(rows: int, V: int) -> Case:
    """Of logits that exist."""
    inputs, shape = [*several((rows, V)), *_targets(rows, V)], f"{rows} logits of {V}"
    return case(kernels.cross_entropy, shape, inputs, exact.cross_entropy, gradients=1)


def _targets(rows: int, V: int) -> tuple[Array, Array]:
    """Targets, some left out, and a gradient: those of a mean are small; so they are about 1."""
    targets = np.random.default_rng(0).integers(0, V, rows).astype(np.int32)
    targets[1::5] = -1
    return targets, np.array([rows], np.float32)


def _adamw(*shapes: tuple[int, ...]) -> Case:
    """The third step, with weight decay, and clipped."""
    n, step = len(shapes), 3
    rates: dict[str, Any] = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "clip": 1.0}
    numbers = several(*shapes * 4)
    numbers[3 * n :] = [v**2 for v in numbers[3 * n :]]
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

    inputs, shape = numbers + scalars, f"{n} tensors from {shapes[0]}"
    return case(kernels.adamw_update, shape, inputs, formula, compute, results=1 + 3 * n)


def _adamw_in_shares(operation: Callable[..., Any], *shapes: tuple[int, ...]) -> Case:
    """The same, in the three parts that several devices take it in."""
    whole, n = _adamw(*shapes), len(shapes)
    rates: dict[str, Any] = {"beta1": 0.9, "beta2": 0.99}

    def compute(*inputs: Tensor) -> list[Tensor]:
        p, g, m, v = (list(inputs[i : i + n]) for i in range(0, 4 * n, n))
        p, m, v = ([t.clone() for t in ts] for ts in (p, m, v))
        lr, *powers = (t.clone() for t in inputs[4 * n :])
        sums = kernels.squared_sums(g)
        numbers, report = kernels.adamw_numbers(sums, lr, *powers, clip=1.0, **rates)
        kernels.adamw_follow(p, g, m, v, numbers, decay=[0.1] * n, eps=1e-8, **rates)
        return [report[1], *(t for part in zip(p, m, v, strict=True) for t in part)]

    shape = f"{whole.shape}, {operation.__name__}"
    return case(operation, shape, whole.inputs, whole.exact, compute, results=whole.results)


def _muon(*shapes: tuple[int, int, int]) -> Case:
    """Clipped, with weight decay, of weights (rows, columns, matrices one above the other)."""
    n, counts, norm = len(shapes), [count for *_, count in shapes], 4.0
    rates: dict[str, Any] = {"momentum": 0.95, "decay": 0.1, "clip": 1.0}
    numbers = several(*[(rows, columns) for rows, columns, _ in shapes] * 3)
    scalars = [np.array(x, np.float32) for x in ([0.01], [1.0, norm, 1.0])]

    def compute(*inputs: Tensor) -> list[Tensor]:
        p, g, m = (list(inputs[i : i + n]) for i in range(0, 3 * n, n))
        p, m = ([t.clone() for t in ts] for ts in (p, m))
        kernels.muon_update(p, g, m, counts, *inputs[3 * n :], ratio=2.0, **rates)
        return [t for part in zip(p, m, strict=True) for t in part]

    def formula(*inputs: exact.Array) -> list[exact.Array]:
        parts = list(zip(*(inputs[i : i + n] for i in range(0, 3 * n, n)), strict=True))
        return exact.muon(parts, counts, lr=0.02, norm=norm, **rates)

    inputs, shape = numbers + scalars, f"{n} matrices from {shapes[0]}"
    return case(kernels.muon_update, shape, inputs, formula, compute, results=2 * n)


Make = Callable[[], Case]


def each(make: Callable[..., Case], *shapes: tuple[Any, ...]) -> list[Make]:
    """What makes a case of every shape."""
    return [partial(make, *shape) for shape in shapes]


THREE = (1, 1), (7, 33), (96, 128)
LAYERS = ((384, 128), (128, 128), (512, 128), (128, 512)) * 4
KERNELS: dict[str, tuple[list[Make], Make]] = {
    "attention": (
        [
            *each(_attention, (2, 2, 1, 1, 16, True), (1, 3, 7, 7, 32, True)),
            *each(_attention, (2, 2, 64, 64, 32, True), (2, 1, 257, 257, 64, True)),
            *each(_attention, (1, 2, 1000, 1000, 16, True), (1, 2, 20, 100, 64, True)),
            *each(_attention, (1, 2, 33, 50, 128, False)),
            *each(_packed, (2, 4, 40, 32)),
            *each(_rows, (2, 2, 4, 300, 64), (3, 5, 2, 100, 32)),
            *each(_rows_int8, (2, 2, 4, 300, 64), (3, 5, 2, 100, 24)),
            *each(_keep, (7, 5, 2, 20, 24)),
        ],
        partial(_packed, 2, 4, 256, 32),
    ),
    "linear": (
        each(_linear, (1, 64, 192), (24, 96, 160), (65, 33, 17)),
        partial(_linear, 768, 128, 512),
    ),
    "bfloat16": (
        [
            *each(_half_linear, (1, 64, 192), (24, 96, 160), (65, 34, 17), (40, 33, 50)),
            *each(_half_attention, (1, 2, 40, 32), (2, 1, 70, 64)),
            *each(_half_loss, (7, 33, 300), (300, 64, 1000)),
        ],
        partial(_half_linear, 768, 128, 512),
    ),
    "gelu": (each(_gelu, *THREE), partial(_gelu, 768, 512)),
    "int8": (
        [
            *each(_int8, (1, 64, 192), (3, 33, 17), (24, 96, 160)),
            *each(_int4, (1, 64, 192), (3, 96, 17), (24, 96, 160)),
        ],
        partial(_int8, 1, 768, 3072),
    ),
    "norm": (each(_norm, (1, 16), (7, 33), (96, 128), (5, 768)), partial(_norm, 768, 128)),
    "dropout": (each(_dropout, *THREE), partial(_dropout, 768, 128)),
    "embedding": (
        each(_embedding, (1, 1, 5, 16), (2, 7, 11, 33), (3, 40, 300, 64)),
        partial(_embedding, 12, 64, 512, 128),
    ),
    "loss": (
        [
            *each(_loss, (1, 16, 5), (7, 33, 300), (300, 64, 1000)),
            *each(_cross_entropy, (7, 300)),
        ],
        partial(_loss, 768, 128, 1024),
    ),
    "adamw": (
        [
            *each(_adamw, ((1,),), ((33, 7), (7,)), ((64, 64), (64, 64), (300, 64), (64,))),
            partial(_adamw_in_shares, kernels.squared_sums, (33, 7), (7,)),
            partial(_adamw_in_shares, kernels.adamw_numbers, (1,)),
            partial(_adamw_in_shares, kernels.adamw_follow, (64, 64), (300, 64), (64,)),
        ],
        partial(_adamw, *LAYERS),
    ),
    "muon": (
        each(_muon, ((99, 33, 3), (33, 48, 1)), ((192, 64, 3), (64, 256, 1))),
        partial(_muon, (384, 128, 3), (512, 128, 1)),
    ),
}
"""What can be checked: what makes its cases, and the one that is timed."""
