"""What the engine computes beside its sequences: calls into the model, and scores of texts.

Such work comes in pieces. While sequences run it may take at most `SHARE` of the time that their
steps take: after each piece the next one waits until enough steps have run. So a sequence beside
any number of scorers keeps 1 / (1 + SHARE) of its pace or more.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tinygpt.generation.decoder import Decoder
from tinygpt.server.engine.scoring import Scored, score_texts

T = TypeVar("T")

SHARE = 0.5
"""Seconds of this work for each second of decoding."""


@dataclass(frozen=True, eq=False)
class Call:
    """A function that is called in the engine's thread."""

    function: Callable[[], Any]
    future: Future[Any] = field(default_factory=Future)


@dataclass(frozen=True, eq=False)
class Text:
    """A text whose tokens each get a log probability, and those of the ``count`` likeliest."""

    ids: Sequence[int]
    count: int
    future: Future[Scored] = field(default_factory=Future)


Pieces = Generator[None, None, Sequence[Any]]
"""Work in pieces, between which it yields; returns a result for each future."""


class Beside:
    """The queue of such work, in the order in which it came; texts of one length go together.

    Only ``piece``, ``earn`` and ``cancel_all`` are for the engine's thread alone.
    """

    def __init__(
        self,
        decoder: Decoder,
        vocab_size: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._decoder, self._vocab_size, self._clock = decoder, vocab_size, clock
        self._waiting: deque[Call | Text] = deque()
        self._current: tuple[list[Call | Text], Pieces] | None = None
        self._debt = 0.0  # seconds that steps have to take before the next piece

    def __bool__(self) -> bool:
        """Whether there is something to do."""
        return bool(self._waiting or self._current)

    @property
    def texts(self) -> int:
        """Texts that wait for their scores."""
        current = self._current[0] if self._current else []
        return sum(isinstance(work, Text) for work in [*current, *self._waiting])

    def add(self, work: Call | Text) -> None:
        self._waiting.append(work)

    def earn(self, seconds: float) -> None:
        """Steps have taken so many seconds."""
        self._debt = max(0.0, self._debt - SHARE * seconds)

    def piece(self, busy: bool) -> None:
        """Do one piece of work, if there is any and the sequences have had their time."""
        if not self or (busy and self._debt > 0):
            return
        begin = self._clock()
        if self._current is None:
            self._begin()
        if self._current is not None:
            self._go_on(*self._current)
        spent = self._clock() - begin
        self._debt = self._debt + spent if busy else 0.0

    def cancel_all(self, error: Exception) -> None:
        """Fail everything that is not done with this error."""
        for work in self._current[0] if self._current else []:
            work.future.set_exception(error)
        self._current = None
        while self._waiting:
            future: Future[Any] = self._waiting.popleft().future
            if future.set_running_or_notify_cancel():
                future.set_exception(error)

    def _begin(self) -> None:
        first = self._waiting.popleft()
        together = [first] if isinstance(first, Call) else self._together(first)
        works = [work for work in together if work.future.set_running_or_notify_cancel()]
        asked = [(work.ids, work.count) for work in works if isinstance(work, Text)]
        if asked:
            self._current = works, score_texts(self._decoder, asked, self._vocab_size)
        elif works and isinstance(first, Call):
            self._current = works, _called(first.function)

    def _together(self, first: Text) -> list[Call | Text]:
        """The text, and others that wait and fit into the same forward pass."""
        most = self._decoder.together(first.ids)
        fitting: list[Call | Text] = [first]
        for work in list(self._waiting):
            if len(fitting) == most:
                break
            if isinstance(work, Text) and self._decoder.together(work.ids) == most > 1:
                fitting.append(work)
                self._waiting.remove(work)
        return fitting

    def _go_on(self, works: list[Call | Text], pieces: Pieces) -> None:
        try:
            next(pieces)
        except StopIteration as end:
            self._current = None
            for work, result in zip(works, end.value, strict=True):
                work.future.set_result(result)
        except Exception as error:
            self._current = None
            for work in works:
                work.future.set_exception(error)


def _called(function: Callable[[], T]) -> Generator[None, None, list[T]]:
    """A call as work in one piece."""
    yield from ()
    return [function()]
