"""Going back to an older checkpoint: what came after it is set aside, and nothing of it is lost."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

from tinygpt.files.atomic import building, sync, sync_folder
from tinygpt.files.disk import writing
from tinygpt.runs.folder import (
    BESIDE,
    BEST,
    best_checkpoint,
    checkpoint_path,
    list_checkpoints,
    mark_best,
    named_step,
)


def set_aside(
    folder: Path,
    step: int,
    best: tuple[int, float] | None = None,
    rows_too: bool = False,
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
        aside = _free_name(folder, step)
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


def _free_name(folder: Path, step: int) -> Path:
    first = folder / f"left-after-{step}"
    others = (first.with_name(f"{first.name}-{n}") for n in itertools.count(2))
    return next(path for path in itertools.chain([first], others) if not path.exists())


def _copy(source: Path, target: Path) -> None:
    """Of an ordinary file: links, pipes and folders of that name are left alone."""
    if source.is_symlink() or not source.is_file():
        return
    with source.open("rb") as old, target.open("xb") as new:
        shutil.copyfileobj(old, new)
        new.flush()
        sync(new.fileno())


def _mark_again(folder: Path, best: tuple[int, float] | None) -> None:
    if best is not None and checkpoint_path(folder, best[0]).is_file():
        mark_best(checkpoint_path(folder, best[0]), best[1])
    elif not (folder / BEST).is_dir():
        with writing(folder / BEST):
            (folder / BEST).unlink()
