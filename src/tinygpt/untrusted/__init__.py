"""Reading what strangers wrote: bounds first, plain values only, and messages that quote little.

A file may come from anybody. It is opened only if it is an ordinary file, since opening a pipe
waits for ever; it is read up to a limit; what is parsed holds no number beyond 64 bits, no name
twice and no nesting beyond what Python can walk; and an error never repeats much of it.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import tomllib
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

LARGEST = (1 << 64) - 1
"""Largest whole number, by amount, that a file may hold."""
SPARSE = 16
"""A file of which less than one part in so many was ever written is refused as sparse."""
SMALL = 1 << 20
"""Bytes up to which a file may be as sparse as it likes."""
EXTENTS = 1 << 14
"""Written parts that are looked at to tell a sparse file from a full one."""
DEPTH = 64
"""Lists and objects within each other that a JSON text may hold: far from Python's own limit."""
MAX_DOTS, MAX_BRACKETS = 256, 1000
"""Dots in a name of a TOML text, and brackets in all, outside of its strings and comments."""
TOML_STRINGS = re.compile(
    r'"{3}(?:[^"\\]|\\.|"(?!""))*+(?:"{3,5}|\Z)'
    r"|'{3}(?:[^']|'(?!''))*+(?:'{3,5}|\Z)"
    r'|"(?:[^"\\\n]|\\.)*+"?'
    r"|'[^'\n]*+'?"
    r"|#[^\n]*+",
    re.DOTALL,
)
"""A string or a comment of TOML's grammar, each found in one pass. One without an end goes to where
the parser gives up."""


def brief(value: object, length: int = 40) -> str:
    """``repr`` of any value for a message, however large or deeply nested it is.

    >>> brief("x" * 100, length=5)
    "'xxxxx…'"
    >>> brief([[[]]])
    'a list of 1'
    """
    if isinstance(value, str | bytes):
        cut = value[:length]
        return repr(cut) if len(value) <= length else f"{repr(cut)[:-1]}…{repr(cut)[-1]}"
    if isinstance(value, int) and abs(value) > LARGEST:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, Mapping | Sequence | Set):
        return f"a {type(value).__name__} of {len(value)}"
    return clip(repr(value), length)


def clip(text: object, length: int = 200) -> str:
    """At most ``length`` characters of a message that others wrote, on one line.

    >>> clip("invalid: " + "x" * 100, length=12)
    'invalid: xxx…'
    """
    line = " ".join(str(text)[: length * 2].split())
    return line if len(line) <= length else line[:length] + "…"


def has_surrogates(text: str) -> bool:
    """Whether a text holds halves of characters, as JSON may, and so cannot be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def utf8_name(text: str) -> str:
    r"""A name with escapes for what is no UTF-8 in it: bytes of a file's name, lone surrogates.

    >>> utf8_name("caf\udce9")
    'caf\\xe9'
    """
    shown = re.sub("[\udc80-\udcff]", lambda byte: f"\\x{ord(byte[0]) - 0xDC00:02x}", text)
    return shown.encode("utf-8", "backslashreplace").decode()


def open_regular(path: str | Path) -> BinaryIO:
    """Open an ordinary file, or a link to one, for reading.

    Raises OSError, also for pipes, devices and sockets, which would wait, or never end, and for
    files of which nearly nothing was ever written.
    """
    _check_regular(path, os.stat(path))  # noqa: PTH116  # before: to open a device may do things
    file = open(path, "rb", opener=_open_without_waiting)  # noqa: SIM115
    try:
        _check_regular(path, os.fstat(file.fileno()))  # after: it may have been exchanged
        if is_sparse(file):
            raise OSError(errno.EINVAL, "nearly all of it was never written", str(path))
    except OSError:
        file.close()
        raise
    return file


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _check_regular(path: str | Path, status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is no ordinary file", str(path))


def read_bounded(path: str | Path, limit: int) -> bytes:
    """The content of an ordinary file of at most ``limit`` bytes; anything else is an OSError."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            reason = f"it has {size:,} bytes, and {limit:,} are the most that are read"
            raise OSError(errno.EFBIG, reason, str(path))
        return file.read(size)


def is_sparse(file: BinaryIO) -> bool:
    """Whether nearly all of a large file was never written: terabytes that cost their maker none.

    Such a file takes no space, yet to read it takes as long as if it did. Systems that cannot tell
    what was written, and files without holes, answer at once.
    """
    handle = file.fileno()
    size = os.fstat(handle).st_size
    if size <= SMALL or not hasattr(os, "SEEK_DATA"):
        return False
    place, before, written = 0, file.tell(), 0
    try:
        for _ in range(EXTENTS):
            start = os.lseek(handle, place, os.SEEK_DATA)
            place = os.lseek(handle, start, os.SEEK_HOLE)
            written += place - start
            if written * SPARSE >= size:
                return False
    except OSError as error:
        return error.errno == errno.ENXIO  # nothing more was written; else: cannot tell
    finally:
        os.lseek(handle, before, os.SEEK_SET)
    return True


def parse_json(content: str | bytes) -> Any:
    """The value of a JSON text in UTF-8. Whatever is wrong with it is a ValueError.

    Refused as well, though the grammar allows them: a name twice in one object, whole numbers
    beyond 64 bits, and nesting beyond ``DEPTH``.
    """
    text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_int=_integer)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _check_depth(value)
    return value


def parse_toml(content: bytes) -> dict[str, Any]:
    """What a TOML text in UTF-8 says. Whatever is wrong with it is a ValueError.

    Refused as well is a text that the parser would take for ever to read: its time grows with the
    cube of the dots in a name, and it calls itself for each bracket. What stands in strings and
    comments costs nothing.
    """
    text = content.decode("utf-8-sig")
    bare = TOML_STRINGS.sub('""', text)
    if bare.count("[") + bare.count("{") > MAX_BRACKETS:
        raise ValueError(f"there are more than {MAX_BRACKETS} brackets")
    if any(part.count(".") > MAX_DOTS for part in re.split("[\n={,]", bare)):
        raise ValueError(f"there are more than {MAX_DOTS} dots in a name")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _check_depth(value: Any) -> None:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(DEPTH):
        children = (v.values() if isinstance(v, dict) else v for v in level)
        level = [c for inner in children for c in inner if isinstance(c, dict | list)]
        if not level:
            return
    raise ValueError("it is nested too deeply")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("an object has the same name twice")
    return values


def _integer(digits: str) -> int:
    if len(digits) > 21 or abs(int(digits)) > LARGEST:
        raise ValueError(f"a number of {len(digits)} digits is too large")
    return int(digits)


def is_number(value: object, low: float, high: float) -> TypeGuard[float]:
    """Whether a value from a file is a number from ``low`` to ``high``: no bool, no NaN."""
    return type(value) in (int, float) and low <= value <= high  # type: ignore[operator]
