"""The engine behind the server: many requests decoded together, in one thread that owns tinygrad.

tinygrad is not thread-safe. So one thread computes, and nothing else does: requests come to it
through a queue, and tokens leave it through streams. Whatever else needs the model (`Engine.run`,
`Engine.score`) is done in that thread between two steps, in its share of the time. A step brings
every running request one token further. A request waits for a free place, of which there are
``places``; its prompt is then prefilled by itself. Between two steps that is one long prompt or a
few short ones, so that no running stream waits for more.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Self, TypeVar

from tinygpt.errors import TinyGPTError
from tinygpt.generation.batching import BatchDecoder, Line
from tinygpt.generation.decoder import SMALLEST_BUCKET
from tinygpt.generation.sample import choose
from tinygpt.machine import kernel_store
from tinygpt.model.transformer import Transformer
from tinygpt.server.engine.beside import Beside, Call, Text
from tinygpt.server.engine.scoring import Scored
from tinygpt.server.engine.sequence import FinishReason, Piece, Request, Stream, wake
from tinygpt.server.engine.writer import Writer
from tinygpt.text.tokenizers import Tokenizer

__all__ = ["Engine", "EngineClosed", "EngineStats", "Piece", "QueueFull", "Request", "Stream"]

log = logging.getLogger(__name__)

T = TypeVar("T")

PROMPT_TOKENS = 64
"""Tokens of prompts between two steps: as soon as there are so many, who runs has its turn."""


class QueueFull(TinyGPTError):  # noqa: N818
    """More requests are waiting than the engine takes; the client should try again later."""


class EngineClosed(TinyGPTError):  # noqa: N818
    """The engine was not started, or has been closed."""


@dataclass(frozen=True)
class EngineStats:
    """What the engine does now, and what it has done since its start."""

    active: int
    """Requests that have a place."""
    waiting: int
    """Requests that wait for one."""
    places: int
    queue: int
    """How many may wait."""
    requests: int
    """All that were accepted; the sum of the ended ones, the active and the waiting."""
    ended: dict[FinishReason, int]
    """How many ended for which reason."""
    refused: int
    """Requests for which the queue was full."""
    prompt_tokens: int
    """Of requests that got a place, whole prompts as they were sent."""
    tokens: int
    """Tokens generated."""
    steps: int
    """Steps of all running requests together."""
    seconds: float
    """Since the start."""


class Engine:
    """Decodes the requests of all clients together.

    >>> with Engine(model, tokenizer) as engine:
    ...     stream = engine.submit(Request((1, 2, 3), max_tokens=20, config=SampleConfig()))
    ...     text = "".join(piece.text for piece in stream)
    """

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, places: int = 16, queue: int = 128
    ) -> None:
        """``places`` requests are decoded together; up to ``queue`` more may wait."""
        self.model, self.tokenizer = model, tokenizer
        self.places, self.queue = places, queue
        self._decoder = BatchDecoder(model, places)
        self._running: list[Writer] = []
        self._waiting: deque[Stream] = deque()
        self._beside = Beside(self._decoder, tokenizer.vocab_size)
        self._changed = threading.Condition()  # guards what is waiting, the counts, and the end
        self._thread: threading.Thread | None = None
        self._preparing: tuple[Iterator[Callable[[], object]], Future[None]] | None = None
        self._open = False
        self._deadline: float | None = None  # of the streams, once it is closed
        self._cancelled = False  # is there a stream somebody has cancelled?
        self._ended: dict[FinishReason, int] = dict.fromkeys(
            ("stop", "length", "cancelled", "error"), 0
        )
        self._requests = self._refused = self._prompt_tokens = self._tokens = self._steps = 0
        self._started = time.monotonic()

    def start(self) -> None:
        """Start the engine's thread, once. The model belongs to it from now on."""
        assert self._thread is None, "an engine is started once"
        self._open, self._started = True, time.monotonic()
        self._thread = threading.Thread(target=self._work, name="tinygpt-engine", daemon=True)
        self._thread.start()

    def warm_up(self) -> Future[None]:
        """Compile, whenever there is nothing else to do, what is else compiled when it is needed.

        The future tells when that is done.
        """
        future: Future[None] = Future()
        future.set_running_or_notify_cancel()  # it can no longer be cancelled
        with self._changed:
            self._check_open()
            self._preparing = self._decoder.preparations(), future
            self._changed.notify()
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

    def submit(self, request: Request) -> Stream:
        """Queue a request; its tokens come through the stream.

        Raises QueueFull if too many are waiting, and EngineClosed.
        """
        stream = Stream(request, self._on_cancel)
        with self._changed:
            self._check_open()
            at_once = request.max_tokens == 0 or (
                request.max_tokens == 1 and request.first is not None
            )
            if not at_once:
                self._check_room(len(self._waiting))
                self._waiting.append(stream)
            self._requests += 1
            self._changed.notify()
        if at_once:
            self._answer(stream)
        return stream

    def score(self, ids: Sequence[int], count: int) -> Future[Scored]:
        """How likely each of up to block_size ids is, and the ``count`` likeliest in its place.

        Texts of about one length are read together, beside the streams, which keep their pace.
        Raises QueueFull if too many texts are waiting for this, and EngineClosed.
        """
        text = Text(ids, count)
        with self._changed:
            self._check_open()
            self._check_room(self._beside.texts)
            self._beside.add(text)
            self._changed.notify()
        return text.future

    def run(self, function: Callable[[], T]) -> Future[T]:
        """Call ``function`` in the engine's thread, between two steps; it may use the model.

        What it raises is the future's exception. Streams wait for it meanwhile, and then it waits
        for them: calls get a share of the time.
        """
        call = Call(function)
        with self._changed:
            self._check_open()
            self._beside.add(call)
            self._changed.notify()
        return call.future

    @property
    def alive(self) -> bool:
        """Whether requests are taken, and the thread is there that answers them."""
        return self._open and self._thread is not None and self._thread.is_alive()

    def stats(self) -> EngineStats:
        """Numbers for a page or for /metrics; from any thread."""
        with self._changed:
            return EngineStats(
                active=len(self._running),
                waiting=len(self._waiting),
                places=self.places,
                queue=self.queue,
                requests=self._requests,
                ended=dict(self._ended),
                refused=self._refused,
                prompt_tokens=self._prompt_tokens,
                tokens=self._tokens,
                steps=self._steps,
                seconds=time.monotonic() - self._started,
            )

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if not self._open:
            raise EngineClosed("The engine is not running: it was not started, or it was closed.")

    def _check_room(self, waiting: int) -> None:
        if waiting >= self.queue:
            self._refused += 1
            raise QueueFull(
                f"{len(self._running)} requests are running and {waiting} are waiting, which is as "
                f"many as the server takes. Try again in a few seconds."
            )

    def _answer(self, stream: Stream) -> None:
        """End a request that needs no place: it wants nothing, or a token that is known so far."""
        reason: FinishReason = "length"
        try:
            if stream.request.max_tokens:
                writer = Writer(stream, Line(stream.request.ids, self.places), self.tokenizer)
                assert stream.request.first is not None
                [token] = choose([stream.request.first], [stream.request.ids], [writer.choice])
                reason = writer.advance(int(token), stream.request.first) or reason
                with self._changed:
                    self._prompt_tokens += len(stream.request.ids)
                    self._tokens += 1
        except Exception as error:
            self._end(stream, "error", error)
        else:
            self._end(stream, reason)

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
                self._step()
                self._beside.earn(time.perf_counter() - begin)
                self._prepare()
        finally:
            self._open = False
            self._cancel_all()
            kernel_store.disconnect()

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

    def _drop_cancelled(self) -> None:
        if not self._cancelled:
            return
        with self._changed:
            self._cancelled = False
            gone = [stream for stream in self._waiting if stream.cancelled]
            self._waiting = deque(s for s in self._waiting if not s.cancelled)
        for stream in gone:
            self._end(stream, "cancelled")
        for writer in [w for w in self._running if w.stream.cancelled]:
            self._leave(writer, "cancelled")

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
        """Give those who wait longest a place, and prefill their prompts: their first tokens."""
        tokens = 0
        while tokens < PROMPT_TOKENS and len(self._running) < self.places:
            with self._changed:
                if not self._waiting:
                    return
                stream = self._waiting.popleft()
            tokens += max(len(stream.request.ids), SMALLEST_BUCKET)
            self._begin(stream)

    def _begin(self, stream: Stream) -> None:
        line = self._decoder.admit(stream.request.ids)
        try:
            writer = Writer(stream, line, self.tokenizer)
        except Exception as error:  # settings that nobody has checked
            self._decoder.release(line)
            self._end(stream, "error", error)
            return
        self._running.append(writer)
        self._prompt_tokens += len(stream.request.ids)
        self._advance([writer])

    def _step(self) -> None:
        if self._running:
            self._steps += 1
            self._advance(list(self._running))

    def _advance(self, writers: list[Writer]) -> None:
        """One token for each of these. Where that fails, those end with the error that it is of."""
        lines = [writer.line for writer in writers]
        try:
            logits = self._decoder.next_logits(lines)[:, : self.tokenizer.vocab_size]
            choices = [writer.choice for writer in writers]
            tokens = choose(logits, [line.ids for line in lines], choices).tolist()
        except Exception as error:
            log.exception("A step of %d requests failed.", len(writers))
            for writer in writers:
                self._leave(writer, "error", error)
            return
        self._tokens += len(writers)
        for writer, token, row in zip(writers, tokens, logits, strict=True):
            try:
                reason = writer.advance(token, row)
            except Exception as error:
                log.exception("A token of one request could not be passed on.")
                self._leave(writer, "error", error)
                continue
            if reason is not None:
                self._leave(writer, reason)
        wake(writer.stream for writer in writers)

    def _leave(self, writer: Writer, reason: FinishReason, error: Exception | None = None) -> None:
        self._running.remove(writer)
        self._decoder.release(writer.line)
        self._end(writer.stream, reason, error)

    def _end(self, stream: Stream, reason: FinishReason, error: Exception | None = None) -> None:
        with self._changed:
            self._ended[reason] += 1
        stream.finish(reason, error)
        wake([stream])

    def _cancel_all(self) -> None:
        with self._changed:
            waiting = list(self._waiting)
            self._waiting.clear()
        for stream in waiting:
            self._end(stream, "cancelled")
        for writer in list(self._running):
            self._leave(writer, "cancelled")
        closed = EngineClosed("The engine was closed meanwhile.")
        self._beside.cancel_all(closed)
        if self._preparing:
            self._preparing[1].set_exception(closed)
