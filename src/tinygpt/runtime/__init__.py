"""The machine: a compiler for tinygrad, cache folders, memory and cores, and ``doctor``.

tinygrad 0.14 compiles its CPU kernels with an executable called clang, or the one that ``CC``
names, and remembers every environment variable that it has read. So ``prepare`` runs when tinygpt
is imported, before tinygrad is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tinygpt.runtime.children import python_module
from tinygpt.runtime.device import (
    bundled_zig,
    compiler,
    prepare,
    require_device,
)
from tinygpt.runtime.folders import cache_dir, keep_limit, token_folders
from tinygpt.runtime.machine import (
    available_memory,
    cores,
    memory,
    peak_memory,
    total_memory,
)

if TYPE_CHECKING:
    from tinygpt.runtime.checks import Check

__all__ = [
    "available_memory",
    "bundled_zig",
    "cache_dir",
    "clear_caches",
    "compiler",
    "cores",
    "doctor",
    "keep_limit",
    "memory",
    "peak_memory",
    "prepare",
    "python_module",
    "require_device",
    "time_devices",
    "token_folders",
    "total_memory",
]


def doctor() -> list[Check]:
    """Look at everything tinygpt depends on. Never raises, however broken the machine is."""
    from tinygpt.runtime import checks  # late: it reads package metadata, which is slow to import

    return checks.examine()


def time_devices() -> list[Check]:
    """Take a small step on every device, which may take minutes; nothing where there is one."""
    from tinygpt.runtime import checks

    return list(checks.time_devices())


def clear_caches() -> tuple[int, list[str]]:
    """Delete kernels and token files; -> the bytes of them, and what could not be deleted."""
    from tinygpt.runtime import checks

    return checks.clear_caches()
