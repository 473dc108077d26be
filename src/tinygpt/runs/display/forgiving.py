"""Messages to a stream that may be full, closed, gone or none at all."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable
from typing import IO, Any, cast


class Forgiving:
    """A text stream that drops what it cannot write: no run ends because of its messages.

    ``stream`` is what the messages go to, or None where a program has no stderr. What its encoding
    does not hold is written as an escape.
    """

    def __init__(self, stream: IO[str] | None) -> None:
        self.stream = stream
        self.hung_up = False
        """Whether the reader of a pipe, or the other end of a socket, is gone."""

    @classmethod
    def of(cls, stream: IO[str] | None) -> IO[str]:
        """``stream`` itself if it forgives already, which keeps ``hung_up`` in one place."""
        return cast(IO[str], stream if isinstance(stream, cls) else cls(stream))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._attempt(self._write, text)
        return len(text)

    def flush(self) -> None:
        self._attempt(lambda stream: stream.flush())

    def isatty(self) -> bool:
        return bool(self._attempt(lambda stream: stream.isatty()))

    def fileno(self) -> int:
        if self.stream is None:
            raise io.UnsupportedOperation("fileno")
        return self.stream.fileno()

    def _attempt(self, action: Callable[..., Any], *given: Any) -> Any:
        """The result of an action on the stream, or None if it fails, with whatever error."""
        if self.stream is None or self.hung_up:
            return None
        try:
            return action(self.stream, *given)
        except ConnectionError:
            self.hung_up = True
        except Exception:  # that of a notebook's stream may be any
            return None
        return None

    def _write(self, stream: IO[str], text: str) -> None:
        try:
            stream.write(text)
        except UnicodeEncodeError:
            encoding = getattr(stream, "encoding", None) or "ascii"
            stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except RuntimeError:  # a signal handler came while the stream itself was writing
            with contextlib.suppress(OSError):
                os.write(stream.fileno(), text.encode(errors="backslashreplace"))


def hung_up(stream: object) -> bool:
    """Whether nobody can read a stream of messages any more, as behind ``2>&1 | head``."""
    return isinstance(stream, Forgiving) and stream.hung_up
