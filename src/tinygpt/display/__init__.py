"""Training as it happens: a live view in a terminal, plain lines anywhere else.

Both consume the steps of a run and change nothing about it. Whatever a model writes is shown as
plain text: it cannot move the cursor, colour the screen or hide behind direction marks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import TracebackType
from typing import IO, TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    from tinygpt.config import TrainConfig
    from tinygpt.runs import TrainingRun
    from tinygpt.train import Step


class Display(Protocol):
    """Shows the steps of a run; a context manager, so that the terminal is always put back."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def update(self, step: Step) -> None:
        """Take note of one optimizer step."""

    def notice(self, message: str) -> None:
        """Say something at once. Safe in a signal handler."""


def watch(run: TrainingRun, *, show: bool = True) -> Iterator[Step]:
    """The steps of ``run``, shown on stderr as they pass; with ``show=False`` just the steps."""
    if not show:
        yield from run
        return
    with make_display(run.config, start=run.iter_num) as display:
        for step in run:
            display.update(step)
            yield step


def make_display(
    config: TrainConfig, *, start: int = 0, title: str = "", stream: IO[str] | None = None
) -> Display:
    """The display that suits ``stream``, by default stderr: live in a terminal, else lines.

    ``start`` is the number of steps done before, in a run that is resumed.
    """
    from rich.console import Console

    stream = stream or sys.stderr
    console = Console(file=stream, highlight=False)
    if console.is_terminal and not console.is_dumb_terminal:
        from tinygpt.display.live import LiveDisplay

        return LiveDisplay(config, start=start, title=title, console=console)
    from tinygpt.display.plain import PlainDisplay

    return PlainDisplay(config, stream=stream)
