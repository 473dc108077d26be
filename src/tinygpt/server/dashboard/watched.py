"""One run folder as a dashboard shows it; its files may hold anything."""

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
from tinygpt.untrusted import clip, has_surrogates, is_number, utf8_name

MAX_SAMPLES, MAX_TEXT = 1000, 4000
"""Sample texts kept of a run, and characters of each."""
MAX_SETTINGS, MAX_VALUE = 200, 400
"""Settings that are shown, and characters of one."""


class Run:
    """One run folder. ``odd`` lists what is wrong with it, and hides nothing else."""

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
        """The run's figures at the last look."""
        self._metrics, self._samples = Tail(folder / METRICS), Tail(folder / SAMPLES)
        self._seen_config: object = None
        self._seen_folder: object = None
        self._why: str | None = None  # the settings could not be read
        self._checkpoints: dict[str, Any] = {"checkpoint": None, "best_checkpoint": None}
        self._trouble: dict[str, str] = {}
        self.card = self._card()

    def glance(self) -> None:
        """Look at the small files: the lock, the settings, the names of checkpoints."""
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
        """Take in the next slice of new rows; -> whether there is more.

        Files are read and parsed before the lock is taken, for which pages wait.
        """
        for tail in (self._metrics, self._samples):
            with self._guarded(tail.path.name):
                before, rows = tail.restarts, tail.look()
                with lock:
                    if tail.restarts != before:
                        self._forget(tail)
                    if tail is self._metrics:
                        self.curves.add(rows)
                    else:
                        self._add_samples(rows)
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
        found = [f"{where}: {why}" for where, why in self._trouble.items()]
        for tail in (self._metrics, self._samples):
            if tail.trouble is not None:
                found.append(f"{tail.path.name}: {tail.trouble[:1].upper()}{tail.trouble[1:]}.")
        if has_surrogates(str(self.folder.absolute())):
            found.append("Its path is not UTF-8.")
        return found + [f"{METRICS}: {reason}" for reason in sorted(self.curves.odd)]

    @contextlib.contextmanager
    def _guarded(self, where: str) -> Iterator[None]:
        """Catch whatever an odd file makes its reader raise, so that other runs are still shown."""
        try:
            yield
        except OSError as error:  # str(error) would show the folder's path
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
        best_iter, best_val_loss = best or (None, None)
        return {
            "state": self.state,
            "holder": None if self.holder is None else clip(self.holder),
            "max_iters": self.max_iters,
            **{key: curves.last(key) for key in last},
            "best_val_loss": best_val_loss,
            "best_iter": best_iter,
            "steps_per_second": self._pace(),
            "bits_per_nat": bits_per_byte(1.0, self.bytes_per_token),
            "skips": curves.skips,
            "damaged": self._metrics.damaged,
            "samples": len(self.samples),
            "odd": self.odd,
            **self._checkpoints,
        }

    def _forget(self, tail: Tail) -> None:
        """Drop the rows of a file that was replaced or cut."""
        self._trouble.pop(tail.path.name, None)
        if tail is self._metrics:
            self.curves = Curves()
        else:
            self.samples = []

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
        path, seen = self.folder / CONFIG, None
        with contextlib.suppress(FileNotFoundError):
            status = path.lstat()
            seen = (status.st_mtime_ns, status.st_size, status.st_ino)
        if self._seen_config != seen:
            self._seen_config, self.settings, self._why = seen, {}, None
            try:
                if path.is_symlink():
                    raise OSError("it is a link, and links are not followed")
                self.settings = {} if seen is None else _flat(read_config(path))
            except (OSError, ValueError, RecursionError) as error:
                self._why = clip(getattr(error, "strerror", None) or error)
        if self._why is not None:
            self._trouble[CONFIG] = f"Its settings cannot be read: {self._why}."

    def _read_checkpoints(self) -> None:
        """The newest and the best one, whenever something in the folder has got another name."""
        seen = self.folder.stat().st_mtime_ns
        if self._seen_folder == seen:
            return
        self._seen_folder = seen
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
    """Identifies a run by the path of its folder.

    >>> run_id(Path("/runs/mine"))
    '1a3d750d026c'
    """
    return hashlib.sha256(os.fsencode(folder.absolute())).hexdigest()[:12]


def _flat(tables: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of all tables by ``table.name``: the first ones, and the start of long ones."""
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
