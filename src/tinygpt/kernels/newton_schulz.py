"""The orthogonal factor of matrices, by a Newton-Schulz iteration.

A matrix X = P Σ Qᵀ has P Qᵀ for its orthogonal factor. No decomposition is needed to come near it:
an odd polynomial changes the singular values alone,

    p(X) = a X + b X (XᵀX) + c X (XᵀX)² = P p(Σ) Qᵀ

and a few of them, one after the other, bring every singular value to about 1: `STEPS`.

The kernel does this for many matrices (m, n), m >= n. It multiplies matrices (n, n) only, in the
iteration: with the Gram matrix A = XᵀX and the polynomial's other factor Z = a + b A + c A²,

    A' = Z A Z          the Gram matrix of X Z
    F' = F Z            the product of all factors so far, F = 1 to begin with

and X F in the end. All of these are polynomials of one symmetric matrix: they commute, and every
product is symmetric. So half of it is computed, in blocks, and written twice. Of a tall matrix
(4n, n) 4 steps take 12.5 n³ multiply-adds instead of 36, and 8 instead of 12 of a square one.
The price is in directions whose singular value is below a thousandth of the largest: squared it is
lost in float32's rounding. The factor is off by less than 0.001 then, in a direction that is noise.

A matrix is a unit: its iteration takes place in the cache of one core.

Matrices are stored in panels of ``lanes`` columns, zeros beyond the last column: the element
(row, column) of (m, n) is at ``(column // lanes * m + row) * lanes + column % lanes``. A vector of
a row lies in one place then, and the next row's behind it; by symmetry the numbers that it is
multiplied by are next to one another as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tinygrad import Tensor, UOp

from tinygpt.kernels.loops import blocks, counted, fill, int32
from tinygpt.kernels.matmul import register_tiles
from tinygpt.kernels.phases import Array, Index, Kernel, Tile, as_uop, empty, minimum, run
from tinygpt.machine.tinygrad_internals import DType

Place = tuple[Array, Index]
"""An array, and where a matrix begins in it."""

STEPS = (
    (8.4703, -25.1081, 18.6293),
    (4.1828, -3.1087, 0.5806),
    (3.9619, -2.9541, 0.5630),
    (3.2866, -2.4647, 0.5074),
)
"""a, b and c of each step: those that bring singular values from 0.001 to 1 nearest to 1 in the
worst case, between 0.45 and 1.55 (Amsel et al., "The Polar Express", 2025). Models learn with them
as with Jordan's five (2024), 3.4445, -4.7750 and 2.0315, for a quarter less of the work."""
TINY = 1e-7
"""What is added to the norm that a matrix is divided by, which makes every singular value <= 1."""
SLOTS = 4
"""Matrices (n, n) that an iteration has in memory."""


# The plain twin --------------------------------------------------------------------------------


def plain_orthogonal(x: Tensor) -> Tensor:
    """Matrices (..., O, I) with their singular values brought near 1."""
    tall = x.shape[-2] > x.shape[-1]
    x = x.transpose(-1, -2) if tall else x  # the products below are then as small as can be
    x = (x / (x.square().sum((-1, -2), keepdim=True).sqrt() + TINY)).contiguous()
    for a, b, c in STEPS:
        gram = (x @ x.transpose(-1, -2)).contiguous()
        x = (a * x + (b * gram + c * (gram @ gram)).contiguous() @ x).contiguous()
    return x.transpose(-1, -2) if tall else x


# The kernel ------------------------------------------------------------------------------------


class Sizes(NamedTuple):
    """Some matrices (m, n) of one shape, m >= n, in panels."""

    matrices: int
    m: int
    n: int

    @classmethod
    def of(cls, count: int, rows: int, columns: int) -> Sizes:
        """Of matrices (rows, columns), which stand upright in panels."""
        n = min(rows, columns)
        return cls(count, max(rows, columns), blocks(n, lanes()) * lanes())

    @property
    def numbers(self) -> int:
        """Of all matrices together."""
        return self.matrices * self.m * self.n

    @property
    def needed(self) -> int:
        """Numbers in memory while the kernel runs: the matrices, their factors and its slots."""
        return 2 * self.numbers + self.matrices * SLOTS * self.n**2

    @property
    def operations(self) -> int:
        """Floating-point operations of the kernel; symmetric products take half."""
        products, _ = program()
        return self.matrices * self.n**2 * (self.m + self.n * len(products) + 2 * self.m)


def lanes() -> int:
    """Columns of a panel."""
    return next(iter(register_tiles()))


class Multiply(NamedTuple):
    """One product of the iteration: out = diagonal + scale left + factor left right."""

    out: int
    left: int
    right: int
    diagonal: float = 0.0
    scale: float = 0.0
    factor: float = 1.0


def program() -> tuple[list[Multiply], int]:
    """The products in order, with the slots of their matrices; and the slot of F in the end.

    The Gram matrix begins in slot 0.
    """
    gram, z, f, spare = range(SLOTS)
    (a, b, c), *later = STEPS
    products = [Multiply(f, gram, gram, a, b, c)]  # Z is F in the first step
    last = f
    for a, b, c in later:
        products += [Multiply(spare, gram, last), Multiply(gram, spare, last)]
        products += [Multiply(z, gram, gram, a, b, c), Multiply(spare, f, z)]
        last, f, spare = z, spare, f
    return products, f


def orthogonal(stack: Tensor, sizes: Sizes) -> Tensor:
    """Of ``stack``, matrices in panels, each one's orthogonal factor in panels."""
    count, m, n = sizes
    work = empty(stack, count * SLOTS * n * n)
    out = empty(stack, sizes.numbers)
    rows = register_tiles()[lanes()]
    return run(
        _orthogonal,
        [out, work],
        [stack],
        lanes=lanes(),
        name=f"orthogonal_{count}x{m}x{n}",
        ops=sizes.operations,
        sizes=sizes,
        rows=rows,
    )[0]


def _orthogonal(
    k: Kernel, out: Array, work: Array, stack: Array, *, sizes: Sizes, rows: int
) -> None:
    count, m, n = sizes
    unit = k.units(count)
    acc, norm = k.tile(rows, out.dtype), k.tile(1, out.dtype, width=1)
    first, slots = unit * (m * n), unit * (SLOTS * n * n)
    _symmetric(k, acc, rows, (n, m), (work, slots), (stack, first), (stack, first))
    _normalise(k, norm, work, slots, n)
    products, last = program()
    with k.loop(len(products)) as i:
        to, left, right, *numbers = zip(*products, strict=True)
        o, l, r = ((work, slots + _pick(i, slot) * (n * n)) for slot in (to, left, right))  # noqa: E741
        _symmetric(k, acc, rows, (n, n), o, l, r, [_pick(i, x, out.dtype) for x in numbers])
    _finish(k, acc, rows, (m, n), (out, first), (stack, first), (work, slots + last * n * n), norm)


def _pick(i: UOp, values: Sequence[float], dtype: DType | None = None) -> UOp:
    """The value of a list at the index of a loop."""
    found = as_uop(values[-1], dtype)
    for j, value in enumerate(values[:-1]):
        found = i.eq(j).where(as_uop(value, dtype), found)
    return found


def _symmetric(
    k: Kernel,
    acc: Tile,
    rows: int,
    shape: tuple[int, int],
    out: Place,
    left: Place,
    right: Place,
    numbers: Sequence[UOp] = (),
) -> None:
    """out (n, n) = diagonal + scale left + factor leftᵀ right, for left and right (depth, n).

    Rows and columns up to the end of each panel are computed, and their mirror image is written.
    """
    (n, depth), W = shape, k.lanes
    (out_array, o), (left_array, l), (right_array, r) = out, left, right  # noqa: E741
    with k.loop(n // W) as p, counted(k, ((p + 1) * W + rows - 1) // rows, blocks(n, rows)) as t:
        xs = [minimum(t * rows + i, n - 1) for i in range(rows)]
        fill(k, 0.0, rows, acc)
        with k.loop(depth) as d, k.phase() as lane:
            vector = right_array[r + (p * depth + d) * W + lane]
            for i, x in enumerate(xs):
                number = left_array[l + (x // W * depth + d) * W + x % W]
                acc[i, lane] = acc[i, lane] + vector * number
        if numbers:
            diagonal, scale, factor = numbers
            with k.phase() as lane:
                for i, x in enumerate(xs):
                    value = acc[i, lane] * factor + left_array[l + (p * n + x) * W + lane] * scale
                    on = int32(x).eq(int32(p * W + lane))
                    acc[i, lane] = value + on.where(diagonal, 0.0)
        with k.phase() as lane:
            for i, x in enumerate(xs):
                out_array[o + (p * n + x) * W + lane] = acc[i, lane]
        with k.phase() as lane:
            for i, x in enumerate(xs):
                out_array[o + (x // W * n + p * W + lane) * W + x % W] = acc[i, lane]


def _normalise(k: Kernel, norm: Tile, work: Array, at: Index, n: int) -> None:
    """Divide a Gram matrix by its trace; norm[0, 0] = 1 / the root of it."""
    W = k.lanes
    with k.phase(1):
        norm[0, 0] = 0.0
    with k.loop(n) as x, k.phase(1):
        norm[0, 0] = norm[0, 0] + work[at + (x // W * n + x) * W + x % W]
    with k.phase(1):
        norm[0, 0] = 1.0 / (norm[0, 0].sqrt() + TINY)
    with k.loop(n * n // W) as j, k.phase() as lane:
        place = at + j * W + lane
        work[place] = work[place] * (norm[0, 0] * norm[0, 0])


def _finish(
    k: Kernel,
    acc: Tile,
    rows: int,
    shape: tuple[int, int],
    out: Place,
    stack: Place,
    factor: Place,
    norm: Tile,
) -> None:
    """out (m, n) = norm stack (m, n) factor (n, n)"""
    (m, n), W = shape, k.lanes
    rows = min(rows, m)
    (out_array, o), (x, first), (f, at) = out, stack, factor
    with k.loop(n // W) as p, k.loop(blocks(m, rows)) as t:
        ys = [minimum(t * rows + i, m - 1) for i in range(rows)]
        fill(k, 0.0, rows, acc)
        with k.loop(n // W) as q, k.loop(W) as d, k.phase() as lane:
            vector = f[at + (p * n + q * W + d) * W + lane]
            for i, y in enumerate(ys):
                acc[i, lane] = acc[i, lane] + vector * x[first + (q * m + y) * W + d]
        with k.phase() as lane:
            for i, y in enumerate(ys):
                out_array[o + (p * m + y) * W + lane] = acc[i, lane] * norm[0, 0]
