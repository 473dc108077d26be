"""Reads request bodies in bounded time and memory, and notices when the client disconnects."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from tinygpt.server.http.limits import Limits
from tinygpt.server.http.refusal import Refusal
from tinygpt.untrusted import parse_json

T = TypeVar("T")

CLOSE = {"connection": "close"}
"""A connection whose body was not read to its end cannot be used again."""
OVERFLOW = 16
"""Bodies of up to this many times the limit are read and dropped, so that the client can read our
answer."""


async def read_json(request: Request, limits: Limits) -> Any:
    """The JSON value in the body. Raises Refusal if it is none, too large or too slow."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal(415, "The body must be JSON: send Content-Type: application/json.")
    content = await read_body(request, limits)
    try:
        return parse_json(content)
    except ValueError as error:
        message = "The body is not JSON in UTF-8, or nested too deeply, or has a name twice."
        raise Refusal(400, message, code="invalid_json") from error


async def read_body(request: Request, limits: Limits) -> bytes:
    """The body, counted as it arrives: its Content-Length is only a claim."""
    content = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            too_large = await _fill(content, request, limits.body_bytes)
    except TimeoutError:
        message = f"The body did not come within {limits.body_seconds:g} seconds."
        raise Refusal(408, message, headers=CLOSE) from None
    if too_large:
        message = f"The body has more than {limits.body_bytes} bytes."
        raise Refusal(413, message, code="body_too_large", headers=CLOSE)
    return bytes(content)


async def _fill(content: bytearray, request: Request, limit: int) -> bool:
    """Read the body into ``content``; -> whether there was more than the limit.

    What exceeds the limit is still read for a while: closing a connection with unread bytes would
    reset it, and the answer would be lost.
    """
    total = 0
    async for chunk in request.stream():
        total += len(chunk)
        if total <= limit:
            content += chunk
        elif total > OVERFLOW * limit:
            break
    return total > limit


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``. If the client disconnects, it is cancelled: ClientDisconnect."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
