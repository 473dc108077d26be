"""Signals while something is under way that may be ended only between two steps of it.

The main thread blocks them, and a thread of their own waits for them. So they interrupt no step and
no save, a compiler that is running inherits the block and ends its work although a terminal's
Ctrl-C goes to every process in front of it, and the second signal is obeyed at once even while a
kernel keeps the main thread busy.
"""

from __future__ import annotations

import _thread
import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType

STOPPING = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
"""Ctrl-C; kill, Slurm and containers; a terminal that was closed; Ctrl-Break on Windows."""
SAVING = ("SIGUSR1",)
"""What Slurm sends ahead of time if asked to: ``#SBATCH --signal=USR1@120``."""
ECHO = 0.2
"""Seconds within which a second signal is the first one once more: wrappers pass them on."""


class Stopper:
    """What the signals of a run do: the first stops it, the next ends it at once, some save.

    ``stop`` and ``again`` get the signal's number, ``tell`` a line for whoever sent it. ``save`` is
    None where there is nothing to save. Called in a thread of its own, or in a signal handler.
    """

    def __init__(
        self,
        stop: Callable[[int], None],
        again: Callable[[int], None],
        save: Callable[[], None] | None,
        tell: Callable[[str], None],
        stopping: str,
    ) -> None:
        self.stop, self.again, self.save, self.tell = stop, again, save, tell
        self.stopping = stopping
        self.received: list[signal.Signals] = []
        """The stopping signals that arrived first and were obeyed."""
        self._first = 0.0
        self._saving = known(*SAVING)

    def receive(self, number: int) -> None:
        if self.save is not None and number in self._saving:
            self.save()
            self._tell(f"{signal.Signals(number).name}: a checkpoint after this step")
        elif not self.received:
            self._first = time.monotonic()
            self.received.append(signal.Signals(number))
            self.stop(number)
            self._tell(f"{self.stopping}; once more stops at once")
        elif time.monotonic() - self._first > ECHO:
            self.again(number)

    def _tell(self, message: str) -> None:
        with contextlib.suppress(Exception):  # nothing may end the thread that listens
            self.tell(message)


@contextlib.contextmanager
def receiving(numbers: Iterable[signal.Signals], receive: Callable[[int], None]) -> Iterator[None]:
    """Hand these signals to ``receive`` instead of what they do otherwise, which is put back."""
    wanted = list(numbers)

    def handle(number: int, frame: FrameType | None) -> None:
        """For what reaches a thread that blocks nothing, and where there is no blocking."""
        receive(number)

    before = {number: signal.signal(number, handle) for number in wanted}
    try:
        with _own_thread(wanted, receive):
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextlib.contextmanager
def _own_thread(numbers: list[signal.Signals], receive: Callable[[int], None]) -> Iterator[None]:
    """Let a thread wait for the signals, which this one and its children do not get meanwhile."""
    if not numbers or sys.platform == "win32":
        yield
        return
    over = threading.Event()

    def wait() -> None:
        while True:
            number = signal.sigwait(numbers)
            if over.is_set():
                return
            receive(number)

    thread = threading.Thread(target=wait, daemon=True, name="tinygpt-signals")
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    thread.start()
    try:
        yield
    finally:
        over.set()
        if thread.ident is not None:
            signal.pthread_kill(thread.ident, numbers[0])  # wakes it, and reaches nobody else
        thread.join()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextlib.contextmanager
def held_back(
    stop: Callable[[], None], save: Callable[[], None], tell: Callable[[str], None]
) -> Iterator[list[signal.Signals]]:
    """Let Ctrl-C and its like call ``stop``, and do what they do otherwise when the block is over.

    For a Python program: KeyboardInterrupt comes at the end of the block, or from where an
    ``asyncio.Runner`` has it come, and SIGTERM and SIGHUP end the process then. A second signal is
    a KeyboardInterrupt at once. A signal that the program handles itself stays its own, but for
    Ctrl-C. Outside the main thread, which alone gets signals, nothing is changed. Yields a list for
    the signal that arrived, which is not passed on if the block ends with an error.
    """
    if threading.current_thread() is not threading.main_thread():
        yield []
        return
    stopper = Stopper(lambda _: stop(), _interrupt, save, tell, "stopping after this step")
    with receiving(filter(_is_free, known(*STOPPING, *SAVING)), stopper.receive):
        yield stopper.received
    for number in stopper.received:
        signal.raise_signal(number)


def _is_free(number: signal.Signals) -> bool:
    """Whether a program leaves a signal to its default, or it is Ctrl-C and not ignored."""
    handler = signal.getsignal(number)
    return handler is signal.SIG_DFL or (number is signal.SIGINT and callable(handler))


def _interrupt(number: int) -> None:
    """A KeyboardInterrupt in the main thread, when it is back in Python."""
    if threading.current_thread() is threading.main_thread():
        raise KeyboardInterrupt
    _thread.interrupt_main(signal.Signals(number))


def known(*names: str) -> list[signal.Signals]:
    """Those that this system has."""
    return [signal.Signals[name] for name in names if hasattr(signal, name)]
