"""A command that several processes run as one: mpiexec -n 4 tinygpt train …"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import ParamSpec

from tinygpt.machine.ranks.alone import Alone
from tinygpt.machine.ranks.join import join

P = ParamSpec("P")
_PRESENT: ContextVar[Alone] = ContextVar("ranks")


def in_ranks(verb: Callable[P, int]) -> Callable[P, int]:
    """The verb, for all processes that a launcher has started: the first one shows and writes.

    Raises what ``world.join`` raises, before anything else. An error of one process ends all.
    """

    @functools.wraps(verb)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        ranks = join()
        token = _PRESENT.set(ranks)
        try:
            with _quiet(not ranks.first), ranks.together():
                return ranks.leave(verb(*args, **kwargs))
        finally:
            _PRESENT.reset(token)

    return run


def present() -> Alone:
    """The ranks that run this command."""
    return _PRESENT.get()


@contextlib.contextmanager
def _quiet(quiet: bool) -> Iterator[None]:
    """Show nothing, if ``quiet``."""
    with contextlib.ExitStack() as stack:
        if quiet:
            null = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123
            stack.enter_context(contextlib.redirect_stdout(null))
            stack.enter_context(contextlib.redirect_stderr(null))
        yield
