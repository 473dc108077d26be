"""A file of JSON lines that somebody else appends to, read from where the last look ended."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, BinaryIO

from tinygpt.training.metrics import MAX_LINE
from tinygpt.untrusted import is_sparse, open_regular, parse_json

CHUNK = 1 << 18
"""Bytes read in one look, or a line if that is longer; a long file takes several looks."""
MARK = 512
"""Bytes before the place reached that must still be the same, or the file is another one."""


class Tail:
    """The rows of a file, a look at a time.

    A resumed run cuts its file and goes on; a file may be replaced or vanish. All of that is seen
    by the bytes just before the place reached: if they differ, ``restarts`` grows and the rows come
    again from the first. A last line without its end waits until it has one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.restarts = self.damaged = 0
        self.more = False
        """Whether the last look ended before the file did."""
        self.trouble: str | None = None
        """Why a file that is there could not be read in the last look."""
        self._offset, self._mark = 0, b""

    def look(self) -> list[dict[str, Any]]:
        """Rows that are new since the last look; empty when there are none."""
        self.more, self.trouble = False, None
        try:
            lines = self._read()
        except FileNotFoundError:
            self._restart()
            return []
        except OSError as error:
            self.trouble = error.strerror or str(error)
            self._restart()
            return []
        rows, damaged = parse_rows(lines)
        self.damaged += damaged
        return rows

    def _read(self) -> bytes:
        """The next whole lines, about ``CHUNK`` bytes of them; OSError if the file is none."""
        with _open(self.path) as file:
            if not self._continues(file):
                self._restart()
            if os.fstat(file.fileno()).st_size == self._offset:
                return b""
            file.seek(self._offset)
            chunk = file.read(CHUNK)
            full = len(chunk) == CHUNK
            if full and b"\n" not in chunk:
                chunk += file.read(MAX_LINE)
        end = chunk.rfind(b"\n") + 1
        if end == 0 and len(chunk) >= MAX_LINE:  # no row is so long: its beginning is passed over
            end = len(chunk)
        self._offset, self.more = self._offset + end, full and end > 0
        self._mark = (self._mark + chunk[:end])[-MARK:]
        return chunk[:end]

    def _continues(self, file: BinaryIO) -> bool:
        file.seek(self._offset - len(self._mark))
        return file.read(len(self._mark)) == self._mark

    def _restart(self) -> None:
        if self._offset:
            self.restarts += 1
        self._offset, self._mark, self.damaged = 0, b"", 0


def _open(path: Path) -> BinaryIO:
    if path.is_symlink():  # it could lead out of the folder, to what is not to be shown
        raise OSError("It is a link, and links are not followed")
    file = open_regular(path)
    if is_sparse(file):
        file.close()
        raise OSError("It was hardly ever written: most of it is a hole")
    return file


def parse_rows(text: bytes) -> tuple[list[dict[str, Any]], int]:
    """The objects in lines of JSON, and how many lines were none.

    All lines are parsed at once, in a quarter of the time that one after the other takes; that way
    is for files in which something is wrong.
    """
    lines = [line for line in text.split(b"\n") if line.strip()]
    try:
        rows = json.loads(b"[" + b",".join(lines) + b"]")
    except (ValueError, RecursionError):
        rows = []
    if len(rows) != len(lines) or not all(type(row) is dict for row in rows):
        rows = [row for line in lines if (row := _parse(line)) is not None]
    return rows, len(lines) - len(rows)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = parse_json(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None
