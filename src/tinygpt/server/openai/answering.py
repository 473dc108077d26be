"""The texts of one answer, generated side by side: whole when all are done, or as they come."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Iterable
from typing import Any

from tinygpt.errors import TinyGPTError
from tinygpt.server.engine.sequence import Output, Outputs, Piece, Sequence
from tinygpt.server.http.answers import event
from tinygpt.server.http.refusal import FAILURE, Refusal, closing, timed_out
from tinygpt.server.openai.choices import Choice, Delta
from tinygpt.server.openai.jobs import Job
from tinygpt.server.openai.service import Service

REST = 0.01
"""Seconds between two sends of one answer. A reader sees no difference, and tokens of a small
model, which come faster, share an event."""
DONE = b"data: [DONE]\n\n"


class Answer:
    """A job in the engine. ``close`` stops what is not yet generated.

    The tokens of all its texts come through one queue, which can hold all of them: so a client that
    reads slowly does not block the engine.
    """

    def __init__(self, service: Service, job: Job, deadline: float) -> None:
        self.service, self.job, self.deadline = service, job, deadline
        with_tokens = job.shape.logprobs is not None
        self.choices = [Choice(i, echo, with_tokens) for i, echo in enumerate(job.echoes)]
        self._outputs = Outputs()
        self._choice_of: dict[Sequence, Choice] = {}
        try:
            for request, choice in zip(job.requests, self.choices, strict=True):
                self._choice_of[service.engine.submit(request, self._outputs)] = choice
        except TinyGPTError:  # no room for all of them, or the end of the engine
            self.close()
            raise

    def close(self) -> None:
        """Free the engine's slots."""
        for sequence in self._choice_of:
            if sequence.finish_reason is None:
                sequence.cancel()

    async def whole(self) -> dict[str, Any]:
        """The answer when every text has ended."""
        texts = [Delta(c.echo.text, list(c.echo.tokens)) for c in self.choices]
        async for burst in self._bursts():
            for choice, delta in burst:
                texts[choice.index] += delta
        return self.job.shape.whole(list(zip(self.choices, texts, strict=True)), self._usage())

    async def events(self) -> AsyncIterator[bytes]:
        """The answer as server-sent events; those of one burst are sent together."""
        shape = self.job.shape
        more = {"usage": None} if self.job.include_usage else {}

        def chunks(parts: Iterable[dict[str, Any] | None]) -> bytes:
            return b"".join(event(shape.chunk([part], **more)) for part in parts if part)

        yield chunks(map(shape.opening, self.choices))
        try:
            async for burst in self._bursts():
                parts = []
                for choice, delta in burst:
                    parts.append(shape.part(choice, delta) if delta else None)
                    if choice.finish_reason is not None:
                        parts.append(shape.part(choice, Delta(), choice.finish_reason))
                yield chunks(parts)
        except Refusal as refusal:  # too late for a status: clients look for an error in the stream
            yield event(refusal.body()) + DONE
        else:
            usage = event(shape.chunk([], usage=self._usage())) if self.job.include_usage else b""
            yield usage + DONE

    async def _bursts(self) -> AsyncIterator[list[tuple[Choice, Delta]]]:
        """The deltas of each burst; with the last one of a text comes its finish reason."""
        rest = REST if self.job.stream else math.inf
        async for burst in self._outputs.bursts(rest, self.deadline):
            yield self._deltas(burst)
            for sequence, piece in burst:
                if piece is None and (refusal := self._refusal(sequence)):
                    raise refusal from sequence.error
        if self._outputs.open:  # time is up: the texts end as they are, if there is any of them
            self.close()
            unread = self._outputs.take()
            if not any(choice.count for choice in self.choices) and not any(p for _, p in unread):
                raise timed_out()
            yield self._deltas([*unread, *((sequence, None) for sequence in self._choice_of)])

    def _deltas(self, burst: Iterable[Output]) -> list[tuple[Choice, Delta]]:
        """One delta for each text with new tokens or an end."""
        new: dict[Sequence, list[Piece | None]] = {}
        for sequence, piece in burst:
            new.setdefault(sequence, []).append(piece)
        deltas = []
        for sequence, pieces in new.items():
            choice = self._choice_of[sequence]
            if choice.finish_reason is None:
                delta = choice.take([piece for piece in pieces if piece is not None])
                if None in pieces and self._refusal(sequence) is None:
                    delta += choice.end(sequence.finish_reason)
                deltas.append((choice, delta))
        return deltas

    def _refusal(self, sequence: Sequence) -> Refusal | None:
        """Why a sequence failed. Only our own errors, such as NaN as logits, are shown."""
        if isinstance(sequence.error, TinyGPTError):
            return Refusal(500, str(sequence.error), code="model_failed")
        if sequence.error is not None:
            return FAILURE
        in_time = asyncio.get_running_loop().time() < self.deadline
        return closing() if sequence.finish_reason == "cancelled" and in_time else None

    def _usage(self) -> dict[str, int]:
        """Tokens in and out; a prompt counts once, however many texts it gets."""
        prompt, new = self.job.prompt_tokens, sum(choice.count for choice in self.choices)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
