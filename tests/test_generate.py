"""Generation: cached decoding equals the full forward, within block_size and beyond."""

import copy
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tinygrad import Tensor, TinyJit, dtypes, nn

from tinygpt.config import GPTConfig, SampleConfig
from tinygpt.errors import TinyGPTError, UsageError
from tinygpt.generation.decoder import Decoder, Sequence
from tinygpt.generation.generate import FINISHED, generate, generate_tokens
from tinygpt.generation.stream import StopStrings, generate_text
from tinygpt.model.transformer import Transformer
from tinygpt.text.tokenizers import ByteTokenizer, CharTokenizer

BLOCK, V = 24, 29
CONFIG = GPTConfig(block_size=BLOCK, vocab_size=V, n_layer=2, n_head=2, n_embd=16, dropout=0.5)
GREEDY = SampleConfig(temperature=0)
TEXT = np.random.default_rng(0).integers(0, V, (2, BLOCK + 10)).astype(np.int32)


def with_strong_weights(model, seed=1):
    """Random weights large enough for every token to matter."""
    rng = np.random.default_rng(seed)
    for p in model.parameters().values():
        p.assign(Tensor(rng.normal(0, 0.4, p.shape).astype(np.float32)).realize()).realize()
    return model


@pytest.fixture(scope="module")
def model():
    return with_strong_weights(Transformer(CONFIG))


@pytest.fixture(scope="module")
def decoder(model):
    return Decoder(model)


@pytest.fixture(scope="module")
def full_forward(model):
    """Uncached logits (n, V) of a row of ids, the reference."""

    @TinyJit
    def forward(tokens):
        return model(tokens).realize()

    def logits(ids):
        padded = np.zeros((1, BLOCK), np.int32)
        padded[0, : len(ids)] = ids
        model.eval()
        out = forward(Tensor(padded).realize()).numpy()[0, : len(ids)]
        model.train()
        return out

    return logits


def test_the_reference_is_not_touched_by_its_padding(model, full_forward):
    plain = model.eval()(Tensor(TEXT[:1, :9])).numpy()[0]
    np.testing.assert_allclose(full_forward(TEXT[0, :9]), plain, atol=1e-5)


@pytest.mark.parametrize("prompt", [1, 17, BLOCK])
def test_cached_decoding_equals_the_full_forward_also_past_block_size(
    prompt, decoder, full_forward
):
    sequences = [Sequence(row[:prompt].tolist()) for row in TEXT]
    for n in range(prompt, TEXT.shape[1]):
        logits = decoder.next_logits(sequences)
        for sequence, row in zip(sequences, TEXT, strict=True):
            sequence.ids.append(int(row[n]))
        for row, ids in zip(logits, TEXT[:, :n], strict=True):
            reference = full_forward(ids[-BLOCK:])[-1]
            np.testing.assert_allclose(row, reference, atol=1e-5)
            assert row.argmax() == reference.argmax()


def test_greedy_generation_is_the_argmax_of_the_full_forward(decoder, full_forward):
    out = generate(decoder, TEXT[:, :5], BLOCK, GREEDY)
    assert out.shape == (2, 5 + BLOCK) and out.dtype == dtypes.int32
    rows = out.numpy()
    np.testing.assert_array_equal(rows[:, :5], TEXT[:, :5])
    for row in rows:
        for n in range(5, 5 + BLOCK):
            assert row[n] == full_forward(row[:n][-BLOCK:])[-1].argmax()


def test_a_prompt_may_be_longer_than_block_size(decoder):
    long = np.tile(TEXT, 5)
    out = generate(decoder, long, 4, GREEDY).numpy()
    assert out.shape == (2, long.shape[1] + 4)
    short = generate(decoder, long[:, -BLOCK:], 4, GREEDY).numpy()
    np.testing.assert_array_equal(out[:, -4:], short[:, -4:])


def test_the_same_seed_gives_the_same_text(decoder):
    prompt = TEXT[:, :3]
    first, second = (generate(decoder, prompt, 20, seed=5).numpy() for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert (generate(decoder, prompt, 20, seed=6).numpy() != first).any()
    assert (generate(decoder, prompt, 20).numpy() != generate(decoder, prompt, 20).numpy()).any()


def test_a_row_does_not_depend_on_the_rest_of_the_batch(decoder):
    alone = generate(decoder, TEXT[:1, :4], 12, seed=3).numpy()
    among = generate(decoder, TEXT[:, :4], 12, seed=3).numpy()
    np.testing.assert_array_equal(alone[0], among[0])


def test_lists_arrays_and_tensors_are_prompts(decoder):
    ids = TEXT[:1, :4]
    results = [
        generate(decoder, prompt, 2, GREEDY).tolist()
        for prompt in (ids.tolist(), ids.astype(np.uint16), Tensor(ids), Tensor(ids).cast("int64"))
    ]
    assert all(result == results[0] for result in results)


def test_max_tokens_0_returns_the_prompt(decoder):
    out = generate(decoder, TEXT[:, :4], 0)
    assert out.dtype == dtypes.int32
    np.testing.assert_array_equal(out.numpy(), TEXT[:, :4])


def test_interleaved_generations_do_not_disturb_each_other(decoder):
    settings = {"max_tokens": 8, "config": GREEDY}
    alone = [list(generate_tokens(decoder, TEXT[i : i + 1, :6], **settings)) for i in (0, 1)]
    both = [generate_tokens(decoder, TEXT[i : i + 1, :6], **settings) for i in (0, 1)]
    turns = [step for pair in zip(*both, strict=True) for step in pair]
    np.testing.assert_array_equal(turns[0::2], alone[0])
    np.testing.assert_array_equal(turns[1::2], alone[1])


@pytest.mark.parametrize("training", [True, False])
def test_generation_leaves_the_mode_as_it_found_it(training, model, decoder):
    model.train(training)
    prompt = TEXT[:1, :3]
    steps = generate_tokens(decoder, prompt, 5)
    next(steps)
    assert model.training is training  # also in the middle
    steps.close()
    assert model.training is training
    a, b = (generate(decoder, prompt, 10, GREEDY).tolist() for _ in range(2))
    assert a == b  # without dropout
    assert model.training is training


def test_an_error_in_the_forward_pass_leaves_mode_and_cache_right(model, monkeypatch):
    decoder = Decoder(model.train())
    wanted = generate(decoder, TEXT[:1, :3], 3, GREEDY).tolist()
    steps = generate_tokens(decoder, TEXT[:1, :3], 3, GREEDY)
    got = [next(steps)]
    with monkeypatch.context() as patch:
        patch.setattr("tinygpt.machine.jit.Capture.__call__", interrupt)
        with pytest.raises(KeyboardInterrupt):
            decoder.next_logits([Sequence([1, 2, 3])])
    assert model.training
    got += list(steps)
    assert [int(ids[0]) for ids in got] == wanted[0][3:]


def interrupt(*_):
    raise KeyboardInterrupt


def test_changed_weights_are_used(model):
    mine = with_strong_weights(Transformer(CONFIG))
    decoder = Decoder(mine)
    prompt = TEXT[:1, :3]

    def text():
        return generate(decoder, prompt, 6, GREEDY).tolist()

    first = text()
    with_strong_weights(mine, seed=2)  # in place
    second = text()
    other = with_strong_weights(Transformer(CONFIG), seed=2)
    assert second == generate(other, prompt, 6, GREEDY).tolist() != first
    # tinygrad's load_state_dict swaps buffers, which a captured jit would not notice
    nn.state.load_state_dict(mine, nn.state.get_state_dict(model), verbose=False)
    assert text() == first


def test_one_cache_serves_batches_of_all_sizes():
    small = Transformer(GPTConfig(block_size=4, vocab_size=5, n_layer=1, n_head=1, n_embd=4))
    decoder = Decoder(small)
    for size in (1, 3, 2, 1):
        generate(decoder, [[1]] * size, 2)
    assert decoder.slots == 3 and len(decoder._cached) <= 3


def test_a_block_of_one_token_works():
    small = Transformer(GPTConfig(block_size=1, vocab_size=5, n_layer=1, n_head=1, n_embd=4))
    with_strong_weights(small)
    row = generate(small, [[3, 1]], 5, GREEDY).tolist()[0]
    small.eval()
    for before, after in itertools.pairwise(row[1:]):
        assert small(Tensor([[before]])).numpy()[0, 0].argmax() == after


def test_a_decoder_hides_its_caches_from_tinygrad_and_from_copies(model):
    mine = Transformer(CONFIG)
    mine.decoder = Decoder(mine)
    count = len(mine.parameters())
    generate(mine.decoder, TEXT[:1, :3], 2)
    assert len(nn.state.get_parameters(mine)) == count
    twin = copy.deepcopy(mine)
    assert twin.decoder.model is twin


# Stops


def scripted(monkeypatch, *rows):
    """Let generation produce these ids, whatever the model says."""
    columns = iter(np.array(rows).T)

    def next_logits(self, sequences):
        return np.eye(self.model.config.vocab_size)[next(columns)]

    monkeypatch.setattr(Decoder, "next_logits", next_logits)


@pytest.mark.parametrize(
    ("stop", "length"),
    [
        (None, 6),
        (7, 4),
        ([7], 4),
        ([7, 5], 1),
        ([[5, 6]], 2),
        ([(6, 7), [8]], 4),
        (np.int64(7), 4),
        (np.array([7, 9]), 4),
        ([[7, 5]], 6),
        ([[1, 5]], 6),
        ([], 6),
    ],
)
def test_generation_ends_with_the_stop(stop, length, model, monkeypatch):
    scripted(monkeypatch, [5, 6, 6, 7, 8, 8])
    # the prompt ends in 1: a stop must lie in what is new
    out = generate(model, [[7, 1]], 6, GREEDY, stop=stop).tolist()
    assert out == [[7, 1, 5, 6, 6, 7, 8, 8][: 2 + length]]


def test_rows_that_finish_early_wait_for_the_others(model, monkeypatch):
    rows = [[5, 6, 7, 8, 9], [6, 5, 4, 3, 9]]
    scripted(monkeypatch, *rows)
    steps = np.stack(list(generate_tokens(model, [[1], [1]], 5, GREEDY, stop=[[5, 6], [3]])))
    assert steps.T.tolist() == [[5, 6, FINISHED, FINISHED], [6, 5, 4, 3]]
    scripted(monkeypatch, *rows)
    out = generate(model, [[1], [1]], 5, GREEDY, stop=[[5, 6], [3]]).tolist()
    assert out == [[1, 5, 6, 6, 6], [1, 6, 5, 4, 3]]


@pytest.mark.parametrize("stop", ["\n", 2.5, [[]], [1.5], [[[1]]], [V], [-1], ["a"], {"a"}])
def test_a_wrong_stop_is_an_error(stop, model):
    with pytest.raises(UsageError, match="stop"):
        generate_tokens(model, [[1]], 5, stop=stop)


# Text


def text_of(model, tokenizer, pieces, monkeypatch, stop=()):
    scripted(monkeypatch, tokenizer.encode("".join(pieces)))
    return list(
        generate_text(model, tokenizer, "a", len("".join(pieces).encode()), GREEDY, stop=stop)
    )


@pytest.fixture(scope="module")
def byte_model():
    return Transformer(GPTConfig(block_size=8, vocab_size=256, n_layer=1, n_head=1, n_embd=4))


def test_text_streams_by_whole_characters(byte_model, monkeypatch):
    pieces = text_of(byte_model, ByteTokenizer(), "aé😀!", monkeypatch)
    assert pieces == ["a", "é", "😀", "!"]


def test_text_that_ends_within_a_character_says_so(byte_model, monkeypatch):
    scripted(monkeypatch, [97, *"😀".encode()[:2]])
    assert list(generate_text(byte_model, ByteTokenizer(), "x", 3, GREEDY)) == ["a", "�"]


def test_a_stop_string_is_not_emitted_even_in_pieces(byte_model, monkeypatch):
    pieces = text_of(byte_model, ByteTokenizer(), "One. STANDS. STOP more", monkeypatch, ["STOP"])
    assert "".join(pieces) == "One. STANDS. "
    pieces = text_of(byte_model, ByteTokenizer(), "to the end ST", monkeypatch, ["STOP"])
    assert "".join(pieces) == "to the end ST"


def test_a_special_token_in_a_prompt_is_plain_text(byte_model, monkeypatch):
    seen = []

    def next_logits(self, sequences):
        seen.append(bytes(sequences[0].ids))
        return np.zeros((1, 256))

    monkeypatch.setattr(Decoder, "next_logits", next_logits)
    list(generate_text(byte_model, ByteTokenizer(), "<|endoftext|>", 1))
    assert seen == [b"<|endoftext|>"]


def test_ids_that_the_tokenizer_lacks_are_never_drawn(byte_model, monkeypatch):
    tokenizer = CharTokenizer("abc")
    text = "".join(generate_text(byte_model, tokenizer, "ab", 50, SampleConfig(temperature=50)))
    assert len(text) == 50 and set(text) <= set("abc")


@given(st.text("abc", max_size=12), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
       st.lists(st.integers(0, 12), max_size=5))  # fmt: skip
def test_stop_strings_cut_alike_however_the_text_is_cut_up(text, strings, cuts):
    def passed(pieces):
        stopper = StopStrings(strings)
        out = "".join([stopper.push(piece) for piece in pieces])
        return out + stopper.flush(), stopper.stopped

    ends = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    whole, stopped = passed(text)  # a character at a time
    assert passed(text[a:b] for a, b in itertools.pairwise(ends)) == (whole, stopped)
    assert text.startswith(whole) and not any(s in whole for s in strings)
    assert stopped == any(s in text for s in strings)
    assert whole == text or any(text[len(whole) :].startswith(s) for s in strings)


def test_stop_strings_hold_back_no_more_than_they_must():
    stopper = StopStrings(["\n\n", "END"])
    assert [stopper.push(p) for p in ("a\n", "b\nE", "N", "x", "\n", "\nz")] == [
        "a", "\nb\n", "", "ENx", "", "",
    ]  # fmt: skip
    assert stopper.stopped and stopper.push("more") == "" and stopper.flush() == ""


# Bad input


@pytest.mark.parametrize(
    ("idx", "says"),
    [
        ([], "prompt is empty"),
        ([[]], "prompt is empty"),
        (np.zeros((0, 3), int), "prompt is empty"),
        ([1, 2], r"shape \(2,\).*wanted integers of shape \(batch, time\)"),
        ([[[1]]], r"shape \(1, 1, 1\)"),
        ([[1.0, 2.0]], "dtype float64"),
        ([[True]], "dtype bool"),
        (["ab"], "dtype"),
        ([[1, 2], [3]], "different lengths"),
        ([[1, 2, V]], f"Token {V} at position 2 of row 0 is outside"),
        ([[1], [-3]], "Token -3 at position 0 of row 1"),
        (Tensor([[1.0]]), "dtype float32"),
    ],
)
def test_a_wrong_prompt_is_an_error_at_once(idx, says, model):
    with pytest.raises(UsageError, match=says):
        generate_tokens(model, idx, 5)


@pytest.mark.parametrize("max_tokens", [-1, 1.5, "3", None, True])
def test_a_wrong_max_tokens_is_an_error(max_tokens, model):
    with pytest.raises(UsageError, match="max_tokens"):
        generate_tokens(model, [[1]], max_tokens)


def test_wrong_arguments_of_text_are_errors_at_once(byte_model):
    with pytest.raises(UsageError, match="prompt '' is empty"):
        generate_text(byte_model, ByteTokenizer(), "", 5)
    for stop in ("END", [""], [3]):
        with pytest.raises(UsageError, match="stop"):
            generate_text(byte_model, ByteTokenizer(), "a", 5, stop=stop)
    with pytest.raises(UsageError, match="seed"):
        generate_text(byte_model, ByteTokenizer(), "a", 5, seed=-1)


def test_a_model_that_diverged_is_an_error_that_says_so():
    small = Transformer(GPTConfig(block_size=4, vocab_size=5, n_layer=1, n_head=1, n_embd=4))
    small.ln_f.weight.assign(Tensor.full((4,), float("nan")).contiguous()).realize()
    with pytest.raises(TinyGPTError, match="diverged"):
        generate(small, [[1]], 1)
