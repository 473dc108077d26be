"""Numbers from numpy into the buffer of a Tensor, and back, without a graph.

``Tensor(array)`` and ``Tensor.numpy()`` build graphs, which takes as much time as the forward pass
of a small model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tinygrad import Device, Tensor

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


def memory(tensor: Tensor) -> Array | None:
    """The values of a Tensor on one device where they lie, to be read and written.

    Everything before has been computed then. None where the processor cannot reach them (a GPU).
    """
    buffer = _buffer(tensor).ensure_allocated()
    if not hasattr(buffer.allocator, "_as_buffer"):
        return None
    values = np.frombuffer(buffer.as_memoryview(force_zero_copy=True), _to_np_dtype(buffer.dtype))
    return values.reshape(tuple(map(int, tensor.shape)))


def write(tensor: Tensor, values: npt.ArrayLike) -> Tensor:
    """Copy values, as many as it has, into a Tensor with a buffer on one device, in place."""
    buffer = _buffer(tensor).ensure_allocated()
    source: Array = np.ascontiguousarray(values, _to_np_dtype(buffer.dtype))
    assert source.size == buffer.size, "of the same shape"
    if (target := memory(tensor)) is None:
        buffer.copy_from(Buffer("NPY", buffer.size, buffer.dtype, opaque=source))
    else:
        target[...] = source.reshape(target.shape)
    return tensor


def fill(tensor: Tensor, pieces: Iterable[Array]) -> Tensor:
    """``write`` for values that come in flat pieces, each of which goes straight to its place."""
    values = memory(tensor)
    target = np.empty(tensor.shape, _to_np_dtype(tensor.dtype)) if values is None else values
    flat, at = target.reshape(-1), 0
    for piece in pieces:
        flat[at : at + len(piece)] = piece
        at += len(piece)
    assert at == flat.size, "of the same shape"
    return write(tensor, target) if values is None else tensor


def read(tensor: Tensor) -> Array:
    """A copy of the values of a realized, contiguous Tensor on one device."""
    assert _buffer(tensor).is_allocated(), "realized"
    if (values := memory(tensor)) is not None:
        return values.copy()
    buffer = _buffer(tensor)
    copied = np.frombuffer(buffer.as_memoryview(), _to_np_dtype(buffer.dtype))
    return copied.reshape(tuple(map(int, tensor.shape)))


def free_unused(device: str = "") -> None:
    """Give back to the system what tinygrad keeps of freed memory for the next Tensor like it."""
    getattr(Device[device or Device.DEFAULT].allocator, "free_cache", lambda: None)()


def _buffer(tensor: Tensor) -> Buffer:
    buffer = tensor.uop.base.buffer
    assert isinstance(buffer, Buffer), "on one device"
    return buffer
