"""A TinyJit that captures at its first call."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar

from tinygrad import Context, Tensor, TinyJit

from tinygpt.machine.gradients import all_gradients_taken

T = TypeVar("T", bound="Tensor | tuple[Tensor, ...]")


def jit(function: Callable[..., T], short: bool = False) -> Callable[..., T]:
    """``function``, captured when it is first called, and replayed from then on.

    TinyJit itself calls a function once before, for the sake of those that make their state when
    they are first called. Ours are handed all they need, realized. For them that call would only
    lower and plan everything twice, and keep the memory of a step that nobody planned: 3 GB for
    GPT-2. The result is the same at each call, with new values.

    A ``short`` function is replayed in one piece; of others tinygrad makes batches of kernels,
    between which Python can look for signals.
    """

    def traced(*given: Any) -> T:
        with all_gradients_taken():
            return function(*given)

    jitted: Any = TinyJit(traced)
    jitted.cnt = 1  # calls so far; the second one is captured
    if not short:
        captured: Callable[..., T] = jitted
        return captured

    def call(*args: Any) -> T:
        with Context(JIT_BATCH_SIZE=0) if jitted.captured is None else nullcontext():
            result: T = jitted(*args)
        return result

    return call
