"""Numbers from numpy into a Tensor that is there already, and back.

Both go straight to the memory behind the Tensor. To do the same with graphs, as ``Tensor(array)``
and ``Tensor.numpy()`` do, costs as much time as the forward pass of a small model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tinygrad import Tensor
from tinygrad.device import Buffer
from tinygrad.dtype import DType, _to_np_dtype

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


def read(tensor: Tensor) -> Array:
    """A copy of the values of a realized, contiguous Tensor on one device."""
    shape = tuple(map(int, tensor.shape))
    buffer = _buffer(tensor)
    assert buffer.is_allocated(), "realized"
    return _view(buffer, allow_zero_copy=True).reshape(shape).copy()


def _buffer(tensor: Tensor) -> Buffer:
    buffer = tensor.uop.base.buffer
    assert isinstance(buffer, Buffer), "on one device"
    return buffer


def _view(buffer: Buffer, **how: bool) -> Array:
    """The buffer's memory, or else a copy, once everything before has been computed."""
    return np.frombuffer(buffer.as_memoryview(**how), _to_np_dtype(buffer.dtype))
