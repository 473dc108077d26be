"""Asks a training to save or to stop: the one in this process, or the holder of a folder's lock."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from tinygpt.errors import UsageError
from tinygpt.runs.lock import Holder, holder


class Steering(Protocol):
    """Controls a run that is training. Both methods raise UsageError where that is impossible."""

    def save(self) -> None:
        """Write a checkpoint after the step in progress."""

    def stop(self) -> None:
        """End after the step in progress, with a checkpoint."""


class Here:
    """Controls the training of this process."""

    def __init__(self, save: Callable[[], None], stop: Callable[[], None]) -> None:
        self._save, self._stop = save, stop
        self.stopped = False
        """Whether a page asked for the end."""

    def save(self) -> None:
        self._save()

    def stop(self) -> None:
        self.stopped = True
        self._stop()


class ByLock:
    """Controls a training in another process of this machine, by signals.

    A lock file may come from anybody and name any process. So a signal is sent only if the file has
    the start time of that process, and if the process handles the signal, which would otherwise
    kill it. A second request to stop sends nothing: a second SIGTERM would end the training at
    once, without a checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stopping: Holder | None = None

    def save(self) -> None:
        self._send("SIGUSR1")

    def stop(self) -> None:
        if (who := holder(self.folder)) is not None and who == self._stopping:
            raise UsageError("It was asked to stop already, and will when its step is done.")
        self._stopping = self._send("SIGTERM")

    def _send(self, name: str) -> Holder:
        who = holder(self.folder)
        if who is None:
            raise UsageError("Nobody trains this run at the moment.")
        by_hand = f"In a shell on {who.host}: kill -{name.removeprefix('SIG')} {who.pid}"
        if not who.is_here:
            raise UsageError(f"The run is trained on another machine. {by_hand}")
        if who.birth is None or not hasattr(os, "pidfd_open"):
            raise UsageError(
                f"This system cannot tell whether that process is the right one. {by_hand}"
            )
        number = signal.Signals[name]
        try:
            process = os.pidfd_open(who.pid)
        except OSError:
            raise UsageError("Nobody trains this run any more.") from None
        try:
            if not who.may_be_alive():  # by its birth: the number may be another process's by now
                raise UsageError("Nobody trains this run any more.")
            if not hears(who.pid, number):
                raise UsageError(
                    "The process that trains it does not listen to requests: only `tinygpt train` "
                    "does, once its first step has begun."
                )
            signal.pidfd_send_signal(process, number)
        except PermissionError:
            raise UsageError(f"That process belongs to somebody else. {by_hand}") from None
        finally:
            os.close(process)
        return who


def hears(pid: int, number: signal.Signals) -> bool:
    """Whether a process handles a signal, and so is not killed by it, according to /proc."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    caught = next((line for line in lines.splitlines() if line.startswith("SigCgt:")), ":0")
    return bool(int(caught.partition(":")[2], 16) >> (number - 1) & 1)
