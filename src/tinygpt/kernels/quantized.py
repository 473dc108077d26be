"""Linear layers whose weights are int8: y = (x qᵀ) scale + b, with one scale for each row of q.

A step of decoding reads every weight once and computes little with it, so it takes the time that
reading takes, if computing does not take longer. To convert bytes to floats does: it takes twice as
many instructions as the multiply-adds. So the few rows of a step are rounded to int16 before, with
a scale for each row of x (`rounded_rows`), and the processor's own dot products of integers take
them: a byte becomes an int16, pairs of which are multiplied and added up in int32, exactly. What
the rounding changes: every number of x is off by at most 1 / 65534 of the row's largest.

The many rows of a prompt, and float64, go through `matmul`, which converts weights as it copies.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

from tinygrad import Device, Tensor, UOp, dtypes

from tinygpt.kernels.dispatch import first_device, operation
from tinygpt.kernels.linear import FEW, plain_linear, project_many
from tinygpt.kernels.loops import across, add_across, blocks, fill, spread
from tinygpt.kernels.pairs import processor_flags
from tinygpt.kernels.phases import Array, Index, Kernel, contiguous, empty, run
from tinygpt.machine.tinygrad_internals import ClangRenderer

LARGEST = 32767
"""What the largest number of a row becomes."""
MOST_STEPS = 256
"""After so many, sums are added up as floats: a step adds up to 2 · 127 · 32767 to an int32."""


class Instructions(NamedTuple):
    """How a processor multiplies pairs of int16, and how much at a time."""

    name: str
    numbers: int  # int16 in a register
    registers: int


AVX512 = Instructions("vpdpwssd", 32, 32)
AVX2 = Instructions("vpmaddwd", 16, 16)
PORTABLE = Instructions("", 16, 32)
"""In C without intrinsics: compilers make NEON's smlal of it."""


@functools.cache
def instructions(device: str) -> Instructions:
    """What the kernels of a device use."""
    renderer = Device[device].renderer
    native = isinstance(renderer, ClangRenderer) and renderer.target.arch == "x86_64,native"
    flags = processor_flags() if native else []
    if {"avx512_vnni", "avx512bw"} <= set(flags):
        return AVX512
    return AVX2 if "avx2" in flags else PORTABLE


def dequantized(weight: Tensor, scale: Tensor) -> Tensor:
    """The numbers that int8 weights (O, I) stand for, with a scale (O,) for each row."""
    return weight.cast(scale.dtype) * scale.unsqueeze(1)


def plain_quantized_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """The same layer with the dequantised weight."""
    return plain_linear(x, dequantized(weight, scale), bias)


@operation("int8", plain_quantized_linear, integers=("weight",), cpu=True)
def quantized_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """y = x Wᵀ + b, where W = weight scale, for x (..., I) -> (..., O).

    weight is int8 (O, I), scale and bias are (O,). Sums are float32, or float64 for float64; up to
    16 rows of float32 or narrower are rounded to int16, and their sums are exact. There is no
    gradient.
    """
    n_out, n_in = map(int, weight.shape)
    x2, w = contiguous(x.reshape(-1, n_in)), contiguous(weight)
    rest = [contiguous(t) for t in (scale, bias) if t is not None]
    if int(x2.shape[0]) > FEW or x.dtype == dtypes.float64:
        y = project_many(x2, w, scale, bias)
    else:
        y = in_integers(few_rows, "int8", x2, [w, *rest], instructions(first_device(x)))
    return y.cast(x.dtype).reshape(*x.shape[:-1], n_out)


def in_integers(
    kernel: Callable[..., None], name: str, x: Tensor, inputs: list[Tensor], kind: Instructions
) -> Tensor:
    """y (M, O) of a product of few rows; ``inputs`` are the weight, whose rows are O, and the rest
    that the kernel takes behind x (M, I) as integers."""
    (m, n_in), n_out = map(int, x.shape), int(inputs[0].shape[0])
    return run(
        kernel,
        [empty(x, m, n_out, dtype=dtypes.float32)],
        [*rounded_rows(x), *inputs],
        lanes=kind.numbers // 2,
        name=f"matvec_{name}_{m}x{n_out}x{n_in}",
        ops=2 * m * n_in * n_out,
        sizes=(m, n_in, n_out),
        kind=kind,
    )[0]


# x as integers ----------------------------------------------------------------------------------


def rounded_rows(x: Tensor) -> list[Tensor]:
    """int16 q (M, I) and float32 scale (M,) with scale q ≈ x (M, I), off by scale / 2 at most.

    A row with a number that is not finite has a scale that is not.
    """
    m, n = map(int, x.shape)
    outputs = [empty(x, m, n, dtype=dtypes.int16), empty(x, m, dtype=dtypes.float32)]
    return run(round_rows, outputs, [x], lanes=min(16, n), name=f"round_{m}x{n}", n=n, m=m)


def round_rows(k: Kernel, q: Array, scale: Array, x: Array, *, m: int, n: int) -> None:
    """A row is a unit. Floats without their sign are ordered as their bits are, NaN behind all."""
    row = k.units(m)
    bits, most = k.tile(1, dtypes.int32), k.tile(1, dtypes.int32, width=1)
    inverse = k.tile(1, dtypes.float32, width=1)
    fill(k, 0, 1, bits)
    for at, lane, _ in across(k, n):
        found = x[row * n + at].cast(dtypes.float32).bitcast(dtypes.int32) & 0x7FFFFFFF
        bits[0, lane] = bits[0, lane].maximum(found)
    k.fold(most, bits, 1, UOp.maximum)
    with k.phase(1):
        largest = most[0, 0].bitcast(dtypes.float32)
        scale[row] = largest * (1 / LARGEST)
        # rows of nothing but 0, or of numbers next to it, whose inverse would be infinite
        inverse[0, 0] = (largest > 1e-30).where(LARGEST / largest, 0.0)
    for at, _, _ in across(k, n):
        moved = x[row * n + at].cast(dtypes.float32) * inverse[0, 0] + (LARGEST + 1.5)
        moved = (moved > 0.0).where(moved, 0.0)  # NaN becomes an integer too
        q[row * n + at] = moved.cast(dtypes.int32) - (LARGEST + 1)


# The product ------------------------------------------------------------------------------------


def few_rows(
    k: Kernel,
    out: Array,
    q: Array,
    x_scale: Array,
    w: Array,
    scale: Array,
    *bias: Array,
    sizes: tuple[int, int, int],
    kind: Instructions,
) -> None:
    """y = q wᵀ x_scale scale + b for a few rows. A unit is a few outputs; the lanes run along w."""
    m, n_in, n_out = sizes
    # so many sums are in registers, besides q's numbers; a weight is converted once for some rows
    height = min(m, 4 if kind.registers == 32 else 2)
    outputs = min(8 if height == 1 else 4, n_out)
    row = spread(k.units(blocks(n_out, outputs)), n_out, outputs)
    steps = n_in // kind.numbers if n_in >= 2 * kind.numbers else 0

    def some(start: Index, count: int) -> None:
        """The rows of x from ``start`` on, so many together."""
        sums = [(a, j) for a in range(count) for j in range(outputs)]
        acc, real = k.tile(len(sums), dtypes.int32), k.tile(len(sums), shared=True)
        total = k.tile(len(sums), width=1)
        fill(k, 0.0, len(sums), real)
        for first in range(0, steps, MOST_STEPS):
            fill(k, 0, len(sums), acc)
            with k.loop(min(MOST_STEPS, steps - first)) as d, k.phase(1):
                begin = (d + first) * kind.numbers
                vectors = [q[(start + a) * n_in + begin] for a in range(count)]
                weights = [w[row(j) * n_in + begin] for j in range(outputs)]
                k.statement(add_products(kind, count, outputs), acc[0, 0], *vectors, *weights)
            with k.phase() as lane:
                for i in range(len(sums)):
                    real[i, lane] = real[i, lane] + acc[i, lane].cast(dtypes.float32)
        for at in range(steps * kind.numbers, n_in, k.lanes):
            with k.phase(min(k.lanes, n_in - at)) as lane:
                for i, (a, j) in enumerate(sums):
                    number = w[row(j) * n_in + at + lane].cast(dtypes.int32)
                    product = q[(start + a) * n_in + at + lane].cast(dtypes.int32) * number
                    real[i, lane] = real[i, lane] + product.cast(dtypes.float32)
        add_across(k, total, real, len(sums))
        with k.phase(outputs) as output:
            for a in range(count):
                value = total[a * outputs + output, 0] * x_scale[start + a]
                value = value * scale[row(output)].cast(dtypes.float32)
                for b in bias:
                    value = value + b[row(output)].cast(dtypes.float32)
                out[(start + a) * n_out + row(output)] = value

    whole, rest = divmod(m, height)
    with k.loop(whole) as i:
        some(i * height, height)
    if rest:
        some(whole * height, rest)


@functools.cache
def add_products(kind: Instructions, rows: int, outputs: int) -> str:
    """Statement: {0} are the sums, rows x outputs, then come the vectors of rows and of weights."""
    lines = [*vector_types(kind)]
    lines += [f"W x{a} = *(W*)({{{1 + a}}});" for a in range(rows)]
    for j in range(outputs):
        lines.append(f"W w{j} = __builtin_convertvector(*(B*)({{{1 + rows + j}}}), W);")
        for a in range(rows):
            total = f"((S*)({{0}}))[{a * outputs + j}]"
            lines += multiply_add(kind, total, f"w{j}", f"x{a}")
    return "{{ " + "\n  ".join(lines) + " }}"


def vector_types(kind: Instructions, byte: str = "signed char") -> list[str]:
    """Vectors of bytes, of the int16 that these become, and of the sums of pairs."""
    return [
        f"typedef {number} {name} __attribute__((vector_size({size * kind.numbers}), "
        f"aligned({align}), may_alias));"
        for name, number, size, align in (
            ("B", byte, 1, 1),
            ("W", "short", 2, 2),
            ("S", "int", 2, 4),
        )
    ]


def multiply_add(kind: Instructions, total: str, a: str, b: str) -> list[str]:
    """total += a b, where the products of two neighbours go to one sum."""
    if kind.name == AVX512.name:
        return [f'__asm__("vpdpwssd %2, %1, %0" : "+v"({total}) : "v"({a}), "v"({b}));']
    if kind.name == AVX2.name:
        return [
            f'{{{{ S t; __asm__("vpmaddwd %2, %1, %0" : "=x"(t) : "x"({a}), "x"({b}));',
            f"{total} += t; }}}}",
        ]
    half = kind.numbers // 2

    def part(v: str, first: int) -> str:
        places = ", ".join(str(first + i) for i in range(half))
        return f"__builtin_convertvector(__builtin_shufflevector({v}, {v}, {places}), S)"

    return [f"{total} += {part(a, first)} * {part(b, first)};" for first in (0, half)]
