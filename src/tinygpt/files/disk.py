"""Room on a disk, and advice where something cannot be written."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tinygpt.errors import CheckpointError

ADVICE = {
    errno.ENOSPC: "Make some room there, or choose a folder on another disk.",
    errno.EDQUOT: "Your quota is used up: delete files of yours, or choose a folder elsewhere.",
    errno.EROFS: "It lies on a disk that can only be read. Choose another folder.",
    errno.EACCES: "You may not write there. Choose another folder, or change its permissions.",
    errno.EPERM: "You may not write there. Choose another folder, or change its permissions.",
    errno.EIO: "The disk itself reports an error: it may be failing. Choose a folder elsewhere.",
    errno.ENOENT: "The folder has vanished. Was it moved, or its disk unmounted?",
}


def size(count: float) -> str:
    """A number of bytes as people read it.

    >>> size(300_000), size(62e6), size(1.3e9)
    ('0.3 MB', '62 MB', '1.3 GB')
    """
    if count >= 1e9:
        return f"{count / 1e9:,.1f} GB"
    return f"{count / 1e6:.0f} MB" if count >= 9.95e6 else f"{count / 1e6:.1f} MB"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError of the block, which writes ``path``, into a CheckpointError with advice."""
    try:
        yield
    except OSError as error:
        general = "Choose a folder with enough space that you may write to."
        advice = ADVICE.get(error.errno or 0, general)
        reason = error.strerror or error
        raise CheckpointError(f"{path} could not be written: {reason}. {advice}") from error


def free_space(folder: Path) -> int | None:
    """Bytes that can still be written where a folder is or will be; None if that is not known."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return None
    return usage.free if usage.total else None


def check_space(folder: Path, count: int) -> None:
    """Raise OSError, with both numbers in it, if the disk has fewer than ``count`` bytes left."""
    free = free_space(folder)
    if free is not None and free < count:
        raise OSError(errno.ENOSPC, f"{size(count)} are needed, and {size(free)} are free")
