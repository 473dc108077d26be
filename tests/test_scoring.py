"""Scores of texts: the eager forward pass's numbers, beside streams that keep their pace."""

import random
import threading
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("starlette", reason="the extra 'serve' is not installed")

from tinygrad import Tensor

from tests.serving import PATIENCE, TINY, until
from tinygpt.api import GPT
from tinygpt.config import SampleConfig
from tinygpt.generation.decoder import CHUNK, WINDOW_TOKENS, Decoder
from tinygpt.generation.sample import log_probabilities
from tinygpt.server.engine.beside import SHARE, Beside, Call, Text
from tinygpt.server.engine.scheduler import Engine, EngineClosed, QueueFull
from tinygpt.server.engine.scoring import score_texts
from tinygpt.server.engine.sequence import Request
from tinygpt.text.tokenizers import ByteTokenizer


@pytest.fixture(scope="module")
def model():
    made = GPT(TINY, seed=3)
    for name, parameter in made.parameters().items():  # far from what it is born with
        if name.endswith("weight"):
            parameter.assign(parameter * 5).realize()
    made.eval()
    return made


@pytest.fixture(scope="module")
def decoder(model):
    return Decoder(model, slots=2)


def scored(decoder, *asked, vocab_size=250):
    pieces = score_texts(decoder, asked, vocab_size)
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            return end.value


def eager(model, ids, vocab_size=250):
    """Log probabilities (T, V) by a forward pass of the text alone, without padding or jit."""
    logits = model(Tensor([ids], dtype="int32"))[0].numpy()[:, :vocab_size]
    return np.array([log_probabilities(row) for row in logits])


def some_ids(n, seed=0):
    return np.random.default_rng(seed).integers(0, 250, n).tolist()


def check(model, ids, count, found):
    wanted = eager(model, ids)
    (first, top), *rest = found.tokens
    assert (first, top) == (None, ()) and len(rest) == len(ids) - 1
    own = [wanted[i, token] for i, token in enumerate(ids[1:])]
    np.testing.assert_allclose([logprob for logprob, _ in rest], own, atol=1e-4)
    for (_, top), row in zip(rest, wanted, strict=False):
        assert [i for i, _ in top] == np.argsort(-row, kind="stable")[:count].tolist()
        np.testing.assert_allclose([p for _, p in top], np.sort(row)[::-1][:count], atol=1e-4)
    np.testing.assert_allclose(log_probabilities(found.following), wanted[-1], atol=1e-4)


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 33, 64])
def test_scores_are_those_of_the_eager_forward_pass_whatever_the_padding(model, decoder, n):
    ids = some_ids(n, seed=n)
    [found] = scored(decoder, (ids, 3))
    check(model, ids, 3, found)


def test_texts_that_are_read_together_have_the_scores_that_they_have_alone(model, decoder):
    texts = [some_ids(n, seed=n) for n in (9, 16, 1, 12, 5)]
    assert len(texts) <= decoder.together(texts[0]) == WINDOW_TOKENS // 16
    asked = [(ids, i) for i, ids in enumerate(texts)]
    assert sum(map(len, texts)) <= CHUNK  # logits of all of them at once
    for (ids, count), found in zip(asked, scored(decoder, *asked), strict=True):
        check(model, ids, count, found)
        [alone] = scored(decoder, (ids, count))
        np.testing.assert_allclose(found.following, alone.following, rtol=1e-5, atol=1e-5)


def test_memory_is_flat_over_many_scores(decoder):
    """Each eager pass left some 1.5 MB behind for ever."""
    scored(decoder, (some_ids(40), 2))

    def resident():
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096

    try:
        before = resident()
    except OSError:
        pytest.skip("only Linux tells how much memory a process holds")
    for i in range(100):
        scored(decoder, (some_ids(40, seed=i), 2))
    assert resident() - before < 20 << 20


class Clock:
    """Time passes as it is told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def spend(self, seconds):
        self.now += seconds


def test_calls_take_their_share_of_the_time_of_streams_and_no_more(decoder):
    clock, draw = Clock(), random.Random(1)
    beside = Beside(decoder, 250, clock)
    spent, streams = 0.0, 0.0
    for _ in range(400):
        beside.add(Call(lambda: clock.spend(draw.uniform(0.5, 3.0))))
    while streams < 300:
        before = clock.now
        beside.piece(busy=True)
        spent += clock.now - before
        beside.earn(0.25)
        streams += 0.25
        assert spent <= SHARE * streams + 3.0, "one piece ahead at most"
    assert spent >= 0.9 * SHARE * streams, "and little time is wasted"


def test_without_streams_nothing_waits_and_nothing_is_owed_later(decoder):
    clock, made = Clock(), []
    beside = Beside(decoder, 250, clock)
    for i in range(3):
        beside.add(Call(lambda i=i: (made.append(i), clock.spend(100.0))))
    beside.piece(busy=True)
    beside.piece(busy=True)
    assert made == [0], "it is in debt"
    beside.piece(busy=False)
    assert made == [0, 1]
    beside.piece(busy=True)
    assert made == [0, 1, 2] and not beside


def test_texts_of_one_length_go_together_in_the_order_of_the_queue(decoder):
    beside = Beside(decoder, 250)
    made = []
    texts = [Text(some_ids(n, seed=n), 1) for n in (5, 40, 7, 20, 3)]
    for text in texts:
        beside.add(text)
    beside.add(Call(lambda: made.append("call")))
    texts[2].future.cancel()
    for i, text in enumerate(texts):
        text.future.add_done_callback(lambda future, i=i: made.append(i))
    made.clear()  # of the cancelled one
    while beside:
        beside.piece(busy=False)
    assert made == [0, 4, 1, 3, "call"]
    assert all(len(t.future.result().tokens) == len(t.ids) for i, t in enumerate(texts) if i != 2)


def test_scores_have_a_queue_with_a_limit_and_an_end(model):
    engine, go = Engine(model, ByteTokenizer(), slots=1, queue=2), threading.Event()
    with engine:
        engine.run(lambda: go.wait(PATIENCE))
        until(lambda: not engine._beside._waiting)
        waiting = [engine.score((1, 2, 3), 0) for _ in range(2)]
        with pytest.raises(QueueFull):
            engine.score((1, 2, 3), 0)
        assert engine.stats().refused == 1
        waiting[0].cancel()
        go.set()
        assert len(waiting[1].result(PATIENCE).tokens) == 3
        go.clear()
        engine.run(lambda: go.wait(PATIENCE))
        until(lambda: not engine._beside._waiting)
        never = engine.score((1, 2, 3), 0)
        threading.Timer(0.05, go.set).start()
    with pytest.raises(EngineClosed):
        never.result(PATIENCE)
    with pytest.raises(EngineClosed):
        engine.score((1, 2, 3), 0)


def test_the_token_behind_a_scored_text_needs_no_place_and_is_the_one_that_is_written(model):
    ids, settings = (72, 101, 108, 108, 111), SampleConfig(temperature=0.8, top_k=20)
    with Engine(model, ByteTokenizer(), slots=1) as engine:
        [wanted] = [p.token for p in engine.submit(Request(ids, 1, settings, seed=5))]
        following = engine.score(ids, 0).result(PATIENCE).following
        hog = engine.submit(Request((1,), 10**6, settings))
        until(lambda: engine.stats().active == 1)
        known = engine.submit(Request(ids, 1, settings, seed=5, logprobs=0, first=following))
        [piece] = known
        assert piece.token == wanted and piece.logprob is not None
        assert known.finish_reason == "length" and hog.finish_reason is None
        nothing = engine.submit(Request(ids, 0, settings))
        assert nothing.finish_reason == "length" and list(nothing) == []
        hog.cancel()
