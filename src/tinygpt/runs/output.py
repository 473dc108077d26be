"""What a run writes into its folder: settings, rows, samples and checkpoints. See ``folder``."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinygpt.config import TrainConfig
from tinygpt.errors import CheckpointError, DataError, TinyGPTError, UsageError
from tinygpt.files.atomic import remove_stale, replacing, user_path
from tinygpt.files.disk import writing
from tinygpt.runs import checkpoint
from tinygpt.runs.folder import (
    CONFIG,
    METRICS,
    SAMPLES,
    TOKENIZER,
    latest_checkpoint,
    list_checkpoints,
    run_of,
)
from tinygpt.runs.history import Cut, History
from tinygpt.runs.lock import FolderLock, check_free
from tinygpt.untrusted import is_number

if TYPE_CHECKING:
    from tinygrad.nn.optim import Optimizer

    from tinygpt.model.transformer import Transformer
    from tinygpt.text.tokenizers import Tokenizer


class Notices:
    """Messages for the user: each is handed out once, and the last 1,000 are kept."""

    def __init__(self) -> None:
        self.kept: deque[str] = deque(maxlen=1000)
        self._new: list[str] = []

    def add(self, message: str) -> None:
        self._new.append(message)
        self.kept.append(message)

    def take(self) -> tuple[str, ...]:
        """The messages since the last call."""
        notices, self._new = tuple(self._new), []
        return notices


class Output:
    """The writer of a run's folder; without a folder, rows are kept in memory and nothing else.

    A disk that fails, a row that cannot be written or a folder that vanishes ends no run: it is a
    notice, and what was not written waits or is tried again.
    """

    def __init__(self, folder: Path | None, config: TrainConfig) -> None:
        self.folder, self.config, self.notices = folder, config, Notices()
        self.newest: Path | None = None
        """The newest checkpoint that is written."""
        self.found: list[Path] = []
        """The checkpoints that were there before the run."""
        self.history, self.samples = History(), History()
        self.saver: checkpoint.Saver | None = None
        self._lock = None if folder is None else FolderLock(folder)
        self._settings = ""
        self._tokenizer: Tokenizer | None = None
        self._bytes_per_token: float | None = None

    # ---- before the first step ----

    def check(self, resume: bool) -> None:
        """Raise UsageError if the folder must not be written to; nothing is changed there."""
        if self.folder is None:
            return
        check_free(self.folder)
        self.found = list_checkpoints(self.folder)
        if self.found and not resume:
            raise UsageError(
                f"{self.folder} holds a run already. Resume it, or choose another folder."
            )
        checkpoint.check_claim(self.folder)

    def find(self, resume: bool | str | Path) -> Path | None:
        """The checkpoint to go on from; None for a run that was stopped before its first one.

        ``resume`` is True for the newest whole checkpoint of the run's own folder, or the path of a
        checkpoint or of a folder. Raises UsageError without a folder, and CheckpointError if no
        checkpoint is whole. The damaged ones after the one that is taken are noticed.
        """
        given = self.folder if resume is True else user_path(str(resume))
        if given is None:
            raise UsageError("To resume, say which run: give its folder or a checkpoint.")
        if resume is True and (given / CONFIG).is_file() and not self.found:
            self.notices.add(f"{given} has no checkpoint yet: it starts from its first step.")
            return None
        latest = latest_checkpoint(given)  # there is one, whole or not
        if not given.is_dir():
            return latest
        path, problems = checkpoint.newest_good(given)
        if path is None:
            raise CheckpointError("\n".join(["No checkpoint is whole.", *map(str, problems)]))
        for problem in problems:
            self.notices.add(f"{problem} Going on from {path} instead.")
        return path

    def check_same_run(self, path: Path, meta: checkpoint.Meta) -> None:
        """UsageError if the run would go on in the folder of another one."""
        folder = self.folder
        if folder is None or not self.found or path.resolve().parent == folder.resolve():
            return
        # a checkpoint without a run's number could only be saved to another place
        if meta.run not in (None, run_of(folder)) or meta.train is None:
            raise UsageError(
                f"{folder} holds another run than {path}, and nothing there is overwritten. Choose "
                f"a folder that is missing or empty."
            )

    def foresee(self, size: int, steps: int) -> None:
        """Notice if checkpoints of ``size`` bytes during ``steps`` more steps will fill the disk.

        Raises CheckpointError if there is no room for a single one.
        """
        assert self.folder is not None
        coming = math.ceil(steps / self._interval)
        kept = min(self.config.keep_last or coming, coming) + 2  # the best, and one in the making
        if warning := checkpoint.foresee_space(self.folder, size, kept):
            self.notices.add(warning)

    def begin(
        self,
        settings: str,
        tokenizer: Tokenizer | None,
        bytes_per_token: float | None,
        iter_num: int,
        best: tuple[int, float] | None,
        anew: bool,
    ) -> None:
        """Take the folder and put it in order for a run that goes on from step ``iter_num``.

        ``settings`` is the text of config.toml, ``best`` step and loss of the best checkpoint so
        far. With ``anew`` the run does not go on from what the folder holds, unless that has
        checkpoints. What the folder holds of later steps is set aside. Raises UsageError if another
        run was in the folder since ``check``.
        """
        assert self.folder is not None
        self.take()
        checkpoint.check_claim(self.folder)
        if list_checkpoints(self.folder) != self.found:
            raise UsageError(f"{self.folder} was being trained until just now: try again.")
        remove_stale(self.folder)
        self.history = History(self.folder / METRICS)
        self.samples = History(self.folder / SAMPLES)
        first = partial(_sync, self.history, self.samples)
        self.saver = checkpoint.Saver(self.folder, self.config.keep_last, first)
        lost = anew and not self.found and self._had_a_checkpoint()
        if aside := checkpoint.set_aside(self.folder, iter_num, best, rows_too=lost):
            self.notices.add(
                f"{self.folder} has come further than step {iter_num}: what came after it is set "
                f"aside in {aside}, whole, and the run goes on from step {iter_num}."
            )
        self._settings, self._tokenizer = settings, tokenizer
        self._bytes_per_token = bytes_per_token
        self._write_settings()
        own = self.newest is not None and self.newest.parent == self.folder
        last = iter_num if self.found else 0
        self._cut(self.history, last, every_step=own)
        self._cut(self.samples, last)

    @property
    def _interval(self) -> int:
        """Steps between two checkpoints."""
        return self.config.checkpoint_interval or self.config.eval_interval

    def _had_a_checkpoint(self) -> bool:
        """Whether rows go so far that there was a checkpoint, which somebody has deleted."""
        try:
            return any(is_number(row.get("iter"), self._interval, math.inf) for row in self.history)
        except DataError:  # damaged lines: they are dropped later, with a notice
            return True

    def _cut(self, history: History, last: int, every_step: bool = False) -> None:
        try:
            cut = history.truncate_after(last, every_step)
        except OSError as error:
            self.notices.add(f"{history.path} could not be put in order: {error.strerror}.")
        else:
            for message in _lost(history.path, cut):
                self.notices.add(message)

    def _write_settings(self) -> None:
        """Write the mark of a run's folder first, so that the folder can be taken again."""
        assert self.folder is not None
        checkpoint.ensure_run(self.folder, self._bytes_per_token)
        with writing(self.folder), replacing(self.folder / CONFIG) as file:
            file.write(self._settings.encode())
        if self._tokenizer is not None:
            self._tokenizer.save(self.folder / TOKENIZER)

    # ---- while it trains ----

    def take(self) -> None:
        """Lock the folder, unless it is locked by this run already."""
        if self.folder is not None and self._lock is not None:
            with writing(self.folder):
                if warning := self._lock.acquire():
                    self.notices.add(warning)

    def release(self) -> None:
        """Unlock the folder."""
        if self._lock is not None:
            self._lock.release()

    def saving(self) -> AbstractContextManager[object]:
        """A context that ends when all checkpoints are written."""
        return self.saver or nullcontext()

    def append(self, history: History, row: Mapping[str, Any]) -> None:
        """Write a row; one that the disk does not take waits, which is a notice once."""
        waited = history.waiting
        try:
            history.append(row)
        except OSError as error:
            if not waited:
                self.notices.add(f"NOT WRITTEN: {history.path}: {error.strerror}. Its rows wait.")
        else:
            if waited:
                self.notices.add(
                    f"{history.path} is written again, with the {waited:,} that waited."
                )

    def save(
        self, model: Transformer, optimizer: Optimizer, meta: checkpoint.Meta, best: float | None
    ) -> Path:
        """Begin to save the state; ``hear`` reports the outcome. -> where it will be"""
        assert self.folder is not None and self.saver is not None
        if not self.folder.is_dir():
            self._make_folder_again()
        return self.saver.save(model, optimizer, meta, best)

    def hear(self) -> None:
        """Take in what became of the saves."""
        if self.saver is not None:
            self.newest = self.saver.newest or self.newest
            for message in self.saver.news():
                self.notices.add(message)

    def close(self) -> None:
        """Close the files and unlock the folder; ``take`` locks it again."""
        self.hear()
        for history in (self.history, self.samples):
            history.close()
            if history.waiting:
                self.notices.add(f"{history.path} lacks its last {history.waiting:,}: not written.")
        self.release()

    def _make_folder_again(self) -> None:
        """Somebody moved or deleted the folder, or its disk is gone; the weights are still here."""
        self.notices.add(
            f"{self.folder} HAS VANISHED. It is made again, with what comes from now on."
        )
        for history in (self.history, self.samples):
            history.close()
        self.release()  # a lock on a file that is no longer there
        try:
            self.take()
            self._write_settings()
        except TinyGPTError as error:
            self.notices.add(str(error))


def _sync(*histories: History) -> list[str]:
    """Sync the rows before their checkpoint is written, so that they are never behind it.

    Runs in the thread that saves; -> what went wrong.
    """
    news = []
    for history in histories:
        try:
            history.sync()
        except OSError as error:
            news.append(f"{history.path} may not be on the disk: {error}.")
    return news


def _lost(path: Path | None, cut: Cut) -> Iterator[str]:
    """What to say of a file of rows that was not whole."""
    if cut.damaged:
        yield f"{path}: {cut.damaged} damaged line(s) were dropped."
    if cut.missing:
        steps = f"{len(cut.missing):,} of its steps, from {cut.missing[0]} to {cut.missing[-1]}"
        yield f"{path} lacks {steps}: they were lost, but not what was learned in them."
