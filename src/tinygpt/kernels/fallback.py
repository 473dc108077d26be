"""Where a kernel cannot run, its plain twin takes over and the log says so, once for each reason.

``--strict`` on the command line, or TINYGPT_STRICT=1, makes an error of it. Going the plain way on
purpose, by ``kernels.plain()`` or ``attention="plain"``, is no fallback.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Sequence

from tinygrad import Device, Tensor, dtypes

from tinygpt.errors import KernelError
from tinygpt.machine.tinygrad_internals import CStyleLanguage

log = logging.getLogger(__name__)

STRICT = "TINYGPT_STRICT"
"""Set to 1, this environment variable does what --strict does."""

NUMBERS = (dtypes.float16, dtypes.bfloat16, dtypes.float32, dtypes.float64)
"""The types that kernels compute with."""


def falls_back(kernel: str, why: str | None) -> bool:
    """Whether the plain twin has to take the kernel's place: if there is a reason ``why``.

    Raises KernelError instead where that is not wanted.
    """
    if why is None:
        return False
    if os.environ.get(STRICT, "") not in ("", "0"):
        raise KernelError(
            f"There is no fast kernel for {kernel} here: {why}. "
            f"Leave out --strict ({STRICT}=1) to go on with the plain formula, which is slower."
        )
    say_once(kernel, why)
    return True


@functools.cache
def say_once(kernel: str, why: str) -> None:
    """Warn, through the log, that a kernel's plain twin is used."""
    log.warning(
        "There is no fast kernel for %s here: %s. The plain formula is used, which is slower.",
        kernel,
        why,
    )


def obstacle(
    *tensors: Tensor,
    ids: Sequence[Tensor] = (),
    copies: bool = False,
    axes: Sequence[int] = (),
) -> str | None:
    """Why kernels cannot take these numbers, and these integer ``ids``; None if they can.

    On several devices they may lie if all are cut along the same one of ``axes``, or, with
    ``copies``, if each device has a whole copy.
    """
    cuts = {t.uop.axis for t in (*tensors, *ids) if isinstance(t.device, tuple)}
    if len({t.device for t in (*tensors, *ids)}) > 1 or not (
        cuts <= {None} if copies else len(cuts) < 2 and cuts <= set(axes)
    ):
        return "its tensors are spread over several devices"
    for t in (*tensors, *ids):
        if why := _renderer_obstacle(first_device(t)):
            return why
        if not all(isinstance(n, int) for n in t.shape):
            return "a size is not a fixed number"
        if 0 in t.shape:
            return "a size is 0"
    for t in tensors:
        if t.dtype not in NUMBERS:
            return f"it would have to compute with the type {t.dtype.name}"
    return None


def first_device(t: Tensor) -> str:
    """The device of a tensor, or the first of several."""
    return t.device[0] if isinstance(t.device, tuple) else t.device or Device.DEFAULT


@functools.cache
def _renderer_obstacle(device: str) -> str | None:
    """Kernels are made and tested for tinygrad's renderers of C, CUDA, Metal, OpenCL and WGSL.

    Of the others X86 lacks a loop that attention needs, and PTX arrays in registers.
    """
    renderer = Device[device].renderer
    if isinstance(renderer, CStyleLanguage) or device.split(":")[0] == "PYTHON":
        return None
    return f"on {device} it would be written by tinygrad's {type(renderer).__name__}"
