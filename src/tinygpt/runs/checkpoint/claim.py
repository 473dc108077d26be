"""Whether a folder may take a run: one that is missing, empty, or a run's already.

Nothing is changed here, so that a folder which is refused stays as it was, its times included.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from tinygpt.config import read_config
from tinygpt.errors import CheckpointError, UsageError
from tinygpt.files.atomic import TEMPORARY
from tinygpt.files.disk import writing
from tinygpt.runs import lock
from tinygpt.runs.checkpoint.format import Meta
from tinygpt.runs.checkpoint.reader import read_meta
from tinygpt.runs.folder import BESIDE, CONFIG, LOCK, list_checkpoints, run_of
from tinygpt.untrusted import clip, utf8_name

MOST_NAMED = 4
"""Entries of a refused folder that the error names."""
NOT_SHAPE = ("dropout", "attention")
"""Model settings that may differ between config.toml and an older checkpoint of the same run."""


def check_claim(folder: Path) -> None:
    """UsageError if there is something in ``folder`` that is not a run's.

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
    if (meta := _newest_meta(folder)) is not None:
        names -= {path.name for path in list_checkpoints(folder)}
        if _says_the_same(folder, meta):
            names -= BESIDE
    return sorted(names)


def _newest_meta(folder: Path) -> Meta | None:
    for path in reversed(list_checkpoints(folder)):
        with contextlib.suppress(CheckpointError):
            return read_meta(path)
    return None


def _says_the_same(folder: Path, meta: Meta) -> bool:
    try:
        table = read_config(folder / CONFIG)["model"]
        shape = meta.model.to_dict()
        return all(table.get(name) == shape[name] for name in shape if name not in NOT_SHAPE)
    except (OSError, ValueError, KeyError, AttributeError):
        return False
