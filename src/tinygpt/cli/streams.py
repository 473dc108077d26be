"""The program's standard streams: messages never fail, results and input fail in words.

A stream may be closed (``>&-``), full (a log on a full disk), a pipe whose reader is gone, or
shared with a program that set O_NONBLOCK, upon which a plain ``print`` loses a part of its text.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys
from collections.abc import Iterator
from typing import IO, Any, cast

from tinygpt.errors import StreamError
from tinygpt.runs.display.forgiving import Forgiving

CLOSED = (
    "stdin is closed, so there is nothing to read. Give it a file or a pipe, as in < FILE.",
    "stdout is closed, so there is nowhere to write to. Give it a file or a pipe, as in > FILE.",
    "stderr is closed.",
)


class _Descriptor(io.RawIOBase):
    """A standard stream by its number. Where the system would not wait, it does.

    Raises StreamError, and BrokenPipeError or its like once: after that it takes and drops all.
    """

    def __init__(self, number: int, *, is_open: bool = True, handle: int | None = None) -> None:
        self.number, self.is_open, self.dropping = number, is_open, False
        self.handle = number if handle is None else handle

    def fileno(self) -> int:
        return self.handle

    def isatty(self) -> bool:
        return self.is_open and os.isatty(self.handle)

    def readable(self) -> bool:
        return self.number == 0

    def writable(self) -> bool:
        return self.number != 0

    def write(self, data: Any) -> int:
        left = memoryview(data)
        if self.dropping:
            return left.nbytes
        with self._told("written"):
            while left:
                try:
                    left = left[os.write(self.handle, left) :]
                except BlockingIOError:
                    select.select([], [self.handle], [])
        return memoryview(data).nbytes

    def readinto(self, buffer: Any) -> int:
        with self._told("read"):
            while True:
                try:
                    read = os.read(self.handle, len(buffer))
                    break
                except BlockingIOError:
                    select.select([self.handle], [], [])
        buffer[: len(read)] = read
        return len(read)

    @contextlib.contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Say what is wrong with the stream, but for a reader that is gone."""
        if not self.is_open:
            raise StreamError(CLOSED[self.number])
        try:
            yield
        except ConnectionError:
            self.dropping = True
            _connect_to_null(self.handle)  # a child that writes to it would be killed by SIGPIPE
            raise
        except OSError as error:
            name = CLOSED[self.number].split()[0]
            raise StreamError(f"{name} cannot be {what}: {error.strerror}.") from error


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """Put such streams in the place of the process's own; those that a host has set stay.

    Messages on stderr are dropped where they cannot be written, whatever stream that is.
    """
    before = sys.stdin, sys.stdout, sys.stderr
    still_open = [_occupy(number) for number in range(3)]
    made = [
        _Descriptor(number, is_open=still_open[number] and stream is not None)
        for number, stream in enumerate(before)
    ]
    binaries = (io.BufferedReader(made[0]), made[1], made[2])
    for name, binary, stream in zip(("stdin", "stdout", "stderr"), binaries, before, strict=True):
        if stream in (None, getattr(sys, f"__{name}__")):
            setattr(sys, name, _text(binary, stream))
    sys.stderr = cast(io.TextIOWrapper, Forgiving.of(sys.stderr))
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        for descriptor in made:  # what failed, and is still buffered, is not tried once more
            descriptor.dropping = True
        sys.stdin, sys.stdout, sys.stderr = before


def _text(binary: Any, before: IO[str] | None) -> io.TextIOWrapper:
    """A stream that encodes and flushes as the one before, but escapes what that would refuse."""
    errors = getattr(before, "errors", "strict")
    return io.TextIOWrapper(
        binary,
        encoding=getattr(before, "encoding", "utf-8"),
        errors="backslashreplace" if errors == "strict" and binary.writable() else errors,
        newline="\n",
        line_buffering=getattr(before, "line_buffering", False),
        write_through=getattr(before, "write_through", False),
    )


def _occupy(number: int) -> bool:
    """Whether a descriptor is open. If not, it is kept from being given to the next file.

    A message that a library or a compiler writes to 2 would go into that file.
    """
    try:
        os.fstat(number)
    except OSError:
        _connect_to_null(number)
        return False
    return True


def _connect_to_null(number: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    if null == number:
        os.set_inheritable(number, True)
    else:
        os.dup2(null, number)
        os.close(null)
