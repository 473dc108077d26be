"""The run that a command takes where none is named: the one that changed last."""

from __future__ import annotations

from pathlib import Path

from tinygpt.cli.console import command, say
from tinygpt.errors import UsageError
from tinygpt.runs.folder import list_checkpoints, runs_in

RUNS = Path("runs")
"""The folder for runs without --out, below the current folder."""


def run_or_newest(run: Path | None) -> Path:
    """The run that was named, or the newest one here with a checkpoint, which a message names.

    Raises UsageError where there is none.
    """
    return newest_runs(1)[0] if run is None else run


def newest_runs(count: int, *, checkpoints: bool = True) -> list[Path]:
    """So many of the newest runs in ``RUNS``, named in a message; UsageError if there are fewer.

    Runs without a checkpoint count where ``checkpoints`` is False.
    """
    found = [run for _, run in runs_in(RUNS) if not checkpoints or list_checkpoints(run)][:count]
    if len(found) < count:
        what = "no run" if count == 1 else f"fewer than {count} runs"
        raise UsageError(
            f"Say which run: the folder that training wrote. There is {what} in {RUNS}/ here that "
            f"could be taken instead. To train one: {command('train', 'TEXT.txt')}"
        )
    say(f"run: {', '.join(map(str, found))} (the newest in {RUNS}/)")
    return found
