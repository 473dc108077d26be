"""Who may ask: the gate in front of every route.

A server on 127.0.0.1 is within reach of every page that a browser on the same machine has open.
Such a page can send requests (the Origin header tells), and by a name that it points to 127.0.0.1
it can also read the answers (the Host header tells). Both are refused. Whoever opens the server
to a network needs a key.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import re
from collections.abc import Collection
from typing import TypedDict

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
"""What needs no key: pages that say nothing of the model until they are given one."""
BOARD_FOLDER = "/dashboard/"
"""What the dashboard tells: it has a key of its own, even where the model has none."""
PLACE = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([\w.-]+))(?::([0-9]{1,5}))?")
"""A Host header, or an Origin behind its scheme: a number in brackets or a name, maybe a port."""
READING = frozenset({"GET", "HEAD", "OPTIONS"})
EXPOSED = "retry-after, x-tinygpt-ignored-fields"
"""Headers of answers that pages of ``--cors-origin`` may read."""
PREFLIGHT_SECONDS = 600

Place = tuple[str, str]
"""Name and port in lower case; the port is empty where none is given."""


def is_loopback(host: str) -> bool:
    """Whether a server bound to this host can only be reached from its own machine.

    >>> is_loopback("localhost"), is_loopback("127.0.0.2"), is_loopback("::1"), is_loopback("::")
    (True, True, True, False)
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def parse_place(text: str) -> Place | None:
    """Name and port of a Host header.

    >>> parse_place("Box:80"), parse_place("[::1]"), parse_place("a b")
    (('box', '80'), ('::1', ''), None)
    """
    match = PLACE.fullmatch(text)
    return ((match[1] or match[2]).lower(), match[3] or "") if match else None


def allowed_place(text: str) -> Place:
    """The place that ``--allow-host`` names; a scheme before it and a slash behind do no harm."""
    scheme, mark, rest = text.strip().rpartition("://")
    place = parse_place(rest.removesuffix("/"))
    if place is None or (mark and scheme.lower() not in ("http", "https")):
        raise UsageError(
            f"--allow-host {text!r} is not the name of a host. Give the name that stands in the "
            f"browser's address, such as box.example."
        )
    return place


def allowed_origin(text: str) -> str:
    """The origin that ``--cors-origin`` names, as browsers write it; ``*`` is any."""
    origin = text.strip().lower().removesuffix("/")
    scheme, _, rest = origin.partition("://")
    if origin in ("*", "null") or (scheme and parse_place(rest)):
        return origin
    raise UsageError(
        f"--cors-origin {text!r} is not an origin. Give scheme, host and port as they stand in "
        f"the address of the page, such as http://localhost:3000, or '*' for any page."
    )


class GateOptions(TypedDict, total=False):
    """What a Gate can be told."""

    api_key: str | None
    board_key: str | None
    board_is_open: bool
    hosts: Collection[str]
    bound: str
    cors: Collection[str]


class Gate:
    """ASGI middleware: checks Host, Origin and key, and adds the headers that protect pages.

    ``hosts`` are names by which the server may be called besides ``localhost`` and ``bound``, the
    name that it listens on; pages that were loaded from one of them, through a proxy say, may send
    requests whatever Host the proxy puts there. A number is always right as a Host: only a name
    can be made to point elsewhere. ``cors`` are origins of other pages that may use the server.

    ``api_key`` is for everything that is not public, ``board_key`` for the dashboard; with
    ``board_is_open`` only for what changes something there.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_key: str | None = None,
        board_key: str | None = None,
        board_is_open: bool = False,
        hosts: Collection[str] = (),
        bound: str = "",
        cors: Collection[str] = (),
    ) -> None:
        self.app, self.api_key = app, api_key
        self.board_key, self.board_is_open = board_key, board_is_open
        self.places = set(map(allowed_place, hosts))
        self.hosts = {"localhost", bound.lower(), *(name for name, _ in self.places)}
        self.cors = frozenset(map(allowed_origin, cors))

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
            await answer(Response(status_code=GONE))  # nobody hears it; it is for the counts
        except asyncio.CancelledError:  # the server ends, and has waited long enough for this one
            if started:
                raise
            await answer(closing().response())
        except Exception:
            logger.exception("A request failed.")
            if started:
                raise  # the connection ends, so that nobody takes the part for the whole
            await answer(FAILURE.response())

    def _check(self, method: str, path: str, headers: Headers) -> None:
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._is_ours(hosts[0]):
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
        """The key that a request needs."""
        if path in PUBLIC or path.startswith(PUBLIC_FOLDER):
            return None
        if path.startswith(BOARD_FOLDER) and self.board_key is not None:
            return None if self.board_is_open and method in READING else self.board_key
        return self.api_key

    def _is_ours(self, host: str) -> bool:
        place = parse_place(host)
        return place is not None and (place[0] in self.hosts or _is_number(place[0]))

    def _may_send(self, headers: Headers, host: str) -> bool:
        """Whether a request that changes something comes from no page, or from a welcome one."""
        return _same_origin(headers, host) or self._is_known(headers) or self._is_welcome(headers)

    def _is_known(self, headers: Headers) -> bool:
        """Whether the page was loaded from one of our names, with any port if none was named."""
        scheme, _, rest = _origin(headers).partition("://")
        place = parse_place(rest) if scheme in ("http", "https") else None
        return place is not None and bool({place, (place[0], "")} & self.places)

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
    """Whether a browser asks, without a key, if a page may send what it wants to send."""
    return method == "OPTIONS" and "access-control-request-method" in headers


def _preflight(headers: Headers) -> Response:
    """Yes: whatever headers the page wants to send, those of OpenAI's client say."""
    told = {
        "access-control-allow-methods": "GET, POST",
        "access-control-allow-headers": headers.get("access-control-request-headers", ""),
        "access-control-max-age": str(PREFLIGHT_SECONDS),
    }
    if "access-control-request-private-network" in headers:
        told["access-control-allow-private-network"] = "true"
    return Response(status_code=204, headers=told)


def _is_number(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _origin(headers: Headers) -> str:
    """The one Origin of a request in lower case, or nothing."""
    origins = headers.getlist("origin")
    return origins[0].lower() if len(origins) == 1 else ""


def _same_origin(headers: Headers, host: str) -> bool:
    """Whether a request comes from no page, or from one with the address it was sent to."""
    if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        return False
    if not headers.getlist("origin"):
        return True
    scheme, _, place = _origin(headers).partition("://")
    return scheme in ("http", "https") and place == host.lower()
