"""Which files were whole when they were last read, so that a start need not hash them again.

To hash the weights of GPT-2 takes longer than to read them and to write the first word. So a file
whose bytes all had their hashes leaves a mark in the cache folder. The mark is named by its stamp:
device, inode, size, time of change (mtime, which programs can set) and of any change of the inode
(ctime, which they cannot), and the digest of the header, which holds the hashes. A file that was
written to, replaced, copied or renamed has another stamp, and is read in full again.

What a stamp cannot see are bits that change beneath the file system: a failing disk, or a program
that writes to the device itself. So a mark holds for a week, and only for models that are loaded to
write: resuming a run, beginning with other weights and ``tinygpt verify`` always read every byte.
"""

from __future__ import annotations

import hashlib
import os
import time
from contextlib import suppress
from pathlib import Path

from tinygpt.files.folders import cache_dir, put

WEEK = 7 * 86_400
"""Seconds that a mark holds."""
TICK = 2
"""Seconds that a file must be old to be marked. Times of files have ticks, of up to two seconds: a
file that was just written can be written to again without another time."""

Stamp = tuple[int, ...]


def stamp(found: os.stat_result) -> Stamp:
    """What changes when a file's content does: place, size and times."""
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def is_marked(of: Stamp, digest: bytes) -> bool:
    """Whether the file with this stamp and this digest of its header was whole within a week."""
    try:
        return 0 <= time.time() - _mark(of, digest).stat().st_mtime < WEEK
    except OSError:
        return False


def mark(of: Stamp, digest: bytes) -> None:
    """Remember that the file is whole, if it can be; ``of`` is its stamp from before it was read.

    To be called soon after: the file must have been old enough when it was read.
    """
    now = time.time()
    with suppress(OSError):
        path = _mark(of, digest)
        path.parent.mkdir(exist_ok=True)
        for old in path.parent.iterdir():
            if now - old.stat().st_mtime >= WEEK:
                old.unlink()
        put(path, b"")


def is_settled(of: Stamp) -> bool:
    """Whether the file is old enough now that any writing to it will change its stamp."""
    return time.time() - max(of[-2:]) / 1e9 > TICK


def _mark(of: Stamp, digest: bytes) -> Path:
    return cache_dir() / "verified" / hashlib.sha256(repr((of, digest)).encode()).hexdigest()
