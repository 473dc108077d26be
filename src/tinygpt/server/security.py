"""Who may ask: the gate in front of every route.

A server on 127.0.0.1 is within reach of every page that a browser on the same machine has open.
Such a page can send requests (the Origin header tells), and by a name that it points to 127.0.0.1
it can also read the answers (the Host header tells). Both are refused. Whoever opens the server
to a network needs a key.
"""

from __future__ import annotations

import hmac
import ipaddress
import logging
import re
from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tinygpt.server.refusal import FAILURE, Refusal

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
HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([\w.-]+))(?::[0-9]{1,5})?")
"""A Host header: a number in brackets or a name, and perhaps a port."""
READING = frozenset({"GET", "HEAD", "OPTIONS"})


def is_loopback(host: str) -> bool:
    """Whether a server bound to this host can only be reached from its own machine.

    >>> is_loopback("localhost"), is_loopback("127.0.0.2"), is_loopback("::1"), is_loopback("::")
    (True, True, True, False)
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Gate:
    """ASGI middleware: checks Host, Origin and key, and adds the headers that protect pages.

    ``hosts`` are names by which the server may be called besides ``localhost``. A number is always
    right: only a name can be made to point elsewhere.
    """

    def __init__(
        self, app: ASGIApp, *, api_key: str | None = None, hosts: Collection[str] = ()
    ) -> None:
        self.app, self.api_key = app, api_key
        self.hosts = {"localhost", *(host.lower() for host in hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        started = False

        async def send_protected(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            self._check(scope["method"], scope["path"], Headers(scope=scope))
            await self.app(scope, receive, send_protected)
        except Refusal as refusal:
            await refusal.response()(scope, receive, send_protected)
        except Exception:
            logger.exception("A request failed.")
            if started:
                raise  # the connection ends, so that nobody takes the part for the whole
            await FAILURE.response()(scope, receive, send_protected)

    def _check(self, method: str, path: str, headers: Headers) -> None:
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._is_ours(hosts[0]):
            raise Refusal(
                403,
                "The Host header names a server that this one is not. Open it by the address that "
                "it printed, or start it with --allow-host and the name.",
                code="wrong_host",
            )
        if method not in READING and not _same_origin(headers, hosts[0]):
            raise Refusal(
                403, "A page of another origin may not send requests here.", code="wrong_origin"
            )
        public = path in PUBLIC or path.startswith(PUBLIC_FOLDER)
        if self.api_key is not None and not public:
            self._check_key(headers.getlist("authorization"))

    def _is_ours(self, host: str) -> bool:
        match = HOST.fullmatch(host)
        name = (match[1] or match[2]).lower() if match else ""
        return name in self.hosts or _is_number(name)

    def _check_key(self, given: list[str]) -> None:
        scheme, _, key = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        right = hmac.compare_digest(key.strip().encode(), (self.api_key or "").encode())
        if scheme.lower() != "bearer" or not right:
            raise Refusal(
                401,
                "The API key is missing or wrong. Send it as: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )


def _is_number(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _same_origin(headers: Headers, host: str) -> bool:
    """Whether a request comes from no page, or from one of this server's own."""
    if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        return False
    origins = headers.getlist("origin")
    if not origins:
        return True
    scheme, _, place = origins[0].partition("://")
    return len(origins) == 1 and scheme in ("http", "https") and place.lower() == host.lower()
