"""For the tests of the server: an engine that writes the alphabet, and servers that are running."""

import contextlib
import socket
import string
import threading
import time
from concurrent.futures import Future
from dataclasses import replace

import pytest

pytest.importorskip("starlette", reason="the extra 'serve' is not installed")
pytest.importorskip("uvicorn", reason="the extra 'serve' is not installed")

from tinygpt.api import GPT
from tinygpt.config import GPTConfig
from tinygpt.generation.decoder import Decoder
from tinygpt.server.app import make_app
from tinygpt.server.engine.scheduler import EngineClosed, EngineStats, QueueFull
from tinygpt.server.engine.scoring import score_texts
from tinygpt.server.engine.sequence import Piece, Sequence, wake
from tinygpt.server.http.limits import Limits
from tinygpt.server.http.listening import Server, listen, url
from tinygpt.server.openai.service import Service
from tinygpt.text.tokenizers import ByteTokenizer

TINY = GPTConfig(block_size=64, vocab_size=256, n_layer=1, n_head=2, n_embd=16)
ALPHABET = string.ascii_lowercase
PATIENCE = 30.0
"""Seconds after which a test gives up; nothing takes so long."""


class FakeEngine:
    """Continues every prompt with the alphabet, while ``go`` is set, in a thread for each text."""

    def __init__(self, queue=1000, pace=0.0, error=None):
        self.queue, self.pace, self.error = queue, pace, error
        self.go, self.closed = threading.Event(), False
        self.go.set()
        self.streams = []

    @property
    def alive(self):
        return not self.closed

    def open(self):
        """Texts that are not at their end: those that hold a place."""
        return [s for s in self.streams if s.finish_reason is None]

    def submit(self, request, outputs=None):
        if self.closed:
            raise EngineClosed("closed")
        if len(self.open()) >= self.queue:
            raise QueueFull("full")
        stream = Sequence(request, outputs)
        self.streams.append(stream)
        threading.Thread(target=self._write, args=(stream,), daemon=True).start()
        return stream

    def _write(self, stream):
        reason = "length"
        for i in range(stream.request.max_tokens):
            while not self.go.wait(0.01) and not stream.cancelled:
                pass
            if stream.cancelled or self.error:
                reason = "cancelled" if stream.cancelled else "error"
                break
            token = ord(ALPHABET[i % 26])
            top = ((token, -0.5), (255, float("-inf")))[: stream.request.logprobs or 0]
            piece = Piece(token, chr(token), -0.5, top, bytes([token]), i)
            stream.outputs.put(stream, piece)
            wake([stream.outputs])
            if self.pace:
                time.sleep(self.pace)
        stream.finish(reason, self.error)
        wake([stream.outputs])

    def run(self, function):
        future = Future()
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(error)
        return future

    def score(self, ids, count):
        """The real scores, of the model that ``fake_service`` gives."""
        pieces = score_texts(Decoder(self.model, 1), [(ids, count)], 256)

        def scored():
            while True:
                try:
                    next(pieces)
                except StopIteration as end:
                    return end.value[0]

        return self.run(scored)

    def stats(self):
        n, ended = len(self.streams), dict.fromkeys(("stop", "length", "cancelled", "error"), 0)
        counts = {"requests": n, "tokens": 12345678, "seconds": 1.5}
        return EngineStats(4, self.queue, active=len(self.open()), ended=ended, **counts)


def fake_service(engine=None, name="tiny", block_size=64, tokenizer=None, **limits):
    """A service of which only the engine is not real."""
    engine = engine or FakeEngine()
    tokenizer = tokenizer or ByteTokenizer()
    engine.model = GPT(replace(TINY, block_size=block_size, vocab_size=tokenizer.vocab_size))
    return Service(engine, engine.model, tokenizer, name, limits=Limits(**limits))


@contextlib.contextmanager
def running(service, **options):
    """The address of a real server, on a free port."""
    listener = listen("127.0.0.1", 0)
    server = Server(make_app(service, **options), service.limits)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    try:
        yield url(listener, "127.0.0.1")
    finally:
        server.stop()
        thread.join(PATIENCE)
        listener.close()
        assert not thread.is_alive()


def until(condition):
    """Wait for something that is about to be true."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.01)


def connection(address, room=None):
    """A plain socket to a server, with ``room`` for so many unread bytes."""
    host, port = address.removeprefix("http://").split(":")
    sock = socket.socket()
    sock.settimeout(PATIENCE)
    if room is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
    sock.connect((host, int(port)))
    return sock
