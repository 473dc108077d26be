"""Folders that an import or an export makes: whole or not at all, and never over another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tinygpt.errors import UsageError
from tinygpt.files import atomic
from tinygpt.files.disk import writing


def check_free(folder: Path) -> None:
    """UsageError if there is something in a folder, or a file of its name."""
    try:
        atomic.check_free(folder)
    except FileExistsError as error:
        raise UsageError(
            f"{folder} is there already, and nothing in it is overwritten. Choose another folder."
        ) from error


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which becomes ``folder`` at the end of the block, unless that failed.

    Raises UsageError if it is there already, CheckpointError if it cannot be written.
    """
    check_free(folder)
    with writing(folder), atomic.building(folder) as staging:
        yield staging
