"""Backward passes that end with the function that was captured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

open_gradients: ContextVar[list[Callable[[], None]] | None] = ContextVar("open", default=None)
"""What drops the backward passes of the innermost ``all_gradients_taken`` in this thread."""


@contextmanager
def all_gradients_taken() -> Iterator[None]:
    """What is computed in this block is differentiated in this block, or never.

    The backward passes drop at its end what they hold. A captured jit keeps its kernels, they keep
    their backward passes, and memory that a Tensor has is not used for anything else: an evaluation
    took as much of it as a training step.
    """
    before, gradients = open_gradients.get(), list[Callable[[], None]]()
    open_gradients.set(gradients)
    try:
        yield
    finally:
        open_gradients.set(before)
        for drop in gradients:
            drop()
