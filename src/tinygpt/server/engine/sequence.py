"""What goes into the engine and what comes out: a request, and a stream of tokens."""

from __future__ import annotations

import asyncio
import math
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from tinygpt.config import SampleConfig
from tinygpt.generation.sample import Penalties

FinishReason = Literal["stop", "length", "cancelled", "error"]
"""A stop string or the end of the text, or ``max_tokens``; the other two speak for themselves."""

Waiter: TypeAlias = "threading.Lock | asyncio.Future[None]"
"""What a consumer waits for: a lock that the engine releases, or a future of its event loop."""


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
    """Logits (V,) of the first token, where they are known already: of a prompt that was scored."""
    penalties: Penalties | None = None
    """What is taken off, or added to, the logits of tokens."""
    ignore_eos: bool = False
    """Whether to go on behind a token that ends a text."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One token."""

    token: int
    text: str
    """Text that became complete with it: whole characters, and none that a stop string may claim.
    It may be empty; the last piece of a stream brings what was held back."""
    logprob: float | None = None
    """Natural log of the token's probability under the model, before temperature and filters; None
    unless asked for."""
    top: tuple[tuple[int, float], ...] = ()
    """(token, logprob) of the likeliest tokens, as many as were asked for, the likeliest first."""


class Stream:
    """The tokens of one request, as they come: ``for piece in stream``, or ``async for``.

    One consumer, in any thread or event loop but the engine's. The engine never waits for it: what
    is not yet read is kept, at most ``max_tokens`` pieces. Iteration also ends, without raising,
    when the stream is cancelled or fails; ``finish_reason`` and ``error`` say so.

    >>> for piece in stream:
    ...     print(piece.text, end="")
    >>> stream.finish_reason
    'length'
    """

    def __init__(self, request: Request, on_cancel: Callable[[], None] = lambda: None) -> None:
        self.request = request
        self.finish_reason: FinishReason | None = None
        """None as long as tokens may come; those that have come may still be unread."""
        self.error: Exception | None = None
        """What went wrong, if ``finish_reason`` is ``"error"``."""
        self.cancelled = False
        """Whether somebody has called ``cancel``."""
        self._on_cancel = on_cancel
        self._pieces: deque[Piece] = deque()
        self._waiter: Waiter | None = None
        self._only_end = False  # does the waiter wait for the end, whatever comes before?

    def cancel(self) -> None:
        """Want no more. Returns at once; the stream ends before the engine's next step."""
        self.cancelled = True
        self._on_cancel()

    def taken(self) -> list[Piece]:
        """All pieces that have come and are not yet read, without waiting."""
        pieces = []
        while self._pieces:
            pieces.append(self._pieces.popleft())
        return pieces

    async def bursts(self, rest: float) -> AsyncIterator[list[Piece]]:
        """All that has come, as soon as it comes; but not before ``rest`` seconds after the last.

        To wake a consumer for each token costs more than a step of a small model, as does what it
        then does. The end of the stream does not wait for the rest to be over.
        """
        while True:
            await self._some()
            if not (pieces := self.taken()):
                return
            yield pieces
            await self._end_within(rest)

    def __iter__(self) -> Iterator[Piece]:
        while True:
            while self._pieces:
                yield self._pieces.popleft()
            lock = threading.Lock()
            lock.acquire()
            if self._waits(lock):
                lock.acquire()
            elif not self._pieces:
                return

    async def __aiter__(self) -> AsyncIterator[Piece]:
        while True:
            await self._some()
            if not self._pieces:
                return
            while self._pieces:
                yield self._pieces.popleft()

    async def _some(self) -> None:
        """Wait until there is something to read, or nothing more to come."""
        while self.finish_reason is None and not self._pieces:
            future = asyncio.get_running_loop().create_future()
            if self._waits(future):
                await future

    async def _end_within(self, seconds: float) -> None:
        """Wait for so long, or until the end."""
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        if not self._waits(future, only_end=True):
            return
        timer = loop.call_later(seconds, _resolve, [future]) if seconds < math.inf else None
        try:
            await future
        finally:
            if timer is not None:
                timer.cancel()

    def _waits(self, waiter: Waiter, only_end: bool = False) -> bool:
        """Register who waits; False if what it waits for is there: a piece, or the end."""
        self._only_end, self._waiter = only_end, waiter
        # Only now look: what came before is seen here, what comes after sees the waiter.
        if self.finish_reason is None and (only_end or not self._pieces):
            return True
        self._waiter = None
        return False

    # The engine's side

    def put(self, piece: Piece) -> None:
        """Add a token. Nobody is woken: see ``wake``."""
        self._pieces.append(piece)

    def finish(self, reason: FinishReason, error: Exception | None = None) -> None:
        """Nothing more will come. Nobody is woken: see ``wake``."""
        self.error = error
        self.finish_reason = reason

    def waiter(self) -> Waiter | None:
        """Who waits for what there is now, and from then on no longer does."""
        if self._waiter is None or (self._only_end and self.finish_reason is None):
            return None
        found, self._waiter = self._waiter, None
        return found


def wake(streams: Iterable[Stream]) -> None:
    """Wake whoever waits for one of these streams, each event loop only once."""
    loops: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for stream in streams:
        waiter = stream.waiter()
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
