"""The default device, where the user named none with DEV.

tinygrad takes the first device that opens, in the order of its ``ALL_DEVICES``, in which OpenCL
precedes the processor's own kernels. An OpenCL driver for the processor (pocl) runs a step 11 to 25
times slower than those kernels, so it is never the default; ``DEV=CL`` still selects it.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterator
from contextlib import suppress
from types import ModuleType
from typing import Any

from tinygpt.machine import environment

log = logging.getLogger(__name__)


def install(device: ModuleType) -> None:
    """Make ``tinygrad.device`` choose by our rule, unless it has chosen already: that is logged."""
    chosen = vars(device.Device).get("_select_device", "CPU")
    if chosen != "CPU":
        log.warning(
            "Kernels run on %s, which tinygrad chose before tinygpt was imported. Import tinygpt "
            "first, or set DEV=CPU for the processor.",
            chosen,
        )
    # Variables such as CUDA=1 once chose a device, and end tinygrad now.
    environment.instead.update(dict.fromkeys(device.Device._devices, "0"))
    device.Device.get_available_devices = lambda: available(device)


def available(device: ModuleType) -> Iterator[str]:
    """Names of the devices that open, best first; the first is the default, and is logged."""
    for name in device.ALL_DEVICES:
        if name == "CL" and not opencl_accelerators():
            continue
        opened: Any = None
        with suppress(Exception):  # backends raise whatever they like where there is no device
            opened = device.Device[name].device
        if opened is None:
            continue
        if name != "CPU":
            log.warning(
                "Kernels run on %s, the first device that was found. DEV=CPU chooses the "
                "processor; `tinygpt doctor` lists the devices.",
                opened,
            )
        yield opened


def has_opencl() -> bool:
    """Whether OpenCL has any platform."""
    return opencl_accelerators() is not None


def opencl_accelerators() -> int | None:
    """The number of OpenCL devices that are not the processor; None without any OpenCL.

    They are those of the first platform, the one that tinygrad takes.
    """
    try:
        from tinygrad.runtime.autogen import opencl as cl

        platforms, count = (cl.cl_platform_id * 1)(), cl.cl_uint(0)
        if cl.clGetPlatformIDs(1, platforms, None):
            return None
        kinds = cl.CL_DEVICE_TYPE_GPU | cl.CL_DEVICE_TYPE_ACCELERATOR
        failed = cl.clGetDeviceIDs(platforms[0], kinds, 0, None, count)
    except Exception:  # no library, or no driver
        return None
    return 0 if failed else int(count.value)


def add_opencl_devices() -> None:
    """Let CL:1, CL:2, … be the further devices of OpenCL's first platform.

    tinygrad asks for graphics cards or else for the default device alone, and then knows one where
    a driver for processors (pocl) has several.
    """
    from tinygrad import Device
    from tinygrad.runtime.autogen import opencl as cl

    known = Device.get_class("CL")  # a class that keeps the list
    if known.device_ids is None or opencl_accelerators():
        return
    platforms, count = (cl.cl_platform_id * 1)(), cl.cl_uint(0)
    cl.clGetPlatformIDs(1, platforms, None)
    cl.clGetDeviceIDs(platforms[0], cl.CL_DEVICE_TYPE_ALL, 0, None, count)
    everything = (cl.cl_device_id * count.value)()
    cl.clGetDeviceIDs(platforms[0], cl.CL_DEVICE_TYPE_ALL, count.value, everything, None)
    first = _address(known.device_ids[0])
    known.device_ids = [known.device_ids[0], *(d for d in everything if _address(d) != first)]


def _address(handle: Any) -> int | None:
    return ctypes.cast(handle, ctypes.c_void_p).value
