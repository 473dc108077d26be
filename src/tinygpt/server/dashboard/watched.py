"""One run folder as a dashboard sees it: whatever its files hold, and whoever wrote them."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tinygpt.config import read_config
from tinygpt.runs.folder import (
    CONFIG,
    FAR,
    LOCK,
    MAX_ENTRIES,
    METRICS,
    SAMPLES,
    best_name,
    bytes_per_token_of,
    named_step,
    sample_of,
)
from tinygpt.runs.history import Row, Tail
from tinygpt.runs.lock import Holder, holder
from tinygpt.server.dashboard.curves import Curves
from tinygpt.training.metrics import bits_per_byte
from tinygpt.untrusted import (
    clip,
    has_surrogates,
    is_number,
    utf8_name,
)

MAX_SAMPLES, MAX_TEXT = 1000, 4000
"""Sample texts kept of a run, and characters of each."""
MAX_SETTINGS, MAX_VALUE = 200, 400
"""Settings that are shown, and characters of one."""


class Run:
    """One run folder. What is odd about it is said in ``odd`` and keeps nothing else from view."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.id = run_id(folder)
        self.name = utf8_name(folder.absolute().name)
        self.curves = Curves()
        self.samples: list[dict[str, Any]] = []
        self.settings: dict[str, Any] = {}
        self.bytes_per_token: float | None = None
        self.holder: Holder | None = None
        self.updated = 0.0
        """When its metrics were last written to, in seconds since 1970."""
        self.card: dict[str, Any] = {}
        """The figures of the run as it was seen last."""
        self._metrics, self._samples = Tail(folder / METRICS), Tail(folder / SAMPLES)
        self._restarts = [0, 0]
        self._seen: dict[str, object] = {}
        self._checkpoints: dict[str, Any] = {"checkpoint": None, "best_checkpoint": None}
        self._trouble: dict[str, str] = {}
        self.card = self._card()

    def glance(self) -> None:
        """Look at the small files: who trains, with which settings, and which checkpoints."""
        for name, read in (
            (LOCK, self._read_lock),
            (CONFIG, self._read_settings),
            ("checkpoints", self._read_checkpoints),
        ):
            with self._guarded(name):
                self._trouble.pop(name, None)
                read()
        self._show()

    def read(self, lock: contextlib.AbstractContextManager[Any]) -> bool:
        """Take in the next slice of the rows that are new; -> whether there is more.

        Files are read and parsed before the lock is taken, which pages wait for.
        """
        for which, tail, take in (
            (0, self._metrics, self._add_rows),
            (1, self._samples, self._add_samples),
        ):
            with self._guarded(tail.path.name):
                rows = tail.look()
                with lock:
                    if tail.restarts != self._restarts[which]:
                        self._restarts[which] = tail.restarts
                        self._forget(which)
                    take(rows)
        self._show()
        return self._metrics.more or self._samples.more

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

    @property
    def odd(self) -> list[str]:
        """What is wrong with the folder and its files, each with its reason."""
        told = [f"{where}: {why}" for where, why in self._trouble.items()]
        for tail in (self._metrics, self._samples):
            if tail.trouble is not None:
                told.append(f"{tail.path.name}: {tail.trouble[:1].upper()}{tail.trouble[1:]}.")
        if has_surrogates(str(self.folder.absolute())):
            told.append("Its path is not UTF-8.")
        return told + [f"{METRICS}: {reason}" for reason in sorted(self.curves.odd)]

    @contextlib.contextmanager
    def _guarded(self, where: str) -> Iterator[None]:
        """Whatever an odd file does to its reader ends here, and the other runs go on."""
        try:
            yield
        except OSError as error:  # its text would tell where the folder lies
            self._trouble[where] = f"It cannot be read: {error.strerror or type(error).__name__}."
        except Exception as error:
            kind = type(error).__name__
            self._trouble[where] = f"It cannot be read: {kind}: {clip(utf8_name(str(error)))}"

    def _show(self) -> None:
        with self._guarded("figures"):
            self._trouble.pop("figures", None)
            self.card = self._card()
            return
        self.card = self.card | {"odd": self.odd}

    def _card(self) -> dict[str, Any]:
        curves, best = self.curves, self.curves.best()
        last = ("iter", "train_loss", "val_loss", "lr", "tokens_per_second", "memory", "elapsed")
        return {
            "state": self.state,
            "holder": None if self.holder is None else clip(self.holder),
            "max_iters": self.max_iters,
            **{key: curves.last(key) for key in last},
            "best_val_loss": None if best is None else best[1],
            "best_iter": None if best is None else best[0],
            "steps_per_second": self._pace(),
            "bits_per_nat": bits_per_byte(1.0, self.bytes_per_token),
            "skips": curves.skips,
            "damaged": self._metrics.damaged,
            "samples": len(self.samples),
            "odd": self.odd,
            **self._checkpoints,
        }

    def _forget(self, which: int) -> None:
        """Drop what is known of a file that is another one now."""
        self._trouble.pop((METRICS, SAMPLES)[which], None)
        if which == 0:
            self.curves = Curves()
        else:
            self.samples = []

    def _add_rows(self, rows: Sequence[Row]) -> None:
        self.curves.add(rows)

    def _add_samples(self, rows: Sequence[Row]) -> None:
        for row in rows:
            if (sample := sample_of(row)) is not None:
                step, text = sample
                self.samples.append({"iter": step, "text": text[:MAX_TEXT]})
                if has_surrogates(text):
                    self._trouble[SAMPLES] = HALVES
        while len(self.samples) > MAX_SAMPLES:  # every other one goes, never the newest
            self.samples = self.samples[-1::-2][::-1]

    def _read_lock(self) -> None:
        self.holder = None
        self.holder = holder(self.folder)
        if has_surrogates(str(self.holder)):
            self._trouble[LOCK] = HALVES

    def _read_settings(self) -> None:
        self.bytes_per_token = bytes_per_token_of(self.folder)
        path = self.folder / CONFIG
        try:
            status = path.lstat()
        except FileNotFoundError:
            self.settings, self._seen = {}, {}
            return
        seen = (status.st_mtime_ns, status.st_size, status.st_ino)
        if self._seen.get(CONFIG) != seen:
            self._seen[CONFIG] = seen
            self.settings, why = {}, None
            try:
                if path.is_symlink():
                    raise OSError("it is a link, and links are not followed")
                self.settings = _flat(read_config(path))
            except (OSError, ValueError, RecursionError) as error:
                why = clip(getattr(error, "strerror", None) or error)
            self._seen["why"] = why
        if self._seen["why"] is not None:
            self._trouble[CONFIG] = f"Its settings cannot be read: {self._seen['why']}."

    def _read_checkpoints(self) -> None:
        """The newest and the best one, whenever something in the folder has got another name."""
        seen = self.folder.stat().st_mtime_ns
        if self._seen.get("folder") == seen:
            return
        self._seen["folder"] = seen
        with os.scandir(self.folder) as entries:
            names = [entry.name for entry in itertools.islice(entries, MAX_ENTRIES)]
        steps = {name: named_step(name) for name in names}
        numbered = [(step, name) for name, step in steps.items() if step is not None]
        best = best_name(self.folder)
        self._checkpoints = {
            "checkpoint": max(numbered)[1] if numbered else None,
            "best_checkpoint": best if best in steps else None,
        }

    def _pace(self) -> float | None:
        """Steps per second over the last rows, evaluations and saves included."""
        steps, elapsed = self.curves["iter"][-200:], self.curves["elapsed"][-200:]
        self._trouble.pop("pace", None)
        taken = float(elapsed[-1] - elapsed[0]) if len(steps) > 1 else 0.0
        if taken == 0 or math.isnan(taken):  # two rows within a tick, or rows without their time
            return None
        pace = float(steps[-1] - steps[0]) / taken
        if taken < 0 or not is_number(pace, 0, FAR):
            self._trouble["pace"] = f"The steps and times in {METRICS} give none."
            return None
        return pace


HALVES = "It holds half a character (a lone surrogate), which is shown as \ufffd."


def run_id(folder: Path) -> str:
    """What tells a run from all others, as long as it is in its place.

    >>> run_id(Path("/runs/mine"))
    '1a3d750d026c'
    """
    return hashlib.sha256(os.fsencode(folder.absolute())).hexdigest()[:12]


def _flat(tables: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of all tables by ``table.name``, so many and so long as can be shown."""
    flat = (
        (f"{t}.{k}", v)
        for t, table in tables.items()
        if isinstance(table, dict)
        for k, v in table.items()
    )
    return {
        name[:MAX_VALUE]: value
        if is_number(value, -1e300, 1e300) or type(value) is bool
        else str(value)[:MAX_VALUE]
        for name, value in itertools.islice(flat, MAX_SETTINGS)
    }
