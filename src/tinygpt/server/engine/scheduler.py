"""The engine behind the server: many requests decoded together, in one thread that owns tinygrad.

tinygrad is not thread-safe. So one thread computes, and nothing else does: requests come to it
through a queue, and tokens leave it through `Outputs`. Whatever else needs the model (`Engine.run`,
`Engine.score`) is computed in that thread between two steps, within its share of the time. A step
generates one token of every running sequence. A request waits for a free slot, of which there are
``slots``; its prompt is then prefilled by itself. Between two steps the engine prefills one long
prompt or a few short ones, so that no running sequence waits longer than that.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Self, TypeVar

from tinygpt.errors import TinyGPTError
from tinygpt.generation.decoder import SMALLEST_BUCKET, Decoder
from tinygpt.generation.sample import choose
from tinygpt.model.transformer import Transformer
from tinygpt.server.engine.beside import Beside, Call, Text
from tinygpt.server.engine.scoring import Scored
from tinygpt.server.engine.sequence import FinishReason, Outputs, Request, Sequence, wake
from tinygpt.text.tokenizers import Tokenizer

log = logging.getLogger(__name__)

T = TypeVar("T")
Ids = tuple[int, ...]

PROMPT_TOKENS = 64
"""Tokens of prompts between two steps: after so many the running sequences have their turn."""


class QueueFull(TinyGPTError):  # noqa: N818
    """More requests are waiting than the engine takes; the client should try again later."""


class EngineClosed(TinyGPTError):  # noqa: N818
    """The engine was not started, or has been closed."""


@dataclass
class EngineStats:
    """What the engine does now, and what it has done since its start."""

    slots: int
    """How many sequences can be decoded together."""
    queue: int
    """How many requests may wait."""
    active: int = 0
    """Sequences that have a slot."""
    waiting: int = 0
    """Requests that wait for one."""
    requests: int = 0
    """All that were accepted: the sum of the ended ones, the active and the waiting."""
    ended: dict[FinishReason, int] = field(
        default_factory=lambda: dict.fromkeys(("stop", "length", "cancelled", "error"), 0)
    )
    """How many ended for which reason."""
    refused: int = 0
    """Requests for which the queue was full."""
    prompt_tokens: int = 0
    """Of requests that got a slot, whole prompts as they were sent."""
    tokens: int = 0
    """Tokens generated."""
    steps: int = 0
    """Steps of all running sequences together."""
    seconds: float = 0.0
    """Since the start."""


class Engine:
    """Decodes the requests of all clients together.

    >>> with Engine(model, tokenizer) as engine:
    ...     sequence = engine.submit(Request((1, 2, 3), max_tokens=20, config=SampleConfig()))
    ...     text = "".join(piece.text for piece in sequence)
    """

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, slots: int = 16, queue: int = 128
    ) -> None:
        """``slots`` sequences are decoded together; up to ``queue`` more requests may wait."""
        self.model, self.tokenizer = model, tokenizer
        self.slots, self.queue = slots, queue
        self.decoder = Decoder(model, slots)
        self._running: list[Sequence] = []
        self._waiting: deque[Sequence] = deque()
        self._beside = Beside(self.decoder, tokenizer.vocab_size)
        self._changed = threading.Condition()  # guards what is waiting, the counts, and the end
        self._thread: threading.Thread | None = None
        self._preparing: tuple[Iterator[Callable[[], object]], Future[None]] | None = None
        self._open = False
        self._deadline: float | None = None  # of the running sequences, after ``close``
        self._cancelled = False  # whether there are sequences whose consumer has cancelled them
        self._stats = EngineStats(slots, queue)
        self._started = time.monotonic()

    def start(self) -> None:
        """Start the engine's thread, once. The model belongs to it from now on."""
        assert self._thread is None, "an engine is started once"
        self._open, self._started = True, time.monotonic()
        self._thread = threading.Thread(target=self._work, name="tinygpt-engine", daemon=True)
        self._thread.start()

    def warm_up(self) -> Future[None]:
        """Compile, while the engine is idle, the kernels that would be compiled at first use.

        The future is done when all of them are compiled.
        """
        future: Future[None] = Future()
        future.set_running_or_notify_cancel()  # it can no longer be cancelled
        with self._locked_open():
            self._preparing = self.decoder.preparations(), future
        return future

    def close(self, drain_seconds: float = 0.0) -> None:
        """Take no more requests, finish within ``drain_seconds`` what is there, cancel the rest.

        Returns when the engine's thread has ended. To close twice does no harm.
        """
        with self._changed:
            self._open, self._deadline = False, time.monotonic() + drain_seconds
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def submit(self, request: Request, outputs: Outputs | None = None) -> Sequence:
        """Queue a request. Its tokens come through ``outputs``, or a queue of its own.

        Raises QueueFull if too many are waiting, and EngineClosed.
        """
        known = request.max_tokens == 1 and request.first is not None
        at_once = known or request.max_tokens == 0
        with self._locked_open():
            if not at_once:
                self._check_room(len(self._waiting))
            sequence = Sequence(request, outputs, self._on_cancel)
            self._stats.requests += 1
            if not at_once:
                self._waiting.append(sequence)
        if at_once:
            self._answer(sequence)
        return sequence

    def score(self, ids: Ids, count: int) -> Future[Scored]:
        """The log probability of each of up to block_size ids, and the ``count`` likeliest there.

        Texts of about one length are read together, beside the sequences, which keep their pace.
        Raises QueueFull if too many texts are waiting for this, and EngineClosed.
        """
        text = Text(ids, count)
        with self._locked_open():
            self._check_room(self._beside.texts)
            self._beside.add(text)
        return text.future

    def run(self, function: Callable[[], T]) -> Future[T]:
        """Call ``function`` in the engine's thread, between two steps; it may use the model.

        What it raises is the future's exception. Sequences wait for it meanwhile, and then it
        waits for them: calls get a share of the time.
        """
        call = Call(function)
        with self._locked_open():
            self._beside.add(call)
        return call.future

    @property
    def alive(self) -> bool:
        """Whether requests are taken, and the thread that answers them is running."""
        return self._open and self._thread is not None and self._thread.is_alive()

    def stats(self) -> EngineStats:
        """Numbers for a page or for /metrics; from any thread."""
        with self._changed:
            return replace(
                self._stats,
                active=len(self._running),
                waiting=len(self._waiting),
                ended=dict(self._stats.ended),
                seconds=time.monotonic() - self._started,
            )

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _locked_open(self) -> Iterator[None]:
        """Hold the lock to add work, and notify the engine's thread; EngineClosed if it is over."""
        with self._changed:
            if not self._open:
                raise EngineClosed("The engine is not running: it was not started, or was closed.")
            yield
            self._changed.notify()

    def _check_room(self, waiting: int) -> None:
        if waiting >= self.queue:
            self._stats.refused += 1
            raise QueueFull(
                f"{len(self._running)} requests are running and {waiting} are waiting, which is as "
                f"many as the server takes. Try again in a few seconds."
            )

    def _answer(self, sequence: Sequence) -> None:
        """Finish a request that needs no slot: no token is wanted, or one with known logits."""
        request = sequence.request
        reason: FinishReason = "length"
        try:
            if request.max_tokens:
                assert request.first is not None
                sequence.begin(self.tokenizer)
                [token] = choose([request.first], [request.ids], [sequence.choice])
                reason = sequence.advance(int(token), request.first) or reason
                with self._changed:
                    self._stats.prompt_tokens += len(request.ids)
                    self._stats.tokens += 1
        except Exception as error:
            self._end(sequence, "error", error)
        else:
            self._end(sequence, reason)

    def _on_cancel(self) -> None:
        with self._changed:
            self._cancelled = True
            self._changed.notify()

    # In the engine's thread

    def _work(self) -> None:
        try:
            while self._wait():
                self._drop_cancelled()
                self._beside.piece(bool(self._running or self._waiting))
                begin = time.perf_counter()
                self._admit()
                if self._running:
                    self._stats.steps += 1
                    self._advance(self._running[:])
                self._beside.earn(time.perf_counter() - begin)
                self._prepare()
        finally:
            self._open = False
            self._cancel_all()

    def _wait(self) -> bool:
        """Wait for something to do; False at the end."""
        with self._changed:
            while True:
                busy = self._running or self._waiting or self._beside
                if self._deadline is not None and (not busy or time.monotonic() > self._deadline):
                    return False
                if busy or self._cancelled or self._preparing:
                    return True
                self._changed.wait()

    def _drop_cancelled(self, everything: bool = False) -> None:
        """End the sequences that their consumers have cancelled, or all."""
        with self._changed:
            self._cancelled = False
            gone = [s for s in self._waiting if s.cancelled or everything]
            for sequence in gone:
                self._waiting.remove(sequence)
        for sequence in gone:
            self._end(sequence, "cancelled")
        for sequence in [s for s in self._running if s.cancelled or everything]:
            self._leave(sequence, "cancelled")
            gone.append(sequence)
        wake(sequence.outputs for sequence in gone)

    def _prepare(self) -> None:
        """Compile one thing more, if there is nothing else to do."""
        if not self._preparing or self._running or self._waiting or self._beside:
            return
        preparations, future = self._preparing
        try:
            if prepare := next(preparations, None):
                prepare()
                return
            future.set_result(None)
        except Exception as error:
            future.set_exception(error)
        self._preparing = None

    def _admit(self) -> None:
        """Give slots to the requests that wait longest, and prefill: their first tokens."""
        tokens = 0
        while tokens < PROMPT_TOKENS and len(self._running) < self.slots:
            with self._changed:
                if not self._waiting:
                    return
                sequence = self._waiting.popleft()
                self._stats.prompt_tokens += len(sequence.request.ids)
            tokens += max(len(sequence.request.ids), SMALLEST_BUCKET)
            self._running.append(sequence)
            try:
                sequence.begin(self.tokenizer)
            except Exception as error:  # invalid settings
                self._leave(sequence, "error", error)
                wake([sequence.outputs])
            else:
                self._advance([sequence])

    def _advance(self, sequences: list[Sequence]) -> None:
        """One token for each of these. If that fails, they end with the error."""
        try:
            logits = self.decoder.next_logits(sequences)[:, : self.tokenizer.vocab_size]
            choices = [sequence.choice for sequence in sequences]
            tokens = choose(logits, [sequence.ids for sequence in sequences], choices).tolist()
        except Exception as error:
            log.exception("A step of %d requests failed.", len(sequences))
            for sequence in sequences:
                self._leave(sequence, "error", error)
        else:
            self._stats.tokens += len(sequences)
            for sequence, token, row in zip(sequences, tokens, logits, strict=True):
                try:
                    if reason := sequence.advance(token, row):
                        self._leave(sequence, reason)
                except Exception as error:
                    log.exception("A token of one request could not be passed on.")
                    self._leave(sequence, "error", error)
        wake(sequence.outputs for sequence in sequences)

    def _leave(
        self, sequence: Sequence, reason: FinishReason, error: Exception | None = None
    ) -> None:
        self._running.remove(sequence)
        self.decoder.release(sequence)
        self._end(sequence, reason, error)

    def _end(
        self, sequence: Sequence, reason: FinishReason, error: Exception | None = None
    ) -> None:
        with self._changed:
            self._stats.ended[reason] += 1
        sequence.finish(reason, error)

    def _cancel_all(self) -> None:
        self._drop_cancelled(everything=True)
        closed = EngineClosed("The engine was closed meanwhile.")
        self._beside.cancel_all(closed)
        if self._preparing:
            self._preparing[1].set_exception(closed)
