"""Texts decoded together: each is, bit for bit, what it would be alone."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tinygrad import Tensor, dtypes, nn
from tinygrad.helpers import Context

from tests.test_attention import RENDERERS, THREAD, render
from tests.test_generate import with_strong_weights
from tinygpt import kernels
from tinygpt.config import GPTConfig, SampleConfig
from tinygpt.errors import KernelError, TinyGPTError
from tinygpt.generation.decoder import Decoder, Sequence
from tinygpt.generation.sample import Choice, choose, draw, draw_each, first_choice, make_sampler
from tinygpt.kernels.attention.rows import (
    Cache,
    decode_rows,
    keep,
    keep_rows,
    plain_keep,
    plain_rows_attention,
    rows_attention,
)
from tinygpt.model.int8 import quantize
from tinygpt.model.transformer import Transformer

BLOCK, V = 24, 29
CONFIG = GPTConfig(block_size=BLOCK, vocab_size=V, n_layer=2, n_head=2, n_embd=16)
RNG = np.random.default_rng(0)


def tensor(x, dtype=dtypes.float32, device=None):
    return Tensor(x, dtype=dtype, device=device).contiguous().realize()


# The kernels


class Problem:
    """n rows at places and positions of their own; what lies behind a position is NaN."""

    def __init__(self, P, H, T, D, n, seed=0):
        rng = np.random.default_rng(seed)
        self.keys, self.values = (
            rng.normal(size=(P, H, T, D)).astype(np.float32) for _ in range(2)
        )
        self.qkv = rng.normal(size=(n, 3 * H * D)).astype(np.float32)
        self.places = rng.permutation(P)[:n].astype(np.int32)
        self.positions = rng.integers(0, T, n).astype(np.int32)
        self.positions[0], self.positions[-1] = 0, T - 1
        for place, position in zip(self.places, self.positions, strict=True):
            self.keys[place, :, position:] = self.values[place, :, position:] = np.nan
        self.H, self.D = H, D

    def run(self, function, device=None):
        """-> the result, and keys and values as they are left."""
        keys, values = (tensor(x, device=device) for x in (self.keys, self.values))
        indices = (tensor(x, dtypes.int32, device) for x in (self.places, self.positions))
        out = function(tensor(self.qkv, device=device), keys, values, *indices)
        return out.numpy(), keys.numpy(), values.numpy()

    def written(self):
        """Keys and values as they ought to be left."""
        keys, values = self.keys.copy(), self.values.copy()
        for row, (place, position) in enumerate(zip(self.places, self.positions, strict=True)):
            _, k, v = self.qkv[row].reshape(3, self.H, self.D)
            keys[place, :, position], values[place, :, position] = k, v
        return keys, values

    def exact(self):
        """The result in float64."""
        keys, values = (x.astype(np.float64) for x in self.written())
        out = np.zeros((len(self.qkv), self.H * self.D))
        for row, (place, position) in enumerate(zip(self.places, self.positions, strict=True)):
            q = self.qkv[row].reshape(3, self.H, self.D)[0].astype(np.float64)
            k, v = keys[place, :, : position + 1], values[place, :, : position + 1]
            scores = np.einsum("hd,htd->ht", q, k) / np.sqrt(self.D)
            weights = np.exp(scores - scores.max(1, keepdims=True))
            weights /= weights.sum(1, keepdims=True)
            out[row] = np.einsum("ht,htd->hd", weights, v).ravel()
        return out


SHAPES = [(5, 2, 100, 16, 4), (3, 2, 130, 20, 3), (17, 1, 9, 8, 16), (1, 4, 256, 32, 1)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("function", [rows_attention, plain_rows_attention])
def test_every_row_attends_to_its_own_place_up_to_its_own_position(shape, function):
    problem = Problem(*shape)
    out, keys, values = problem.run(function)
    np.testing.assert_allclose(out, problem.exact(), atol=2e-6)
    for got, wanted in zip((keys, values), problem.written(), strict=True):
        np.testing.assert_array_equal(got, wanted)  # and nothing else is touched


def test_a_row_is_bitwise_what_decoding_it_alone_gives():
    P, H, T, D, n = 6, 2, 100, 20, 5
    problem = Problem(P, H, T, D, n)
    out, keys, values = problem.run(rows_attention)
    for row, (place, position) in enumerate(zip(problem.places, problem.positions, strict=True)):
        qkv, cache = (
            tensor(problem.qkv[row][None]),
            (tensor(x[place][None]) for x in (keys, values)),
        )
        where = (tensor(np.array([n]), dtypes.int32) for n in (0, position))
        alone = rows_attention(qkv, *cache, *where).numpy()
        np.testing.assert_array_equal(out[row], alone.ravel())


@pytest.mark.parametrize("function", [keep, plain_keep])
def test_a_prompt_goes_to_the_beginning_of_its_place_and_nowhere_else(function):
    P, H, T, D, n = 3, 2, 12, 20, 7
    problem = Problem(P, H, T, D, n=1)
    qkv = RNG.normal(size=(n, 3 * H * D)).astype(np.float32)
    caches = [tensor(problem.keys), tensor(problem.values)]
    Tensor.realize(*function(tensor(qkv), *caches, tensor([1], dtypes.int32)))
    for part, (got, wanted) in enumerate(
        zip(caches, (problem.keys, problem.values), strict=True), start=1
    ):
        wanted[1, :, :n] = qkv.reshape(n, 3, H, D)[:, part].transpose(1, 0, 2)
        np.testing.assert_array_equal(got.numpy(), wanted)


@pytest.mark.skipif(os.environ.get("DEV", "CPU") != "CPU", reason="once is enough")
def test_the_kernels_for_gpus_are_right_on_the_device_that_emulates_one():
    problem = Problem(2, 1, 6, 4, 2)
    out, keys, values = problem.run(rows_attention, "PYTHON")
    np.testing.assert_allclose(out, problem.exact(), atol=2e-6)
    np.testing.assert_array_equal(keys, problem.written()[0])
    np.testing.assert_array_equal(values, problem.written()[1])


@pytest.mark.parametrize("name", RENDERERS)
def test_the_kernels_can_be_written_for_gpus(name):
    sizes = {"s": Cache(2, 3, 2, 40, 16)}
    cache = 3 * 2 * 40 * 16
    for kernel, outputs, lengths in (
        (decode_rows, 3, (64, cache, cache, 192, 1, 1)),
        (keep_rows, 2, (cache, cache, 192, 1)),
    ):
        source = render(name, kernel, outputs, lengths, sizes)
        assert THREAD[name] in source
        assert "long" not in source and "i64" not in source  # WebGPU has no 64-bit integers


# The decoder


@pytest.fixture(scope="module")
def model():
    return with_strong_weights(Transformer(CONFIG))


@pytest.fixture(scope="module")
def decoder(model):
    return Decoder(model)


def alone(decoder, ids, count, seed):
    """Logits (count, V) of a text whose continuation is drawn from the seed."""
    sequence, rng = Sequence(ids), np.random.default_rng(seed)
    found = []
    for _ in range(count):
        found.append(decoder.next_logits([sequence])[0])
        sequence.ids.append(int(rng.integers(V)))
    return np.stack(found)


def together(batch, prompts, count, arrivals):
    """The same for each of several texts, which come in before so many steps."""
    rngs = [np.random.default_rng(seed) for seed in range(len(prompts))]
    found = [[] for _ in prompts]
    waiting, running = list(range(len(prompts))), {}
    for step in range(1000):
        while waiting and arrivals[waiting[0]] <= step and len(running) < batch.slots:
            i = waiting.pop(0)
            running[i] = Sequence(prompts[i])
        if not running and not waiting:
            break
        logits = batch.next_logits(list(running.values()))
        for (i, sequence), row in zip(list(running.items()), logits, strict=True):
            found[i].append(row)
            sequence.ids.append(int(rngs[i].integers(V)))
            if len(found[i]) == count:
                batch.release(running.pop(i))
    return [np.stack(rows) for rows in found]


PROMPTS = [RNG.integers(0, V, n).tolist() for n in (3, 17, BLOCK, 1, BLOCK + 9, 9, 20)]


@pytest.fixture(scope="module")
def wanted(decoder):
    return [alone(decoder, ids, 12, seed) for seed, ids in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def batch(model):
    return Decoder(model, 7)


@pytest.mark.parametrize("arrivals", [[0] * 7, [0, 0, 1, 2, 5, 5, 9], list(range(0, 98, 14))])
def test_logits_are_bitwise_those_of_a_decoder_also_past_block_size(arrivals, batch, wanted):
    np.testing.assert_array_equal(together(batch, PROMPTS, 12, arrivals), wanted)


def test_more_sequences_than_a_step_has_rows_take_several(model, decoder):
    batch, prompts = Decoder(model, 19), [[n] for n in range(19)]
    got = together(batch, prompts, 3, [0] * 19)
    np.testing.assert_array_equal(got, [alone(decoder, p, 3, i) for i, p in enumerate(prompts)])


def test_a_quantised_model_is_decoded_alike():
    small = quantize(with_strong_weights(Transformer(CONFIG)))
    decoder = Decoder(small)
    got = together(Decoder(small, 3), PROMPTS[:3], 8, [0, 0, 1])
    np.testing.assert_array_equal(got, [alone(decoder, p, 8, i) for i, p in enumerate(PROMPTS[:3])])


def test_plain_formulas_give_the_same_to_rounding():
    small = {"block_size": 8, "n_layer": 1}
    fast, plain = (
        with_strong_weights(Transformer(GPTConfig(**CONFIG.to_dict() | small | {"attention": way})))
        for way in ("auto", "plain")
    )
    batch, decoder = Decoder(plain, 2), Decoder(fast)
    with kernels.plain(), Context(NOOPT=1):  # tinygrad's optimiser takes longer than the model
        got = together(batch, [[3, 1], [4]], 4, [0, 1])
    wanted = [alone(decoder, ids, 4, seed) for seed, ids in enumerate([[3, 1], [4]])]
    np.testing.assert_allclose(got, wanted, atol=1e-4)
    assert (np.argmax(got, -1) == np.argmax(wanted, -1)).all()


def test_flash_attention_that_must_and_cannot_run_is_an_error():
    x = Tensor.zeros(2, 3, 4).cast(dtypes.int32)
    with kernels.use("flash"), pytest.raises(KernelError, match="flash"):
        kernels.rows_attention(x[0], x, x, x[0, 0], x[0, 0])


def test_the_mode_of_the_model_and_its_dropout_do_not_matter(wanted):
    config = GPTConfig(**CONFIG.to_dict() | {"dropout": 0.5})
    mine = with_strong_weights(Transformer(config)).train()
    got = together(Decoder(mine, 2), PROMPTS[:2], 12, [0, 0])
    np.testing.assert_array_equal(got, wanted[:2])
    assert mine.training


def test_a_sequence_takes_a_slot_that_is_free_or_else_the_one_unused_the_longest(model):
    batch = Decoder(model, 2)
    first, second, third, fourth = (Sequence([i]) for i in range(4))
    batch.next_logits([first, second])
    slots = [slot for slot, _ in batch._cached.values()]
    assert sorted(slots) == [0, 1]
    batch.next_logits([first])
    batch.next_logits([third])
    assert batch._cached == {first: (slots[0], 1), third: (slots[1], 1)}
    batch.release(third)
    batch.next_logits([fourth])
    assert batch._cached == {first: (slots[0], 1), fourth: (slots[1], 1)} and batch.slots == 2


def test_sequences_that_lose_their_slots_get_the_same_logits(model, wanted):
    one = Decoder(model)
    running = [Sequence(ids) for ids in PROMPTS[:3]]
    rngs = [np.random.default_rng(seed) for seed in range(3)]
    for step in range(4):
        for i, sequence in enumerate(running):
            [logits] = one.next_logits([sequence])
            np.testing.assert_allclose(logits, wanted[i][step], atol=1e-5)
            sequence.ids.append(int(rngs[i].integers(V)))
    assert one.slots == 1
    logits = one.next_logits(running)
    np.testing.assert_allclose(logits, [wanted[i][4] for i in range(3)], atol=1e-5)
    assert one.slots == 3  # so many are decoded together


def test_a_sequence_that_grew_by_several_tokens_or_by_none_is_decoded_rightly(decoder, model):
    sequence, fresh = Sequence([1, 2]), Decoder(model)
    first = decoder.next_logits([sequence])
    np.testing.assert_allclose(decoder.next_logits([sequence]), first, atol=1e-5)
    sequence.ids += [3, 4]
    wanted = fresh.next_logits([Sequence([1, 2, 3, 4])])
    np.testing.assert_array_equal(decoder.next_logits([sequence]), wanted)


def test_what_was_prepared_is_not_made_again(batch, wanted):
    for prepare in batch.preparations():
        prepare()
    captures = [function.captures for function in batch._passes]
    # Prompts, steps of up to 8 rows, windows; texts that are only read; logits of 16 rows and 64.
    assert list(map(len, captures)) == [2, 4, 3, 4, 2]
    made = [dict(found) for found in captures]
    got = together(batch, PROMPTS, 12, [0, 0, 1, 2, 5, 5, 9])
    np.testing.assert_array_equal(got, wanted)  # preparing leaves nothing behind
    assert captures == made  # the very same: nothing is compiled for a request


def test_the_caches_are_hidden_from_tinygrad(model):
    mine = with_strong_weights(Transformer(CONFIG))
    count = len(nn.state.get_parameters(mine))
    mine.decoder = Decoder(mine, 2)
    assert len(nn.state.get_parameters(mine)) == count


def test_weights_that_change_in_place_are_used(decoder):
    mine = with_strong_weights(Transformer(CONFIG), seed=5)
    batch = Decoder(mine, 1)
    together(batch, [[3]], 2, [0])
    with_strong_weights(mine)
    np.testing.assert_array_equal(together(batch, [[3]], 2, [0])[0], alone(decoder, [3], 2, 0))


def test_a_sequence_keeps_its_own_ids():
    ids = [1, 2]
    Sequence(ids).ids.append(3)
    assert ids == [1, 2]


# Choosing for many


@given(
    st.integers(1, 17), st.sampled_from([1, 2, 65, 300]), st.integers(0, 1000), st.floats(0.1, 100)
)
@settings(max_examples=60)
def test_drawing_for_many_rows_is_drawing_for_each(rows, vocabulary, seed, spread):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, spread, (rows, vocabulary))
    logits[rng.random(logits.shape) < 0.3] = -np.inf
    logits[:, rng.integers(vocabulary)] = 1.0
    uniforms = rng.choice([0.0, 1 - 2**-53, rng.random()], rows).tolist()
    each = [draw(row, uniform) for row, uniform in zip(logits, uniforms, strict=True)]
    assert draw_each(logits, uniforms) == each


CONFIGS = [
    SampleConfig(),
    SampleConfig(temperature=0),
    SampleConfig(temperature=0.3),
    SampleConfig(temperature=0, repetition_penalty=1.3),
    SampleConfig(top_k=5),
    SampleConfig(top_p=0.7, temperature=0.9),
    SampleConfig(min_p=0.1, repetition_penalty=2.0),
    SampleConfig(temperature=1e-9),
]


def test_rows_with_different_settings_choose_as_each_would_alone():
    logits = np.random.default_rng(4).normal(0, 2, (30, len(CONFIGS), 65)).astype(np.float32)
    seen = [list(range(i + 1)) for i in range(len(CONFIGS))]
    together = [first_choice(config, seed) for seed, config in enumerate(CONFIGS)]
    each = [first_choice(config, seed) for seed, config in enumerate(CONFIGS)]
    samplers = [make_sampler(config, seed) for seed, config in enumerate(CONFIGS)]
    for rows in logits:
        picked = choose(rows, seen, together).tolist()
        assert picked == [
            choice.pick(row, np.array(ids))
            for choice, row, ids in zip(each, rows, seen, strict=True)
        ]
        assert picked == [
            int(sampler(row[None], np.array([ids]))[0])
            for sampler, row, ids in zip(samplers, rows, seen, strict=True)
        ]


@pytest.mark.parametrize("config", CONFIGS[:3])
def test_logits_that_are_no_numbers_are_an_error_in_any_row(config):
    logits = np.zeros((3, 5), np.float32)
    logits[1, 2] = np.nan
    with pytest.raises(TinyGPTError, match="1 are not numbers"):
        choose(logits, [[0]] * 3, [Choice(config, np.random.SeedSequence(0)) for _ in range(3)])
