"""Signals while a run is on: they set a flag, and the run sees to it when its step is done.

The main thread blocks them, and a thread of their own hears of them. So they interrupt no step and
no save, a compiler that is running inherits the block and ends its work although a terminal's
Ctrl-C goes to every process in front of it, and the second signal is obeyed at once even while a
kernel keeps the main thread busy.

The system may deliver a signal to any thread that does not block it, such as one that a library
has started, and Python runs its handler in the main thread when that is free again. But the number
of the signal is written to a pipe as it arrives (``signal.set_wakeup_fd``), which the thread reads.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn

from tinygpt.cli.console import program_name

STOPPING = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
"""Ctrl-C; kill, Slurm and containers; a terminal that was closed; Ctrl-Break on Windows."""
SAVING = ("SIGUSR1",)
"""What Slurm sends ahead of time if asked to: ``#SBATCH --signal=USR1@120``."""
ECHO = 0.2
"""Seconds after the answer to a signal in which it is taken for the same: wrappers pass it on."""


END = b"\0"
"""What ends the thread for signals; no signal has the number 0."""


@dataclass(frozen=True)
class Words:
    """What is said to whoever sent a signal."""

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
    if threading.current_thread() is not threading.main_thread():
        yield []
        return
    listener = _Listener(stop, save, notice, words)
    wanted = (*STOPPING, *(SAVING if save is not None else ()))
    numbers = [number for number in _known(*wanted) if not _ignored(number)]
    threaded = bool(numbers) and sys.platform != "win32"
    handler = _heard if threaded else listener.handle
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        with _own_thread(numbers, listener.receive) if threaded else contextlib.nullcontext():
            yield listener.received
    finally:
        for number, earlier in before.items():
            signal.signal(number, signal.SIG_DFL if earlier is None else earlier)


def _heard(number: int, frame: FrameType | None) -> None:
    """The handler of a signal that the thread for signals has read from the pipe."""


class _Listener:
    def __init__(
        self,
        stop: Callable[[], None],
        save: Callable[[], None] | None,
        notice: Callable[[str], None],
        words: Words,
    ) -> None:
        self.stop, self.save, self.notice, self.words = stop, save, notice, words
        self.received: list[signal.Signals] = []
        self.terminals = [fd for fd in (1, 2) if _is_terminal(fd)]
        self._first = 0.0
        self._saving = _known(*SAVING)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Where there is no blocking: the main thread receives them."""
        self.receive(number)

    def receive(self, number: int) -> None:
        name = signal.Signals(number).name
        if self.save is not None and number in self._saving:
            self.save()
            self._say(f"{name}: a checkpoint after this step")
            return
        if not self.received:
            self.received.append(signal.Signals(number))
            if name == "SIGHUP":
                _silence(self.terminals)  # nobody is there any more, and writing would fail
            self.stop()
            self._say(f"{self.words.stopping}; once more stops at once")
            self._first = time.monotonic()  # after the message: only then can it be obeyed
        elif time.monotonic() - self._first > ECHO:
            _quit(number, self.terminals, self.words)

    def _say(self, message: str) -> None:
        with contextlib.suppress(Exception):  # nothing may end the thread that listens
            self.notice(f"{program_name()}: {message}")


@contextlib.contextmanager
def _own_thread(numbers: list[signal.Signals], receive: Callable[[int], None]) -> Iterator[None]:
    """Let a thread hear of the signals, which this one and its children do not get meanwhile."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    earlier = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def listen() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)  # one thread at least gets them
        while (number := os.read(reading, 1)) != END:
            if number[0] in numbers:
                receive(number[0])
            elif earlier >= 0:
                os.write(earlier, number)

    thread = threading.Thread(target=listen, daemon=True, name="tinygpt-signals")
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    thread.start()
    try:
        yield
    finally:
        os.write(writing, END)
        thread.join()
        signal.set_wakeup_fd(earlier)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.close(reading)
        os.close(writing)


def _known(*names: str) -> list[signal.Signals]:
    """Those that this system has."""
    return [signal.Signals[name] for name in names if hasattr(signal, name)]


def _ignored(number: signal.Signals) -> bool:
    return signal.getsignal(number) is signal.SIG_IGN


def _is_terminal(fd: int) -> bool:
    try:
        return os.isatty(fd)
    except OSError:
        return False


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
    os._exit(128 + number)
