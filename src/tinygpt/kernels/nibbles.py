"""Linear layers whose weights are 4 bits: blocks of 32 numbers of a row, with a scale each.

The layout of a block is that of llama.cpp's Q4_0: 16 bytes, of which byte j holds number j in its
low half and number j + 16 in its high half, each from 0 to 15, and a float16 scale. A number stands
for scale (number - 8). As in `quantized`, a step of decoding takes the time that reading the weight
takes; the halves are taken apart in the registers.
"""

from __future__ import annotations

from tinygrad import Tensor, UOp, dtypes

from tinygpt.kernels.dispatch import operation
from tinygpt.kernels.linear import FEW, plain_linear, project
from tinygpt.kernels.loops import blocks, fill
from tinygpt.kernels.phases import Array, Kernel, contiguous, run, wide

BLOCK = 32
"""Numbers that share a scale."""
LANES = 8
"""Half of a block's bytes: eight sums of eight lanes stay in the registers of AVX2."""
OUTPUTS = 8
"""Rows of the weight that are read at once, from places far apart: see `linear`."""


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

    weight is uint8 (O, I / 2), scale (O, I / 32), bias (O,); I is a multiple of 32. Sums are
    float32, or float64 for float64. There is no gradient.
    """
    (n_out, _), n_in = map(int, weight.shape), int(x.shape[-1])
    x2, real = contiguous(x.reshape(-1, n_in)), wide(x.dtype)
    m = int(x2.shape[0])
    if m > FEW:
        y = project(x2, unpacked(weight, scale.cast(real)).contiguous(), None, bias)
    else:
        given = [x2, contiguous(weight), contiguous(scale)]
        y = run(
            few_rows,
            [Tensor.empty(m, n_out, dtype=real, device=x.device)],
            given + [contiguous(b) for b in (bias,) if b is not None],
            lanes=LANES,
            name=f"matvec_int4_{m}x{n_out}x{n_in}",
            ops=2 * m * n_in * n_out,
            sizes=(m, n_in, n_out),
        )[0]
    return y.cast(x.dtype).reshape(*x.shape[:-1], n_out)


def few_rows(
    k: Kernel,
    out: Array,
    x: Array,
    w: Array,
    scale: Array,
    *bias: Array,
    sizes: tuple[int, int, int],
) -> None:
    """y = x Wᵀ + b for a few rows of x. A unit is some outputs; the lanes run along the bytes."""
    m, n_in, n_out = sizes
    outputs, count = min(OUTPUTS, n_out), n_in // BLOCK
    units, real = blocks(n_out, outputs), wide(out.dtype)
    unit = k.units(units)

    def row(j: int | UOp) -> UOp:
        """The unit's output j. The last units may repeat some of others: the numbers are equal."""
        return unit + (n_out - units) * j // max(outputs - 1, 1)

    with k.loop(m) as i:
        acc, total = k.tile(outputs, real, shared=True), k.tile(outputs, real, width=1)
        fill(k, 0.0, outputs, acc)
        with k.loop(count) as b, k.phase() as lane:
            at = i * n_in + b * BLOCK + lane
            x0, x1, x2, x3 = (x[at + step * LANES].cast(real) for step in range(4))
            for j in range(outputs):
                block = row(j) * count + b
                first, second = (
                    w[block * (BLOCK // 2) + half * LANES + lane].cast(dtypes.int32)
                    for half in range(2)
                )
                low = x0 * ((first & 15) - 8).cast(real) + x1 * ((second & 15) - 8).cast(real)
                high = x2 * ((first >> 4) - 8).cast(real) + x3 * ((second >> 4) - 8).cast(real)
                acc[j, lane] = acc[j, lane] + scale[block].cast(real) * (low + high)
        k.fold(total, acc, outputs)
        with k.phase(outputs) as output:
            value = total[output, 0]
            for shift in bias:
                value = value + shift[row(output)].cast(real)
            out[i * n_out + row(output)] = value
