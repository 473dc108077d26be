"""Which checkpoints of a folder are good, and which of them stay."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

from tinygpt.errors import CheckpointError
from tinygpt.runs.checkpoint.reader import verify
from tinygpt.runs.folder import best_checkpoint, list_checkpoints, named_step


class Verified:
    """Remembers which files were whole, so that none is read again unless it has changed."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[int, ...]] = {}

    def add(self, path: Path) -> None:
        """Take note of a file that was just written or checked."""
        self._known[path] = _stamp(path)

    def forget_all_but(self, paths: Iterable[Path]) -> None:
        """Forget files that are gone, so that a long run does not collect their names."""
        self._known = {path: self._known[path] for path in paths if path in self._known}

    def check(self, path: Path) -> None:
        """CheckpointError if the file is not a whole checkpoint of this folder's run."""
        try:
            if self._known.get(path) == _stamp(path):
                return
            verify(path)
            self.add(path)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error


def _stamp(path: Path) -> tuple[int, ...]:
    """What changes when a file's content does."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def newest_good(folder: Path) -> tuple[Path | None, list[CheckpointError]]:
    """-> the newest checkpoint of a folder that is whole, and what is wrong with those after it"""
    problems: list[CheckpointError] = []
    for path in reversed(list_checkpoints(folder)):
        try:
            verify(path)
        except CheckpointError as error:
            problems.append(error)
        else:
            return path, problems
    return None, problems


def remove_old(
    folder: Path, keep_last: int, verified: Verified | None = None, written: Path | None = None
) -> list[CheckpointError]:
    """Delete all but the newest ``keep_last`` good checkpoints and the best one; 0 deletes none.

    ``written`` is the checkpoint that was just saved: those of later steps are not this run's, so
    they neither count nor go.
    Damaged ones do not count, so that there is always a good one, and are not deleted: somebody may
    want to know what became of them. -> what is wrong with them. A file that cannot be deleted is
    left: that is no reason to stop a run.
    """
    if keep_last == 0:
        return []
    verified = verified or Verified()
    best = best_checkpoint(folder)
    problems: list[CheckpointError] = []
    good = 0
    last = None if written is None else named_step(written)
    found = list_checkpoints(folder)
    verified.forget_all_but(found)
    for path in reversed(found):
        if last is not None and (named_step(path) or 0) > last:
            continue
        try:
            verified.check(path)
        except CheckpointError as error:
            problems.append(error)
            continue
        good += 1
        if good > keep_last and path != best:
            with contextlib.suppress(OSError):
                path.unlink()
    return problems
