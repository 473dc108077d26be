"""Curves of any length in a bounded number of points.

Rows fall into buckets of ``stride`` rows, a power of two. A bucket keeps the lowest, the highest
and the mean of its values, so a spike stays visible at every width. Buckets begin at multiples of
the stride, so a page can add new rows to the last one, and can halve their number by joining
neighbours; the result is the same as from here.
"""

from __future__ import annotations

import copy
import itertools
import math
import zlib
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from tinygpt.runs.columns import KEYS, Columns, Numbers, column
from tinygpt.runs.history import Row
from tinygpt.untrusted import has_surrogates

RANGES = ("train_loss", "grad_norm", "tokens_per_second")
"""Curves that are shown with their lowest and highest values beside the mean."""
POINTS = 1024
"""The most points of one curve."""
LAYER_POINTS = 256
"""The most points of one layer's gradient norm."""
MAX_ROWS = 2_000_000
"""Rows of a run that are kept; later ones are not shown."""
MAX_LAYERS, MAX_NAME = 128, 100
"""Layers that are shown, and characters of a layer's name."""
MAX_SKIPPED = 500
"""Skipped steps that are named; the others are counted."""


class Curves(Columns):
    """The rows of one run in columns, with what a page shows of layers and skipped steps."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: list[str] = []
        self.skipped: list[tuple[float, str]] = []
        self.skips = 0
        self.odd: set[str] = set()
        """Reasons why parts of the rows are not shown."""
        self._norms = np.empty((0, self._columns.shape[1]), np.float32)  # (layers, capacity)

    def add(self, rows: Sequence[Row]) -> Sequence[Row]:
        """Add rows; -> those that have a step, up to ``MAX_ROWS`` in all."""
        start = self.rows
        if len(rows) > MAX_ROWS - start:
            self.odd.add(f"Rows after the first {MAX_ROWS:,} are not shown.")
            rows = rows[: MAX_ROWS - start]
        rows = super().add(rows)
        at = [i for i, row in enumerate(rows) if isinstance(row.get("grad_norms"), dict)]
        norms = [rows[i]["grad_norms"] for i in at]
        self._see_layers(norms)
        for i, layer in enumerate(self.layers if at else ()):  # where there is none it is NaN
            self._norms[i, start + np.array(at)] = column(norms, layer)
        self._see_skipped(rows)
        return rows

    def frozen(self) -> Self:
        """A snapshot, to be read while more rows are added to these."""
        now = copy.copy(self)  # whose columns have the same first rows, which never change
        now.layers, now.skipped = self.layers[:], self.skipped[:]
        return now

    def mark(self, rows: int) -> str:
        """A checksum of row number ``rows``, which differs after a run is replaced or resumed."""
        if not 0 < rows <= self.rows:
            return ""
        return f"{zlib.crc32(self._columns[:, rows - 1].tobytes()):08x}"

    def tail(self, start: int) -> dict[str, Any]:
        """The rows from number ``start`` on, column by column."""
        columns = {key: plain(self[key][start:]) for key in KEYS}
        norms = {n: plain(self._norms[i, start : self.rows]) for i, n in enumerate(self.layers)}
        skipped = [s for s in self.skipped if start < self.rows and s[0] >= self["iter"][start]]
        return columns | {"layers": norms, "skipped": skipped}

    def overview(
        self, points: int = POINTS, low: float = -math.inf, high: float = math.inf
    ) -> dict[str, Any]:
        """Everything between two steps, in at most ``points`` points a curve."""
        points = max(2, min(points, POINTS))
        first, last = self._between(low, high)
        stride = stride_for(last - first, points)
        first -= first % stride
        cut = slice(first, last)
        layer_stride = max(stride, stride_for(last - first, min(points, LAYER_POINTS)))
        start = first - first % layer_stride
        return {
            "rows": self.rows,
            "mark": self.mark(self.rows),
            "first": first,
            "stride": stride,
            "x": plain(means(self["iter"][cut], stride), 12),
            **{
                key: _described(self[key][cut], stride, key in RANGES)
                for key in KEYS[1:]
                if key != "val_loss"
            },
            "val_loss": self._evaluations(cut, points),
            "skipped": [s for s in self.skipped if low <= s[0] <= high],
            "skips": self.skips,
            "layers": {
                "stride": layer_stride,
                "x": plain(means(self["iter"][start:last], layer_stride), 12),
                "names": self.layers,
                "norms": [
                    plain(means(row[start:last].astype(float), layer_stride), 4)
                    for row in self._norms
                ],
            },
        }

    def _evaluations(self, cut: slice, points: int) -> dict[str, Any]:
        """Validation losses are few and far between: steps and values, the lowest among them."""
        steps, losses = self["iter"][cut], self["val_loss"][cut]
        steps, losses = (values[~np.isnan(losses)] for values in (steps, losses))
        size = math.ceil(len(losses) / points) or 1
        chosen = [i + int(np.argmin(losses[i : i + size])) for i in range(0, len(losses), size)]
        return {"x": plain(steps[chosen], 12), "y": plain(losses[chosen])}

    def _between(self, low: float, high: float) -> tuple[int, int]:
        """First and last row of the steps from low to high, with a neighbour on both sides."""
        steps = np.maximum.accumulate(self["iter"])
        first = int(np.searchsorted(steps, low, "left")) - 1
        last = int(np.searchsorted(steps, high, "right")) + 1
        return max(first, 0), min(last, self.rows)

    def _see_layers(self, norms: Sequence[Row]) -> None:
        """Register the layers in the first and the last of some rows' norms."""
        for name in dict.fromkeys(itertools.chain(*norms[:1], *norms[-1:])):
            if len(name) > MAX_NAME:
                self.odd.add(f"Layers with names of more than {MAX_NAME} characters are not shown.")
            elif name not in self.layers and len(self.layers) == MAX_LAYERS:
                self.odd.add(f"Layers after the first {MAX_LAYERS} are not shown.")
            elif name not in self.layers:
                self.layers.append(name)
                if has_surrogates(name):
                    self.odd.add("The name of a layer holds half a character (a lone surrogate).")
        if missing := len(self.layers) - len(self._norms):
            more = np.full((missing, self._columns.shape[1]), np.nan, np.float32)
            self._norms = np.concatenate([self._norms, more])

    def _see_skipped(self, rows: Sequence[Row]) -> None:
        for row in rows:
            if reason := row.get("skipped"):
                self.skips += 1
                why = reason if isinstance(reason, str) else type(reason).__name__
                self.skipped.append((float(row["iter"]), why[:200]))
        del self.skipped[:-MAX_SKIPPED]

    def _make_room(self, rows: int) -> None:
        super()._make_room(rows)
        if (more := self._columns.shape[1] - self._norms.shape[1]) > 0:
            self._norms = np.pad(self._norms, ((0, 0), (0, more)), constant_values=np.nan)


def stride_for(rows: int, points: int) -> int:
    """The smallest power of two that needs at most ``points`` buckets for so many rows.

    >>> stride_for(1000, 1000), stride_for(1001, 1000), stride_for(10_000, 1000)
    (1, 2, 16)
    """
    return 1 << max(0, math.ceil(math.log2(max(rows, 1) / points)))


def buckets(values: Numbers, stride: int) -> Numbers:
    """(rows,) -> (buckets, stride), the last one filled up with NaN."""
    missing = -len(values) % stride
    return np.pad(values, (0, missing), constant_values=np.nan).reshape(-1, stride)


def means(values: Numbers, stride: int) -> Numbers:
    """The mean of every bucket; NaN where it has no value."""
    parts = buckets(values, stride)
    count = (~np.isnan(parts)).sum(1)
    with np.errstate(invalid="ignore"):
        mean: Numbers = np.nansum(parts, 1) / count
    return mean


def _described(values: Numbers, stride: int, with_range: bool) -> dict[str, Any]:
    found = {"mean": plain(means(values, stride))}
    if with_range:
        parts = buckets(values, stride)
        found |= {"low": plain(np.fmin.reduce(parts, 1)), "high": plain(np.fmax.reduce(parts, 1))}
    return found


def plain(values: npt.NDArray[Any], digits: int = 6) -> list[float | None]:
    """Numbers for JSON, NaN as None, rounded to so many significant digits."""
    return [None if v != v else float(f"{v:.{digits}g}") for v in values.tolist()]
