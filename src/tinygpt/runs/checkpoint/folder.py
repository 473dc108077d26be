"""The names in a folder of checkpoints, and the small files that stand beside them.

ckpt_N.safetensors   the checkpoint of step N
best.json            which of them is the best one
run.json             which run they belong to
config.toml          the settings of that run
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tinygpt.config import read_config
from tinygpt.files.atomic import user_path
from tinygpt.files.strict_json import write_json
from tinygpt.runs.checkpoint.writer import writing
from tinygpt.text.corpus import NAMES
from tinygpt.text.names import exists
from tinygpt.untrusted import parse_json, read_bounded

BEST, RUN, CONFIG = "best.json", "run.json", "config.toml"
SUFFIX = ".safetensors"
"""How the names of checkpoints end."""
BESIDE = {BEST, RUN, CONFIG, "tokenizer.json", "metrics.jsonl", "samples.jsonl"}
"""The files of a run besides its checkpoints."""
MAX_FILE_BYTES = 1 << 16
"""A larger file is none of the small ones and is not read."""
PROGRAM = {"program": "tinygpt"}
"""What tells our run.json from those of other programs."""


def checkpoint_path(folder: str | Path, iter_num: int) -> Path:
    return user_path(folder) / f"ckpt_{iter_num}{SUFFIX}"


def named_step(path: Path) -> int | None:
    """The step that a checkpoint's name speaks of; None for any other name."""
    found = re.fullmatch(rf"ckpt_([0-9]+){re.escape(SUFFIX)}", path.name)
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


def mark_best(path: Path, val_loss: float) -> None:
    """Write down which checkpoint of its folder is the best one. Raises CheckpointError."""
    _write(path.parent / BEST, {"checkpoint": path.name, "val_loss": val_loss})


def best_checkpoint(folder: Path) -> Path | None:
    """The one marked as best, if it is still there."""
    name = _read_object(folder / BEST).get("checkpoint")
    return next((path for path in list_checkpoints(folder) if path.name == name), None)


def run_of(folder: Path) -> str | None:
    """The number of the run that a folder is of; None if it is not marked as a run's."""
    found = _read_object(folder / RUN)
    run = found.pop("run", None)
    ours = found in ({}, PROGRAM) and isinstance(run, str) and re.fullmatch("[0-9a-f]{16}", run)
    return run if ours else None


def mark_run(folder: Path, run: str) -> None:
    """Mark a folder as that of a run, which makes it take runs. Raises CheckpointError."""
    _write(folder / RUN, {"run": run, **PROGRAM})


def text_of(folder: Path) -> str | None:
    """The name of the text that a run learned from, without the place where it lies."""
    try:
        source = read_config(folder / CONFIG)["data"]["source"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not isinstance(source, str):
        return None
    name = Path(source).name
    return f"./{name}" if name in NAMES and source != name else name or None  # see names.py


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
