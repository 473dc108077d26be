"""What lies in a run's folder: the names of its files, and how they are found and read.

run.json             the number of the run, which marks its folder, and its bytes per token
config.toml          the resolved settings
tokenizer.json       the tokenizer, if the run has one
metrics.jsonl        one row per step (``history``, ``columns``)
samples.jsonl        the sample texts, with the steps they were taken at
ckpt_N.safetensors   the checkpoint of step N: the newest ones and the best one (``checkpoint``)
best.json            the name of the best checkpoint
run.lock             the process that trains in the folder now (``lock``)
left-after-N         a folder with what came after step N, before the run went back to that step

A folder may come from anybody. The small files are read up to ``MAX_FILE_BYTES``, and one that
cannot be read counts as missing.
"""

from __future__ import annotations

import itertools
import os
import re
from pathlib import Path
from typing import Any

from tinygpt.config import MAX_CONFIG_BYTES, read_config
from tinygpt.errors import CheckpointError
from tinygpt.files.atomic import user_path
from tinygpt.files.disk import writing
from tinygpt.files.strict_json import write_json
from tinygpt.runs.history import Row
from tinygpt.text.corpus import NAMES
from tinygpt.text.mix_shares import is_mix, parse_mix, write_mix
from tinygpt.text.names import exists
from tinygpt.untrusted import is_number, parse_json, read_bounded

RUN, CONFIG, TOKENIZER = "run.json", "config.toml", "tokenizer.json"
METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
BEST, LOCK = "best.json", "run.lock"
SUFFIX = ".safetensors"
"""How the names of checkpoints end."""
BESIDE = {RUN, CONFIG, TOKENIZER, METRICS, SAMPLES, BEST}
"""The files of a run besides its checkpoints and its lock."""
MAX_FILE_BYTES = MAX_CONFIG_BYTES
"""A larger file is none of the small ones and is not read."""
MAX_STEP, FAR = 10**12, 1e30
"""The last step, and the largest number by amount, that are believed of a row."""
MAX_ENTRIES, MAX_RUNS = 10_000, 100
"""Entries of a folder that are looked at, and the most runs that are taken, the newest of them."""
BYTES = "bytes_per_token"
PROGRAM = {"program": "tinygpt"}
"""Marks a run.json as ours: other programs have files of that name too."""


# ---- checkpoints ----


def checkpoint_path(folder: str | Path, iter_num: int) -> Path:
    return user_path(folder) / f"ckpt_{iter_num}{SUFFIX}"


def named_step(name: str | Path) -> int | None:
    """The step in a checkpoint's name; None for any other name."""
    found = re.fullmatch(rf"ckpt_([0-9]+){re.escape(SUFFIX)}", Path(name).name)
    return int(found[1]) if found else None


def named_checkpoint(path: Path) -> Path:
    """The path of a checkpoint that may be given without its suffix, as ckpt_N or another name.

    A path that exists as it is given, such as a run folder, is returned as it is.
    """
    if path.name in ("", "..") or exists(path):
        return path
    full = path.with_name(path.name + SUFFIX)
    return full if named_step(full) is not None or exists(full) else path


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest step first."""
    try:
        numbered = [(named_step(path), path) for path in folder.iterdir() if path.is_file()]
    except OSError:
        return []
    return [path for _, path in sorted((n, path) for n, path in numbered if n is not None)]


def best_name(folder: Path) -> str | None:
    """The name in best.json, whether there is such a checkpoint or not."""
    name = _read_object(folder / BEST).get("checkpoint")
    return name if isinstance(name, str) else None


def best_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that is marked as best, if it is still there."""
    name = best_name(folder)
    return next((path for path in list_checkpoints(folder) if path.name == name), None)


def latest_checkpoint(path: Path) -> Path:
    """The newest checkpoint of a run folder; a file is itself, also without its suffix.

    Raises CheckpointError that names runs nearby if there is none.
    """
    if (file := named_checkpoint(path)).is_file():
        return file
    if found := list_checkpoints(path):
        return found[-1]
    raise CheckpointError(f"There is no checkpoint in {path}. {_runs_nearby(path)}")


def choose_checkpoint(path: Path) -> Path:
    """The checkpoint to use of a run folder: the best one, or else the newest."""
    return best_checkpoint(path) or latest_checkpoint(path)


def _runs_nearby(path: Path) -> str:
    parent = path.parent if path.parent.is_dir() else Path()
    runs = [p for p in sorted(parent.iterdir()) if p.is_dir() and list_checkpoints(p)]
    names = ", ".join(str(run) for run in runs[-5:])
    return f"Runs nearby: {names}." if names else "Train one first: tinygpt train YOUR_TEXT.txt"


def mark_best(path: Path, val_loss: float) -> None:
    """Write down which checkpoint of its folder is the best one. Raises CheckpointError."""
    _write(path.parent / BEST, {"checkpoint": path.name, "val_loss": val_loss})


# ---- the run ----


def folder_of(path: Path) -> Path:
    """The folder of a run that is given by its folder or by a checkpoint in it."""
    return path if path.is_dir() else path.parent


def run_of(folder: Path) -> str | None:
    """The number of the run that a folder belongs to; None if it is not marked as a run's."""
    found = _read_object(folder / RUN)
    run = found.pop("run", None)
    found.pop(BYTES, None)
    ours = found in ({}, PROGRAM) and isinstance(run, str) and re.fullmatch("[0-9a-f]{16}", run)
    return run if ours else None


def mark_run(folder: Path, run: str, bytes_per_token: float | None = None) -> None:
    """Mark a folder as that of a run, so that it takes runs. Raises CheckpointError."""
    known = {} if bytes_per_token is None else {BYTES: bytes_per_token}
    _write(folder / RUN, {"run": run, **PROGRAM, **known})


def bytes_per_token_of(path: Path) -> float | None:
    """Bytes per token of the validation text, or without one of the training text, of a run.

    ``path`` is the run's folder or a file in it. None where the folder does not say: the run has no
    tokenizer, or it is older than the figure and has not gone on since.
    """
    value = _read_object(folder_of(path) / RUN).get(BYTES)
    return float(value) if is_number(value, 1e-9, FAR) else None


def text_of(path: Path) -> str | None:
    """The name of the text that a run learned from, without the folder where the text lies.

    ``path`` is a run's folder or a checkpoint in it.
    """
    try:
        source = read_config(folder_of(path) / CONFIG)["data"]["source"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not isinstance(source, str):
        return None
    if is_mix(source):
        return write_mix({Path(name).name: share for name, share in parse_mix(source).items()})
    name = Path(source).name
    return f"./{name}" if name in NAMES and source != name else name or None  # see text/names.py


# ---- the runs of a folder ----


def last_change(folder: Path) -> float | None:
    """When a run was last written to, in seconds since 1970; None for a folder that is no run.

    A folder is one as soon as it has one of a run's files, of whatever kind that is. One that may
    not be entered may be a run too, which is then shown with the reason.
    """
    for name in (METRICS, CONFIG):
        try:
            return (folder / name).lstat().st_mtime
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:
            return 0.0
    return None


def runs_in(place: Path) -> list[tuple[float, Path]]:
    """The run folders right below a folder; no links, which could lead anywhere."""
    try:
        with os.scandir(place) as entries:
            below = [
                place / entry.name
                for entry in itertools.islice(entries, MAX_ENTRIES)
                if entry.is_dir(follow_symlinks=False)
            ]
    except OSError:
        return []
    runs = [(when, folder) for folder in below if (when := last_change(folder)) is not None]
    return sorted(runs, key=lambda run: run[0], reverse=True)[:MAX_RUNS]


# ---- rows ----


def number_of(row: Row, key: str) -> float | None:
    """A number of a row; None if it is missing, not finite, no number, or beyond ``FAR``."""
    value = row.get(key)
    return float(value) if is_number(value, -FAR, FAR) else None


def sample_of(row: Row) -> tuple[int, str] | None:
    """Step and text of a row of samples.jsonl; None if it is no such row."""
    step, text = row.get("iter"), row.get("text")
    return (int(step), text) if is_number(step, 0, MAX_STEP) and isinstance(text, str) else None


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a small file; an empty one if there is none."""
    try:
        found = parse_json(read_bounded(path, MAX_FILE_BYTES))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path, value: dict[str, Any]) -> None:
    with writing(path):
        write_json(path, value)
