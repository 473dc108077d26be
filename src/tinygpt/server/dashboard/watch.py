"""The runs that a dashboard shows: found in folders, read as they grow, never written to."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tinygpt.errors import UsageError
from tinygpt.files.atomic import user_path
from tinygpt.runs.folder import MAX_RUNS, last_change, runs_in
from tinygpt.server.dashboard.curves import Curves
from tinygpt.server.dashboard.watched import Run, run_id
from tinygpt.untrusted import utf8_name

MAX_TAIL = 1000
"""New rows that are sent one by one; the curves of more are sent anew."""
PAUSE = 0.4
"""Seconds between two looks at the files, whatever the number of pages."""
READING = 0.5
"""Seconds that a look spends on rows; the next look goes on with long files."""

Cursor = Mapping[str, tuple[int, str]]
"""By run: the number of rows that a page has read, and a checksum of the last one."""


class Watch:
    """All runs of some folders. Safe to use from several threads.

    One thread at a time looks at the files; others wait for its result, for ``READING`` seconds and
    one slice at most. What pages read changes under ``lock``, which is held for one slice of one
    run at a time.
    """

    def __init__(self, places: Iterable[str | Path]) -> None:
        self.places = [user_path(place) for place in places]
        for place in self.places:
            if not place.is_dir():
                raise UsageError(
                    f"{place} is no folder. Give run folders, or folders that hold some."
                )
        self.lock = threading.RLock()
        self.runs: dict[str, Run] = {}
        self._turn = threading.Lock()
        self._looked = -PAUSE
        self._next: str | None = None
        """Id of the first run for which the last look had no time."""

    def refresh(self) -> None:
        """Look at all files, unless the last look is less than `PAUSE` seconds old."""
        with self._turn:
            if time.monotonic() - self._looked < PAUSE:
                return
            self._find()
            for run in self.runs.values():
                run.glance()
            self._read(time.monotonic() + READING)
            self._looked = time.monotonic()

    def changes(self, cursor: Cursor) -> list[dict[str, Any]]:
        """The card of every run and, for those in the cursor, the new rows.

        If these are too many, or the run's file was replaced, the card says ``reload`` instead.
        """
        with self.lock:
            seen = [(card, self.runs[card["id"]].curves.frozen()) for card in self.cards()]
        return [card | _new_rows(curves, cursor.get(card["id"])) for card, curves in seen]

    def cards(self) -> list[dict[str, Any]]:
        """The figures of every run, in the order of ``listed``."""
        with self.lock:
            return [
                {"id": run.id, "name": run.name, "updated": run.updated, **run.card}
                for run in self.listed()
            ]

    def listed(self) -> list[Run]:
        """All runs: those in training first, then by their last change."""
        return sorted(self.runs.values(), key=lambda run: (run.holder is None, -run.updated))

    def _find(self) -> None:
        found: dict[str, Run] = {}
        for place in self.places:
            changed = last_change(place)
            for when, folder in runs_in(place) if changed is None else [(changed, place)]:
                key = run_id(folder)
                if key not in found:
                    found[key] = self.runs.get(key) or Run(folder)
                    found[key].updated = when
        for run, name in zip(found.values(), _names(found.values()), strict=True):
            run.name = name
        with self.lock:
            self.runs = found

    def _read(self, deadline: float) -> None:
        """Slices of all runs in turn until nothing is new or time is up, at least one."""
        waiting = deque(self.runs.values())
        if self._next in self.runs:
            waiting.rotate(-list(self.runs).index(self._next))
        while waiting:
            run = waiting.popleft()
            if run.read(self.lock):
                waiting.append(run)
            if time.monotonic() > deadline:
                break
        self._next = waiting[0].id if waiting else None


def _new_rows(curves: Curves, known: tuple[int, str] | None) -> dict[str, Any]:
    if known is None or (known[0] == curves.rows and known[1] == curves.mark(curves.rows)):
        return {}
    rows, mark = known
    now = {"rows": curves.rows, "mark": curves.mark(curves.rows)}
    if rows > curves.rows or mark != curves.mark(rows) or curves.rows - rows > MAX_TAIL:
        return now | {"reload": True}
    return now | {"from": rows, "new": curves.tail(rows)}


def _names(runs: Iterable[Run]) -> Iterator[str]:
    """For every run, as much of the end of its path as tells it from the others."""
    paths = [run.folder.absolute().parts for run in runs]
    deepest = max(map(len, paths), default=0)
    counts = [Counter(path[-n:] for path in paths) for n in range(1, deepest + 1)]
    for path in paths:
        ends = (path[-n:] for n in range(1, len(path)) if counts[n - 1][path[-n:]] == 1)
        yield utf8_name("/".join(next(ends, path)))


def parse_cursor(text: str) -> dict[str, tuple[int, str]]:
    """The cursor that a page sends, ``RUN:ROWS:MARK,…``; what does not parse is left out.

    >>> parse_cursor("0123456789ab:500:00c0ffee,nonsense")
    {'0123456789ab': (500, '00c0ffee')}
    """
    found = re.findall(r"\b([0-9a-f]{12}):([0-9]{1,9}):([0-9a-f]{8}|)(?:,|$)", text[:8192])
    return {run: (int(rows), mark) for run, rows, mark in found[:MAX_RUNS]}


def write_cursor(cursor: Cursor) -> str:
    """The inverse of ``parse_cursor``."""
    return ",".join(f"{run}:{rows}:{mark}" for run, (rows, mark) in cursor.items())
