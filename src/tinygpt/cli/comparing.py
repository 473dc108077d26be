"""``tinygpt compare``: runs side by side, from what lies in their folders."""

from __future__ import annotations

import math
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinygpt.cli.console import aligned, show_json
from tinygpt.cli.flags import Switch
from tinygpt.cli.newest import newest_runs
from tinygpt.cli.options import CONFIGS, Tables, run_tables
from tinygpt.config import GPTConfig
from tinygpt.errors import CheckpointError, MissingExtraError, UsageError
from tinygpt.runs import checkpoint
from tinygpt.runs.columns import Columns
from tinygpt.runs.display.text import duration, printable
from tinygpt.runs.folder import METRICS, SAMPLES, list_checkpoints, number_of, sample_of
from tinygpt.runs.history import read
from tinygpt.untrusted import brief

MOST_RUNS = 6
MISSING = "-"
TEXT = 1200
"""Characters of a sample that are printed."""

Settings = dict[str, Any]
Losses = dict[int, float]


@dataclass
class Run:
    """What a folder, or a checkpoint by itself, tells of a run."""

    path: Path
    settings: Settings
    """By table and field, such as model.n_layer; of a run without settings only its model's."""
    parameters: int
    step: int
    best: tuple[int | None, float] | None
    """Step and value of the lowest validation loss."""
    elapsed: float | None
    """Seconds of training."""
    train: Losses = field(default_factory=dict)
    val: Losses = field(default_factory=dict)
    speeds: list[float] = field(default_factory=list)
    samples: dict[int, str] = field(default_factory=dict)

    def figures(self) -> dict[str, float | int | None]:
        """What a run has come to. The speed is the median of its steps'."""
        last = max(self.train, default=None)
        return {
            "parameters": self.parameters,
            "steps": self.step,
            "best_loss": None if self.best is None else self.best[1],
            "best_step": None if self.best is None else self.best[0],
            "train_loss": None if last is None else self.train[last],
            "tokens_per_second": statistics.median(self.speeds) if self.speeds else None,
            "seconds": self.elapsed,
        }


def compare(*runs: Path, samples: int = 2, json: Switch = False) -> None:
    """Show runs side by side: settings that differ, figures, losses, samples.

    Parameters
    ----------
    runs
        Run folders, also of runs that are still being trained, or checkpoints. [default: the two
        newest in runs/]
    samples
        At how many steps that all runs have samples of to show them; the last step is one.
    json
        Print everything as JSON, with the samples of all such steps.
    """
    runs = runs or tuple(newest_runs(2, checkpoints=False))
    if not 2 <= len(runs) <= MOST_RUNS:
        raise UsageError(f"Give from 2 to {MOST_RUNS} runs to compare, and not {len(runs)}.")
    if samples < 0:
        raise UsageError(f"--samples {samples} must be at least 0.")
    found = [read_run(path) for path in runs]
    if json:
        show_json(_as_json(found))
        return
    names = [str(run.path) for run in found]
    differing = differences([run.settings for run in found])
    print("[settings]" if differing else "[settings]\nThey are the same.")
    if differing:
        shown = [(key, *map(_setting, values)) for key, values in differing.items()]
        print(aligned([("", *names), *shown]))
    print("\n[figures]")
    rows = {name: [run.figures()[name] for run in found] for name in found[0].figures()}
    cells = [(n.replace("_", " "), *(_figure(n, v) for v in row)) for n, row in rows.items()]
    print(aligned([("", *names), *cells], right=range(1, len(found) + 1)))
    print("\n[losses]")
    print(_curves(found))
    for step in _chosen(sorted(common(run.samples for run in found)), samples):
        print(f"\n[samples at step {step:,}]")
        _print_beside(names, [run.samples[step] for run in found])


# Reading ----------------------------------------------------------------------------------------


def read_run(path: Path) -> Run:
    """All that is there of a run, or of a checkpoint by itself.

    Raises UsageError if there is nothing at ``path``, and CheckpointError if it is no run.
    """
    if not path.exists():
        raise UsageError(f"There is no run at {path}. Give the folder that training wrote.")
    file = path if path.is_file() else next(reversed(list_checkpoints(path)), None)
    meta = None if file is None else checkpoint.read_meta(file)
    tables = run_tables(path)
    if meta is not None:
        train = {} if meta.train is None else {"train": meta.train.to_dict()}
        tables = {**train, "model": meta.model.to_dict(), **tables}
    if "model" not in tables:
        raise CheckpointError(
            f"{path} holds neither a checkpoint nor the settings of a run, so it is none."
        )
    progress = {} if meta is None else meta.progress
    loss = number_of(progress, "best_val_loss")
    columns = Columns.read(path / METRICS)
    return Run(
        path,
        _flat(tables),
        GPTConfig.from_dict(tables["model"]).num_params(),
        step=int(columns["iter"].max(initial=0 if meta is None else meta.iter_num)),
        best=columns.best() or (None if loss is None else (progress.get("best_iter"), loss)),
        elapsed=columns.last("elapsed") or number_of(progress, "elapsed"),
        train=dict(columns.points("train_loss")),
        val=dict(columns.points("val_loss")),
        speeds=[speed for _, speed in columns.points("tokens_per_second")],
        samples=dict(filter(None, map(sample_of, read(path / SAMPLES)))),
    )


def _flat(tables: Tables) -> Settings:
    """Every field of the tables that are there, with its default where it is not given."""
    return {
        f"{name}.{key}": value
        for name, config in CONFIGS.items()
        if name in tables
        for key, value in config.from_dict(tables[name]).to_dict().items()
    }


# Comparing --------------------------------------------------------------------------------------


def differences(settings: Sequence[Settings]) -> dict[str, list[Any]]:
    """The fields that are not the same in all, with the value of each; None where it is not known.

    >>> differences([{"model.n_layer": 4, "model.bias": True}, {"model.n_layer": 6}])
    {'model.n_layer': [4, 6], 'model.bias': [True, None]}
    """
    keys = dict.fromkeys(key for each in settings for key in each)
    values = {key: [each.get(key) for each in settings] for key in keys}
    return {key: row for key, row in values.items() if any(v != row[0] for v in row)}


def common(series: Any) -> set[int]:
    """The steps that all of some mappings from steps have."""
    first, *others = map(set, series)
    return first.intersection(*others)


def _chosen(steps: Sequence[int], most: int) -> list[int]:
    """At most so many of some steps, evenly spread up to the last."""
    if most <= 0 or not steps:
        return []
    count = min(most, len(steps))
    return [steps[(i + 1) * len(steps) // count - 1] for i in range(count)]


def loss_table(runs: Sequence[Run], most: int = 12) -> tuple[str, list[tuple[int, list[float]]]]:
    """(which loss, (step, each run's)) at steps that all have: of validation, or of training."""
    for name in ("val", "train"):
        series: list[Mapping[int, float]] = [getattr(run, name) for run in runs]
        if steps := sorted(common(series)):
            return name, [(step, [s[step] for s in series]) for step in _chosen(steps, most)]
    return "val", []


def _as_json(runs: Sequence[Run]) -> dict[str, Any]:
    kind, losses = loss_table(runs, most=200)
    return {
        "runs": [
            {
                "path": str(run.path),
                "settings": run.settings,
                "figures": run.figures(),
            }
            for run in runs
        ],
        "differences": differences([run.settings for run in runs]),
        "losses": {"kind": kind, "steps": [{"iter": step, "loss": row} for step, row in losses]},
        "samples": [
            {"iter": step, "texts": [run.samples[step] for run in runs]}
            for step in sorted(common(run.samples for run in runs))
        ],
    }


# Printing ---------------------------------------------------------------------------------------


def _setting(value: Any) -> str:
    """A value on one line, quoted where it could not be seen otherwise."""
    if isinstance(value, str):
        return value if value.isprintable() and value else brief(value, 60)
    return MISSING if value is None else str(value)


def _figure(name: str, value: float | int | None) -> str:
    if value is None or not math.isfinite(value):
        return MISSING
    if name == "seconds":
        return duration(value)
    return f"{value:.4f}" if name.endswith("loss") else f"{value:,.0f}"


def _curves(runs: Sequence[Run]) -> str:
    """The curves where they can be drawn, and losses at steps that all runs have.

    Without colours, as in a file, the curves look alike: the numbers tell which is which.
    """
    from tinygpt.runs.plots import terminal_plot

    drawn = [run.path for run in runs if run.train or run.val]
    if not drawn:
        return "None of them has any."
    size = shutil.get_terminal_size((100, 30))
    height = max(min(size.lines - 2, 26), 12)
    try:
        drawing = terminal_plot(drawn, min(size.columns, 140), height, color=sys.stdout.isatty())
    except MissingExtraError:
        return _table(runs)
    return f"{drawing}\n\n{_table(runs)}"


def _table(runs: Sequence[Run]) -> str:
    kind, rows = loss_table(runs)
    if not rows:
        return "There is no step at which all of them have a loss."
    heads = (f"{'validation' if kind == 'val' else 'training'}, step", *(str(r.path) for r in runs))
    shown = [(f"{step:,}", *(f"{loss:.4f}" for loss in losses)) for step, losses in rows]
    return aligned([heads, *shown], right=range(len(heads)))


def _print_beside(names: Sequence[str], texts: Sequence[str]) -> None:
    """Texts in columns, broken into lines where they must be."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    width = shutil.get_terminal_size((100, 30)).columns
    table = Table(box=None, padding=(0, 2, 0, 0), width=width)
    for name in names:
        table.add_column(Text(printable(name)), ratio=1, overflow="fold", header_style="")
    table.add_row(*(Text(printable(text[:TEXT])) for text in texts))
    console = Console(width=width, highlight=False)
    with console.capture() as captured:
        console.print(table)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))
