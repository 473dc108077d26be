"""How much a loader may take: memory in proportion to the file, and no more than a second."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
import tracemalloc
from collections.abc import Iterator
from types import FrameType

MEMORY_PER_BYTE = 64
"""A JSON text of empty objects becomes about thirty times as large in Python."""
MEMORY = 8 << 20
"""Bytes that a loader may take for any file: blocks that are read, tables of a fixed size."""
SECONDS = 1.0
"""Processor time; the clock on the wall would blame a loader for other programs."""


class Finding(BaseException):
    """What should not happen. No ``except Exception`` in a loader can hide it."""


@contextlib.contextmanager
def limited(size: int, what: str) -> Iterator[None]:
    """A Finding if the block takes more memory or time than a file of ``size`` bytes is worth."""
    tracing = tracemalloc.is_tracing()
    if not tracing:
        tracemalloc.start()
    tracemalloc.reset_peak()
    before, start = tracemalloc.get_traced_memory()[0], time.process_time()
    try:
        with _alarm(what):
            yield
        taken, peak = time.process_time() - start, tracemalloc.get_traced_memory()[1] - before
    finally:
        if not tracing:
            tracemalloc.stop()
    if peak > MEMORY + MEMORY_PER_BYTE * size:
        raise Finding(f"{what}: {peak:,} bytes of memory for a file of {size:,} bytes")
    if taken > SECONDS:
        raise Finding(f"{what}: {taken:.1f} s for a file of {size:,} bytes")


@contextlib.contextmanager
def _alarm(what: str) -> Iterator[None]:
    """Interrupts Python code that goes on for ever. What hangs in C, whoever waits has to end."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise Finding(f"{what}: hangs")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGVTALRM, ring)
    signal.setitimer(signal.ITIMER_VIRTUAL, 10 * SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
