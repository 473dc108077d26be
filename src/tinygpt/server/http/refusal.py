"""Errors in the JSON shape of OpenAI's API. They repeat nothing of the request."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from tinygpt.server.http.answers import JSONResponse

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
"""Kinds of errors by status; other refusals are ``invalid_request_error``."""
GONE = 499
"""nginx's status for a client that disconnected before its answer."""
RETRY_SECONDS = 2
"""Retry-After, in seconds, where a queue is full or the server restarts."""
DOCUMENT = "/openapi.json"
ADVICE = {404: f" GET {DOCUMENT} lists what there is.", 405: " The header Allow lists others."}


class Refusal(Exception):  # noqa: N818
    """A request that is not served: the HTTP status, and a message that says what was wanted.

    ``param`` names the field that is wrong, ``code`` is for programs. The message must hold no
    text from the request, because pages and logs may show it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        again = {"retry-after": str(RETRY_SECONDS)} if status in (429, 503) else {}
        self.headers = {**again, **(headers or {})}

    def body(self) -> dict[str, Any]:
        """The object that OpenAI's clients look for."""
        usual = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = TYPES.get(self.status, usual)
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


def answer_refusal(request: Request, error: Exception) -> Response:
    """For Starlette's table of exception handlers."""
    assert isinstance(error, Refusal)
    return error.response()


def answer_http_error(request: Request, error: Exception) -> Response:
    """For Starlette's own errors: an unknown path, or a method that a path does not have."""
    assert isinstance(error, HTTPException)
    phrase = HTTPStatus(error.status_code).phrase
    advice = ADVICE.get(error.status_code, "")
    if DOCUMENT in advice and all(getattr(r, "path", "") != DOCUMENT for r in request.app.routes):
        advice = ""  # a dashboard has no API that could be described
    message = f"{phrase}.{advice}"
    return Refusal(error.status_code, message, headers=error.headers).response()


FAILURE = Refusal(
    500, "The server failed on this request; whoever runs it sees why in its terminal."
)
"""The answer to a bug of ours. The log has the exception, the client does not."""


def queue_full() -> Refusal:
    """The answer where too many requests are waiting."""
    message = "More requests are waiting than this server takes. Try again soon."
    return Refusal(429, message, code="queue_full")


def closing() -> Refusal:
    """The answer while the server shuts down; another one may be up in a moment."""
    return Refusal(503, "The server is shutting down.", code="shutting_down")


def timed_out() -> Refusal:
    """The answer to a request that got no turn within its time."""
    message = "The time for this request was over before it had its turn."
    return Refusal(504, message, code="timeout")
