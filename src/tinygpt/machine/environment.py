"""The environment variables that tinygrad reads, some of which are meant for other programs.

tinygrad turns ``DEBUG=true`` or ``NO_COLOR=`` into a number while it is imported, and ends there.
So it reads the environment through ``read``, which knows words for numbers and ignores what is
neither. The environment itself stays as the user has set it, for the programs started from here.
"""

from __future__ import annotations

import functools
import math
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from tinygpt.errors import DeviceError

TRUE = ("true", "t", "yes", "y", "on", "enabled")
FALSE = ("false", "f", "no", "n", "off", "none", "disabled")

instead = {"TYPED": "0", "REGEN": "0", "IOCTL": "0"}
"""What tinygrad reads for a name, whatever the environment says. These need files that only
tinygrad's developers have."""


def read(name: str, default: Any = None) -> Any:
    """A variable, of the type of its default, which also stands for one that is empty.

    Where a number is wanted, words such as ``true`` are 1 or 0, and others are the default.
    """
    value = instead.get(name, os.environ.get(name, "")).strip()
    if not value:
        return default
    if isinstance(default, int | float):
        return type(default)(number(value, default))
    if isinstance(default, str) and re.fullmatch("-?[0-9]+", default):  # int(getenv("TYPED", "0"))
        return str(int(number(value, int(default))))
    return value


def number(text: str, default: float) -> float:
    """The number that a text stands for, whole if ``default`` is whole; else ``default``."""
    word = text.lower()
    if word in TRUE + FALSE:
        return int(word in TRUE)
    with suppress(ValueError):  # also for more digits than Python reads
        if isinstance(default, int) and text.lstrip("+-").isdecimal():
            return int(text)
        if math.isfinite(value := float(text)):
            return int(value) if isinstance(default, int) else value
    return default


@contextmanager
def importing(tinygrad: ModuleSpec) -> Iterator[None]:
    """Within this block, in which tinygrad is imported, it reads the environment as above.

    Raises DeviceError where DEV is none of its devices.
    """
    check_device(tinygrad)
    own, os.getenv = os.getenv, read  # type: ignore[assignment]
    try:
        yield
    finally:
        os.getenv = own


def change_helpers(helpers: ModuleType) -> None:
    """The same for whatever tinygrad reads later; ``helpers`` is ``tinygrad.helpers``.

    A tinygrad that was used before has read, and remembers, what it needs.
    """
    if "tinygrad.device" not in sys.modules:
        helpers.getenv = functools.cache(getenv)  # type: ignore[attr-defined]


def getenv(name: str, default: Any = 0) -> Any:
    """tinygrad's own function of that name, which remembers what it has read."""
    return read(name, default)


def to_stderr(*values: object, **options: Any) -> None:
    """Stands for ``print`` in tinygrad's modules: stdout is for results. Never fails."""
    if sys.stderr is not None:
        with suppress(OSError, ValueError):
            print(*values, **{"file": sys.stderr, **options})


def check_device(tinygrad: ModuleSpec) -> None:
    """DeviceError unless DEV is empty or names devices that tinygrad has a module for."""
    chosen = read("DEV", "")
    folder = Path((tinygrad.submodule_search_locations or [""])[0], "runtime")
    known = {p.stem.removeprefix("ops_").upper() for p in folder.glob("ops_*.py")} - STORES
    names = [DEVICE.fullmatch(part) for part in chosen.split(";")]
    if chosen and known and not all(n and n[1].upper() in known for n in names):
        raise DeviceError(
            f"The device DEV={chosen} is not one of tinygrad's: {', '.join(sorted(known))}; a "
            f"renderer may follow, as in DEV=CPU:LLVM. Unset DEV to let it choose, or set DEV=CPU."
        )


DEVICE = re.compile(r"(?:[^+;]*\+)?([^:+;]*)(?::[^:+;]*){0,2}")
"""One device of DEV: its interface, its name, its renderer and architecture."""
STORES = {"DISK", "NPY", "TINYFS", "RDMA"}
"""Its modules for what holds numbers and computes nothing."""
