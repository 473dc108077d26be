"""Signals while a command is under way: the first lets it end well, the second ends it at once."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NoReturn

from tinygpt.cli.console import program_name
from tinygpt.machine.ranks.launcher import end_at_once
from tinygpt.runs.interrupts import SAVING, STOPPING, Stopper, receiving


@dataclass(frozen=True)
class Words:
    """What a signal is answered with on stderr."""

    stopping: str = "stopping after this step"
    stopped: str = "the last checkpoint is as it was"


TRAINING = Words()


@contextlib.contextmanager
def run_signals(
    stop: Callable[[], None],
    save: Callable[[], None] | None,
    notice: Callable[[str], None],
    words: Words = TRAINING,
) -> Iterator[list[signal.Signals]]:
    """The first signal that ends programs calls ``stop``, the second ends this one at once.

    SIGUSR1 calls ``save``, if there is one. Yields the list of the stopping signals that arrived;
    the exit code of a program that was stopped is 128 and the number of the first. A signal that is
    ignored, as nohup does with SIGHUP, stays ignored. Outside the main thread nothing is changed.
    """
    terminals = [fd for fd in (1, 2) if os.isatty(fd)]

    def first(number: int) -> None:
        if signal.Signals(number).name == "SIGHUP":
            _silence(terminals)  # nobody is there any more, and writing would fail
        stop()

    def tell(message: str) -> None:
        notice(f"{program_name()}: {message}")

    def again(number: int) -> None:
        _quit(number, terminals, words)

    stopper = Stopper(first, again, save, tell, words.stopping)
    wanted = (*STOPPING, *(SAVING if save is not None else ()))
    heard = [number for number in wanted if signal.getsignal(number) is not signal.SIG_IGN]
    with receiving(heard, stopper.receive):
        yield stopper.received


def _silence(terminals: list[int]) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    for fd in terminals:
        os.dup2(null, fd)
    os.close(null)


def _quit(number: int, terminals: list[int], words: Words) -> NoReturn:
    """Not even ``finally`` is waited for: what a crash at any instant leaves is whole."""
    with contextlib.suppress(OSError):
        if 2 in terminals:
            os.write(2, b"\x1b[?25h\r\n")  # the live view has hidden the cursor
        message = f"{program_name()}: stopped at once; {words.stopped}\n"
        os.write(2, message.encode())
    end_at_once(128 + number)
