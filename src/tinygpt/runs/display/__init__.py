"""Training as it happens: a live view in a terminal, plain lines anywhere else.

Both show the steps of a run and change nothing about it, not even when their stream fails (see
``Forgiving``). What a model writes is shown as plain text: it cannot move the cursor, colour the
screen or hide behind direction marks.
"""

from __future__ import annotations

import sys
from typing import IO, TYPE_CHECKING, Protocol, Self

from tinygpt.runs.display.forgiving import Forgiving
from tinygpt.runs.display.forgiving import hung_up as hung_up
from tinygpt.runs.display.text import printable
from tinygpt.runs.interrupts import held_back

if TYPE_CHECKING:
    from tinygpt.config import TrainConfig
    from tinygpt.runs.run import TrainingRun
    from tinygpt.training.loop import Step


class Display(Protocol):
    """Shows the steps of a run; a context manager, so that the terminal is always put back."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def update(self, step: Step) -> None:
        """Show one optimizer step."""

    def notice(self, message: str) -> None:
        """Show a message at once. Safe in a signal handler."""


def follow(run: TrainingRun, *, show: bool = True) -> None:
    """Train to the end, shown on stderr, or until a signal.

    A signal ends the run after the step in progress and its checkpoint; then it has its usual
    effect, so Ctrl-C raises KeyboardInterrupt.
    """
    display = make_display(run.config, start=run.iter_num) if show else Hidden()
    with held_back(run.stop, run.save_soon, display.notice) as received:
        try:
            with display:
                for step in run:
                    display.update(step)
        finally:
            stopped = [_stopped(run)] if received and run.result.stopped else []
            for message in (*run.take_notices(), *stopped) if show else ():
                print(printable(message), file=Forgiving.of(sys.stderr), flush=True)


def _stopped(run: TrainingRun) -> str:
    kept = "no folder was given to keep it in"
    if run.folder is not None:
        kept = f"all of it kept in {run.folder}. To go on: train(..., resume=True)"
    return f"stopped at step {run.iter_num:,}, {kept}"


class Hidden:
    """Shows nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, step: Step) -> None:
        pass

    def notice(self, message: str) -> None:
        pass


def make_display(
    config: TrainConfig, *, start: int = 0, title: str = "", stream: IO[str] | None = None
) -> Display:
    """The display that suits ``stream``, by default stderr: live in a terminal, else lines.

    ``start`` is the number of steps done before, in a run that is resumed. Where a program has no
    stderr nothing is shown.
    """
    from rich.console import Console

    stream = Forgiving.of(sys.stderr if stream is None else stream)
    console = Console(file=stream, highlight=False)
    if console.is_terminal and not console.is_dumb_terminal:
        from tinygpt.runs.display.live import LiveDisplay

        return LiveDisplay(config, start=start, title=title, console=console)
    from tinygpt.runs.display.plain import PlainDisplay

    return PlainDisplay(config, stream=stream)
