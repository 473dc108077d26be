"""Asking a training to save now or to stop: that of this process, or one by its folder's lock."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from tinygpt.errors import UsageError
from tinygpt.runs.lock import Holder, holder


class Steering(Protocol):
    """What can be asked of a run that is training. Raises UsageError where it cannot."""

    def save(self) -> None:
        """A checkpoint after the step in progress."""

    def stop(self) -> None:
        """An end after the step in progress, with a checkpoint."""


class Here:
    """A run that is trained by this process."""

    def __init__(self, save: Callable[[], None], stop: Callable[[], None]) -> None:
        self._save, self._stop = save, stop
        self.stopped = False
        """Whether somebody asked for the end."""

    def save(self) -> None:
        self._save()

    def stop(self) -> None:
        self.stopped = True
        self._stop()


class ByLock:
    """A run that another process of this machine trains: it is sent a signal.

    A lock file may come from anybody and name any process. So nothing is sent unless the file
    knows when that process was born and the process itself says that it hears the signal, which
    would otherwise kill it. A second request to stop is not passed on: it would end the training at
    once, without a checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._told_to_stop: Holder | None = None

    def save(self) -> None:
        self._send("SIGUSR1")

    def stop(self) -> None:
        if (who := holder(self.folder)) is not None and who == self._told_to_stop:
            raise UsageError("It was asked to stop already, and will when its step is done.")
        self._told_to_stop = self._send("SIGTERM")

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
    """Whether a process handles a signal, and so is not killed by it, by the kernel's own word."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    caught = next((line for line in lines.splitlines() if line.startswith("SigCgt:")), ":0")
    return bool(int(caught.partition(":")[2], 16) >> (number - 1) & 1)
