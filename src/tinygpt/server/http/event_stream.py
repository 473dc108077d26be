"""Server-sent events: how one is written, and how a stream of them ends when the server does."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from tinygpt.files.strict_json import to_json

LAST_SECONDS = 1.0
"""Time for the end of a stream to be sent to a client that leaves bytes unread."""


def event(value: object) -> bytes:
    """One server-sent event with a JSON value."""
    return f"data: {to_json(value, unicode=True, compact=True)}\n\n".encode()


class EventStream(StreamingResponse):
    """A stream that ends as an answer does, with ``last``, where the server cancels it.

    uvicorn cancels what still runs when the time of a shutdown is over. A connection that is closed
    then, in the middle of an answer, looks to a client like a fault of the network.
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
