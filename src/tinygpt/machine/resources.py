"""What this machine has, and what this process takes of it."""

from __future__ import annotations

import os
import resource
import sys
import time
from contextlib import suppress
from pathlib import Path

from tinygpt.machine import groups


def cores() -> int:
    """Processor cores this process may use: its affinity, and its control groups' quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = groups.core_quota()
    return max(1, min(count or 1, int(quota) if quota else count or 1))


def memory() -> int:
    """Resident memory of this process now, in bytes; its peak where only that is known."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return peak_memory()
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_memory() -> int:
    """The most resident memory this process has had, in bytes."""
    if sys.platform == "linux":  # where getrusage counts what the process was forked from as well
        with suppress(OSError, ValueError, IndexError):
            status = Path("/proc/self/status").read_text()
            return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others KiB


def process_age() -> float:
    """Seconds since this process began; where only Linux would know, those it has computed."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        began = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # after the start of the system
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - began)
    except (OSError, ValueError, IndexError, AttributeError):
        return time.process_time()


def total_memory() -> int:
    """Memory this process could have at most, in bytes; 0 where it is unknown."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 0
    return min(total, groups.memory_limit() or total)


def available_memory() -> int:
    """Memory that this process could still take without swapping, in bytes; 0 where unknown.

    Caches that the system would give up for it count as free.
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found = {name: int(rest.split()[0]) * 1024 for name, rest in (s.split(":") for s in lines)}
    except (OSError, ValueError, IndexError):
        return total_memory()  # the best guess
    free = found.get("MemAvailable", 0)
    left = groups.memory_left()
    return free if left is None else min(free, left)


def processor() -> str:
    """Everything that decides which instructions run here: kernels are compiled for just that."""
    machine = os.uname().machine
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as file:
            first = file.read(1 << 14).split("\n\n")[0].splitlines()
    except OSError:
        return machine
    kept = ("model name", "flags", "Features", "CPU implementer", "CPU part", "isa")
    return "\n".join([machine, *(line for line in first if line.startswith(kept))])


def may_have_accelerator() -> bool:
    """Whether tinygrad could find anything but the processor here; true where that is uncertain."""
    if sys.platform != "linux":
        return True
    bus = Path("/sys/bus")
    return (
        any(map(os.path.exists, ACCELERATORS))
        or any(_is_for_accelerators(path) for path in OPENCL_DRIVERS.glob("*.icd"))
        or any(
            _read(d / "class")[:4] in DISPLAYS and _read(d / "vendor") in MAKERS
            for d in bus.glob("pci/devices/*")
        )
        or any(_read(path) in USB_BRIDGES for path in bus.glob("usb/devices/*/idVendor"))
    )


ACCELERATORS = (
    *("/dev/nvidiactl", "/dev/nvidia0", "/dev/kfd", "/dev/dri", "/dev/dxg", "/dev/kgsl-3d0"),
    *("/dev/mali0", "/dev/pvr_sync", "/dev/galcore"),
)
"""What the drivers of NVIDIA, AMD, WSL, Qualcomm and of small boards leave on a Linux system."""
OPENCL_DRIVERS = Path("/etc/OpenCL/vendors")
"""A file for each installed OpenCL driver, which names its library."""
ON_PROCESSOR = ("pocl", "intelocl", "oclgrind")
"""Words in the names of those libraries that run kernels on the processor."""
DISPLAYS = ("0x03", "0x12")
"""Classes of PCI devices: displays and accelerators, which tinygrad can drive without a driver."""
MAKERS = ("0x1002", "0x10de", "0x8086", "0x5143")
USB_BRIDGES = ("add1", "3801", "174c")
"""Boxes that put a graphics card on a USB port."""


def _is_for_accelerators(driver: Path) -> bool:
    return not any(word in _read(driver) for word in ON_PROCESSOR)


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
