"""Numbers from numpy into the buffer of a Tensor, and back, without a graph.

``Tensor(array)`` and ``Tensor.numpy()`` build graphs, which takes as much time as the forward pass
of a small model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tinygrad import Device, Tensor, dtypes

from tinygpt.files.tensor_file import from_bfloat16, to_bfloat16
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

    Everything before has been computed then. None where the processor cannot reach them (a GPU),
    and for bfloat16, which numpy does not have.
    """
    return None if tensor.dtype == dtypes.bfloat16 else _stored(tensor)


def unwritten(tensor: Tensor) -> Array | None:
    """``memory`` of a Tensor that has none until now, as ``Tensor.empty`` returns it: to
    fill it overwrites nothing. None for all others."""
    plain = isinstance(tensor.device, str) and tensor.uop.has_buffer_identity()
    return memory(tensor) if plain and not _buffer(tensor).is_allocated() else None


def _stored(tensor: Tensor) -> Array | None:
    """The same, with the bits of bfloat16 as uint16."""
    buffer = _buffer(tensor).ensure_allocated()
    if not hasattr(buffer.allocator, "_as_buffer"):
        return None
    values = np.frombuffer(buffer.as_memoryview(force_zero_copy=True), _numpy_type(buffer.dtype))
    return values.reshape(tuple(map(int, tensor.shape)))


def _numpy_type(dtype: DType) -> Any:
    return np.uint16 if dtype == dtypes.bfloat16 else _to_np_dtype(dtype)


def write(tensor: Tensor, values: npt.ArrayLike) -> Tensor:
    """Copy values, as many as it has, into a Tensor with a buffer on one device, in place.

    They are rounded to the nearest number of its type.
    """
    buffer = _buffer(tensor).ensure_allocated()
    if buffer.dtype == dtypes.bfloat16:
        source: Array = to_bfloat16(values)
    else:
        source = np.ascontiguousarray(values, _to_np_dtype(buffer.dtype))
    assert source.size == buffer.size, "of the same shape"
    if (target := _stored(tensor)) is None:
        buffer.copy_from(Buffer("NPY", buffer.size, buffer.dtype, opaque=source))
    else:
        target[...] = source.reshape(target.shape)
    return tensor


def overwrite(tensor: Tensor, values: Array) -> None:
    """``write`` for any Tensor, in place: also for one that is not computed yet, or is spread over
    several devices.

    Other Tensors and captured functions that have the same buffer see the values.
    """
    if not tensor.uop.has_buffer_identity():
        tensor.realize()
    if isinstance(tensor.device, str) and tensor.uop.has_buffer_identity():
        write(tensor, values)
    else:
        tensor.assign(Tensor(values, device=tensor.device).cast(tensor.dtype)).realize()


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


def read(tensor: Tensor, out: Array | None = None) -> Array:
    """A copy of the values of a realized, contiguous Tensor on one device; bfloat16 as float32.

    It is ``out``, if that is given: an array of the same shape.
    """
    assert _buffer(tensor).is_allocated(), "realized"
    buffer, values = _buffer(tensor), _stored(tensor)
    is_copy = values is None
    if values is None:
        copied = np.frombuffer(buffer.as_memoryview(), _numpy_type(buffer.dtype))
        values = copied.reshape(tuple(map(int, tensor.shape)))
    if buffer.dtype == dtypes.bfloat16:
        return from_bfloat16(values, out)
    if out is None:
        return values if is_copy else values.copy()
    np.copyto(out, values)
    return out


def release_unused(device: str = "") -> None:
    """Give back to the system what tinygrad keeps of freed memory for the next Tensor like it."""
    getattr(Device[device or Device.DEFAULT].allocator, "free_cache", lambda: None)()


def _buffer(tensor: Tensor) -> Buffer:
    buffer = tensor.uop.base.buffer
    assert isinstance(buffer, Buffer), "on one device"
    return buffer
