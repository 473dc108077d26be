"""A server in a thread of its own, beside a training that it must not slow down."""

from __future__ import annotations

import errno
import socket
import threading
from typing import Self

from starlette.types import ASGIApp

from tinygpt.errors import UsageError
from tinygpt.server.http.limits import Limits
from tinygpt.server.http.listening import Server, listen

TRIES = 20
"""Ports that are tried, one after the other."""


def listen_nearby(host: str, port: int, flag: str = "--port") -> socket.socket:
    """A socket that listens on ``port`` or, if it is taken, on one of the next ``TRIES`` - 1."""
    for candidate in [port, *range(port + 1, min(port + TRIES, 65536))]:
        try:
            return listen(host, candidate, flag)
        except UsageError as error:
            if getattr(error.__cause__, "errno", None) != errno.EADDRINUSE:
                raise
    raise UsageError(f"The ports from {port} to {port + TRIES - 1} are all taken. Choose another.")


class ServerThread:
    """Serves an application within a ``with`` block, in a daemon thread."""

    def __init__(self, app: ASGIApp, listener: socket.socket) -> None:
        self._server = Server(app, Limits(shutdown_seconds=1))
        self._thread = threading.Thread(
            target=self._server.run, args=([listener],), daemon=True, name="tinygpt-dashboard"
        )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop()
        self._thread.join(3)
