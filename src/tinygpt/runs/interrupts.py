"""Signals during work that may be ended only between two of its steps.

The main thread blocks the signals, and a thread of their own receives them. So they interrupt no
step and no save; a compiler that is running inherits the block and ends its work although a
terminal's Ctrl-C goes to every process in the foreground; and the second signal ends the program at
once even while a kernel keeps the main thread busy.

The system may deliver a signal to any thread that does not block it, such as one that a library
has started, and Python runs its handler in the main thread when that is free again. But the number
of the signal is written to a pipe as it arrives (``signal.set_wakeup_fd``), which the thread reads.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C; kill, Slurm and containers; a terminal that was closed."""
SAVING = (signal.SIGUSR1,)
"""What Slurm sends ahead of time if asked to: ``#SBATCH --signal=USR1@120``."""
ECHO = 0.2
"""Seconds after a signal in which a second one counts as its echo: some wrappers pass it on."""
END = b"\0"
"""What ends the thread for signals when it is read from the pipe; no signal has the number 0."""


@dataclass
class Stopper:
    """What the signals of a run do: the first stops it, the next ends it at once, some save.

    All functions are called in the thread for signals.
    """

    stop: Callable[[int], None]
    """Gets the signal's number, as ``again`` does."""
    again: Callable[[int], None]
    save: Callable[[], None] | None
    """None where there is nothing to save."""
    tell: Callable[[str], None]
    """Shows a message to the user."""
    stopping: str
    """What the first signal is answered with."""
    received: list[signal.Signals] = field(default_factory=list)
    """The stopping signal that arrived first, once there is one."""
    _first: float = 0.0

    def receive(self, number: int) -> None:
        if self.save is not None and number in SAVING:
            self.save()
            self._tell(f"{signal.Signals(number).name}: a checkpoint after this step")
        elif not self.received:
            self.received.append(signal.Signals(number))
            self.stop(number)
            self._tell(f"{self.stopping}; once more stops at once")
            self._first = time.monotonic()  # after the message: only then can it be obeyed
        elif time.monotonic() - self._first > ECHO:
            self.again(number)

    def _tell(self, message: str) -> None:
        with contextlib.suppress(Exception):  # nothing may end the thread for signals
            self.tell(message)


@contextlib.contextmanager
def receiving(numbers: Iterable[signal.Signals], receive: Callable[[int], None]) -> Iterator[None]:
    """Pass these signals to ``receive`` during the block; their handlers are restored then.

    Outside the main thread, which alone gets signals, nothing is changed.
    """
    here = threading.current_thread() is threading.main_thread()
    wanted = list(numbers) if here else []

    def ignore(number: int, frame: FrameType | None) -> None:
        """The thread for signals has read the number from the pipe."""

    before = {number: signal.signal(number, ignore) for number in wanted}
    try:
        with _own_thread(wanted, receive) if wanted else contextlib.nullcontext():
            yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, signal.SIG_DFL if earlier is None else earlier)


@contextlib.contextmanager
def _own_thread(numbers: list[signal.Signals], receive: Callable[[int], None]) -> Iterator[None]:
    """Receive the signals in a thread; this thread and its child processes block them meanwhile."""
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


@contextlib.contextmanager
def held_back(
    stop: Callable[[], None], save: Callable[[], None], tell: Callable[[str], None]
) -> Iterator[list[signal.Signals]]:
    """Make Ctrl-C and its like call ``stop``, and raise them again when the block is over.

    For a Python program: at the end of the block comes KeyboardInterrupt, or what an
    ``asyncio.Runner`` makes of it, and SIGTERM and SIGHUP end the process. A second signal is a
    KeyboardInterrupt at once. A signal with a handler of the program's own keeps it, except Ctrl-C.
    Outside the main thread, which alone gets signals, nothing is changed. Yields a list for the
    signal that arrived, which is not raised again if the block ends with an error.
    """
    stopper = Stopper(lambda _: stop(), interrupt, save, tell, "stopping after this step")
    with receiving(filter(_is_free, (*STOPPING, *SAVING)), stopper.receive):
        yield stopper.received
    for number in stopper.received:
        signal.raise_signal(number)


def _is_free(number: signal.Signals) -> bool:
    """Whether a program leaves a signal to its default, or it is Ctrl-C and not ignored."""
    handler = signal.getsignal(number)
    return handler is signal.SIG_DFL or (number is signal.SIGINT and callable(handler))


def interrupt(number: int) -> None:
    """A KeyboardInterrupt in the main thread, when it is back in Python."""
    main = threading.main_thread()
    if threading.current_thread() is main:
        raise KeyboardInterrupt
    raising = ctypes.pythonapi.PyThreadState_SetAsyncExc
    raising(ctypes.c_ulong(main.ident or 0), ctypes.py_object(KeyboardInterrupt))
