"""Which way an operation is computed: by its fast kernel, or by its plain twin.

Every operation is declared once, in its file::

    @operation("norm", plain_layer_norm)
    def layer_norm(x, weight, bias): ...  # the fast way

From then on ``layer_norm(...)`` runs the kernel where the device, the types and the shapes allow
it. Where they do not, the twin takes over, and the log says so once for each reason. With
``--strict`` (TINYGPT_STRICT=1) a KernelError is raised instead. Within ``plain()`` the twins are
used on purpose, and nothing is logged.

The operations are registered in ``OPERATIONS``, from which ``tinygpt check`` and the tests take
them: `check.unchecked` names those that no case checks.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

from tinygrad import Device, Tensor, dtypes

from tinygpt.config import AttentionMethod
from tinygpt.errors import KernelError
from tinygpt.machine.tinygrad_internals import CStyleLanguage

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

STRICT = "TINYGPT_STRICT"
"""Set to 1, this environment variable does what --strict does."""

NUMBERS = (dtypes.float16, dtypes.bfloat16, dtypes.float32, dtypes.float64)
"""The types that kernels compute with."""

OPERATIONS: dict[str, str] = {}
"""Every operation: the name of its function, and of its kernel in the log and in the check."""

_way = ContextVar[AttentionMethod]("way", default="auto")  # of each thread, not of the process


@contextmanager
def use(way: AttentionMethod) -> Iterator[None]:
    """Compute operations this way within the block, in this thread.

    "plain": by the twins. "flash": by the kernels, or raise KernelError. "auto": as outside of the
    block. Within a block of "plain" everything stays plain.
    """
    before = _way.get()
    _way.set(before if way == "auto" or before == "plain" else way)
    try:
        yield
    finally:
        _way.set(before)


def way() -> AttentionMethod:
    """The way of the block that this thread is in."""
    return _way.get()


plain = functools.partial(use, "plain")
"""Within this block everything that this thread computes is computed by the plain twins."""


def operation(
    kernel: str,
    twin: Callable[P, R],
    *,
    integers: Container[str] = (),
    axes: tuple[int, ...] = (),
    copies: bool = False,
    cpu: bool = False,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Declare a function to be the fast way of an operation, whose plain way is ``twin``.

    ``kernel`` is what the log and the check call it. ``integers`` names the parameters that are no
    floats; ``axes`` and ``copies`` say what `obstacle` accepts on several devices. With ``cpu``
    the operation has a kernel for CPUs only: elsewhere the twin is as good, and nothing is logged.
    """

    def declare(fast: Callable[P, R]) -> Callable[P, R]:
        name = fast.__name__
        parameters = tuple(inspect.signature(fast).parameters)
        OPERATIONS[name] = kernel

        @functools.wraps(fast)
        def compute(*args: P.args, **kwargs: P.kwargs) -> R:
            if _way.get() != "plain":
                given = dict(zip(parameters, args, strict=False), **kwargs)
                floats, ids = list[Tensor](), list[Tensor]()
                for parameter, value in given.items():
                    (ids if parameter in integers else floats).extend(_tensors(value))
                if not falls_back(kernel, obstacle(*floats, ids=ids, copies=copies, axes=axes)):
                    elsewhere = cpu and not all(map(on_cpu, (*floats, *ids)))
                    return (twin if elsewhere else fast)(*args, **kwargs)
            with plain():
                return twin(*args, **kwargs)

        return compute

    return declare


def _tensors(value: Any) -> Iterable[Tensor]:
    """The Tensors of an argument: itself, or those in a list."""
    if isinstance(value, Tensor):
        return [value]
    return [t for t in value if isinstance(t, Tensor)] if isinstance(value, (list, tuple)) else []


def falls_back(kernel: str, why: str | None) -> bool:
    """Whether the plain twin has to take the kernel's place: if there is a reason ``why``.

    Raises KernelError instead within ``use("flash")`` and under --strict.
    """
    if why is None:
        return False
    if _way.get() == "flash":
        raise KernelError(
            f"attention='flash' was asked for, and flash attention cannot run here: {why}. "
            f"attention='auto' takes the plain formula in such a case, attention='plain' always."
        )
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
    *floats: Tensor, ids: Iterable[Tensor] = (), copies: bool = False, axes: tuple[int, ...] = ()
) -> str | None:
    """Why kernels cannot take these numbers, and these integer ``ids``; None if they can.

    On several devices they may lie if all are cut along the same one of ``axes``, or, with
    ``copies``, if each device has a whole copy.
    """
    tensors = (*floats, *ids)
    cuts = {t.uop.axis for t in tensors if isinstance(t.device, tuple)}
    allowed = cuts <= {None} if copies else len(cuts) < 2 and cuts <= set(axes)
    if len({t.device for t in tensors}) > 1 or not allowed:
        return "its tensors are spread over several devices"
    for t in tensors:
        if why := _renderer_obstacle(first_device(t)):
            return why
        if not all(isinstance(n, int) for n in t.shape):
            return "a size is not a fixed number"
        if 0 in t.shape:
            return "a size is 0"
    for t in floats:
        if t.dtype not in NUMBERS:
            return f"it would have to compute with the type {t.dtype.name}"
    return None


def first_device(t: Tensor) -> str:
    """The device of a tensor, or the first of several."""
    return t.device[0] if isinstance(t.device, tuple) else t.device or Device.DEFAULT


def on_cpu(t: Tensor) -> bool:
    """Whether a tensor lies on a CPU, whose kernels come in vectors and pieces."""
    return first_device(t).split(":")[0] == "CPU"


@functools.cache
def _renderer_obstacle(device: str) -> str | None:
    """Kernels are made and tested for tinygrad's renderers of C, CUDA, Metal, OpenCL and WGSL.

    Of the others X86 lacks a loop that attention needs, and PTX arrays in registers.
    """
    renderer = Device[device].renderer
    if isinstance(renderer, CStyleLanguage) or device.split(":")[0] == "PYTHON":
        return None
    return f"on {device} it would be written by tinygrad's {type(renderer).__name__}"
