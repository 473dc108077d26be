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
    """Open the devices of ``TrainConfig.devices``; -> their names, the default device first.

    That one has the model's weights. Raises DeviceError, naming the devices that there are, where
    one cannot be opened or the default device is not among them.

    >>> open_devices("CPU:1,CPU:0")
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
    if default not in names:
        raise DeviceError(
            f"The default device, {default}, must be one of the devices, which are "
            f"{', '.join(names)}: it has the model's weights, and evaluates and samples. "
            f"{_advice(names, default)}"
        )
    names = (default, *(name for name in names if name != default))
    for name in names[1:]:
        pool.extend(name)
    return names


def _advice(names: tuple[str, ...], default: str) -> str:
    """What to do where the default device is not one of ``names``."""
    kind = names[0].split(":")[0]
    if kind != default.split(":")[0]:
        return f"Set DEV={kind}, or name devices of the kind {default}."
    if kind != "CUDA":
        return f"Name {default} too, or give a number of devices."
    numbers = ",".join(name.partition(":")[2] or "0" for name in names)
    return (
        f"Name {default} too, or let the program see no others: CUDA_VISIBLE_DEVICES={numbers} "
        f"and --devices {len(names)}."
    )


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
