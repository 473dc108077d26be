"""Backward passes that end with the function that was captured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol


class Gradient(Protocol):
    """What a kernel gives tinygrad as its gradient; its backward pass can be dropped."""

    def drop(self) -> None: ...


open_gradients: ContextVar[list[Gradient] | None] = ContextVar("open_gradients", default=None)
"""Those of the innermost block of ``all_gradients_taken`` in this thread."""


@contextmanager
def all_gradients_taken() -> Iterator[None]:
    """What is computed in this block is differentiated in this block, or never.

    The backward passes drop at its end what they hold. A captured jit keeps its kernels, they keep
    their backward passes, and memory that a Tensor has is not used for anything else: an evaluation
    took as much of it as a training step.
    """
    before, gradients = open_gradients.get(), list[Gradient]()
    open_gradients.set(gradients)
    try:
        yield
    finally:
        open_gradients.set(before)
        for gradient in gradients:
            gradient.drop()
