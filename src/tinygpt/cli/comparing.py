"""``tinygpt compare``: runs side by side, from what lies in their folders."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinygpt.cli.console import aligned, show_json
from tinygpt.cli.flags import Switch
from tinygpt.cli.newest import newest_runs
from tinygpt.cli.options import CONFIGS, Tables, run_tables
from tinygpt.cli.plotting import in_terminal
from tinygpt.config import GPTConfig
from tinygpt.errors import CheckpointError, MissingExtraError, UsageError
from tinygpt.runs import checkpoint
from tinygpt.runs.display.text import duration, printable
from tinygpt.runs.folder import METRICS, SAMPLES, list_checkpoints, sample_of
from tinygpt.runs.history import read
from tinygpt.runs.plots import NUMBERS
from tinygpt.runs.record import UNITS, Axis, Record, Unit, learned, unit_for
from tinygpt.untrusted import brief

MOST_RUNS = 6
MISSING = "-"
TEXT = 1200
"""Characters of a sample that are printed."""

PER: dict[Axis, str] = {"time": "minute", "tokens": "token"}
LOSS = {"val_loss": "validation loss", "train_loss": "training loss"}

Settings = dict[str, Any]


@dataclass
class Run:
    """What a folder, or a checkpoint by itself, tells of a run."""

    path: Path
    settings: Settings
    """By table and field, such as model.n_layer; of a run without settings only its model's."""
    record: Record
    figures: dict[str, float | int | None]
    samples: dict[int, str]


def compare(*runs: Path, samples: int = 2, json: Switch = False) -> None:
    """Show runs side by side: settings that differ, losses, samples, and which learned more.

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
    unit = unit_for([run.record for run in found])
    if json:
        show_json(_as_json(found, unit))
        return
    names = [str(run.path) for run in found]
    differing = differences([run.settings for run in found])
    print("[settings]" if differing else "[settings]\nThey are the same.")
    if differing:
        shown = [(key, *map(_setting, values)) for key, values in differing.items()]
        print(aligned([("", *names), *shown]))
    print("\n[figures]")
    cells = [
        (name.replace("_", " "), *(_figure(name, run.figures[name]) for run in found))
        for name in found[0].figures
    ]
    print(aligned([("", *names), *cells], right=range(1, len(found) + 1)))
    print("\n[losses]")
    print(_curves(found, unit))
    for axis, per in PER.items():
        print(f"\n[learned per {per}]\n{verdict(found, axis, unit)}")
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
    record = Record.read(path / METRICS)  # which a checkpoint by itself has not
    done, progress = (0, {}) if meta is None else (meta.iter_num, meta.progress)
    size = {"parameters": GPTConfig.from_dict(tables["model"]).num_params()}
    samples = dict(filter(None, map(sample_of, read(path / SAMPLES))))
    return Run(path, _flat(tables), record, size | record.figures(progress, done), samples)


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


def loss_table(
    runs: Sequence[Run], unit: Unit = "loss", most: int = 12
) -> tuple[str, list[tuple[int, list[float]]]]:
    """(which loss, (step, each run's)) at steps that all have: of validation, or of training."""
    for kind in ("val", "train"):
        series = [dict(run.record.points(f"{kind}_loss", "step", unit)) for run in runs]
        if steps := sorted(common(series)):
            rows = [(int(step), [s[step] for s in series]) for step in _chosen(steps, most)]
            return kind, rows
    return "val", []


def verdict(runs: Sequence[Run], axis: Axis, unit: Unit) -> str:
    """One sentence: which run learned most, at equal times or at equal numbers of tokens."""
    found = learned([run.record for run in runs], axis, unit)
    if found is None:
        what = "time" if axis == "time" else "number of tokens"
        return f"There is no {what} at which all of them have a loss."
    if unit == "loss" and len({run.settings["model.vocab_size"] for run in runs}) > 1:
        return "Their vocabularies differ, and not all of them say how many bytes a token has."
    order = sorted(range(len(runs)), key=lambda i: found.mean[i])
    means, ends = ([f"{value:.4f}" for value in row] for row in (found.mean, found.last))
    first, *others = order
    alike = all(means[i] == means[first] for i in others)
    start, end = map(NUMBERS[axis], (found.start, found.end))
    rest = "; ".join(f"{runs[i].path}: {means[i]} and {ends[i]}" for i in others)
    return (
        f"{'All of them learned alike' if alike else f'{runs[first].path} learned most'}: from "
        f"{start} to {end}{' tokens' * (axis == 'tokens')} its {LOSS[found.key]} was "
        f"{means[first]} {UNITS[unit]} on average, and {ends[first]} at the end ({rest})."
    )


def _as_json(runs: Sequence[Run], unit: Unit) -> dict[str, Any]:
    kind, losses = loss_table(runs, unit, most=200)
    records = [run.record for run in runs]
    found = {axis: learned(records, axis, unit) for axis in PER}
    return {
        "runs": [
            {"path": str(run.path), "settings": run.settings, "figures": run.figures}
            for run in runs
        ],
        "differences": differences([run.settings for run in runs]),
        "losses": {
            "kind": kind,
            "unit": UNITS[unit],
            "steps": [{"iter": step, "loss": row} for step, row in losses],
        },
        "learned": {axis: each and vars(each) for axis, each in found.items()},
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
    return f"{value:.4f}" if name.endswith(("loss", "byte")) else f"{value:,.0f}"


def _curves(runs: Sequence[Run], unit: Unit) -> str:
    """The curves where they can be drawn, and losses at steps that all runs have.

    Without colours, as in a file, the curves look alike: the numbers tell which is which.
    """
    drawn = [run.path for run in runs if any(map(run.record.points, LOSS))]
    if not drawn:
        return "None of them has any."
    try:
        return f"{in_terminal(drawn, 26, y=unit)}\n\n{_table(runs, unit)}"
    except MissingExtraError:
        return _table(runs, unit)


def _table(runs: Sequence[Run], unit: Unit) -> str:
    kind, rows = loss_table(runs, unit)
    if not rows:
        return "There is no step at which all of them have a loss."
    heads = (f"{'validation' if kind == 'val' else 'training'}, step", *(str(r.path) for r in runs))
    shown = [(f"{step:,}", *(f"{loss:.4f}" for loss in losses)) for step, losses in rows]
    unit_line = "" if unit == "loss" else f"In {UNITS[unit]}:\n"
    return unit_line + aligned([heads, *shown], right=range(len(heads)))


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
