"""The little language that kernels are written in: units, loops, phases, lanes, tiles.

A kernel does some number of independent *units* of work, which go in *pieces* to the cores of a CPU
or one by one to the workgroups of a GPU. Inside a unit there are loops and *phases*. A phase is a
group of assignments done for every *lane* at once: on a CPU the lanes are an innermost loop of
constant length that the C compiler turns into vector instructions, on a GPU each lane is a thread.
*Tiles* are small arrays of rows x lanes that live while a unit is worked on: registers, or a little
stack.

The rules:

- Phases run in the order in which they are written; within a phase everything is read before
  anything is written, so ``a[i] = a[i] + 1`` is fine and a swap needs no temporary.
- Two assignments of a phase may not hit the same element, and an element that another lane wrote
  may only be read in a later phase.
- Python's own ``for`` unrolls; ``with k.loop(n) as i`` is a loop of the kernel. ``n`` may be a
  number, or read from memory, but must not depend on the index of a unit or of another loop.
- Units must not depend on one another, so that the result is the same for any number of cores.
- Units and pieces follow from the work alone: one kernel serves any number of cores.

An example, the sums of the rows of ``x`` (n, m), a row per unit:

>>> def row_sums(k, out, x, *, n, m):
...     row = k.units(n)
...     acc, total = k.tile(1), k.tile(1)
...     with k.phase() as lane:
...         acc[0, lane] = 0.0
...     with k.loop(m // k.lanes) as j, k.phase() as lane:
...         acc[0, lane] = acc[0, lane] + x[row * m + j * k.lanes + lane]
...     k.fold(total, acc, rows=1)
...     with k.phase(1) as lane:
...         out[row] = total[0, 0]
>>> x = Tensor.ones(3, 16).contiguous()
>>> run(row_sums, [Tensor.empty(3)], [x], lanes=8, n=3, m=16)[0].tolist()
[16.0, 16.0, 16.0]

The language rests on ``Tensor.custom_kernel`` of tinygrad 0.14, which may change. What tinygrad's
code generation needs (order tokens, ranges, tags, estimates) is in this file and nowhere else. Its
traps, each with the test or kernel that falls into it without the precaution:

1. A load is ordered behind a store only if its buffer is ``.after()`` it: `Kernel._ordered`.
   (test_phases: a phase reads everything before it writes)
2. The END of a loop also ends the loops that its length was computed from. `Kernel.loop` refuses
   such a length, `loops.counted` counts for itself. (attention/forward: blocks of a causal tile)
3. A store through a RESHAPE loses its gate and writes out of bounds: `Array` unwraps it.
   (test_phases: vector add writes every element and none beyond)
4. Unrolled assignments of a phase all load before one of them stores, so that a sum over them
   keeps only the last. `loops.product` writes its results in a loop of phases.
   (attention/forward: the maximum over a block of keys)
5. Two stores to one constant address are refused: `Kernel.fold` is a loop of phases.
   (test_phases: the largest of all lanes is found wherever it is)
6. tinygrad splits ranges, which makes cycles of these kernels, unless the sink has a tag; and it
   cannot count the operations of loops of unknown length, which `finish` estimates instead.
   (test_phases: a loop can be as long as a number in memory says)
7. An index that two loops inside another one share may be left inside the first of them: the second
   needs an outer loop of its own. (attention/forward: the last loop;
   test_attention: lengths that fill no group of tiles)
8. An index whose range is unknown is computed in 64 bits, which WebGPU lacks and vectors compare
   slowly: `loops.at_most`, `int32`, `uint32`. (test_attention: the kernels can be written for GPUs)
9. A select in an address keeps the C compiler from using vectors. `minimum` is written so that it
   folds to its first argument where tinygrad knows that to be the smaller one. (attention/backward:
   the columns of dQ)
10. A product of three factors is multiplied in an order of tinygrad's choice, and then contracted
    with a sum: a rewritten expression can change the last bit. (loss/chunked: `exp2` in statistics)
11. An input that a kernel does not use must stand last, else arguments are mixed up and the process
    crashes. (loss/chunked: x and the weight in `mean`, which are there for their gradients)
12. ``Tensor.contiguous`` copies the output of a kernel; `contiguous` does not.
    (test_linear: a layer is one launch forward and two backward)
13. A launch is forgotten once one of its outputs is realized: asked for another output, tinygrad
    launches it again, on buffers that later launches may have overwritten. `together` prevents it.
    (test_linear_cross_entropy: the fused results may be realized in any order)
14. tinygrad's cache of UOps holds ``backward`` for as long as the call lives: what it refers to is
    not freed. (test_leaks)
15. A gradient through an output that has been realized is 0 without a word: take it before.
    (test_attention: results are bitwise the same for any number of pieces)
16. Eight phases in a row inside nested loops of one round each were dropped without a word:
    `loops.product` writes its results in a loop. (test_linear_cross_entropy: one row of width 8)
17. What is no store and ends no loop is dropped without a word, and a loop of one round is none:
    `pairs.add_products` takes two steps at least. (test_pairs: any small sizes)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tinygrad import Device, Tensor, UOp, dtypes

from tinygpt.machine.gradients import open_gradients
from tinygpt.machine.tinygrad_internals import (
    PIECE,
    AddrSpace,
    AxisType,
    DType,
    Estimates,
    KernelInfo,
    Ops,
    pieces_of_kernels,
)

PIECE_OPS = 200_000
"""Operations of a piece at least: some 3 µs of a core. Dealing it out costs 0.1 µs to 0.3 µs."""
PIECE_BYTES = 32 << 10
"""Bytes of a piece at least, for kernels that move more than they compute: as long."""
MOST_PIECES = 256
"""For cores that share a kernel evenly there should be some pieces for each."""

Index = UOp | int
Value = UOp | float
Backward = Callable[[Tensor, Sequence[Tensor]], Sequence[Tensor | None]]


def as_uop(value: Value, dtype: DType | None = None) -> UOp:
    """A number, or a value of the kernel, as a value of type ``dtype`` (None: as it is)."""
    uop: UOp = value if isinstance(value, UOp) else UOp.const(value, dtype)
    return uop if dtype is None or uop.dtype == dtype else uop.cast(dtype)


def as_index(value: Index) -> UOp:
    """A number, or an integer of any type that the kernel has read or computed, as an index."""
    value = as_uop(value)
    return value if value.dtype == dtypes.weakint else value.cast(dtypes.weakint)


def minimum(a: Index, b: Index) -> UOp:
    """The smaller of two indices; where a's range ends before a number b, just a (trap 9)."""
    a, b = as_index(a), as_index(b)
    return (b < a).where(b, a)


def wide(dtype: DType) -> DType:
    """The type in which numbers of type ``dtype`` are added up: float32, float64 for float64."""
    return dtypes.float64 if dtype == dtypes.float64 else dtypes.float32


LOG2E = 1 / math.log(2)
"""exp(x) = 2 ** (x LOG2E)"""
_EXP2_SERIES = [math.log(2) ** n / math.factorial(n) for n in range(6, -1, -1)]


def exp2(x: UOp) -> UOp:
    """2 ** x without branches, so that it vectorises; float32, relative error 2e-7.

    Exactly 0 up to -126.5, infinite from 127.5 on, NaN for NaN. Other types: tinygrad's own.
    """
    if x.dtype != dtypes.float32:
        return x.exp2()
    x = x.maximum(-127.0)
    x = (x > 128.0).where(128.0, x)
    whole = (x + 150.5).cast(dtypes.int32) - 150  # round to nearest, by truncating above zero
    rest = x - whole.cast(dtypes.float32)  # |rest| <= 1/2: the series of 2 ** rest is short
    power = as_uop(_EXP2_SERIES[0], dtypes.float32)
    for coefficient in _EXP2_SERIES[1:]:
        power = power * rest + coefficient
    # a float's exponent is stored as whole + 127 from bit 23 on; for whole = -127 all bits are 0
    return power * ((whole + 127) * (1 << 23)).bitcast(dtypes.float32)


class Array:
    """A one-dimensional buffer in memory: ``x[i]`` reads, ``x[i] = v`` writes (in a phase)."""

    def __init__(self, kernel: Kernel, buffer: UOp, written: bool) -> None:
        while buffer.op is Ops.RESHAPE:  # indexing through a RESHAPE loses the gate of a store
            buffer = buffer.src[0]
        self._kernel, self._buffer, self._written = kernel, buffer, written
        self.dtype: DType = buffer.dtype

    def __getitem__(self, index: Index) -> UOp:
        # memory that nothing writes needs no order
        buffer = self._kernel._ordered(self._buffer) if self._written else self._buffer
        element: UOp = buffer[as_index(index)]
        return element

    def __setitem__(self, index: Index, value: Value) -> None:
        self.put(index, value)

    def put(self, index: Index, value: Value, where: UOp | None = None) -> None:
        """Write ``value``, cast to the array's type; only where the gate ``where`` is true."""
        assert self._written, "only the kernel's outputs can be written"
        at = self[index if where is None else as_index(index).valid(where)]
        self._kernel._add(at.store(as_uop(value, self.dtype)))


class Tile:
    """Rows x lanes of one unit: ``t[row, lane]`` reads, ``t[row, lane] = v`` writes."""

    def __init__(self, kernel: Kernel, rows: int, lanes: int, dtype: DType, shared: bool) -> None:
        self._kernel, self.dtype, self.rows, self.width = kernel, dtype, rows, lanes
        # a GPU thread keeps only its own lane's column in its registers
        self._stride = 1 if kernel.gpu and not shared else lanes
        space = AddrSpace.LOCAL if kernel.gpu and shared else AddrSpace.REG
        self._buffer = UOp.placeholder((rows * self._stride,), dtype, kernel._slot(), space)

    def __getitem__(self, at: tuple[Index, Index]) -> UOp:
        row, lane = as_index(at[0]), at[1]
        index = row if self._stride == 1 else row * self._stride + lane
        element: UOp = self._kernel._ordered(self._buffer)[index]
        return element

    def __setitem__(self, at: tuple[Index, Index], value: Value) -> None:
        self._kernel._add(self[at].store(as_uop(value, self.dtype)))


class Kernel:
    """What a kernel function writes to; `run` and `build` make one and call the function with it.

    ``lanes``, ``pieces``, the most that its units make, and ``gpu`` are what the kernel is made
    for; a kernel function may read them, and must work for every value that its callers use.
    """

    def __init__(self, lanes: int, pieces: int = 1, gpu: bool = False) -> None:
        self.lanes, self.pieces, self.gpu = lanes, pieces, gpu
        self._ranges = self._tiles = 0
        self._order: tuple[UOp, ...] = ()  # what the next phase comes after
        self._depth = 0  # loops entered and not yet left
        self._outer: tuple[UOp, ...] = ()  # the ranges of the units
        self._stores: list[UOp] | None = None  # the open phase

    def units(self, n: int) -> UOp:
        """The index of the unit, below ``n``. A piece is some units in a row."""
        assert not self._order, "k.units comes first, and once"
        if self.gpu:
            unit: UOp = UOp.special(n, "gidx0")
            self._order = (unit, UOp.special(self.lanes, "lidx0"))
            return unit
        size = -(-n // self.pieces)  # of a piece, but for the last
        if (pieces := -(-n // size)) == 1:
            unit = self._range(n)
            self._order = self._outer = (unit,)
            return unit
        # The number of the piece is a variable of the kernel, launched once for each of its values.
        piece = as_index(UOp.variable(PIECE, 0, pieces - 1, dtypes.int, param=True))
        if size == 1:
            self._order = (piece,)
            return piece
        first = piece * size
        i = self._range(minimum(n - first, size) if n % size else size)
        self._order = self._outer = (i,)
        return first + i

    def tile(
        self,
        rows: int,
        dtype: DType = dtypes.float32,
        *,
        width: int | None = None,
        shared: bool = False,
    ) -> Tile:
        """An uninitialised tile of rows x ``width`` (None: the lanes).

        ``shared``: lanes will read each other's elements.
        """
        return Tile(self, rows, width or self.lanes, dtype, shared)

    @contextmanager
    def loop(self, n: Index) -> Iterator[UOp]:
        """A loop around the phases inside; its index runs from 0 up to ``n``.

        ``n`` is a number or is read from memory, at a place that depends on no loop's index: where
        tinygrad ends a loop it also ends the loops that the bound was computed from.
        """
        assert self._stores is None, "a loop cannot stand inside a phase"
        n = n if isinstance(n, int) else as_index(n)
        outside = isinstance(n, int) or not n.ranges
        assert outside, "the length of a loop cannot depend on the index of another loop or unit"
        index = self._range(n)
        self._order += (index,)
        self._depth += 1
        yield index
        assert len(self._order) == 1, "a loop without a phase"
        self._depth -= 1
        self._order = (self._order[0].end(index),)

    @contextmanager
    def phase(self, n: int | None = None) -> Iterator[UOp]:
        """Assignments for every lane; with ``n``, for n elements in turn, whatever the lanes."""
        assert self._stores is None, "phases do not nest"
        thread = self.gpu and n is None
        if thread:
            lane = UOp.special(self.lanes, "lidx0")
        else:
            lane = self._range(self.lanes if n is None else n)
        self._stores = []
        yield lane
        stores, self._stores = self._stores, None
        assert stores, "a phase without an assignment"
        group = UOp.group(*stores)
        self._order = (group if thread else group.end(lane),)

    def statement(self, c: str, *operands: UOp) -> None:
        """In a phase, a statement of C for an instruction that tinygrad has no operation for.

        ``{0}``, ``{1}``, ... in it become the operands; an element of an array or a tile becomes
        its address. ``c`` may write to tiles only: tinygrad looks for the stores of an array. It
        must stand in a loop of two rounds at least (trap 17).
        """
        self._add(UOp(Ops.CUSTOM, dtypes.void, operands, c))

    def fold(
        self,
        out: Tile,
        tile: Tile,
        rows: int,
        op: Callable[[UOp, UOp], UOp] = lambda a, b: a + b,
        start: float = 0.0,
    ) -> None:
        """Across the lanes, in their order: ``out[x, 0] = op(... op(start, tile[x, 0]) ...)``."""
        with self.phase(1):
            for x in range(rows):
                out[x, 0] = start
        # A loop, not a phase of many lanes: each step reads what the one before has written.
        with self.loop(self.lanes) as lane, self.phase(1):
            for x in range(rows):
                out[x, 0] = op(out[x, 0], tile[x, lane])

    def finish(self, name: str, ops: int = 0, mem: int = 0) -> UOp:
        """The finished kernel, for tinygrad."""
        assert not self._depth and self._stores is None, "an open loop or phase"
        last = self._order[0].end(*self._outer)
        # The tag makes tinygrad skip its own loop splitting, which these kernels must not meet, and
        # the estimates save it from inferring them, which it cannot for loops of unknown length.
        info = KernelInfo(name=name, opts_to_apply=(), estimates=Estimates(ops, mem, mem))
        sink: UOp = last.sink(arg=info, tag=1)
        return sink

    def _range(self, n: Index) -> UOp:
        self._ranges += 1
        index: UOp = UOp.range(n, self._ranges - 1, AxisType.WEAK)
        return index

    def _slot(self) -> int:
        self._tiles += 1
        return self._tiles - 1

    def _ordered(self, buffer: UOp) -> UOp:
        ordered: UOp = buffer.after(*self._order)
        return ordered

    def _add(self, store: UOp) -> None:
        assert self._stores is not None, "assignments stand inside a phase"
        self._stores.append(store)

    @contextmanager
    def repeat_while(self, condition: Callable[[], UOp]) -> Iterator[None]:
        """Phases that run once, and again for as long as ``condition()`` is true at their end.

        Unlike the length of a ``loop``, the condition may depend on units and other loops.
        """
        self._ranges += 1
        loop: UOp = UOp.loop(self._ranges - 1)
        self._order += (loop,)
        self._depth += 1
        yield
        self._depth -= 1
        self._order = (self._order[0].end(loop, condition()),)


def on_gpu(x: Tensor) -> bool:
    """Whether kernels on this tensor's device run as workgroups of threads."""
    device = x.device if isinstance(x.device, str) else (x.device or (Device.DEFAULT,))[0]
    return is_gpu(device)


def is_gpu(device: str) -> bool:
    """The same of a device, of which OpenCL's may be the processor all the same."""
    return bool(Device[device].renderer.has_local)


def contiguous(x: Tensor) -> Tensor:
    """``x`` in memory, row by row. Unlike ``Tensor.contiguous`` it copies no kernel's output."""
    return x if x.uop.has_buffer_identity(after_ok=True) else x.contiguous()


def empty(like: Tensor, *shape: int, dtype: DType | None = None) -> Tensor:
    """Memory for a kernel's output, on the devices of ``like`` and cut along the same axis."""
    new = functools.partial(Tensor.empty, dtype=dtype or like.dtype, device=like.device)
    if isinstance(like.device, tuple) and (axis := like.uop.axis) is not None:
        local = [n // len(like.device) if i == axis else n for i, n in enumerate(shape)]
        return Tensor(new(*local).uop.unshard(axis))
    return new(*shape)


@functools.lru_cache(maxsize=4096)
def build(
    fn: Callable[..., None],
    buffers: tuple[UOp, ...],
    n_outputs: int,
    lanes: int,
    whole: bool,
    gpu: bool,
    name: str | None,
    ops: int,
    constants: tuple[tuple[str, Any], ...],
) -> UOp:
    """The UOps of a kernel, made once for each function, shapes, types and constants.

    Without this every launch would be built again: half a second in a training step.
    """
    mem = sum(b.max_numel() * b.dtype.itemsize for b in buffers)
    pieces = max(1, min(MOST_PIECES, max(ops // PIECE_OPS, mem // PIECE_BYTES)))
    k = Kernel(lanes, 1 if whole else pieces, gpu)
    arrays = [Array(k, b, written=i < n_outputs) for i, b in enumerate(buffers)]
    fn(k, *arrays, **dict(constants))
    if name is None:
        name = "_".join([fn.__name__, *(str(int(v)) for _, v in constants if isinstance(v, int))])
    return k.finish(name, ops, mem)


def run(
    fn: Callable[..., None],
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    *,
    lanes: int,
    name: str | None = None,
    ops: int = 0,
    backward: Backward | None = None,
    **constants: Any,
) -> list[Tensor]:
    """Call the kernel ``fn(k, *outputs, *inputs, **constants)``; returns the outputs, filled.

    ``outputs`` may be read too (state that is updated in place). ``fn`` is a function of a module,
    no closure, and ``constants`` are hashable: kernels are built once and remembered by them. An
    input that the kernel does not use must stand last. ``name`` (None: the function's, and its
    constants) is for profiles; ``ops``, the number of floating-point operations, also says, with
    the size of the arrays, in how many pieces the work goes to the cores of a CPU. Under tinygrad's
    NUM_CPU_THREADS=1 it stays whole.

    ``backward(gradient, outputs)`` is given the gradient of the first output, and the outputs; it
    returns one gradient, or None, for each input. The other outputs are for ``backward``'s own use:
    no gradient may reach them (and ``detach()`` would copy them). ``backward`` must not refer to
    the outputs in any other way: tinygrad's cache of UOps holds it for as long as the call lives,
    and an output holds the call, so that neither would ever be freed.
    """
    assert fn.__closure__ is None, "a kernel function takes its constants as arguments"
    gpu, whole = on_gpu(outputs[0]), pieces_of_kernels() == 1
    fixed = tuple(sorted(constants.items()))

    def body(*buffers: UOp) -> UOp:
        return build(fn, buffers, len(outputs), lanes, whole, gpu, name, ops, fixed)

    gradient = Gradient(backward, len(outputs)) if backward else None
    filled = Tensor.custom_kernel(*outputs, *inputs, fxn=body, grad_fxn=gradient)
    return filled[: len(outputs)]


def together(last: Tensor, *others: Tensor) -> list[Tensor]:
    """The same Tensors, of which none is realized without the others (trap 13).

    ``last`` is an output of the last launch of all.
    """
    launch, states = last.uop.src[1], [t.uop for t in others]
    joined = [u.after(launch, *(s for s in states if s is not u)) for u in states]
    return [Tensor(u) for u in (last.uop.src[0].after(launch, *states), *joined)]


class Gradient:
    """``backward`` in the form that tinygrad asks for; ``drop`` frees the Tensors that it holds."""

    def __init__(self, backward: Backward, outputs: int) -> None:
        self.backward: Backward | None = backward
        self.outputs = outputs
        if (opened := open_gradients.get()) is not None:
            opened.append(self.drop)

    def drop(self) -> None:
        self.backward = None

    def __call__(self, grad: UOp, call: UOp) -> tuple[UOp | None, ...]:
        assert self.backward is not None, "a gradient through a function that was captured without"
        outputs = [Tensor(u.after(call)) for u in call.src[1 : 1 + self.outputs]]
        found = self.backward(Tensor(grad), outputs)
        return (None,) * self.outputs + tuple(None if g is None else g.uop for g in found)
