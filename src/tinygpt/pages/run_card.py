"""What a page says of how its model came about."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinygpt.runs import checkpoint
from tinygpt.runs.folder import METRICS, text_of
from tinygpt.runs.history import read

POINTS = 200
"""Points of a curve: as many as a small picture can show."""

Point = tuple[int, float | None]
"""A step and its loss; None is a gap in the curve."""


def run_card(path: Path) -> dict[str, Any]:
    """What the checkpoint at ``path`` and the run that it lies in say of the model, as JSON values.

    Of the training text only its name is said, not where it lay. What is not known is left out.
    """
    meta = checkpoint.read_meta(path)
    found: dict[str, Any] = {
        "step": meta.iter_num,
        "parameters": meta.model.num_params(),
        "data": text_of(path),
        "best_val_loss": meta.progress.get("best_val_loss"),
        "best_iter": meta.progress.get("best_iter"),
        "seconds": meta.progress.get("elapsed"),
        "train": None if meta.train is None else meta.train.to_dict(),
    }
    known = {name: value for name, value in found.items() if value is not None}
    return known | _curves(path.parent / METRICS, meta.iter_num)


def _curves(path: Path, last: int) -> dict[str, Any]:
    """The losses up to step ``last``, as [step, loss]; means of equal stretches of training.

    The loss of a step that was skipped, or is no number, is a gap.
    """
    train: list[Point] = []
    val: list[Point] = []
    if not path.is_file():
        return {}
    for row in read(path):
        step = row.get("iter")
        if type(step) is not int or step > last:
            continue
        for points, name in ((train, "train_loss"), (val, "val_loss")):
            value = row.get(name)
            if isinstance(value, float):
                gap = not math.isfinite(value) or (name == "train_loss" and row.get("skipped"))
                points.append((step, None if gap else value))
    curves = {"train": _thinned(train), "val": _thinned(val)}
    return {"curves": curves} if len(train) > 1 else {}


def _thinned(points: Sequence[Point]) -> list[list[float | None]]:
    """Means of equal stretches; None for one without a single loss."""
    stretch = max(1, -(-len(points) // POINTS))
    parts = [points[i : i + stretch] for i in range(0, len(points), stretch)]
    return [[part[-1][0], _mean([loss for _, loss in part if loss is not None])] for part in parts]


def _mean(losses: Sequence[float]) -> float | None:
    return round(sum(losses) / len(losses), 4) if losses else None
