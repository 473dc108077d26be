"""Copies of a model's and an optimizer's Tensors in memory, ready to be written.

tinygrad is imported where it is used, so that a program which only looks at files starts quickly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tinygpt.errors import UsageError
from tinygpt.runs.checkpoint.format import Array, Layout, arrange, data_size
from tinygpt.runs.checkpoint.writer import Snapshot

if TYPE_CHECKING:
    from tinygrad import Tensor, UOp
    from tinygrad.nn.optim import Optimizer

    from tinygpt.machine.tinygrad_internals import Buffer
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
    from tinygpt.machine.tinygrad_internals import _to_np_dtype

    kinds = [(name, np.dtype(_to_np_dtype(t.dtype)), t.shape) for name, t in tensors.items()]
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
        self._sources = {n: _Source(t, self.snapshot.array(n)) for n, t in tensors.items()}
        self._devices = {t.device for t in tensors.values() if isinstance(t.device, str)}


@dataclass
class _Source:
    """A Tensor, and where its values go.

    The values are copied from the Tensor's memory: ``Tensor.numpy()`` takes half a millisecond,
    which for the 159 Tensors of a small model is more than a training step.
    """

    tensor: Tensor
    out: Array
    uop: UOp | None = None
    buffer: Buffer | None = None
    """The buffer of ``uop``."""
    memory: Array | None = None
    """The content of ``buffer``, where the processor can reach it."""

    def copy(self) -> None:
        """Copy the values; the device must have finished its work."""
        if self.tensor.uop is not self.uop:
            self.uop, self.buffer = self.tensor.uop, _buffer(self.tensor, self.out)
            self.memory = _memory(self.buffer, self.out)
        if self.memory is not None:
            np.copyto(self.out, self.memory)
        elif self.buffer is not None:
            _fetch(self.buffer, self.out)
        else:  # not computed yet, a view of something larger, or on several devices
            np.copyto(self.out, self.tensor.numpy())


def _buffer(tensor: Tensor, out: Array) -> Buffer | None:
    """The buffer that holds the values of a Tensor and nothing else, as they are in ``out``."""
    from tinygpt.machine.tinygrad_internals import Buffer

    if not tensor.uop.has_buffer_identity():
        return None
    buffer = tensor.uop.base.buffer
    if not isinstance(buffer, Buffer) or not buffer.is_initialized():
        return None
    return buffer if buffer.nbytes == out.nbytes else None


def _memory(buffer: Buffer | None, like: Array) -> Array | None:
    """The memory of a buffer without a copy, if the processor can reach it."""
    if buffer is None or not hasattr(buffer.allocator, "_as_buffer"):
        return None
    memory = buffer.as_memoryview(force_zero_copy=True)
    return np.frombuffer(memory, like.dtype).reshape(like.shape)


def _fetch(buffer: Buffer, out: Array) -> None:
    """Copy from a device with memory of its own."""
    from tinygpt.machine.tinygrad_internals import Buffer

    memory = out.reshape(-1).view(np.uint8).data
    Buffer("PYTHON", buffer.size, buffer.dtype, opaque=memory).copy_from(buffer)
