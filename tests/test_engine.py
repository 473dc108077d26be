"""The engine: whatever else runs, each request gets the text that it would get alone."""

from __future__ import annotations

import asyncio
import gc
import math
import threading
import weakref

import numpy as np
import pytest

from tests.test_generate import with_strong_weights
from tinygpt.config import GPTConfig, SampleConfig
from tinygpt.errors import TinyGPTError, UsageError
from tinygpt.generation.decoder import Decoder
from tinygpt.generation.decoder import Sequence as Ids
from tinygpt.generation.stream import generate_text
from tinygpt.model.transformer import Transformer
from tinygpt.server.engine.scheduler import Engine, EngineClosed, QueueFull
from tinygpt.server.engine.sequence import Outputs, Piece, Request, Sequence, wake
from tinygpt.text.tokenizers import ByteTokenizer, CharTokenizer

TOKENIZER = CharTokenizer("abcdefghijklmnopqrstuvwxyz .,")
BLOCK, V = 16, 32  # the model has more ids than the tokenizer
GREEDY = SampleConfig(temperature=0)
FOREVER = 10**9
SECONDS = 120
"""After which something that should have happened never will."""


@pytest.fixture(scope="module")
def model():
    config = GPTConfig(block_size=BLOCK, vocab_size=V, n_layer=2, n_head=2, n_embd=16)
    return with_strong_weights(Transformer(config), seed=3).eval()


@pytest.fixture(scope="module")
def shared(model):
    with Engine(model, TOKENIZER, slots=4) as engine:
        yield engine


@pytest.fixture
def engine(shared):
    """The one engine of this file, on which every test must leave nothing running."""
    yield shared
    settle(shared)
    assert (shared.stats().active, shared.stats().waiting) == (0, 0)


@pytest.fixture(scope="module")
def expected(model, shared):
    """The text that generation by itself gives, in the thread that owns tinygrad."""
    decoder = Decoder(model)

    def text(prompt, count, config=GREEDY, seed=None, stop=()):
        def work():
            return "".join(
                generate_text(decoder, TOKENIZER, prompt, count, config, seed, list(stop))
            )

        return shared.run(work).result(SECONDS)

    return text


def request(prompt, count, config=GREEDY, **more):
    return Request(tuple(TOKENIZER.encode(prompt)), count, config, **more)


def text_of(stream):
    text = "".join(piece.text for piece in stream)
    assert stream.error is None
    return text


def settle(engine):
    """Wait until what was asked of the engine before is done: cancelling, for example."""
    for _ in range(2):
        engine.run(lambda: None).result(SECONDS)


def endless(engine, prompt="on and on "):
    """A stream that runs until it is cancelled, and is running."""
    stream = engine.submit(request(prompt, FOREVER))
    next(iter(stream))
    return stream


# What comes out

CASES = [
    ("hello", 12, GREEDY, None),
    ("a", 40, GREEDY, None),  # beyond block_size
    ("a prompt that is longer than the block size of the model, ", 9, GREEDY, None),
    ("x", 30, SampleConfig(), 1),
    ("many ", 25, SampleConfig(temperature=0.7, top_k=5), 2),
    ("more ", 25, SampleConfig(top_p=0.8, repetition_penalty=1.5), 3),
    ("and ", 20, SampleConfig(min_p=0.1, temperature=2.0), 4),
    ("b" * BLOCK, 5, GREEDY, None),
    ("z", 1, SampleConfig(), 5),
]


@pytest.mark.parametrize("case", CASES)
def test_a_text_alone_is_the_one_that_generate_gives(case, engine, expected):
    prompt, count, config, seed = case
    stream = engine.submit(request(prompt, count, config, seed=seed))
    pieces = list(stream)
    assert len(pieces) == count and stream.finish_reason == "length"
    text = "".join(piece.text for piece in pieces)
    assert text == expected(*case)
    assert text == TOKENIZER.decode([piece.token for piece in pieces])


def test_texts_together_are_the_same_as_alone(engine, expected):
    streams = [
        engine.submit(request(prompt, count, config, seed=seed))
        for prompt, count, config, seed in CASES * 2
    ]
    assert [text_of(s) for s in streams] == [expected(*case) for case in CASES] * 2
    assert {s.finish_reason for s in streams} == {"length"}


def test_without_a_seed_texts_differ(engine):
    asked = request("a", 30, SampleConfig())
    assert len({text_of(engine.submit(asked)) for _ in range(3)}) == 3


@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_text_ends_before_a_stop_string(length, engine, expected):
    whole = expected("stop ", 40, SampleConfig(), 8)
    stop = ("ZZZ"[:1] + "q" * 9, whole[11 : 11 + length])
    stream = engine.submit(request("stop ", 40, SampleConfig(), seed=8, stop=stop))
    text = text_of(stream)
    assert text == expected("stop ", 40, SampleConfig(), 8, stop) == whole[: whole.index(stop[1])]
    assert stream.finish_reason == "stop"


def test_what_may_begin_a_stop_string_comes_with_the_last_piece(engine, expected):
    whole = expected("stop ", 40, SampleConfig(), 8)
    stop = (whole[-3:] + "!",)
    pieces = list(engine.submit(request("stop ", 40, SampleConfig(), seed=8, stop=stop)))
    assert [len(p.text) for p in pieces[-3:]] == [0, 0, 3]
    assert "".join(p.text for p in pieces) == whole


def test_no_tokens_are_no_pieces(engine):
    stream = engine.submit(request("a", 0))
    assert list(stream) == [] and stream.finish_reason == "length"


def test_log_probabilities_are_the_models_own(engine, model):
    config = SampleConfig(temperature=0.2, top_k=2)  # neither of which they depend on
    pieces = list(engine.submit(request("abc", 6, config, seed=1, logprobs=29)))
    decoder, sequence = Decoder(model), Ids(TOKENIZER.encode("abc"))
    for piece in pieces:
        [logits] = engine.run(lambda: decoder.next_logits([sequence])).result(SECONDS)
        logs = logits[:29] - np.log(np.exp(logits[:29].astype(np.float64)).sum())
        assert piece.logprob == pytest.approx(logs[piece.token], abs=1e-5)
        assert [i for i, _ in piece.top] == np.argsort(-logs, kind="stable").tolist()
        assert math.fsum(math.exp(log) for _, log in piece.top) == pytest.approx(1)
        sequence.ids.append(piece.token)


@pytest.mark.parametrize("count", [None, 0, 3])
def test_as_many_likeliest_tokens_come_as_were_asked_for(count, engine):
    for piece in engine.submit(request("abc", 3, logprobs=count)):
        assert (piece.logprob is None) == (count is None)
        assert len(piece.top) == (count or 0)
        if count:
            assert piece.top[0] == (piece.token, piece.logprob)  # it was greedy


def test_text_that_ends_within_a_character_says_so():
    script = iter([97, *"😀".encode()[:2]])
    with Engine(byte_model(), ByteTokenizer(), slots=1) as engine:
        engine.decoder.__class__ = Scripted
        Scripted.script = script
        stream = engine.submit(Request((1,), 3, GREEDY))
        assert [p.text for p in stream] == ["a", "", "�"]


def byte_model():
    return Transformer(GPTConfig(block_size=8, vocab_size=256, n_layer=1, n_head=1, n_embd=4))


class Scripted(Decoder):
    """Says what it is told to say."""

    __slots__ = ()
    script = iter(())

    def next_logits(self, sequences):
        return np.eye(256, dtype=np.float32)[[next(self.script) for _ in sequences]]


# Many at once


def test_a_second_request_does_not_wait_for_the_first_to_end(engine, expected):
    first = endless(engine)
    second = engine.submit(request("hello", 12))
    assert text_of(second) == expected("hello", 12)
    assert first.finish_reason is None
    first.cancel()
    assert len(list(first)) > 12 and first.finish_reason == "cancelled"


def test_more_requests_than_slots_take_turns(engine):
    hogs = [endless(engine) for _ in range(3)]
    streams = [engine.submit(request("a", 5)) for _ in range(10)]  # one place for all of them
    assert len({text_of(s) for s in streams}) == 1
    for hog in hogs:
        hog.cancel()


def test_cancelling_frees_the_place_for_who_waits(engine, expected):
    hogs = [endless(engine) for _ in range(4)]
    waiting = [engine.submit(request("hello", 3)) for _ in range(3)]
    settle(engine)
    assert (engine.stats().active, engine.stats().waiting) == (4, 3)
    waiting[1].cancel()
    assert list(waiting[1]) == [] and waiting[1].finish_reason == "cancelled"
    assert waiting[0].finish_reason is None
    hogs[2].cancel()
    assert [text_of(waiting[i]) for i in (0, 2)] == [expected("hello", 3)] * 2
    for hog in hogs:
        hog.cancel()
        hog.cancel()  # twice does no harm


def test_cancelling_what_has_ended_changes_nothing(engine):
    stream = engine.submit(request("a", 2))
    pieces = list(stream)
    stream.cancel()
    settle(engine)
    assert stream.finish_reason == "length" and len(pieces) == 2


def test_a_consumer_that_does_not_read_blocks_nobody(engine, expected):
    stuck = engine.submit(request("hello", 12))
    assert text_of(engine.submit(request("a", 40))) == expected("a", 40)
    assert stuck.finish_reason == "length"
    assert text_of(stuck) == expected("hello", 12)


def test_a_full_queue_refuses_and_says_what_to_do(model):
    with Engine(model, TOKENIZER, slots=1, queue=2) as engine:
        streams = [endless(engine), *(engine.submit(request("a", 2)) for _ in range(2))]
        with pytest.raises(QueueFull, match=r"2 are waiting.*Try again"):
            engine.submit(request("a", 2))
        assert engine.stats().refused == 1 and engine.stats().requests == 3
        streams[0].cancel()
        assert [len(list(s)) for s in streams[1:]] == [2, 2]
        assert len(list(engine.submit(request("a", 2)))) == 2


def test_the_engine_counts(model):
    with Engine(model, TOKENIZER, slots=2) as engine:
        list(engine.submit(request("hello", 4)))
        list(engine.submit(request("a", 3, stop=tuple(TOKENIZER.chars))))
        hog = endless(engine, "abc")
        settle(engine)
        now = engine.stats()
        assert (now.active, now.waiting, now.slots, now.requests) == (1, 0, 2, 3)
        hog.cancel()
        count = len(list(hog)) + 1
        settle(engine)
        then = engine.stats()
    assert then.ended == {"stop": 1, "length": 1, "cancelled": 1, "error": 0}
    assert then.prompt_tokens == 5 + 1 + 3 and then.tokens == 4 + 1 + count
    assert then.active == 0 and then.steps > 3 and then.seconds > 0


def test_64_requests_of_all_kinds_get_their_texts(engine, expected):
    rng = np.random.default_rng(64)
    cases = []
    for seed in range(64):
        length = int(rng.choice([1, 3, BLOCK - 1, BLOCK, BLOCK + 1, 40]))
        prompt = TOKENIZER.decode(rng.integers(0, 29, length).tolist())
        config = CASES[int(rng.integers(len(CASES)))][2]
        stop = (TOKENIZER.chars[int(rng.integers(29))],) if rng.random() < 0.3 else ()
        cases.append((prompt, int(rng.integers(0, 25)), config, seed, stop))
    streams, texts = [], {}
    for prompt, count, config, seed, stop in cases:
        streams.append(engine.submit(request(prompt, count, config, seed=seed, stop=stop)))
        if rng.random() < 0.2:
            engine.submit(request(prompt, FOREVER)).cancel()
        if rng.random() < 0.3 and (i := int(rng.integers(len(streams)))) not in texts:
            texts[i] = text_of(streams[i])
    texts |= {i: text_of(stream) for i, stream in enumerate(streams) if i not in texts}
    assert [texts[i] for i in range(64)] == [expected(*case) for case in cases]


def test_the_engine_keeps_nothing_of_a_request(engine):
    stream = engine.submit(request("abc", 5))
    list(stream)
    settle(engine)
    kept = weakref.ref(stream)
    del stream
    gc.collect()
    assert kept() is None


# Consumers


def test_streams_are_read_from_many_threads(engine, expected):
    found = {}

    def consume(i):
        found[i] = text_of(engine.submit(request("hello", 12)))

    threads = [threading.Thread(target=consume, args=(i,)) for i in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert list(found.values()) == [expected("hello", 12)] * 9


def test_streams_are_read_from_an_event_loop(engine, expected):
    async def consume(case):
        prompt, count, config, seed = case
        stream = engine.submit(request(prompt, count, config, seed=seed))
        bursts = [burst async for burst in stream.outputs.bursts()]
        return "".join(piece.text for burst in bursts for _, piece in burst if piece)

    async def everybody():
        return await asyncio.gather(*map(consume, CASES))

    assert asyncio.run(everybody()) == [expected(*case) for case in CASES]


def test_a_reader_that_goes_away_harms_nobody(engine, expected):
    hog = endless(engine)

    async def reader():
        async for _ in hog.outputs.bursts():
            pass

    async def leave():
        task = asyncio.create_task(reader())
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(leave())  # after which its loop is closed
    assert text_of(engine.submit(request("hello", 12))) == expected("hello", 12)
    assert hog.finish_reason is None
    hog.cancel()


def test_a_closed_loop_is_not_woken():
    outputs, loop = Outputs(), asyncio.new_event_loop()
    outputs._waiter = loop.create_future()
    loop.close()
    wake([outputs])


def test_pieces_that_have_come_can_be_taken_together():
    stream = Sequence(request("a", 3))
    pieces = [Piece(token, str(token)) for token in range(3)]
    for piece in pieces:
        stream.outputs.put(stream, piece)
    taken = stream.outputs.take()
    assert taken == [(stream, piece) for piece in pieces] and stream.outputs.take() == []
    stream.finish("length")
    assert list(stream) == []


@pytest.mark.parametrize("rest", [0.0, 0.001, math.inf])
def test_bursts_are_all_pieces_and_the_end_does_not_wait(rest, engine, expected):
    async def bursts():
        outputs = Outputs()
        engine.submit(request("a", 40), outputs)
        return [burst async for burst in outputs.bursts(rest)]

    found = asyncio.run(asyncio.wait_for(bursts(), SECONDS))
    text = "".join(piece.text for burst in found for _, piece in burst if piece is not None)
    assert text == expected("a", 40)
    assert all(found) and (rest < math.inf or len(found) <= 2)  # the first, and all the others


def test_who_rests_is_woken_by_the_end_alone():
    async def rest():
        stream = Sequence(request("a", 3))
        outputs = stream.outputs
        outputs.put(stream, Piece(1, "a"))
        bursts = outputs.bursts(math.inf)
        assert [p.text for _, p in await anext(bursts)] == ["a"]
        following = asyncio.create_task(anext(bursts))
        for text in "bc":
            await asyncio.sleep(0.01)
            outputs.put(stream, Piece(1, text))
            wake([outputs])
        await asyncio.sleep(0.01)
        assert not following.done()
        stream.finish("length")
        wake([outputs])
        return await asyncio.wait_for(following, SECONDS)

    assert [p and p.text for _, p in asyncio.run(rest())] == ["b", "c", None]


def test_an_error_does_not_wait_for_the_other_texts_of_its_answer():
    async def failing():
        outputs = Outputs()
        broken, other = (Sequence(request("a", 3), outputs) for _ in range(2))
        outputs.put(other, Piece(1, "a"))
        bursts = outputs.bursts(math.inf)
        await anext(bursts)
        following = asyncio.create_task(anext(bursts))
        await asyncio.sleep(0.01)
        broken.finish("error", ValueError())
        wake([outputs])
        return await asyncio.wait_for(following, SECONDS), broken, other

    burst, broken, other = asyncio.run(failing())
    assert burst == [(broken, None)] and other.finish_reason is None


@pytest.mark.parametrize("n", [1, 5])
def test_a_step_wakes_each_event_loop_once(n, monkeypatch):
    async def step():
        loop, woken = asyncio.get_running_loop(), []
        queues = [Outputs() for _ in range(n)]
        for outputs in queues:
            Sequence(request("a", 3), outputs)
        firsts = [asyncio.create_task(anext(outputs.bursts())) for outputs in queues]
        await asyncio.sleep(0.01)
        for outputs in queues:
            outputs.put(None, Piece(1, "a"))
        call = loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *a: woken.append(a) or call(*a))
        wake(queues)
        monkeypatch.undo()
        return len(woken), await asyncio.wait_for(asyncio.gather(*firsts), SECONDS)

    woken, firsts = asyncio.run(step())
    assert woken == 1 and len(firsts) == n


# Calls between steps


def test_a_call_runs_in_the_engines_thread_while_streams_run(engine):
    hog = endless(engine)
    name = engine.run(lambda: threading.current_thread().name).result(SECONDS)
    assert name == "tinygpt-engine" != threading.current_thread().name
    assert hog.finish_reason is None
    hog.cancel()


def test_what_a_call_raises_is_the_futures_and_nobody_elses(engine, expected):
    hog = endless(engine)
    with pytest.raises(ZeroDivisionError):
        engine.run(lambda: 1 // 0).result(SECONDS)
    assert text_of(engine.submit(request("hello", 12))) == expected("hello", 12)
    assert hog.finish_reason is None
    hog.cancel()


def test_a_call_that_was_cancelled_is_not_made(engine):
    go, made = threading.Event(), []
    blocking = engine.run(lambda: go.wait(SECONDS))
    late = engine.run(lambda: made.append(1))
    assert late.cancel()
    go.set()
    assert blocking.result(SECONDS) and not made


def test_warming_up_makes_all_that_requests_need(model):
    with Engine(model, TOKENIZER, slots=2) as engine:
        engine.warm_up().result(SECONDS)
        made = [dict(function.captures) for function in engine.decoder._passes]
        streams = [engine.submit(request("hello"[:n], 40)) for n in range(1, 6)]
        assert len({len(list(s)) for s in streams}) == 1
        assert [function.captures for function in engine.decoder._passes] == made


def test_requests_and_calls_go_before_warming_up(model):
    with Engine(model, TOKENIZER, slots=2) as engine:
        warm = engine.warm_up()
        assert len(list(engine.submit(request("a", 3)))) == 3
        assert engine.run(lambda: 1).result(SECONDS) == 1
    assert warm.done() and not warm.cancel()


# Failures


def failing(monkeypatch, engine, when):
    """Let the next step of so many requests fail."""
    step = Decoder.next_logits
    broken = RuntimeError("the device is gone")

    def next_logits(self, sequences):
        if len(sequences) == when and self is engine.decoder:
            monkeypatch.setattr(Decoder, "next_logits", step)
            raise broken
        return step(self, sequences)

    monkeypatch.setattr(Decoder, "next_logits", next_logits)
    return broken


def test_a_step_that_fails_ends_its_streams_and_the_engine_lives_on(
    engine, expected, monkeypatch, caplog
):
    streams = [endless(engine) for _ in range(3)]
    broken = failing(monkeypatch, engine, 3)
    for stream in streams:
        assert len(list(stream)) >= 0  # it ends
        assert stream.finish_reason == "error" and stream.error is broken
    assert "3 requests failed" in caplog.text
    assert text_of(engine.submit(request("hello", 12))) == expected("hello", 12)
    settle(engine)
    assert engine.stats().active == 0


def test_a_prompt_that_fails_ends_nobody_else(engine, monkeypatch):
    hogs = [endless(engine) for _ in range(2)]
    failing(monkeypatch, engine, 1)
    unlucky = engine.submit(request("a", 5))
    assert list(unlucky) == [] and unlucky.finish_reason == "error"
    assert [hog.finish_reason for hog in hogs] == [None, None]
    for hog in hogs:
        hog.cancel()


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"stop": ("",)}])
def test_settings_that_nobody_has_checked_are_an_error_of_their_own(wrong, engine, expected):
    stream = engine.submit(request("a", 5, **wrong))
    assert list(stream) == [] and isinstance(stream.error, UsageError)
    assert text_of(engine.submit(request("hello", 12))) == expected("hello", 12)


def test_a_model_that_diverged_is_an_error_that_says_so(model):
    broken = Transformer(model.config)
    broken.ln_f.weight.assign(broken.ln_f.weight * float("nan")).realize()
    with Engine(broken, TOKENIZER, slots=1) as engine:
        stream = engine.submit(request("a", 5))
        assert list(stream) == [] and isinstance(stream.error, TinyGPTError)
        assert "diverged" in str(stream.error)


def test_a_token_that_cannot_be_passed_on_ends_its_own_request_alone(engine, expected, monkeypatch):
    advance = Sequence.advance

    def fail_for_one(self, token, logits):
        if self.request.max_tokens == 7:
            raise ValueError("this one")
        return advance(self, token, logits)

    monkeypatch.setattr(Sequence, "advance", fail_for_one)
    streams = [engine.submit(request("hello", n)) for n in (12, 7, 9)]
    assert [text_of(streams[i]) for i in (0, 2)] == [expected("hello", n) for n in (12, 9)]
    assert list(streams[1]) == [] and str(streams[1].error) == "this one"


def test_an_engine_says_whether_it_lives(model):
    engine = Engine(model, TOKENIZER, slots=1)
    assert not engine.alive
    engine.start()
    assert engine.alive
    engine.close()
    assert not engine.alive


# The end


def test_closing_finishes_what_there_is_time_for_and_cancels_the_rest(model):
    engine = Engine(model, TOKENIZER, slots=2)
    engine.start()
    streams = [engine.submit(request("a", 10)) for _ in range(5)]
    engine.close(drain_seconds=SECONDS)
    assert {s.finish_reason for s in streams} == {"length"}
    assert [len(list(s)) for s in streams] == [10] * 5


@pytest.mark.parametrize("drain", [0.0, 0.05])
def test_closing_cancels_what_does_not_end(drain, model):
    engine = Engine(model, TOKENIZER, slots=1)
    engine.start()
    hog, waiting = endless(engine), engine.submit(request("a", 3))
    engine.close(drain)
    assert hog.finish_reason == waiting.finish_reason == "cancelled"
    assert list(waiting) == []
    engine.close()  # twice does no harm


def test_a_call_that_waits_at_the_end_hears_of_it(model):
    engine, go = Engine(model, TOKENIZER, slots=1), threading.Event()
    engine.start()
    engine.run(lambda: go.wait(SECONDS))
    never = engine.run(lambda: None)
    closing = threading.Thread(target=engine.close)
    closing.start()
    while engine._open:
        pass
    go.set()
    closing.join(SECONDS)
    with pytest.raises(EngineClosed):
        never.result(SECONDS)


def test_an_engine_that_does_not_run_takes_nothing(model):
    engine = Engine(model, TOKENIZER)
    for _ in range(2):
        with pytest.raises(EngineClosed, match="not running"):
            engine.submit(request("a", 1))
        with pytest.raises(EngineClosed):
            engine.run(lambda: None)
        if engine._thread is None:
            engine.start()
        engine.close()
