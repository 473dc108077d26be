"""Saving while the run goes on: copied in the step loop, hashed and written in a thread.

The order of what is written makes every instant of it a good one to be killed at:

1. the rows of the metrics up to this step are synced, so that a checkpoint is never ahead of them;
2. the checkpoint is written beside its name, synced and renamed (``files/atomic.replacing``);
3. best.json is replaced by one that names it, if it is the best: it never names a missing file;
4. older checkpoints are deleted, when the new one is known to be whole.

So a folder has at least one whole checkpoint from the first save on.
"""

from __future__ import annotations

import contextlib
import secrets
import shlex
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

from tinygpt.errors import CheckpointError
from tinygpt.runs.checkpoint.copier import Copier
from tinygpt.runs.checkpoint.format import Meta
from tinygpt.runs.checkpoint.keeping import Verified, remove_old
from tinygpt.runs.checkpoint.reader import read_meta
from tinygpt.runs.checkpoint.writer import Snapshot, write
from tinygpt.runs.folder import checkpoint_path, list_checkpoints, mark_best, mark_run, run_of

if TYPE_CHECKING:
    from tinygrad.nn.optim import Optimizer

    from tinygpt.model.transformer import Transformer

PAUSES = (0.5, 2.0, 5.0)
"""Seconds before each further try to write the last checkpoint of a run."""
REFUGES: dict[str, Callable[[], str | Path]] = {
    "the folder for temporary files": tempfile.gettempdir,
    "your home": Path.home,
    "the current folder": Path.cwd,
}
"""Where the last state is written if the run's folder takes none. Any of them may not exist."""


@dataclass
class _Job:
    snapshot: Snapshot
    meta: Meta
    best_loss: float | None
    """Given if it is the best checkpoint so far."""
    again: bool
    """Whether the attempt before failed."""
    error: Exception | None = None
    """Why it is not written yet."""


class Saver:
    """Saves the checkpoints of one run, each in a thread of its own, one after the other.

    It is a context manager: at its end the last checkpoint is written, or a CheckpointError is
    raised. Until then a checkpoint that cannot be written is only a message of ``news``.
    """

    def __init__(self, folder: Path, keep_last: int, first: Callable[[], list[str]] = list) -> None:
        """``first`` is called in the thread, before each checkpoint is written; it returns news."""
        self.folder, self.keep_last, self.first = folder, keep_last, first
        self.newest: Path | None = None
        """The last checkpoint that is written."""
        self._copier: Copier | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._writing: Future[None] | None = None
        self._unsaved: _Job | None = None
        self._unmarked: tuple[Path, float] | None = None
        self._verified = Verified()
        self._news: list[str] = []
        self._problems: set[str] = set()

    def save(
        self,
        model: Transformer,
        optimizer: Optimizer | None,
        meta: Meta,
        best_loss: float | None = None,
    ) -> Path:
        """Copy the state and begin to write it; -> where it will be.

        The save before is waited for. ``best_loss`` marks the best checkpoint so far.
        """
        self.wait()
        if self._copier is None:
            self._copier = Copier(model, optimizer)
        return self.save_snapshot(self._copier.copy(), meta, best_loss)

    def save_snapshot(self, snapshot: Snapshot, meta: Meta, best_loss: float | None = None) -> Path:
        """The same from a copy, which must not change until ``wait`` has returned."""
        self.wait()
        self._pool = self._pool or ThreadPoolExecutor(1, "tinygpt-checkpoint")
        job = _Job(snapshot, meta, best_loss, again=self._unsaved is not None)
        self._unsaved = job
        self._writing = self._pool.submit(self._write, job)
        return checkpoint_path(self.folder, meta.iter_num)

    def wait(self) -> None:
        """Until nothing is being written."""
        if self._writing is not None:
            self._writing.result()

    def news(self) -> list[str]:
        """What has gone wrong, or is well again, since the last call."""
        count = len(self._news)  # the thread may add more meanwhile
        found, self._news[:count] = self._news[:count], []
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.wait()
        if self._pool is not None:
            self._pool.shutdown()
        self._pool = self._copier = None
        for pause in PAUSES if error is None else ():
            if self._unsaved is not None:
                time.sleep(pause)
                self._unsaved.again = True
                self._write(self._unsaved)
        if self._unsaved is not None:
            message = self._rescue(self._unsaved)
            if error is None or isinstance(error, GeneratorExit):
                raise CheckpointError(message) from self._unsaved.error
            error.add_note(message)

    # ---- in the thread ----

    def _write(self, job: _Job) -> None:
        path = checkpoint_path(self.folder, job.meta.iter_num)
        try:
            self._news += self.first()
            run = ensure_run(self.folder)
            write(path, job.snapshot, replace(job.meta, run=run))
            self._verified.add(path)
        except Exception as error:  # any error: it would be lost with the thread
            job.error = error
            self._news.append(f"NOT SAVED: {error} The run goes on and tries again.")
            return
        self._unsaved, self.newest = None, path
        if job.again:
            self._news.append(f"saving works again: {path}")
        if job.best_loss is not None:
            self._unmarked = path, job.best_loss
        try:
            self._tidy()
        except Exception as error:
            self._news.append(f"Old checkpoints are not deleted: {error}")

    def _tidy(self) -> None:
        """Mark the best checkpoint and delete old ones, which has to wait for the mark."""
        if self._unmarked is not None:
            mark_best(*self._unmarked)
            self._unmarked = None
        problems = remove_old(self.folder, self.keep_last, self._verified, self.newest)
        for problem in map(str, problems):
            if problem not in self._problems:
                self._problems.add(problem)
                self._news.append(f"{problem} It is left there, and an older one is kept for it.")

    def _rescue(self, job: _Job) -> str:
        """Write the checkpoint to another place; -> the message that says where it is"""
        step = job.meta.iter_num
        for place in REFUGES.values():
            path = _write_below(place, step, job)
            if path is None:
                continue
            return (
                f"{job.error}\nThe state of step {step} was written to {path} instead. Once "
                f"{self.folder} can be written again, move it there and resume the run:\n"
                f"  {shlex.join(['mv', str(path), f'{self.folder}/'])}\n"
                f"  {shlex.join(['tinygpt', 'train', '--resume', '--out', str(self.folder)])}"
            )
        newest = self.newest or next(reversed(list_checkpoints(self.folder)), None)
        kept = f"The newest checkpoint is {newest}." if newest else "There is no other checkpoint."
        *others, last = REFUGES
        return (
            f"{job.error}\nNor could the state of step {step} be written to {', '.join(others)} or "
            f"{last}: it is lost. {kept}"
        )


def ensure_run(folder: Path, bytes_per_token: float | None = None) -> str:
    """The number of a folder's run; a new one is drawn and written down if there is none.

    Bytes per token are written down where they are given.
    """
    run = run_of(folder)
    if run is None or bytes_per_token is not None:
        run = run or _run_of_newest(folder) or secrets.token_hex(8)
        mark_run(folder, run, bytes_per_token)
    return run


def _write_below(place: Callable[[], str | Path], step: int, job: _Job) -> Path | None:
    """Write the checkpoint into a new folder of that place; None if it cannot be."""
    folder = None
    try:
        folder = Path(tempfile.mkdtemp(prefix="tinygpt-rescued-", dir=place()))
        return write(checkpoint_path(folder, step), job.snapshot, job.meta)
    except (OSError, RuntimeError, CheckpointError):  # the second: there is no home folder
        if folder is not None:
            with contextlib.suppress(OSError):
                folder.rmdir()
        return None


def _run_of_newest(folder: Path) -> str | None:
    for path in reversed(list_checkpoints(folder)):
        with contextlib.suppress(CheckpointError):
            if run := read_meta(path).run:
                return run
    return None
