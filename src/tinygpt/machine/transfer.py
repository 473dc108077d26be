"""Numbers from numpy into a Tensor that is there already, and back.

Both go straight to the memory behind the Tensor. To do the same with graphs, as ``Tensor(array)``
and ``Tensor.numpy()`` do, costs as much time as the forward pass of a small model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tinygrad import Tensor

from tinygpt.machine.tinygrad_internals import Buffer, DType, _to_np_dtype

Array = npt.NDArray[Any]


def zeros(
    shape: Sequence[int], dtype: DType, device: str | tuple[str, ...] | None = None
) -> Tensor:
    """A realized Tensor of zeros."""
    if isinstance(device, tuple):
        return Tensor.zeros(*shape, dtype=dtype, device=device).contiguous().realize()
    return write(Tensor.empty(*shape, dtype=dtype, device=device), np.zeros(shape))


def zeros_like(tensor: Tensor, dtype: DType | None = None) -> Tensor:
    """Realized zeros in the shape of a Tensor, where that one is."""
    return zeros([int(n) for n in tensor.shape], dtype or tensor.dtype, tensor.device)


def write(tensor: Tensor, values: npt.ArrayLike) -> Tensor:
    """Copy values of the same shape into a Tensor with a buffer on one device, in place."""
    buffer = _buffer(tensor).ensure_allocated()
    source: Array = np.ascontiguousarray(values, _to_np_dtype(buffer.dtype))
    assert source.size == buffer.size, "of the same shape"
    if hasattr(buffer.allocator, "_as_buffer"):  # memory that the processor can reach
        _view(buffer, force_zero_copy=True)[:] = source.ravel()
    else:
        buffer.copy_from(Buffer("NPY", buffer.size, buffer.dtype, opaque=source))
    return tensor


def fill(tensor: Tensor, pieces: Iterable[Array]) -> Tensor:
    """The same for values that come in pieces, flat: they go straight to where they belong."""
    buffer = _buffer(tensor).ensure_allocated()
    reachable = hasattr(buffer.allocator, "_as_buffer")
    kind = _to_np_dtype(buffer.dtype)
    target = _view(buffer, force_zero_copy=True) if reachable else np.empty(buffer.size, kind)
    at = 0
    for piece in pieces:
        target[at : at + len(piece)] = piece
        at += len(piece)
    assert at == buffer.size, "of the same shape"
    return tensor if reachable else write(tensor, target)


def read(tensor: Tensor) -> Array:
    """A copy of the values of a realized, contiguous Tensor on one device."""
    shape = tuple(map(int, tensor.shape))
    buffer = _buffer(tensor)
    assert buffer.is_allocated(), "realized"
    return _view(buffer, allow_zero_copy=True).reshape(shape).copy()


class Port:
    """``write`` and ``read`` for one Tensor, again and again: where it lies is asked only once.

    Nothing may be computing with it when it is written: what was computed is read first.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._shape = tensor, tuple(map(int, tensor.shape))
        self._buffer = _buffer(tensor).ensure_allocated()
        self._memory = None
        if hasattr(self._buffer.allocator, "_as_buffer"):  # memory that the processor can reach
            self._memory = _view(self._buffer, force_zero_copy=True).reshape(self._shape)

    def write(self, values: npt.ArrayLike) -> None:
        """Copy values that have the Tensor's shape, or stretch to it, into the Tensor."""
        if self._memory is None:
            write(self._tensor, np.broadcast_to(values, self._shape))
        else:
            self._memory[...] = values

    def read(self) -> Array:
        """A copy of the Tensor's values, once everything before has been computed."""
        if self._memory is None:
            return read(self._tensor)
        self._buffer.allocator.dev.synchronize()
        return self._memory.copy()


def _buffer(tensor: Tensor) -> Buffer:
    buffer = tensor.uop.base.buffer
    assert isinstance(buffer, Buffer), "on one device"
    return buffer


def _view(buffer: Buffer, **how: bool) -> Array:
    """The buffer's memory, or else a copy, once everything before has been computed."""
    return np.frombuffer(buffer.as_memoryview(**how), _to_np_dtype(buffer.dtype))
