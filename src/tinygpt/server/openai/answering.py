"""The texts of one answer, written side by side: whole when all are done, or as they come."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from typing import Any

from tinygpt.errors import TinyGPTError
from tinygpt.server.engine.sequence import Piece, Stream
from tinygpt.server.http.event_stream import event
from tinygpt.server.http.refusal import FAILURE, Refusal, closing
from tinygpt.server.openai.choices import Choice, Delta
from tinygpt.server.openai.jobs import Job
from tinygpt.server.openai.service import Service
from tinygpt.server.openai.shapes import usage

SENT_TOGETHER = 1 << 14
"""Bytes of events that are sent at once, if more are waiting than the client takes."""
DONE = b"data: [DONE]\n\n"

REST = 0.01
"""Seconds between two sends of one text: those who read see no difference, and the tokens of a
small model, which come faster, go together in one event."""

Arrived = tuple[int, list[Piece]]
"""Pieces of the text with this index that came together; none when it has ended."""


class Running:
    """A job in the engine. Close it, and whatever is not yet written never will be.

    What the streams bring is put into one queue, whose length is bounded by what was asked for;
    so a client that reads slowly holds up nobody.
    """

    def __init__(self, service: Service, job: Job, deadline: float) -> None:
        self.service, self.job, self.deadline = service, job, deadline
        tells_tokens = job.shape.logprobs is not None
        self.choices = [
            Choice(i, service.tokenizer, echo, tells_tokens) for i, echo in enumerate(job.echoes)
        ]
        self.streams = _submit_all(service, job)
        self._arrived: asyncio.Queue[Arrived] = asyncio.Queue()
        self._tasks = [
            asyncio.create_task(self._forward(i, stream)) for i, stream in enumerate(self.streams)
        ]

    def close(self) -> None:
        """Let go of the engine's places."""
        for stream in self.streams:
            if stream.finish_reason is None:
                stream.cancel()
        for task in self._tasks:
            task.cancel()

    async def whole(self) -> dict[str, Any]:
        """The answer when every text has ended."""
        texts = [Delta(c.echo.text, list(c.echo.tokens)) for c in self.choices]
        async for choice, delta in self._deltas():
            texts[choice.index].text += delta.text
            texts[choice.index].tokens += delta.tokens
        counted = usage(self.job.prompt_tokens, self.choices)
        return self.job.shape.whole(list(zip(self.choices, texts, strict=True)), counted)

    async def events(self) -> AsyncIterator[bytes]:
        """The answer as server-sent events; those that are there together are sent together."""
        held = bytearray()
        async for each in self._events():
            held += each
            if self._arrived.empty() or len(held) > SENT_TOGETHER:
                yield bytes(held)
                held.clear()
        yield bytes(held)

    async def _events(self) -> AsyncIterator[bytes]:
        shape = self.job.shape
        more = {"usage": None} if self.job.include_usage else {}
        for choice in self.choices:
            if opening := shape.opening(choice):
                yield event(shape.chunk([opening], **more))
        try:
            async for choice, delta in self._deltas():
                if delta:
                    yield event(shape.chunk([shape.part(choice, delta)], **more))
                if choice.finish_reason is not None:
                    yield event(shape.chunk([shape.closing(choice)], **more))
        except Refusal as refusal:  # too late for a status: clients look for an error in the stream
            yield event(refusal.body())
        else:
            if self.job.include_usage:
                counted = usage(self.job.prompt_tokens, self.choices)
                yield event(shape.chunk([], usage=counted))
        yield DONE

    async def _deltas(self) -> AsyncIterator[tuple[Choice, Delta]]:
        """What is new of the texts, as it comes; the last of each has a finish reason."""
        async for index, pieces in self._until_deadline():
            choice = self.choices[index]
            if pieces:
                yield choice, choice.take(pieces)
                continue
            stream = self.streams[index]
            _raise_failure(stream)
            if stream.finish_reason == "cancelled" and self._in_time():
                raise closing()
            yield choice, choice.end(stream.finish_reason)

    async def _until_deadline(self) -> AsyncIterator[Arrived]:
        """What arrives. When time is up the texts end as they are, if there is anything of them."""
        open_ = set(range(len(self.streams)))
        while open_:
            try:
                index, pieces = await self._next()
            except TimeoutError:
                self.close()
                unread = {index: self.streams[index].taken() for index in sorted(open_)}
                if not any(unread.values()) and not any(choice.count for choice in self.choices):
                    message = "The time for this request was over before it had its turn."
                    raise Refusal(504, message, code="timeout") from None
                for index, pieces in unread.items():
                    if pieces:
                        yield index, pieces
                    yield index, []
                return
            if not pieces:
                open_.discard(index)
            yield index, pieces

    async def _next(self) -> Arrived:
        """The next that arrives; TimeoutError if time is up before."""
        if self._in_time() and not self._arrived.empty():  # without a timer, which costs a lot
            return self._arrived.get_nowait()
        async with asyncio.timeout_at(self.deadline):
            return await self._arrived.get()

    def _in_time(self) -> bool:
        return asyncio.get_running_loop().time() < self.deadline

    async def _forward(self, index: int, stream: Stream) -> None:
        async for pieces in stream.bursts(REST if self.job.stream else math.inf):
            self._arrived.put_nowait((index, pieces))
        self._arrived.put_nowait((index, []))


def _submit_all(service: Service, job: Job) -> list[Stream]:
    """All requests of a job, or none."""
    streams: list[Stream] = []
    try:
        for request in job.requests:
            streams.append(service.engine.submit(request))
    except TinyGPTError:  # no room for all of them, or the end of the engine
        for stream in streams:
            stream.cancel()
        raise
    return streams


def _raise_failure(stream: Stream) -> None:
    """A model whose numbers are no numbers says so itself; other failures are not for clients."""
    if isinstance(stream.error, TinyGPTError):
        raise Refusal(500, str(stream.error), code="model_failed") from stream.error
    if stream.error is not None:
        raise FAILURE from stream.error
