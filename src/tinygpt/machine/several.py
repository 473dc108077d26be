"""The devices that a training is spread over: opened, or an error that says what there is."""

from __future__ import annotations

from contextlib import suppress

from tinygrad import Device

from tinygpt.config.devices import MOST_DEVICES, device_names
from tinygpt.errors import DeviceError
from tinygpt.machine import choice, pool
from tinygpt.machine.device import require_device
from tinygpt.machine.tinygrad_internals import ALL_DEVICES


def open_devices(devices: int | str | None) -> tuple[str, ...]:
    """Open the devices of ``TrainConfig.devices``; -> their names, first one first.

    The first is the default device, which has the model's weights. Raises DeviceError, naming the
    devices that there are, where one cannot be opened or another should come first.

    >>> open_devices("CPU:0,CPU:1")
    ('CPU', 'CPU:1')
    """
    if device_names(devices)[0].split(":")[0] in ("", "CPU"):
        require_device()  # which knows what is wrong with a compiler
    default = Device.canonicalize(Device.DEFAULT)
    names = device_names(devices, default.split(":")[0])
    missing = [name for name in names if not _opens(name)]
    if missing:
        raise DeviceError(
            f"There is no device {', '.join(missing)}. {_there(names[0].split(':')[0])} Name some "
            f"of these with --devices, or leave it out for one."
        )
    if names[0] != default:
        advice = (
            f"Name {default} first."
            if names[0].split(":")[0] == default.split(":")[0]
            else f"Set DEV={names[0].split(':')[0]}, or name devices of the kind {default}."
        )
        raise DeviceError(
            f"The first of the devices {', '.join(names)} must be the default device, {default}: "
            f"it has the model's weights, and evaluates and samples. {advice}"
        )
    for name in names[1:]:
        pool.extend(name)
    return names


def _opens(name: str) -> bool:
    with suppress(Exception):  # backends raise whatever they like where there is no device
        if name.startswith("CL:") and Device["CL"] is not None:
            choice.add_opencl_devices()
        return Device[name] is not None
    return False


def _there(kind: str) -> str:
    """The devices of a kind that open, in a sentence."""
    found = list[str]()
    for i in range(MOST_DEVICES):
        if not _opens(f"{kind}:{i}"):
            break
        found.append(f"{kind}:{i}")
    if not found:
        others = ", ".join(name for name in ALL_DEVICES if _opens(name))
        return f"No device of the kind {kind} can be opened here; those that can are {others}."
    return f"Of the kind {kind} there are {', '.join(found)}."
