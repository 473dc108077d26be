"""Sockets and connections: where the server listens, and the time limits of its clients."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import struct
from collections.abc import Callable, Generator, Mapping
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from tinygpt.errors import UsageError, extras
from tinygpt.server.http.limits import Limits
from tinygpt.server.http.refusal import Refusal

try:
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError as error:
    raise extras.missing("serve", f"uvicorn {uvicorn.__version__} has no H11Protocol.") from error

BACKLOG = 128
AT_ONCE = struct.pack("ii", 1, 0)
"""SO_LINGER: when this socket is closed, nothing lingers."""
NEARBY = 64
"""Ports that are tried to name a free one."""


def listen(host: str, port: int, flag: str = "--port") -> socket.socket:
    """A socket that listens there. Raises UsageError if the port is taken or the host is unknown.

    ``flag`` is the command line's name for the port.
    """
    if not 0 <= port <= 65535:
        raise UsageError(f"{flag} {port} is not a port: they go from 1 to 65535.")
    try:
        return _listen(host, port)
    except socket.gaierror as error:
        raise UsageError(f"--host {host}: there is no such host: {error.strerror}.") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            free = _free_port(host, port)
            raise UsageError(f"Port {port} is taken. A free one: {flag} {free}") from error
        if error.errno == errno.EACCES:
            message = f"Port {port} is for the system's own programs. Take one from 1024 up."
            raise UsageError(message) from error
        raise UsageError(f"--host {host} {flag} {port}: {error.strerror}.") from error


def _listen(host: str, port: int) -> socket.socket:
    info = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, _, _, _, address = info[0]
    listener = socket.create_server(address[:2], family=family, backlog=BACKLOG)
    # Connections inherit it. asyncio does not set it for this kind of socket; without it the body
    # of an answer waits 40 ms behind its head (Nagle's algorithm and delayed ACKs).
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _free_port(host: str, port: int) -> int:
    """One of the next ports, or any free one."""
    for candidate in [*range(port + 1, min(port + NEARBY, 65536)), 0]:
        with contextlib.suppress(OSError), _listen(host, candidate) as found:
            free: int = found.getsockname()[1]
            return free
    return 0


def url(listener: socket.socket, host: str) -> str:
    """The address to open in a browser."""
    port = listener.getsockname()[1]
    name = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
    return f"http://{f'[{name}]' if ':' in name else name}:{port}"


HOOKS: dict[type, tuple[str, ...]] = {
    uvicorn.Server: ("capture_signals", "run", "should_exit"),
    H11Protocol: (
        *("connection_made", "connection_lost", "handle_events", "on_response_complete"),
        *("pause_writing", "resume_writing", "connections", "cycle", "loop", "transport"),
    ),
}
"""Attributes of uvicorn that the classes below override and use; none is documented."""


def check_hooks(hooks: Mapping[type, tuple[str, ...]]) -> None:
    """Raise MissingExtraError, with the cure, if this uvicorn lacks any of them.

    An override of a method that uvicorn no longer calls would silently switch a limit off.
    """
    for base, names in hooks.items():
        known = {*dir(base), *vars(base)["__init__"].__code__.co_names}  # attributes too
        if lacking := [name for name in names if name not in known]:
            found = f"uvicorn {uvicorn.__version__} has no {base.__name__}.{lacking[0]}"
            raise extras.missing("serve", f"{found}, on which the limits of connections depend.")


check_hooks(HOOKS)


class Server(uvicorn.Server):
    """uvicorn with time limits for connections; the command line handles the signals."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        def protocol(*args: Any, **kwargs: Any) -> _Connection:
            return _Connection(limits, *args, **kwargs)

        config = uvicorn.Config(
            app,
            http=protocol,  # type: ignore[arg-type]  # whatever makes one
            loop="asyncio",
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            log_level="critical",  # what fails in a request is logged where it fails
            access_log=False,
            proxy_headers=False,  # any client can send X-Forwarded-For
            server_header=False,
            timeout_graceful_shutdown=limits.shutdown_seconds,
        )
        super().__init__(config)

    def stop(self) -> None:
        """Take no more connections, let running answers end, and return from ``run``."""
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave signals to the command line."""
        yield


class _Connection(H11Protocol):
    """A connection with time limits for sending requests and for reading answers."""

    def __init__(self, limits: Limits, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._most = limits.connections
        self._head = _Timer(self.loop, limits.header_seconds, self._cut_off)
        self._write = _Timer(self.loop, limits.write_seconds, self._cut_off)

    def _cut_off(self) -> None:
        """Close at once, without sending what is left, which the system would try as well."""
        own = self.transport.get_extra_info("socket")
        with contextlib.suppress(OSError):
            own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, AT_ONCE)
        self.transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # any unread byte counts
        self._head.start()
        if len(self.connections) > self._most:
            transport.write(_raw(Refusal(503, "There are too many connections. Try again soon.")))
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head.stop()
        self._write.stop()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete:
            self._head.stop()  # the application has a request, and its own limits for it

    def on_response_complete(self) -> None:
        self._head.start()
        super().on_response_complete()  # which takes up the next request if it has come already

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write.start()

    def resume_writing(self) -> None:
        self._write.stop()
        super().resume_writing()


class _Timer:
    """Calls a function once, some seconds after the last ``start``, unless it is stopped."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, seconds: float, action: Callable[[], None]
    ) -> None:
        self._loop, self._seconds, self._action = loop, seconds, action
        self._handle: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self.stop()
        self._handle = self._loop.call_later(self._seconds, self._action)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None


def _raw(refusal: Refusal) -> bytes:
    """The bytes of an answer for a connection that is not accepted."""
    body = bytes(refusal.response().body)
    head = (
        "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nretry-after: 1\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + body
