"""Linear layers whose weights are 4 bits: blocks of 32 numbers of a row, with a scale each.

The layout of a block is that of llama.cpp's Q4_0: 16 bytes, of which byte j holds number j in its
low half and number j + 16 in its high half, each from 0 to 15, and a float16 scale. A number stands
for scale (number - 8). As in `quantized`, a step of decoding takes the time that reading the weight
takes, x is rounded to int16, and products of integers are added up exactly, those of a block here.
The 8 is taken off once a block: sums begin at -8 times those of x, which all outputs share.
"""

from __future__ import annotations

import functools

from tinygrad import Tensor, dtypes

from tinygpt.kernels.dispatch import first_device, operation
from tinygpt.kernels.linear import FEW, plain_linear, project_many
from tinygpt.kernels.loops import add_across, blocks, fill, spread
from tinygpt.kernels.phases import Array, Kernel, contiguous, wide
from tinygpt.kernels.quantized import (
    Instructions,
    in_integers,
    instructions,
    multiply_add,
    vector_types,
)

BLOCK = 32
"""Numbers that share a scale."""
HALF = BLOCK // 2
"""Bytes of a block: as int16 they fill a register of AVX2."""
LANES = HALF // 2
"""Sums of pairs of numbers."""


def unpacked(packed: Tensor, scale: Tensor) -> Tensor:
    """The numbers (..., I) of packed bytes (..., I / 2) and scales (..., I / 32), like the scale.

    The bytes may be of any type.
    """
    lead, count = packed.shape[:-1], int(scale.shape[-1])
    # kept apart from what made the bytes: NaN, which marks an unknown token, is no integer constant
    whole = contiguous(packed).cast(dtypes.int32).reshape(*lead, count, BLOCK // 2)
    numbers = (whole & 15).cat(whole >> 4, dim=-1) - 8  # (..., blocks, 32)
    values = numbers.cast(scale.dtype) * scale.unsqueeze(-1)
    return values.reshape(*lead, count * BLOCK)


def plain_int4_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """The same layer with the weight unpacked."""
    return plain_linear(x, unpacked(weight, scale.cast(wide(x.dtype))), bias)


@operation("int8", plain_int4_linear, integers=("weight",), cpu=True)
def int4_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + b for x (..., I) -> (..., O), where W is ``unpacked(weight, scale)``.

    weight is uint8 (O, I / 2), scale (O, I / 32), bias (O,); I is a multiple of 32. Up to 16
    rows of float32 or narrower are rounded to int16, see `quantized`; sums are float32, or float64
    for float64. There is no gradient.
    """
    (n_out, _), n_in = map(int, weight.shape), int(x.shape[-1])
    x2, w, scale = contiguous(x.reshape(-1, n_in)), contiguous(weight), contiguous(scale)
    rest = [contiguous(t) for t in (bias,) if t is not None]
    if int(x2.shape[0]) > FEW or n_in == BLOCK or x.dtype == dtypes.float64:
        y = project_many(x2, unpacked(w, scale.cast(wide(x.dtype))).contiguous(), None, bias)
    else:
        kind = instructions(first_device(x))._replace(numbers=HALF)
        y = in_integers(few_rows, "int4", x2, [w, scale, *rest], kind)
    return y.cast(x.dtype).reshape(*x.shape[:-1], n_out)


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
    """y = x Wᵀ + b for a few rows of x. A unit is some outputs; the lanes run along the bytes."""
    m, n_in, n_out = sizes
    outputs, count = min(8, n_out), n_in // BLOCK
    row = spread(k.units(blocks(n_out, outputs)), n_out, outputs)
    scales = k.tile(outputs, width=count, shared=True)
    with k.phase(count) as b:
        for j in range(outputs):
            scales[j, b] = scale[row(j) * count + b].cast(dtypes.float32)
    with k.loop(m) as i:
        acc, total = k.tile(outputs, shared=True), k.tile(outputs, width=1)
        fill(k, 0.0, outputs, acc)
        with k.loop(count) as b, k.phase(1):
            bytes_ = [w[(row(j) * count + b) * HALF] for j in range(outputs)]
            factors = [scales[j, b] for j in range(outputs)]
            statement = add_block(kind, outputs)
            k.statement(statement, acc[0, 0], q[i * n_in + b * BLOCK], *bytes_, *factors)
        add_across(k, total, acc, outputs)
        with k.phase(outputs) as output:
            value = total[output, 0] * x_scale[i]
            for shift in bias:
                value = value + shift[row(output)].cast(dtypes.float32)
            out[i * n_out + row(output)] = value


@functools.cache
def add_block(kind: Instructions, outputs: int) -> str:
    """Statement: {0} are the sums, {1} the 32 numbers of x, then come bytes, and their scales."""
    lines = [
        *vector_types(kind, "unsigned char"),
        f"typedef float F __attribute__((vector_size({4 * LANES}), aligned(4), may_alias));",
        f"W x0 = *(W*)({{1}}), x1 = *(W*)({{1}}+{HALF}), ones = (W){{{{}}}} - 8;",
        "S eights = (S){{}};",
        *multiply_add(kind, "eights", "ones", "x0"),
        *multiply_add(kind, "eights", "ones", "x1"),
    ]
    for j in range(outputs):
        lines += [
            f"W w{j} = __builtin_convertvector(*(B*)({{{2 + j}}}), W);",
            f"W l{j} = w{j} & 15, h{j} = w{j} >> 4; S s{j} = eights;",
            *multiply_add(kind, f"s{j}", f"l{j}", "x0"),
            *multiply_add(kind, f"s{j}", f"h{j}", "x1"),
            f"((F*)({{0}}))[{j}] += __builtin_convertvector(s{j}, F) * *({{{2 + outputs + j}}});",
        ]
    return "{{ " + "\n  ".join(lines) + " }}"
