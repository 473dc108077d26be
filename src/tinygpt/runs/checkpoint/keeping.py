"""What may happen to the checkpoints of a folder: which stay, which go, which are set aside.

Also whether a folder may take a run at all: one that is missing, empty, or a run's already.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
from collections.abc import Iterable
from pathlib import Path

from tinygpt.config import read_config
from tinygpt.errors import CheckpointError, UsageError
from tinygpt.files.atomic import TEMPORARY, building, sync, sync_folder
from tinygpt.files.disk import writing
from tinygpt.runs import lock
from tinygpt.runs.checkpoint.format import FREE
from tinygpt.runs.checkpoint.reader import read_meta, verify
from tinygpt.runs.checkpoint.stamps import Stamp, stamp
from tinygpt.runs.folder import (
    BESIDE,
    BEST,
    CONFIG,
    LOCK,
    best_checkpoint,
    checkpoint_path,
    list_checkpoints,
    mark_best,
    named_step,
    run_of,
)
from tinygpt.untrusted import clip, utf8_name

MOST_NAMED = 4
"""Entries of a refused folder that the error names."""


# ---- which checkpoints stay ----


class Verified:
    """Remembers which files were whole, so that none is read again unless it has changed."""

    def __init__(self) -> None:
        self._known: dict[Path, Stamp] = {}

    def add(self, path: Path) -> None:
        """Take note of a file that was just written or checked."""
        self._known[path] = stamp(path.stat())

    def forget_all_but(self, paths: Iterable[Path]) -> None:
        """Forget files that are gone, so that a long run does not collect their names."""
        self._known = {path: self._known[path] for path in paths if path in self._known}

    def check(self, path: Path) -> None:
        """CheckpointError if the file is not a whole checkpoint of this folder's run."""
        try:
            if self._known.get(path) != stamp(path.stat()):
                verify(path)
                self.add(path)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error


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

    ``written`` is the checkpoint that was just saved. Checkpoints of later steps belong to another
    run: they neither count nor are deleted. Damaged ones do not count, so that a good one is always
    left, and they stay, so that they can be looked into; the list returned says what is wrong with
    them. A file that cannot be deleted stays too, since that is no reason to stop a run.
    """
    if keep_last == 0:
        return []
    verified, best, good = verified or Verified(), best_checkpoint(folder), 0
    problems: list[CheckpointError] = []
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


# ---- which folder may take a run ----


def check_claim(folder: Path) -> None:
    """UsageError if there is something in ``folder`` that is not a run's.

    Nothing is changed there, so that a folder that is refused stays as it was, its times included.
    Raises CheckpointError if the folder cannot be listed.
    """
    if not folder.is_dir():
        return
    with writing(folder):
        names = foreign(folder)
    if names:
        more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
        listed = clip(utf8_name(", ".join(names[:MOST_NAMED])))
        raise UsageError(
            f"{folder} is not the folder of a run: it holds {listed}{more}, and a run would write "
            f"its files among them. Nothing was changed there. Choose a folder that is missing or "
            f"empty, such as {folder / 'run'}."
        )


def foreign(folder: Path) -> list[str]:
    """Names of entries that no run has put into a folder; none if it is marked as a run's.

    Without the mark, files count as a run's if config.toml says what the newest checkpoint says.
    """
    names = {path.name for path in folder.iterdir() if not TEMPORARY.fullmatch(path.name)}
    if run_of(folder) is not None:
        return []
    if lock.is_lock(folder / LOCK):
        names.discard(LOCK)
    for path in reversed(list_checkpoints(folder)):
        with contextlib.suppress(CheckpointError):
            shape = read_meta(path).model.to_dict()
            names -= {path.name for path in list_checkpoints(folder)}
            return sorted(names - BESIDE if _says(folder, shape) else names)
    return sorted(names)


def _says(folder: Path, shape: dict[str, object]) -> bool:
    """Whether the config.toml of a folder describes a model of this shape."""
    try:
        table = read_config(folder / CONFIG)["model"]
        return all(table.get(name) == shape[name] for name in shape if name not in FREE)
    except (OSError, ValueError, KeyError, AttributeError):
        return False


# ---- going back to an older checkpoint ----


def set_aside(
    folder: Path, step: int, best: tuple[int, float] | None = None, rows_too: bool = False
) -> Path | None:
    """Move the checkpoints after ``step`` to a folder below; -> that folder, None without any

    It becomes a run folder of its own, with copies of the settings, the metrics and the samples as
    they were, so that it can be looked at, generated from and resumed. ``best`` is step and loss of
    the best checkpoint up to ``step``; it is marked again if the one marked has gone. ``rows_too``
    sets aside what is there even without a later checkpoint. Raises CheckpointError.
    """
    later = [path for path in list_checkpoints(folder) if (named_step(path) or 0) > step]
    marked = best_checkpoint(folder)
    aside = None
    if later or rows_too:
        names = (f"left-after-{step}" + (f"-{n}" if n > 1 else "") for n in itertools.count(1))
        aside = next(path for name in names if not (path := folder / name).exists())
        # The copies appear first and all at once. A crash between two of the moves leaves each
        # checkpoint in one of two complete run folders.
        with writing(aside), building(aside) as staging:
            for name in sorted(BESIDE - (set() if marked in later else {BEST})):
                _copy(folder / name, staging / name)
        with writing(aside):
            for path in later:
                path.replace(aside / path.name)
            sync_folder(aside)
            sync_folder(folder)
    if (folder / BEST).exists() and best_checkpoint(folder) is None:
        _mark_again(folder, best)
    return aside


def _copy(source: Path, target: Path) -> None:
    """Copy an ordinary file to the disk; links, pipes and folders of that name are left alone."""
    if source.is_symlink() or not source.is_file():
        return
    with source.open("rb") as old, target.open("xb") as new:
        shutil.copyfileobj(old, new)
        new.flush()
        sync(new.fileno())


def _mark_again(folder: Path, best: tuple[int, float] | None) -> None:
    """Make best.json name the best checkpoint that is left, or delete it if there is none."""
    if best is not None and checkpoint_path(folder, best[0]).is_file():
        mark_best(checkpoint_path(folder, best[0]), best[1])
    elif not (folder / BEST).is_dir():
        with writing(folder / BEST):
            (folder / BEST).unlink()
