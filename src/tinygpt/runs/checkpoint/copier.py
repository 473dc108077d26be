"""Copies of a model's and an optimizer's Tensors in memory, ready to be written.

tinygrad is imported where it is used, so that a program which only looks at files starts quickly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tinygpt.errors import UsageError
from tinygpt.files.tensor_file import Layout, arrange
from tinygpt.runs.checkpoint.format import Array, data_size
from tinygpt.runs.checkpoint.writer import Snapshot

if TYPE_CHECKING:
    from tinygrad import Tensor, UOp
    from tinygrad.nn.optim import Optimizer

    from tinygpt.machine.tinygrad_internals import DType
    from tinygpt.model.transformer import Transformer


def named_tensors(model: Transformer, optimizer: Optimizer | None) -> dict[str, Tensor]:
    """All that a checkpoint holds, under the names that it has there.

    Raises UsageError for an optimizer of another model.
    """
    from tinygpt.training.optim import optimizer_state

    parameters = model.parameters()
    tensors = {f"model.{name}": p for name, p in parameters.items()}
    if optimizer is not None:
        _check_own(model, optimizer)
        state = optimizer_state(optimizer, parameters)
        tensors |= {f"optimizer.{name}": t for name, t in state.items()}
    return tensors


def _check_own(model: Transformer, optimizer: Optimizer) -> None:
    own = {id(p) for p in (*model.parameters().values(), *model.trainable().values())}
    foreign = sum(id(p) not in own for p in optimizer.params)
    if foreign:
        raise UsageError(
            f"{foreign} of the optimizer's {len(optimizer.params)} parameters are not this "
            f"model's: it was made for another one. Make it from list(model.trainable().values())."
        )


def layout_of(tensors: Mapping[str, Tensor]) -> Layout:
    """Where each Tensor lies in a file; floats of 16 bits are written as float32."""
    from tinygrad import dtypes

    from tinygpt.machine.tinygrad_internals import _to_np_dtype

    def kind(dtype: DType) -> np.dtype[Any]:
        half = dtypes.is_float(dtype) and dtype.itemsize == 2
        return np.dtype(_to_np_dtype(dtypes.float32 if half else dtype))

    kinds = [(name, kind(t.dtype), t.shape) for name, t in tensors.items()]
    return arrange((name, dtype, tuple(map(int, shape))) for name, dtype, shape in kinds)


def state_size(model: Transformer, optimizer: Optimizer | None) -> int:
    """Bytes of a checkpoint's tensors."""
    return data_size(layout_of(named_tensors(model, optimizer)))


class Copier:
    """Copies the state of a model and its optimizer into memory that is used again each time.

    That takes as much memory as the state has, 12 bytes for each parameter with Adam.
    """

    def __init__(self, model: Transformer, optimizer: Optimizer | None) -> None:
        self.model, self.optimizer = model, optimizer
        self._prepare(named_tensors(model, optimizer))

    def copy(self) -> Snapshot:
        """The values of this moment. They stand in the snapshot until the next call."""
        from tinygrad import Device

        tensors = named_tensors(self.model, self.optimizer)
        same = len(tensors) == len(self._sources) and all(
            source.tensor is tensors.get(name) for name, source in self._sources.items()
        )
        if not same:  # other Tensors have replaced them
            self._prepare(tensors)
        for device in self._devices:
            Device[device].synchronize()
        for source in self._sources.values():
            source.copy()
        return self.snapshot

    def _prepare(self, tensors: Mapping[str, Tensor]) -> None:
        self.snapshot = Snapshot(layout_of(tensors))
        elsewhere = getattr(self.optimizer, "elsewhere", {})
        self._sources = {
            n: _Source(t, self.snapshot.array(n), elsewhere.get(id(t))) for n, t in tensors.items()
        }
        self._devices = {t.device for t in tensors.values() if isinstance(t.device, str)}


@dataclass
class _Source:
    """A Tensor, and where its values go.

    The values are copied from the Tensor's memory: ``Tensor.numpy()`` takes half a millisecond,
    which for the 159 Tensors of a small model is more than a training step.
    """

    tensor: Tensor
    out: Array
    fetch: Callable[[Array], None] | None = None
    """What brings the values from another process, if that has them."""
    uop: UOp | None = None
    memory: Array | None = None
    """Where the values of ``uop`` lie, if the processor can reach them."""

    def copy(self) -> None:
        """Copy the values; the device must have finished its work."""
        if self.fetch is not None:
            self.fetch(self.out)
            return
        if self.tensor.uop is not self.uop:
            self.uop, self.memory = self.tensor.uop, _memory(self.tensor, self.out)
        if self.memory is None:
            _fetch(self.tensor, self.out)
        else:
            np.copyto(self.out, self.memory)


def _memory(tensor: Tensor, out: Array) -> Array | None:
    """The values of a Tensor where they lie; None where the processor cannot reach them."""
    from tinygpt.machine import transfer

    return transfer.memory(tensor) if _has_own_buffer(tensor, out) else None


def _fetch(tensor: Tensor, out: Array) -> None:
    """Copy the values from a device with memory of its own, or from bfloat16, as float32.

    Also of a Tensor without a buffer: one not computed yet, a view, or one on several devices.
    """
    from tinygpt.machine import transfer

    if _has_own_buffer(tensor, out):
        transfer.read(tensor, out)
    else:
        np.copyto(out, tensor.numpy())


def _has_own_buffer(tensor: Tensor, out: Array) -> bool:
    """Whether a buffer holds the values of a Tensor, as many as ``out`` has, and nothing else."""
    from tinygpt.machine.tinygrad_internals import Buffer

    buffer = tensor.uop.base.buffer if tensor.uop.has_buffer_identity() else None
    return isinstance(buffer, Buffer) and buffer.is_initialized() and buffer.size == out.size
