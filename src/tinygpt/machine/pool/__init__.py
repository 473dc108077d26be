"""tinygrad's CPU kernels on every core.

tinygrad 0.14 splits a large kernel into pieces, one for each core, and then runs the pieces one
after another. ``install`` hands it a pool of threads that runs them side by side, through the two
attributes by which a device of tinygrad says how kernels are run: ``graph``, for what a
``TinyJit`` has captured, and ``runtime_t``, for a kernel launched by itself. The results are the
same, bit for bit: the same pieces are run, only elsewhere. ``docs/multicore.md`` has the figures.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from typing import TYPE_CHECKING

from tinygpt.errors import UsageError
from tinygpt.machine.ranks import launcher
from tinygpt.machine.resources import cores

if TYPE_CHECKING:
    from tinygrad import UOp

    from tinygpt.machine.pool.runner import Engine, PoolGraph

log = logging.getLogger(__name__)

TINYGRAD = "0.14."
"""The versions of tinygrad that this was written for and is tested with."""

MAX_THREADS = 1024
"""A larger number is taken for a typing error."""


def install(threads: int | None = None) -> int:
    """Run tinygrad's CPU kernels on ``threads`` threads from now on; return their number.

    Without ``threads`` the environment variable TINYGPT_THREADS counts, and without that one every
    core that the process may use: its affinity (``taskset``) and its container's quota, or its part
    of them where mpiexec started several processes on this host. With 1
    there are no workers, but a captured ``TinyJit`` still runs as one call instead of one for each
    kernel. 0 leaves everything to tinygrad, as ``uninstall`` does.

    Where there is no default device, or one other than the CPU, nothing happens. Where tinygrad is
    not as this module knows it, a line of the log says so, and tinygrad goes on in its own way.
    Both return 1.

    Raises UsageError for a number that makes no sense.
    """
    number = _checked(threads)
    if number == 0:
        uninstall()
        return 1
    from tinygrad import Device

    try:
        device = Device.DEFAULT
    except RuntimeError:  # there is none, which ``device.require_device`` explains
        return 1
    if device.split(":")[0] != "CPU":
        return 1
    try:
        _engine().plug_in(number)
    except Exception as error:  # whatever tinygrad's insides raise when they have changed
        uninstall()
        log.warning(
            "Kernels run on one core, in tinygrad's own way: %s. "
            "Set TINYGPT_THREADS=0 to do without this notice.",
            error,
        )
        return 1
    return number


def uninstall() -> None:
    """Stop the workers and give tinygrad its own way of running kernels back.

    A ``TinyJit`` that was captured in between goes on working, on one core.
    """
    if _engine.cache_info().currsize:
        _engine().unplug()


def extend(name: str) -> None:
    """Run the kernels of another CPU device, such as CPU:1, on the same threads as CPU's.

    Nothing happens for other devices, and where ``install`` was not called.
    """
    from tinygrad import Device

    from tinygpt.machine.tinygrad_internals import CPUDevice

    if _engine.cache_info().currsize and isinstance(device := Device[name], CPUDevice):
        _engine().extend(device)


def fixed_graphs(linear: UOp) -> list[PoolGraph]:
    """The batches of a captured ``TinyJit``, if the pool runs all of them and none ever changes.

    To ``replay`` them takes a few microseconds, and ``TinyJit``'s own call a hundred. Otherwise the
    list is empty.
    """
    if not _engine.cache_info().currsize:
        return []
    from tinygpt.machine.pool import runner

    return runner.fixed_graphs(linear)


def installed() -> bool:
    """Whether kernels are run by this module now."""
    return bool(_engine.cache_info().currsize) and _engine().plugged


def engine() -> Engine:
    """The engine, where it is ``installed``."""
    assert installed()
    return _engine()


def threads() -> int:
    """The number of threads that kernels run on now; 1 where ``install`` was not called."""
    return _engine().pool.threads if _engine.cache_info().currsize else 1


@cache
def _engine() -> Engine:
    """The one engine of this process, made on first use."""
    from importlib.metadata import version  # late: slow to import

    if not (found := version("tinygrad")).startswith(TINYGRAD):
        raise RuntimeError(f"tinygrad {found} is installed, and running on all cores needs 0.14")
    from tinygpt.machine.pool.runner import Engine

    return Engine()


def _checked(threads: int | None) -> int:
    value: object = threads
    source = "threads"
    if threads is None:
        source, value = "TINYGPT_THREADS", os.environ.get("TINYGPT_THREADS", "").strip()
        if not value:
            shared = launcher.own_cores(cores(), os.cpu_count() or 1)  # with other ranks
            return min(shared, MAX_THREADS)
    try:
        number = int(str(value))
    except ValueError:
        number = -1
    if not 0 <= number <= MAX_THREADS:
        raise UsageError(
            f"{source}={value!r} is not a number of threads from 1 to {MAX_THREADS}. "
            f"This process may use {cores()}; 0 leaves kernels to tinygrad."
        )
    return number
