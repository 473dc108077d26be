"""A run as its folder tells it: its rows, by step, tokens or time, in nats or in bits per byte."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from tinygpt.config import read_config
from tinygpt.runs.columns import Columns, Numbers
from tinygpt.runs.folder import CONFIG, FAR, METRICS, bytes_per_token_of, folder_of, number_of
from tinygpt.runs.history import Row
from tinygpt.training.metrics import bits_per_byte
from tinygpt.untrusted import is_number

Axis = Literal["step", "tokens", "time"]
"""What a curve is drawn over: optimizer steps, tokens that were trained on, seconds of training."""
Unit = Literal["loss", "bits"]
"""What a loss is given in: nats per token, or bits per byte of text."""
UNITS: dict[Unit, str] = {"loss": "nats per token", "bits": "bits per byte"}
LOSSES = ("train_loss", "val_loss")

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Record:
    """The rows of a run, and what turns steps into tokens and nats into bits."""

    columns: Columns
    tokens_per_step: float | None
    bytes_per_token: float | None

    @classmethod
    def read(cls, path: Path) -> Self:
        """The record in a run's folder, or in a file of rows and what lies beside it.

        Raises DataError if a row is damaged.
        """
        columns = Columns.read(path / METRICS if path.is_dir() else path)
        return cls(columns, _tokens_per_step(folder_of(path)), bytes_per_token_of(path))

    def figures(self, progress: Row | None = None, done: int = 0) -> dict[str, Any]:
        """What the run has come to; None for what is not known.

        ``progress`` is what a checkpoint says of it and ``done`` that one's step: they count where
        no row says more.
        """
        columns, known = self.columns, progress or {}
        speeds = columns["tokens_per_second"]
        speeds = speeds[~np.isnan(speeds)]
        step, loss = columns.best() or (known.get("best_iter"), number_of(known, "best_val_loss"))
        return {
            "steps": int(columns["iter"].max(initial=done)),
            "train_loss": columns.last("train_loss"),
            "val_loss": columns.last("val_loss"),
            "best_loss": loss,
            "best_bits_per_byte": bits_per_byte(loss, self.bytes_per_token),
            "best_step": None if loss is None else step,
            "tokens_per_second": float(np.median(speeds)) if len(speeds) else None,
            "seconds": columns.last("elapsed") or number_of(known, "elapsed"),
        }

    def places(self, axis: Axis) -> Numbers | None:
        """Where each row stands on an axis, (rows,); None if the run does not say.

        Time never goes back, as it may in the rows of a run that was resumed.
        """
        if axis == "time":
            elapsed = np.nan_to_num(self.columns["elapsed"])
            return np.maximum.accumulate(elapsed) if elapsed.any() else None
        scale = 1.0 if axis == "step" else self.tokens_per_step
        return None if scale is None else self.columns["iter"] * scale

    def points(self, key: str, axis: Axis = "step", unit: Unit = "loss") -> Points:
        """(place, value) of every row that has a value under ``key``; losses in ``unit``.

        None are there if the run does not say what the axis or the unit takes.
        """
        places, values = self.places(axis), self.columns[key]
        scale = bits_per_byte(1.0, self.bytes_per_token) if unit == "bits" else 1.0
        if places is None or scale is None:
            return []
        there = ~np.isnan(values)
        values = values[there] * (scale if key in LOSSES else 1.0)
        return list(zip(places[there].tolist(), values.tolist(), strict=True))


def _tokens_per_step(folder: Path) -> float | None:
    """Batch size, micro-batches and block size multiplied; None without such a config.toml."""
    try:
        tables = read_config(folder / CONFIG)
        train, model = tables["train"], tables["model"]
        sizes = train["batch_size"], train.get("grad_accum_steps", 1), model["block_size"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return None
    return math.prod(map(float, sizes)) if all(is_number(n, 1, FAR) for n in sizes) else None


# Which learned more -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Learned:
    """The losses of some runs where all of them have one: from ``start`` to ``end`` of an axis."""

    key: str
    """Which loss: val_loss, or train_loss if not all have the other."""
    start: float
    end: float
    mean: list[float]
    """The mean of each run's curve between the two: the area below it, divided by the width."""
    last: list[float]
    """The loss of each at the end."""


def unit_for(records: Sequence[Record]) -> Unit:
    """Bits per byte where tokens stand for different amounts of text, and all say for how much."""
    known = {record.bytes_per_token for record in records}
    return "bits" if None not in known and len(known) > 1 else "loss"


def learned(records: Sequence[Record], axis: Axis, unit: Unit) -> Learned | None:
    """The losses of runs compared at equal places of an axis; None where there are no such places.

    Between two evaluations the loss is taken to change evenly.
    """
    for key in ("val_loss", "train_loss"):
        curves = [np.array(record.points(key, axis, unit)) for record in records]  # (n, 2) each
        if all(map(len, curves)):
            start, end = (max(c[0, 0] for c in curves), min(c[-1, 0] for c in curves))
            if start < end:
                return _between(key, curves, float(start), float(end))
    return None


def _between(key: str, curves: Sequence[Numbers], start: float, end: float) -> Learned:
    mean, last = [], []
    for x, y in (curve.T for curve in curves):
        inside = (x > start) & (x < end)
        at = np.concatenate([[start], x[inside], [end]])
        values = np.interp(at, x, y)
        mean.append(float(np.trapezoid(values, at) / (end - start)))
        last.append(float(values[-1]))
    return Learned(key, start, end, mean, last)
