"""The bodies of answers: JSON, and streams of server-sent events."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from starlette import responses
from starlette.types import Message, Receive, Scope, Send

from tinygpt.files.strict_json import to_json

LAST_SECONDS = 1.0
"""Seconds to send the end of a stream to a client that leaves bytes unread."""


class JSONResponse(responses.JSONResponse):
    """JSON with null for NaN and escapes for lone surrogates, where Starlette's class raises."""

    def render(self, content: Any) -> bytes:
        return to_json(content, unicode=True, compact=True).encode()


def event(value: object) -> bytes:
    """One server-sent event with a JSON value."""
    return f"data: {to_json(value, unicode=True, compact=True)}\n\n".encode()


class EventStream(responses.StreamingResponse):
    """A stream that ends properly, with ``last``, when the server cancels it.

    uvicorn cancels running answers when the time of a shutdown is over. A connection that closed in
    the middle of an answer would look like a network failure to its client.
    """

    media_type = "text/event-stream"
    last = b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        unfinished = False

        async def noted(message: Message) -> None:
            nonlocal unfinished
            unfinished = message.get("more_body", True)
            await send(message)

        try:
            await super().__call__(scope, receive, noted)
        except asyncio.CancelledError:
            if not unfinished:
                raise
            with suppress(TimeoutError):
                async with asyncio.timeout(LAST_SECONDS):
                    await send(
                        {"type": "http.response.body", "body": self.last, "more_body": False}
                    )
