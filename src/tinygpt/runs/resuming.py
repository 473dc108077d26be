"""Which checkpoint a run goes on from, and whether it may."""

from __future__ import annotations

from pathlib import Path

from tinygpt.errors import CheckpointError, UsageError
from tinygpt.files.atomic import user_path
from tinygpt.runs import checkpoint
from tinygpt.runs.folder import CONFIG, latest_checkpoint, run_of
from tinygpt.runs.output import Output


def find(resume: bool | str | Path, output: Output) -> Path | None:
    """The checkpoint to go on from; None for a run that was stopped before its first one.

    ``resume`` is True for the newest whole checkpoint of the run's own folder, or the path of a
    checkpoint or of a folder. Raises UsageError without a folder, and CheckpointError if no
    checkpoint is whole.
    """
    if resume is not True:
        return _newest_whole(user_path(str(resume)), output)
    if output.folder is None:
        raise UsageError("To resume, say which run: give its folder or a checkpoint.")
    if (output.folder / CONFIG).is_file() and not output.found:
        output.notices.add(f"{output.folder} has no checkpoint yet: it starts from its first step.")
        return None
    return _newest_whole(output.folder, output)


def _newest_whole(given: Path, output: Output) -> Path:
    """The newest checkpoint of a folder that is whole; the damaged ones after it are noticed."""
    if not given.is_dir():
        return latest_checkpoint(given)
    latest_checkpoint(given)  # there is one, whole or not
    path, problems = checkpoint.newest_good(given)
    if path is None:
        raise CheckpointError("\n".join(["No checkpoint is whole.", *map(str, problems)]))
    for problem in problems:
        output.notices.add(f"{problem} Going on from {path} instead.")
    return path


def check_same_folder(path: Path, meta: checkpoint.Meta, output: Output) -> None:
    """Raise UsageError if the run would go on in the folder of another one."""
    folder = output.folder
    if folder is None or path.resolve().parent == folder.resolve():
        return
    # a checkpoint without a run's number could only be saved to another place
    same = meta.run in (None, run_of(folder)) and meta.train is not None
    if output.found and not same:
        raise UsageError(
            f"{folder} holds another run than {path}, and nothing there is overwritten. Choose a "
            f"folder that is missing or empty."
        )
