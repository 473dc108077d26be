"""What goes into the engine and what comes out: a request, its sequence, and a queue of tokens.

`Request` is what is wanted, `Sequence` one text on its way through the engine, `Outputs` the queue
through which the tokens of all texts of one answer leave it. The engine fills the queues from its
own thread and never waits for their consumers.
"""

from __future__ import annotations

import asyncio
import codecs
import math
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from tinygpt.config import SampleConfig
from tinygpt.generation import decoder
from tinygpt.generation.sample import Penalties, first_choice, likeliest, log_probabilities
from tinygpt.generation.stream import StopStrings
from tinygpt.text.tokenizers import Tokenizer, ends_of

FinishReason = Literal["stop", "length", "cancelled", "error"]
"""``stop``: a stop string or the end of the text; ``length``: ``max_tokens`` were generated."""

Waiter: TypeAlias = "threading.Lock | asyncio.Future[None]"
"""What a consumer waits on: a lock that the engine releases, or a future of its event loop."""


@dataclass(frozen=True)
class Request:
    """A prompt and what is wanted of its continuation; already validated."""

    ids: tuple[int, ...]
    """The prompt, at least one token, of any length: the model sees the last block_size tokens."""
    max_tokens: int
    """How many tokens at most; 0 is allowed and gives none."""
    config: SampleConfig
    """How tokens are chosen."""
    seed: int | None = None
    """The same seed gives the same text, as `tinygpt generate` does; None: a random one."""
    stop: tuple[str, ...] = ()
    """The text ends before the first of these strings."""
    logprobs: int | None = None
    """How many of the likeliest tokens to report with each; 0: the chosen one's only."""
    first: npt.NDArray[np.float32] | None = field(default=None, compare=False)
    """Logits (V,) of the first token, if the prompt was scored and they are known already."""
    penalties: Penalties | None = None
    """What is subtracted from, or added to, the logits of tokens."""
    ignore_eos: bool = False
    """Whether to continue after a token that ends a text."""
    ends: tuple[int, ...] = ()
    """Ids that end this text, besides those that end every one."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One token."""

    token: int
    text: str
    """Text that became complete with it: whole characters, without any that may belong to a stop
    string. It may be empty; a sequence's last piece also has the text that was held back."""
    logprob: float | None = None
    """Natural log of the token's probability under the model, before temperature and filters; None
    unless asked for."""
    top: tuple[tuple[int, float], ...] = ()
    """(token, logprob) of the likeliest tokens, as many as were asked for, the likeliest first."""
    raw: bytes = b""
    """The token's bytes: UTF-8 that may begin or end within a character."""
    begins: int = 0
    """Characters of the text before the one in which the token begins."""


class Sequence(decoder.Sequence):
    """One text in the engine: its request, how far it has come, and how it ended.

    A consumer reads pieces from it, ``for piece in sequence``, or from the ``Outputs`` that it
    shares with other sequences. Iteration also ends, without raising, when the sequence is
    cancelled or fails; ``finish_reason`` and ``error`` say so.

    >>> for piece in sequence:
    ...     print(piece.text, end="")
    >>> sequence.finish_reason
    'length'
    """

    def __init__(
        self,
        request: Request,
        outputs: Outputs | None = None,
        on_cancel: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(request.ids)
        self.request, self.outputs = request, outputs or Outputs()
        self.finish_reason: FinishReason | None = None
        """None while tokens may come; those that have come may still be unread."""
        self.error: Exception | None = None
        """What went wrong, if ``finish_reason`` is ``"error"``."""
        self.cancelled = False
        self._on_cancel = on_cancel
        self.outputs.open += 1

    def cancel(self) -> None:
        """Want no more tokens. Returns at once; the sequence ends before the next step."""
        self.cancelled = True
        self._on_cancel()

    def __iter__(self) -> Iterator[Piece]:
        return (piece for _, piece in self.outputs if piece is not None)

    # The engine's side

    def begin(self, tokenizer: Tokenizer) -> None:
        """Get ready to generate; UsageError for settings that are wrong."""
        request, self._tokenizer = self.request, tokenizer
        self.choice = first_choice(
            request.config, request.seed, request.penalties, len(request.ids)
        )
        self._left, self._begins = request.max_tokens, 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stop = StopStrings(request.stop)
        self._ends = () if request.ignore_eos else (*ends_of(tokenizer), *request.ends)

    def advance(self, token: int, logits: npt.NDArray[np.float32]) -> FinishReason | None:
        """Put out the token, chosen from logits (V,); -> why it is the last one, if it is."""
        self.ids.append(token)
        self._left -= 1
        ended, raw = token in self._ends, self._tokenizer.decode_bytes([token])
        text = "" if ended else self._decoder.decode(raw)
        begins, self._begins = self._begins, self._begins + len(text)
        text = self._stop.push(text)
        if ended or self._left == 0:
            text += self._stop.push(self._decoder.decode(b"", final=True)) + self._stop.flush()
        logprob: float | None = None
        top: tuple[tuple[int, float], ...] = ()
        if self.request.logprobs is not None:
            logs = log_probabilities(logits)
            logprob = float(logs[token])
            top = tuple((i, float(logs[i])) for i in likeliest(logs, self.request.logprobs))
        self.outputs.put(self, Piece(token, text, logprob, top, raw, begins))
        return "stop" if ended or self._stop.stopped else "length" if self._left == 0 else None

    def finish(self, reason: FinishReason, error: Exception | None = None) -> None:
        """No more tokens will come. This wakes no consumer: see ``wake``."""
        self.error, self.finish_reason = error, reason
        self.outputs.put(self, None)


Output = tuple[Sequence, Piece | None]
"""A sequence and its next token; None where the sequence has ended."""


class Outputs:
    """The queue of one answer: the tokens of its sequences in the order in which they came.

    One consumer, in any thread or event loop but the engine's. What is unread is kept; its length
    is bounded by what the requests ask for.
    """

    def __init__(self) -> None:
        self.open = 0
        """Sequences whose end is not yet in the queue."""
        self.failed = False
        """Whether one of them has ended with an error, which a consumer need not wait to see."""
        self._queue: deque[Output] = deque()
        self._waiter: Waiter | None = None
        self._only_end = False  # whether the consumer waits for the last end, whatever comes before

    def take(self) -> list[Output]:
        """All that has come and is unread, without waiting."""
        return [self._queue.popleft() for _ in range(len(self._queue))]

    async def bursts(
        self, rest: float = 0.0, deadline: float = math.inf
    ) -> AsyncIterator[list[Output]]:
        """All that has come, as soon as it comes, but not before ``rest`` seconds after the last.

        Waking a consumer for each token costs more than a step of a small model. The last end does
        not wait for ``rest`` to be over. At ``deadline``, in the event loop's time, this ends with
        sequences still open.
        """
        loop = asyncio.get_running_loop()
        while self.open or self._queue:
            await self._wait(deadline)
            if loop.time() >= deadline:
                return
            yield self.take()
            await self._wait(min(deadline, loop.time() + rest), only_end=True)

    def __iter__(self) -> Iterator[Output]:
        while self.open or self._queue:
            while self._queue:
                yield self._queue.popleft()
            lock = threading.Lock()
            lock.acquire()
            if self._register(lock):
                lock.acquire()

    async def _wait(self, until: float, only_end: bool = False) -> None:
        """Wait until there is something to read, or for the last end; and no longer than that."""
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        if self._register(future, only_end):
            timer = loop.call_at(until, _resolve, [future]) if until < math.inf else None
            try:
                await future
            finally:
                if timer is not None:
                    timer.cancel()

    def _register(self, waiter: Waiter, only_end: bool = False) -> bool:
        """Let the engine wake this waiter; False if what it waits for is there."""
        self._only_end, self._waiter = only_end, waiter
        # Only now look: what came before is seen here, what comes after sees the waiter.
        if self.open and not (self.failed if only_end else self._queue):
            return True
        self._waiter = None
        return False

    # The engine's side

    def put(self, sequence: Sequence, piece: Piece | None) -> None:
        """Add a token, or an end. This wakes no consumer: see ``wake``."""
        self._queue.append((sequence, piece))
        if piece is None:
            self.failed |= sequence.error is not None
            self.open -= 1  # last: a consumer that sees 0 finds all ends in the queue

    def waiter(self) -> Waiter | None:
        """Who waits for what there is now, and from then on no longer does."""
        if self._waiter is None or (self._only_end and self.open and not self.failed):
            return None
        found, self._waiter = self._waiter, None
        return found


def wake(queues: Iterable[Outputs]) -> None:
    """Wake the consumers of these queues, each event loop only once."""
    loops: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for outputs in queues:
        waiter = outputs.waiter()
        if isinstance(waiter, asyncio.Future):
            loops.setdefault(waiter.get_loop(), []).append(waiter)
        elif waiter is not None:
            waiter.release()
    for loop, futures in loops.items():
        try:
            loop.call_soon_threadsafe(_resolve, futures)
        except RuntimeError:  # a loop that was closed: its consumers are gone
            continue


def _resolve(futures: list[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():  # cancelled meanwhile
            future.set_result(None)
