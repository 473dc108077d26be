"""``tinygpt runs``: the runs of a folder as a table, the newest first."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from tinygpt.cli.console import aligned, command, say, show_json
from tinygpt.cli.flags import Switch
from tinygpt.cli.newest import RUNS
from tinygpt.cli.options import run_tables
from tinygpt.errors import TinyGPTError, UsageError
from tinygpt.files.disk import size
from tinygpt.runs.folder import runs_in
from tinygpt.runs.lock import holder
from tinygpt.runs.record import Record

TITLES = (
    "run",
    "steps",
    "train loss",
    "val loss",
    "best",
    "bits/byte",
    "at step",
    "changed",
    "size",
)
LOSSES = ("train_loss", "val_loss", "best_val_loss", "best_bits_per_byte")


def runs(*folders: Path, json: Switch = False) -> None:
    """List the runs of a folder: steps, losses, the best, when each changed last, its size.

    Parameters
    ----------
    folders
        Folders that hold runs. [default: runs]
    json
        Print the table as JSON.
    """
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(f"{folder} is no folder. Give one that holds runs.")
    places = folders or (RUNS,)
    found = [_figures(run, when) for place in places for when, run in runs_in(place)]
    if json:
        show_json(found)
    elif found:
        rows = [_cells(each) for each in found]
        print(aligned([TITLES, *rows], right=range(1, len(TITLES) - 2)))
    else:
        where = ", ".join(map(str, places))
        say(f"There is no run in {where}. To train one: {command('train', 'TEXT.txt')}")


def _figures(run: Path, when: float) -> dict[str, Any]:
    """What there is to say of a run; ``trouble`` where a file of it cannot be read."""
    figures: dict[str, Any] = {"run": str(run), "changed": when, "training": False}
    try:
        figures["bytes"] = sum(path.lstat().st_size for path in run.iterdir())
        figures["training"] = holder(run) is not None
        figures["max_iters"] = run_tables(run).get("train", {}).get("max_iters")
        figures |= Record.read(run).figures()
        figures["best_val_loss"] = figures.pop("best_loss")
    except TinyGPTError as error:
        figures["trouble"] = str(error)
    except OSError as error:
        figures["trouble"] = f"{error.strerror}."
    return figures


def _cells(run: dict[str, Any]) -> tuple[str, ...]:
    if trouble := run.get("trouble"):
        return (run["run"], *[""] * (len(TITLES) - 2), trouble)
    most, step = run["max_iters"], run["best_step"]
    losses = (run[name] for name in LOSSES)
    changed = f"{datetime.fromtimestamp(run['changed']):%Y-%m-%d %H:%M}"
    return (
        run["run"],
        f"{run['steps']:,}" + (f" of {most:,}" if isinstance(most, int) else ""),
        *("-" if loss is None else f"{loss:.4f}" for loss in losses),
        "-" if step is None else f"{step:,}",
        "training now" if run["training"] else changed,
        size(run["bytes"]),
    )
