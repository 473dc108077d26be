"""``tinygpt plot``: the loss curves of runs, in the terminal or as a picture."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from tinygpt.cli.console import say
from tinygpt.cli.flags import Switch
from tinygpt.cli.newest import newest_runs
from tinygpt.runs.record import Axis, Unit


def plot(
    *runs: Path,
    x: Axis = "step",
    y: Unit = "loss",
    out: Path | None = None,
    terminal: Switch = False,
) -> None:
    """Draw the loss curves of runs, in the terminal or as a PNG or SVG.

    Parameters
    ----------
    runs
        Run folders; several are drawn over each other. [default: the newest run in runs/]
    x
        What they are drawn over: step, tokens (that were trained on) or time (of training).
    y
        The unit of the losses: loss, in nats per token, or bits, per byte of text, which compares
        runs with different tokenizers.
    out
        File to draw into, .png or .svg.
    terminal
        Draw in the terminal, also with --out.
    """
    from tinygpt.runs.plots import save_plot

    runs = runs or tuple(newest_runs(1, checkpoints=False))
    if out is not None:
        say(f"drew {save_plot(runs, out, x, y)}")
    if terminal or out is None:
        print(in_terminal(runs, 32, x, y))


def in_terminal(runs: Sequence[Path], most_lines: int, x: Axis = "step", y: Unit = "loss") -> str:
    """The curves as text that fits the terminal. Raises MissingExtraError without plotext."""
    from tinygpt.runs.plots import terminal_plot

    size = shutil.get_terminal_size((100, 30))
    height = max(min(size.lines - 2, most_lines), 12)
    return terminal_plot(runs, min(size.columns, 140), height, sys.stdout.isatty(), x, y)
