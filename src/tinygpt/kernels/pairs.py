"""bfloat16 in pairs, for the processors that multiply and add two of them in each lane.

The instruction (AVX512_BF16's ``vdpbf16ps``) takes a vector of pairs and one pair for all lanes::

    sum[lane] += vector[lane][0] * number[0] + vector[lane][1] * number[1]

The sums are float32. A pair is a uint32 in memory, its first number in the lower half: two numbers
side by side are one already, those of two rows are put together by `joined`. Numbers below 2⁻¹²⁶
count as 0. tinygrad's operations cannot say it, so it is a statement of C, and assembly inside, for
the intrinsics have other types from one release of clang to the next.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from tinygrad import Device, UOp, dtypes

from tinygpt.kernels.phases import Kernel, Tile
from tinygpt.machine.tinygrad_internals import ClangRenderer

log = logging.getLogger(__name__)

VECTOR = 16
"""Sums, or pairs, of a register of 512 bits."""


@functools.cache
def available(device: str) -> bool:
    """Whether the kernels of a device may use the instruction; why not is logged once."""
    if why := obstacle(device):
        log.info("bfloat16 is computed by way of float32 on %s: %s.", device, why)
    return why is None


def obstacle(device: str) -> str | None:
    """Why the kernels of a device cannot use the instruction; None if they can."""
    renderer = Device[device].renderer
    if not isinstance(renderer, ClangRenderer):
        return "it is no device of the C compiler"
    if renderer.target.arch != "x86_64,native":
        return f"kernels are made for {renderer.target.arch}"
    if "avx512_bf16" not in processor_flags():
        return "the processor has no AVX512_BF16"
    return None


def processor_flags() -> list[str]:
    """What the processor can do, as Linux names it."""
    try:
        return Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return []


def halves(pair: UOp) -> list[UOp]:
    """The two numbers of a pair, as float32."""
    both = pair << 16, pair & 0xFFFF0000
    return [bits.bitcast(dtypes.float32) for bits in both]


def joined(first: UOp, second: UOp) -> UOp:
    """Two numbers as a pair, rounded to bfloat16 if they have another type."""
    low, high = (x.cast(dtypes.bfloat16).bitcast(dtypes.ushort) for x in (first, second))
    return low.cast(dtypes.uint32) | (high.cast(dtypes.uint32) << 16)


def add_products(
    k: Kernel,
    steps: int,
    sums: Tile,
    vector: Callable[[UOp], UOp],
    numbers: Callable[[UOp], Sequence[UOp]],
) -> None:
    """sums[x, lane] += ``vector(d)``, a row of pairs, times the pair ``numbers(d)[x]``.

    For d < ``steps``, at least two (see `Kernel.statement`); the lanes are a multiple of `VECTOR`.
    """
    assert steps > 1
    with k.loop(steps) as d, k.phase(1):
        rows = numbers(d)
        k.statement(_multiply_add(len(rows), k.lanes), sums[0, 0], vector(d), *rows)


@functools.cache
def _multiply_add(rows: int, lanes: int) -> str:
    """The statement: {0} are the sums, {1} the vector, {2} and so on the numbers of the rows."""
    vectors = range(lanes // VECTOR)
    lines = ["typedef float V __attribute__((vector_size(64), aligned(4), may_alias));"]
    lines += [f"V b{v} = *(V*)({{1}}+{v * VECTOR});" for v in vectors]
    for x, v in itertools.product(range(rows), vectors):
        total, number = f"*(V*)({{0}}+{x * lanes + v * VECTOR})", f"*(const int*)({{{x + 2}}})"
        code = "vdpbf16ps %1%{{1to16%}}, %2, %0"
        lines.append(f'__asm__("{code}" : "+v"({total}) : "m"({number}), "v"(b{v}));')
    return "{{ " + "\n  ".join(lines) + " }}"
