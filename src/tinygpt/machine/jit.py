"""Numbers in, numbers out: a function of Tensors, captured at its first call and replayed after it.

A captured function is a list of kernels that read and write fixed buffers. ``jit`` makes buffers
for the arguments, copies each call's numbers into them, replays the kernels, and copies the results
out. To hand TinyJit a Tensor instead costs more than the whole forward pass of a small model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import numpy.typing as npt
from tinygrad import Context, Device, Tensor, TinyJit

from tinygpt.machine import pool
from tinygpt.machine.gradients import all_gradients_taken
from tinygpt.machine.pool import recorded
from tinygpt.machine.pool.recorded import Kept, Replay
from tinygpt.machine.tinygrad_internals import DEBUG, PROFILE, Buffer
from tinygpt.machine.transfer import Array, memory, read, write

if TYPE_CHECKING:
    from tinygpt.machine.pool.runner import PoolGraph

Kind = tuple[tuple[int, ...], np.dtype[Any]]
"""Shape and type of an argument."""

INTEGERS = "int8", "int16", "int64", "uint8", "uint16"
CAST: dict[np.dtype[Any], np.dtype[Any]] = {np.dtype(t): np.dtype("int32") for t in INTEGERS}
CAST |= {np.dtype(t): np.dtype("float32") for t in ("float16", "float64")}
"""The types that kernels take instead; others, such as uint32 for random keys, stay."""


@overload
def jit(
    compute: Callable[..., Tensor], short: bool = False, kept: Kept | None = None
) -> Callable[..., Array]: ...
@overload
def jit(
    compute: Callable[..., tuple[Tensor, ...]], short: bool = False, kept: Kept | None = None
) -> Callable[..., tuple[Array, ...]]: ...
def jit(
    compute: Callable[..., Any], short: bool = False, kept: Kept | None = None
) -> Callable[..., Any]:
    """``compute``, but from numpy arrays and numbers to numpy arrays, compiled.

    Integers become int32, but for uint32, and floats become float32. Each combination of shapes and
    types is captured once, at its first call; branches and Python numbers inside ``compute`` are
    frozen then. Tensors that ``compute`` assigns to, such as weights, it has to realize itself.
    tinygrad replays a capture in several batches of kernels, between which Python can handle
    signals; ``short`` replays it as one, which is faster. With ``kept``, which says what
    ``compute`` depends on, the next process finds the capture on disk and does not call
    ``compute``: see ``pool.recorded``.

    >>> double = jit(lambda x: x * 2)
    >>> double([1.0, 2.0]).tolist()
    [2.0, 4.0]
    """
    return Jitted(compute, short, kept)


class Jitted:
    """What ``jit`` returns."""

    def __init__(self, compute: Callable[..., Any], short: bool, kept: Kept | None) -> None:
        self._compute, self._short, self._kept = compute, short, kept
        self.captures: dict[tuple[Kind, ...], Capture] = {}

    def __call__(self, *values: npt.ArrayLike) -> Any:
        arrays = [np.asarray(value) for value in values]
        kinds = tuple([(x.shape, CAST.get(x.dtype, x.dtype)) for x in arrays])
        capture = self.captures.get(kinds)
        if capture is None:
            capture = self.captures[kinds] = Capture(self._compute, kinds, self._short, self._kept)
        return capture(arrays)


class Capture:
    """A function for arguments of fixed shapes and types: its buffers and its kernels."""

    def __init__(
        self,
        compute: Callable[..., Any],
        kinds: Sequence[Kind],
        short: bool = False,
        kept: Kept | None = None,
    ) -> None:
        self.inputs = [Tensor.empty(*shape, dtype=dtype.name) for shape, dtype in kinds]
        self._memories = [memory(x) for x in self.inputs]
        self._short, inputs = short, self.inputs
        self._made: Any = None
        self._several = False
        self._outputs: list[tuple[Tensor | None, Any]] = []
        self._graphs: Sequence[PoolGraph | Replay] = []
        self._to_keep: Callable[[Sequence[PoolGraph], Any], None] | None = None
        self._data = data = self._find(kept, getattr(compute, "__qualname__", ""))

        # No method of this object, which would close a circle: of Tensors that are freed with one,
        # tinygrad's own list of Tensors keeps an entry for ever.
        def on_inputs() -> Any:
            with all_gradients_taken():
                made = compute(*inputs)
            if data is not None:
                data.extend(recorded.allocated())
            return made

        self.kernels: Any = TinyJit(on_inputs)
        # TinyJit would run a function once before it captures, for state that is made in a first
        # call. That run would compile everything twice, and keep 3 GB more for a step of GPT-2.
        self.kernels.cnt = 1

    def _find(self, kept: Kept | None, function: str) -> list[Buffer] | None:
        """Take the recording on disk if there is one; -> else where to note data for making one"""
        if kept is None or not (name := recorded.name_of(kept, function, self.inputs, self._short)):
            return None
        own = [*self.inputs, *kept.state()]
        if (found := recorded.find(name, own)) is None:
            data = list[Buffer]()
            self._to_keep = partial(recorded.keep, name, own, recorded.buffers_of(own), data)
            return data
        self._graphs, outputs, self._several = found
        self._outputs = [(None, values) for values in outputs]
        self._made = found
        return None

    def __call__(self, values: Sequence[npt.ArrayLike]) -> Any:
        """The results, numpy arrays, for values of the shapes and types of this capture."""
        # The results of the call before were read, so no kernel reads the buffers any more.
        for tensor, numbers, value in zip(self.inputs, self._memories, values, strict=True):
            if numbers is None:
                write(tensor, value)
            else:
                numbers[...] = value
        return self._read(self._replay())

    def _replay(self) -> Any:
        if self._graphs and not (DEBUG >= 2 or PROFILE):  # the call of TinyJit shows each kernel
            for graph in self._graphs:
                graph.replay()
            return self._made
        one_piece = self._short and self.kernels.captured is None
        with Context(JIT_BATCH_SIZE=0) if one_piece else nullcontext():
            made = self.kernels()
        if captured := self.kernels.captured:  # none with JIT=0
            graphs = self._graphs = pool.fixed_graphs(captured.linear)
            if graphs and (to_keep := self._to_keep):
                to_keep(graphs, made)
        self._to_keep = None
        if self._data:
            self._data.clear()  # it holds on to buffers
        return made

    def _read(self, made: Any) -> Any:
        if made is not self._made:  # a replay returns the Tensors of the capture again
            self._made, self._several = made, isinstance(made, tuple)
            self._outputs = [(x, memory(x)) for x in (made if self._several else [made])]
        if not self._graphs:
            Device[made[0].device if self._several else made.device].synchronize()
        results = [
            numbers.copy() if x is None or numbers is not None else read(x)
            for x, numbers in self._outputs
        ]
        return tuple(results) if self._several else results[0]
