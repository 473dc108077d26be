"""The floating types that models compute in, by name, and which of them a device has.

A device lacks a type if the code that tinygrad writes for it has no such numbers. float32 is always
there.
"""

from __future__ import annotations

from tinygrad import Device, dtypes

from tinygpt.config import PRECISIONS
from tinygpt.errors import DeviceError, UsageError, nearest
from tinygpt.machine.tinygrad_internals import DType
from tinygpt.untrusted import brief


def type_of(name: str) -> DType:
    """tinygrad's type of a name in ``PRECISIONS``; UsageError for any other."""
    if name not in PRECISIONS:
        raise UsageError(
            f"There is no dtype {brief(name)}.{nearest(str(name)[:99], list(PRECISIONS))} "
            f"Known: {', '.join(PRECISIONS)}."
        )
    found: DType = getattr(dtypes, name)
    return found


def half_of(name: str) -> DType | None:
    """The type of a name, or None for float32, in which nothing has to be cast."""
    return None if (found := type_of(name)) == dtypes.float32 else found


def name_of(dtype: DType) -> str:
    """The name in ``PRECISIONS`` of a type of tinygrad's, which has names of its own."""
    return next(name for name in PRECISIONS if type_of(name) == dtype)


def available(device: str | None = None) -> list[str]:
    """The types that a device has, the default one if none is named."""
    supported = Device[device or Device.DEFAULT].renderer.supported_dtypes()
    return [name for name in PRECISIONS if type_of(name) in supported]


def require(name: str, device: str | None = None) -> None:
    """Raise UsageError for an unknown type, DeviceError for one that the device does not have."""
    type_of(name)
    if name not in (there := available(device)):
        raise DeviceError(
            f"The device {device or Device.DEFAULT} cannot compute in {name}. "
            f"It has: {', '.join(there)}."
        )
