"""``tinygpt plot``: the loss curves of runs, in the terminal or as a picture."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from tinygpt.cli.console import say
from tinygpt.cli.flags import Switch
from tinygpt.cli.newest import newest_runs


def plot(
    *runs: Path,
    out: Path | None = None,
    terminal: Switch = False,
) -> None:
    """Draw the loss curves of runs, in the terminal or as a PNG or SVG.

    Parameters
    ----------
    runs
        Run folders; several are drawn over each other. [default: the newest run in runs/]
    out
        File to draw into, .png or .svg.
    terminal
        Draw in the terminal, also with --out.
    """
    from tinygpt.runs.plots import save_plot, terminal_plot

    runs = runs or tuple(newest_runs(1, checkpoints=False))
    if out is not None:
        say(f"drew {save_plot(runs, out)}")
    if terminal or out is None:
        size = shutil.get_terminal_size((100, 30))
        height = max(min(size.lines - 2, 32), 12)
        print(terminal_plot(runs, min(size.columns, 140), height, color=sys.stdout.isatty()))
