"""Access control: the middleware that checks Host, Origin and key of every request.

A server on 127.0.0.1 is within reach of every page that a browser on the same machine has open.
Such a page can send requests, which the Origin header shows, and under a name that resolves to
127.0.0.1 it can also read the answers, which the Host header shows (DNS rebinding). Both are
refused. A server that a network can reach needs a key.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import re
from collections.abc import Collection
from typing import TypedDict, Unpack

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tinygpt.errors import UsageError
from tinygpt.server.http.refusal import FAILURE, GONE, Refusal, closing

logger = logging.getLogger(__name__)

CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": CSP,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}
"""On every answer that does not set them itself."""

PUBLIC = frozenset({"/", "/dashboard", "/healthz", "/favicon.ico"})
PUBLIC_FOLDER = "/page/"
"""Paths without a key: the pages themselves, which hold no data."""
BOARD_FOLDER = "/dashboard/"
"""The dashboard's data, which has a key of its own even if the model has none."""
PLACE = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([\w.-]+))(?::([0-9]{1,5}))?")
"""A Host header, or an Origin without its scheme: [address] or name, maybe with a port."""
READING = frozenset({"GET", "HEAD", "OPTIONS"})
EXPOSED = "retry-after, x-tinygpt-ignored-fields"
"""Headers of answers that pages of ``--cors-origin`` may read."""
PREFLIGHT_SECONDS = 600

HostPort = tuple[str, str]
"""Name and port in lower case; the port is empty where none is given."""


def is_loopback(host: str) -> bool:
    """Whether a server bound to this host is reachable only from its own machine.

    >>> is_loopback("localhost"), is_loopback("127.0.0.2"), is_loopback("::1"), is_loopback("::")
    (True, True, True, False)
    """
    address = _address(host)
    return host == "localhost" if address is None else address.is_loopback


def parse_host(text: str) -> HostPort | None:
    """Name and port of a Host header.

    >>> parse_host("Box:80"), parse_host("[::1]"), parse_host("a b")
    (('box', '80'), ('::1', ''), None)
    """
    match = PLACE.fullmatch(text)
    return ((match[1] or match[2]).lower(), match[3] or "") if match else None


def allowed_host(text: str) -> HostPort:
    """Name and port of ``--allow-host``; a scheme before it and a slash after it are ignored."""
    scheme, mark, rest = text.strip().rpartition("://")
    host_port = parse_host(rest.removesuffix("/"))
    if host_port is None or (mark and scheme.lower() not in ("http", "https")):
        raise UsageError(
            f"--allow-host {text!r} is not the name of a host. Give the name that stands in the "
            f"browser's address, such as box.example."
        )
    return host_port


def allowed_origin(text: str) -> str:
    """The origin that ``--cors-origin`` names, as browsers write it; ``*`` is any."""
    origin = text.strip().lower().removesuffix("/")
    scheme, _, rest = origin.partition("://")
    if origin in ("*", "null") or (scheme and parse_host(rest)):
        return origin
    raise UsageError(
        f"--cors-origin {text!r} is not an origin. Give scheme, host and port as they stand in "
        f"the address of the page, such as http://localhost:3000, or '*' for any page."
    )


class AccessOptions(TypedDict, total=False):
    """The options of `AccessControl`."""

    api_key: str | None
    board_key: str | None
    board_is_open: bool
    hosts: Collection[str]
    bound: str
    cors: Collection[str]


class AccessControl:
    """ASGI middleware: checks Host, Origin and key, and adds the headers that protect pages.

    ``hosts`` are valid Host headers besides ``localhost`` and ``bound``, the name that the server
    listens on; pages from one of them, loaded through a proxy for example, may send requests
    whatever Host the proxy writes. An IP address is always valid as a Host: only a name can be
    made to resolve elsewhere. ``cors`` are origins of other pages that may use the server.

    ``api_key`` is for everything that is not public, ``board_key`` for the dashboard; with
    ``board_is_open`` only for what changes something there.
    """

    def __init__(self, app: ASGIApp, **options: Unpack[AccessOptions]) -> None:
        self.app, self.api_key = app, options.get("api_key")
        self.board_key = options.get("board_key")
        self.board_is_open = options.get("board_is_open", False)
        self.names = set(map(allowed_host, options.get("hosts", ())))
        bound = options.get("bound", "").lower()
        self.hosts = {"localhost", bound, *(name for name, _ in self.names)}
        self.cors = frozenset(map(allowed_origin, options.get("cors", ())))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        started, given = False, Headers(scope=scope)
        added = HEADERS | self._cors_headers(given)

        async def send_protected(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                for name, value in added.items():
                    headers.setdefault(name, value)
            await send(message)

        async def answer(response: ASGIApp) -> None:
            await response(scope, receive, send_protected)

        try:
            self._check(scope["method"], scope["path"], given)
            if _is_preflight(scope["method"], given) and self._is_welcome(given):
                await answer(_preflight(given))
            else:
                await self.app(scope, receive, send_protected)
        except Refusal as refusal:
            await answer(refusal.response())
        except ClientDisconnect:
            await answer(Response(status_code=GONE))  # not sent: for the counts only
        except asyncio.CancelledError:  # the server ends; its time for answers is over
            if started:
                raise
            await answer(closing().response())
        except Exception:
            logger.exception("A request failed.")
            if started:
                raise  # the connection ends: a part must not look like the whole
            await answer(FAILURE.response())

    def _check(self, method: str, path: str, headers: Headers) -> None:
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._is_valid_host(hosts[0]):
            raise Refusal(
                403,
                "The Host header names a server that this one is not. Open it by the address that "
                "it printed, or start it with --allow-host and the name.",
                code="wrong_host",
            )
        if method not in READING and not self._may_send(headers, hosts[0]):
            raise Refusal(
                403,
                "A page of another origin may not send requests here. If it is this server's, "
                "behind a proxy, start it with --allow-host and the name in the page's address; "
                "if it is another program's, with --cors-origin and its origin.",
                code="wrong_origin",
            )
        key = self._key_for(method, path)
        if key is not None and not _is_preflight(method, headers):
            _check_key(headers.getlist("authorization"), key)

    def _key_for(self, method: str, path: str) -> str | None:
        """The key that a request needs, if any."""
        if path in PUBLIC or path.startswith(PUBLIC_FOLDER):
            return None
        if path.startswith(BOARD_FOLDER) and self.board_key is not None:
            return None if self.board_is_open and method in READING else self.board_key
        return self.api_key

    def _is_valid_host(self, host: str) -> bool:
        host_port = parse_host(host)
        return host_port is not None and (
            host_port[0] in self.hosts or _address(host_port[0]) is not None
        )

    def _may_send(self, headers: Headers, host: str) -> bool:
        """Whether a POST comes from no page, from one of ours, or from one of --cors-origin."""
        return _same_origin(headers, host) or self._is_known(headers) or self._is_welcome(headers)

    def _is_known(self, headers: Headers) -> bool:
        """Whether the page was loaded from one of --allow-host, with any port if none was given."""
        scheme, _, rest = _origin(headers).partition("://")
        host_port = parse_host(rest) if scheme in ("http", "https") else None
        return host_port is not None and bool({host_port, (host_port[0], "")} & self.names)

    def _is_welcome(self, headers: Headers) -> bool:
        """Whether the page is one of --cors-origin."""
        origin = _origin(headers)
        return bool(origin) and bool({origin, "*"} & self.cors)

    def _cors_headers(self, headers: Headers) -> dict[str, str]:
        if not self.cors:
            return {}
        if not self._is_welcome(headers):
            return {"vary": "origin"}
        allowed = {"access-control-allow-origin": headers["origin"]}
        return {**allowed, "access-control-expose-headers": EXPOSED, "vary": "origin"}


def _check_key(given: list[str], wanted: str) -> None:
    scheme, _, key = given[0].partition(" ") if len(given) == 1 else ("", "", "")
    right = hmac.compare_digest(key.strip().encode(), wanted.encode())
    if scheme.lower() != "bearer" or not right:
        raise Refusal(
            401,
            "The API key is missing or wrong. Send it as: Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )


def _is_preflight(method: str, headers: Headers) -> bool:
    """Whether this is a browser's CORS preflight, which carries no key."""
    return method == "OPTIONS" and "access-control-request-method" in headers


def _preflight(headers: Headers) -> Response:
    """Allows any header: OpenAI's client sends many."""
    allowed = {
        "access-control-allow-methods": "GET, POST",
        "access-control-allow-headers": headers.get("access-control-request-headers", ""),
        "access-control-max-age": str(PREFLIGHT_SECONDS),
    }
    if "access-control-request-private-network" in headers:
        allowed["access-control-allow-private-network"] = "true"
    return Response(status_code=204, headers=allowed)


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def _origin(headers: Headers) -> str:
    """The one Origin of a request in lower case, or nothing."""
    origins = headers.getlist("origin")
    return origins[0].lower() if len(origins) == 1 else ""


def _same_origin(headers: Headers, host: str) -> bool:
    """Whether a request comes from no page, or from a page of the same origin."""
    if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        return False
    if not headers.getlist("origin"):
        return True
    scheme, _, host_port = _origin(headers).partition("://")
    return scheme in ("http", "https") and host_port == host.lower()
