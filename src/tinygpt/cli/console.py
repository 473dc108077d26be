"""How the commands speak: results on stdout, everything else on stderr."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from os import fsencode
from pathlib import Path
from typing import Any

from tinygpt.errors import DataError
from tinygpt.files.strict_json import to_json
from tinygpt.runs.display.text import printable
from tinygpt.untrusted import has_surrogates

PROGRAMS = ("tinygpt", "minimiggy")
FAILURE, WRONG_USE, INTERRUPTED, BROKEN_PIPE = 1, 2, 130, 141


def program_name() -> str:
    """The name the program was called by: ``tinygpt`` or ``minimiggy``."""
    name = Path(sys.argv[0]).stem if sys.argv else ""
    return name if name in PROGRAMS else PROGRAMS[0]


def command(*words: object) -> str:
    """A command line of this program that can be pasted into a shell."""
    return " ".join([program_name(), *map(_argument, words)])


def _argument(word: object) -> str:
    """A word, quoted. A path that begins with a hyphen must not be taken for a flag."""
    text = str(word)
    if isinstance(word, Path) and text.startswith("-"):
        text = f"./{text}"
    if not has_surrogates(text):
        return shlex.quote(text)
    plain = (
        chr(b) if 32 <= b < 127 and chr(b) not in "\\'" else f"\\x{b:02x}" for b in fsencode(text)
    )
    return f"$'{''.join(plain)}'"  # a name that is no UTF-8, as bash, zsh and ksh write it


def say(message: str) -> None:
    """Print a line on stderr, without what a terminal would obey."""
    print(printable(message), file=sys.stderr, flush=True)


def emit(text: str) -> None:
    """Text on stdout at once; a terminal gets it without what it would obey."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def read_stdin() -> str:
    """All of stdin as text. Raises DataError if it is not UTF-8, StreamError if it is closed."""
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"The text on stdin is not UTF-8: {error}.") from error


def show_json(value: Any) -> None:
    """The result for a program to read: one JSON value on stdout."""
    print(to_json(value, indent=2, other=str))


def aligned(rows: Sequence[Sequence[object]], right: Sequence[int] = ()) -> str:
    """Rows as lines, each column as wide as its widest cell; those in ``right`` end together.

    >>> print(aligned([("a", 1), ("long", 20)], right=[1]))
    a      1
    long  20
    """
    cells = [[printable(str(cell)) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )
