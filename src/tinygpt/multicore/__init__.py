"""tinygrad's CPU kernels on every core.

tinygrad 0.14 splits a large kernel into pieces, one for each core, and then runs the pieces one
after another. ``install`` hands it a pool of threads that runs them side by side, through the two
places where tinygrad lets a device say how kernels are run: ``graph``, for what a ``TinyJit`` has
captured, and ``runtime_t``, for a kernel launched by itself. The results are the same, bit for
bit: the same pieces are run, only elsewhere. ``docs/multicore.md`` tells how, and how fast.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
import warnings
from functools import cache, partial
from typing import TYPE_CHECKING

from tinygpt.errors import UsageError
from tinygpt.runtime import cores

if TYPE_CHECKING:
    from tinygpt.multicore.pool import Pool

TINYGRAD = "0.14."
"""The versions of tinygrad that this was written for and is tested with."""

MAX_THREADS = 256
