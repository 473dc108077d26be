"""The runs that a dashboard shows: found in folders, read as they grow, never written to."""

from __future__ import annotations

import hashlib
import itertools
import re
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tinygpt.checkpoint.folder import best_checkpoint, list_checkpoints
from tinygpt.errors import UsageError
from tinygpt.files import user_path
from tinygpt.lock import Holder, holder
from tinygpt.server.curves import Curves
from tinygpt.server.tail import Tail
from tinygpt.untrusted import is_number, parse_toml, read_bounded

CONFIG, METRICS, SAMPLES = "config.toml", "metrics.jsonl", "samples.jsonl"
MAX_RUNS = 100
"""The most runs that are shown of a folder, the newest of them."""
MAX_ENTRIES = 10_000
"""Entries of a folder that are looked at for runs."""
MAX_SAMPLES, MAX_TEXT = 1000, 4000
"""Sample texts kept of a run, and characters of each."""
MAX_CONFIG = 1 << 16
"""A larger config.toml is none."""
MAX_SETTINGS, MAX_VALUE = 200, 400
"""Settings that are shown, and characters of one."""
MAX_TAIL = 1000
"""New rows that are sent one by one; the curves of more are sent anew."""
PAUSE = 0.4
"""Seconds between two looks at the files, however many pages ask."""
READING = 0.5
"""Seconds that a look spends on reading; the rest of a long file comes with the next."""

Cursor = Mapping[str, tuple[int, str]]
"""What a page has: by run, the number of rows and what tells them from others."""


class Run:
    """One run folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, folder.absolute().name
        self.id = hashlib.sha256(str(folder.absolute()).encode("utf-8", "replace")).hexdigest()[:12]
        self.curves = Curves()
        self.samples: list[dict[str, Any]] = []
        self.settings: dict[str, Any] = {}
        self.holder: Holder | None = None
        self.updated = 0.0
        self._metrics, self._samples = Tail(folder / METRICS), Tail(folder / SAMPLES)
        self._restarts = [0, 0]
        self._config_seen: object = None
        self._checkpoints: dict[str, Any] = {}

    def refresh(self, deadline: float) -> None:
        """Look at the files again."""
        self.holder = holder(self.folder)
        self._read_settings()
        for row in self._new(0, self._metrics, deadline):
            self.curves.add(row)
        for rows in self._new(1, self._samples, deadline):
            self._add_samples(rows)

    @property
    def state(self) -> str:
        """training, finished, stopped or empty."""
        if self.holder is not None:
            return "training"
        if not self.curves.rows:
            return "empty"
        done, planned = self.curves.last("iter") or 0, self.max_iters
        return "finished" if planned is not None and done >= planned else "stopped"

    @property
    def max_iters(self) -> float | None:
        value = self.settings.get("train.max_iters")
        return value if is_number(value, 1, 1e12) else None

    def card(self) -> dict[str, Any]:
        """The figures of the run as it stands."""
        curves, best = self.curves, self.curves.best()
        last = ("iter", "train_loss", "val_loss", "lr", "tokens_per_second", "memory", "elapsed")
        return {
            "id": self.id,
            "name": self.name,
            "state": self.state,
            "holder": None if self.holder is None else str(self.holder),
            "max_iters": self.max_iters,
            **{key: curves.last(key) for key in last},
            "best_val_loss": None if best is None else best[1],
            "best_iter": None if best is None else best[0],
            "steps_per_second": self._pace(),
            "skips": curves.skips,
            "damaged": self._metrics.damaged,
            "samples": len(self.samples),
            "updated": self.updated,
            **self._checkpoints,
        }

    def _new(self, which: int, tail: Tail, deadline: float) -> Iterable[list[dict[str, Any]]]:
        """The new rows of a file, a piece at a time; what is known is dropped if it was cut."""
        while True:
            rows = tail.look()
            if tail.restarts != self._restarts[which]:
                self._restarts[which] = tail.restarts
                if which == 0:
                    self.curves = Curves()
                else:
                    self.samples = []
            if rows:
                self._note_change()
                yield rows
            if not tail.more or time.monotonic() > deadline:
                return

    def _note_change(self) -> None:
        try:
            self.updated = (self.folder / METRICS).stat().st_mtime
        except OSError:
            self.updated = 0.0
        newest = list_checkpoints(self.folder)[-1:]
        best = best_checkpoint(self.folder)
        self._checkpoints = {
            "checkpoint": newest[0].name if newest else None,
            "best_checkpoint": None if best is None else best.name,
        }

    def _add_samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        for row in rows:
            step, text = row.get("iter"), row.get("text")
            if is_number(step, 0, 1e12) and isinstance(text, str):
                self.samples.append({"iter": step, "text": text[:MAX_TEXT]})
        while len(self.samples) > MAX_SAMPLES:  # every other one goes, never the newest
            self.samples = self.samples[-1::-2][::-1]

    def _read_settings(self) -> None:
        path = self.folder / CONFIG
        try:
            status = path.stat()
            seen = (status.st_mtime_ns, status.st_size, status.st_ino)
            if seen == self._config_seen or path.is_symlink():
                return
            self._config_seen = seen
            tables = parse_toml(read_bounded(path, MAX_CONFIG).decode())
        except (OSError, ValueError, RecursionError):
            return
        flat = (
            (f"{t}.{k}", v)
            for t, table in tables.items()
            if isinstance(table, dict)
            for k, v in table.items()
        )
        self.settings = {
            name[:MAX_VALUE]: value
            if is_number(value, -1e300, 1e300) or type(value) is bool
            else str(value)[:MAX_VALUE]
            for name, value in itertools.islice(flat, MAX_SETTINGS)
        }

    def _pace(self) -> float | None:
        """Steps per second over the last rows, evaluations and saves included."""
        steps, elapsed = self.curves["iter"][-200:], self.curves["elapsed"][-200:]
        if len(steps) < 2 or not elapsed[-1] > elapsed[0]:
            return None
        return float((steps[-1] - steps[0]) / (elapsed[-1] - elapsed[0]))


class Watch:
    """All runs of some folders. Safe to use from several threads."""

    def __init__(self, places: Iterable[str | Path]) -> None:
        self.places = [user_path(place) for place in places]
        for place in self.places:
            if not place.is_dir():
                raise UsageError(
                    f"{place} is no folder. Give run folders, or folders that hold some."
                )
        self.lock = threading.RLock()
        self.runs: dict[str, Run] = {}
        self._looked = -PAUSE

    def refresh(self) -> None:
        """Look at all files again, unless that was done just now."""
        with self.lock:
            if time.monotonic() - self._looked < PAUSE:
                return
            self._find()
            deadline = time.monotonic() + READING
            for run in self.runs.values():
                run.refresh(deadline)
            self._looked = time.monotonic()

    def changes(self, cursor: Cursor) -> list[dict[str, Any]]:
        """The card of every run and, for those in the cursor, the rows that are new.

        If there are too many, or the rows that the page has are no longer those of the run, the
        card says ``reload`` instead.
        """
        with self.lock:
            return [run.card() | _new_rows(run.curves, cursor.get(run.id)) for run in self.listed()]

    def listed(self) -> list[Run]:
        """Those in training first, then by their last change."""
        return sorted(self.runs.values(), key=lambda run: (run.holder is None, -run.updated))

    def _find(self) -> None:
        found: dict[str, Run] = {}
        for place in self.places:
            for folder in [place] if is_run(place) else _runs_in(place):
                run = Run(folder)
                found.setdefault(run.id, self.runs.get(run.id, run))
        names = Counter(run.folder.absolute().name for run in found.values())
        for run in found.values():
            *_, parent, own = run.folder.absolute().parts
            run.name = own if names[own] == 1 else f"{parent}/{own}"
        self.runs = found


def _new_rows(curves: Curves, known: tuple[int, str] | None) -> dict[str, Any]:
    if known is None or (known[0] == curves.rows and known[1] == curves.mark(curves.rows)):
        return {}
    rows, mark = known
    now = {"rows": curves.rows, "mark": curves.mark(curves.rows)}
    if rows > curves.rows or mark != curves.mark(rows) or curves.rows - rows > MAX_TAIL:
        return now | {"reload": True}
    return now | {"from": rows, "new": curves.tail(rows)}


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run, or the beginning of one."""
    return any((folder / name).is_file() for name in (CONFIG, METRICS))


def _runs_in(place: Path) -> list[Path]:
    """The run folders right below a folder; no links, which could lead anywhere."""
    try:
        entries = list(itertools.islice(place.iterdir(), MAX_ENTRIES))
    except OSError:
        return []
    runs = [entry for entry in entries if not entry.is_symlink() and is_run(entry)]
    return sorted(runs, key=_changed, reverse=True)[:MAX_RUNS]


def _changed(folder: Path) -> float:
    for name in (METRICS, CONFIG):
        try:
            return (folder / name).stat().st_mtime
        except OSError:
            continue
    return 0.0


def parse_cursor(text: str) -> dict[str, tuple[int, str]]:
    """What a page says that it has: ``RUN:ROWS:MARK,…``; what cannot be read is left out.

    >>> parse_cursor("0123456789ab:500:00c0ffee,nonsense")
    {'0123456789ab': (500, '00c0ffee')}
    """
    found = re.findall(r"\b([0-9a-f]{12}):([0-9]{1,9}):([0-9a-f]{8}|)(?:,|$)", text[:8192])
    return {run: (int(rows), mark) for run, rows, mark in found[:MAX_RUNS]}


def write_cursor(cursor: Cursor) -> str:
    """The other way round."""
    return ",".join(f"{run}:{rows}:{mark}" for run, (rows, mark) in cursor.items())
