"""The rows of a run as columns of numbers, for whatever draws or compares them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from tinygpt.runs.folder import FAR, MAX_STEP
from tinygpt.runs.history import Row, read
from tinygpt.untrusted import is_number

Numbers = npt.NDArray[np.float64]

KEYS = (
    "iter",
    "train_loss",
    "val_loss",
    "lr",
    "grad_norm",
    "tokens_per_second",
    "memory",
    "elapsed",
)
"""The columns."""


FLOATS = {float, np.float64, type(None)}


class Columns:
    """Rows in columns of float64, which grow; NaN stands where a row has no number.

    The training loss of a skipped step is no loss of the run and becomes NaN too.
    """

    def __init__(self) -> None:
        self.rows = 0
        self._columns = np.full((len(KEYS), 1024), np.nan)  # (K, capacity)

    @classmethod
    def read(cls, path: Path) -> Self:
        """The columns of a whole file of rows. Raises DataError if a line is damaged."""
        found = cls()
        rows = read(path)
        while part := list(itertools.islice(rows, 4096)):
            found.add(part)
        return found

    def add(self, rows: Sequence[Row]) -> Sequence[Row]:
        """Take in rows; -> those that have a step from 0 to ``MAX_STEP`` and so count."""
        steps = column(rows, "iter")
        fine = (steps >= 0) & (steps <= MAX_STEP)
        if not fine.all():
            rows = list(itertools.compress(rows, fine.tolist()))
        end = self.rows + len(rows)
        self._make_room(end)
        for i, key in enumerate(KEYS):
            self._columns[i, self.rows : end] = column(rows, key)
        skipped = [i for i, row in enumerate(rows, self.rows) if row.get("skipped")]
        self._columns[KEYS.index("train_loss"), skipped] = np.nan
        self.rows = end
        return rows

    def __getitem__(self, key: str) -> Numbers:
        """All values of one of ``KEYS``, (rows,)."""
        return self._columns[KEYS.index(key), : self.rows]

    def last(self, key: str) -> float | None:
        """The newest value there is among the last 4,096 rows."""
        values = self[key][-4096:]
        found = values[~np.isnan(values)]
        return float(found[-1]) if len(found) else None

    def best(self) -> tuple[int, float] | None:
        """Step and value of the lowest validation loss; of equal ones the first."""
        losses = self["val_loss"]
        if np.isnan(losses).all():
            return None
        at = int(np.nanargmin(losses))
        return int(self["iter"][at]), float(losses[at])

    def _make_room(self, rows: int) -> None:
        more = max(rows, 2 * self.rows) - self._columns.shape[1]
        if rows > self._columns.shape[1]:
            self._columns = np.pad(self._columns, ((0, 0), (0, more)), constant_values=np.nan)


def column(rows: Iterable[Row], key: str) -> Numbers:
    """The values of a key, (rows,); NaN for what is missing, no number, or beyond ``FAR``."""
    values = [row.get(key) for row in rows]
    if not set(map(type, values)) <= FLOATS:  # numpy would take texts and truths too
        values = [value if is_number(value, -FAR, FAR) else math.nan for value in values]
    found = np.array(values, np.float64)
    found[~(np.abs(found) < FAR)] = np.nan
    return found
