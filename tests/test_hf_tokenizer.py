"""Tokenizers in Hugging Face's files: the same ids there as here, and back; hostile files."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from tests.mixed_text import mixed_text
from tinygpt.errors import TokenizerError
from tinygpt.interop import byte_level
from tinygpt.interop.hf.hf_tokenizer import read_tokenizer, write_tokenizer
from tinygpt.text.tokenizers import (
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    tokenizer_from_dict,
    vocabulary,
)

TEXT = mixed_text(300_000)
END = "<|endoftext|>"

needs_gpt2 = pytest.mark.skipif(
    vocabulary.offline_path("vocab.bpe") is None, reason="needs the extra 'offline'"
)
KINDS = [pytest.param("gpt2", marks=needs_gpt2), "bpe", "special", "char", "byte"]


@pytest.fixture(scope="module")
def trained() -> BPETokenizer:
    return BPETokenizer.train(TEXT, 1000)


@pytest.fixture(scope="module")
def shuffled(trained: BPETokenizer) -> BPETokenizer:
    """As other tools number their tokens: a special one first, bytes in another order, one last."""
    merges = [token for token in trained.ranks if len(token) > 1]
    alphabet = bytes([*range(33, 256), *range(33)])
    return BPETokenizer.from_merges(merges, alphabet=alphabet, special={"<s>": 0, END: 1001})


@pytest.fixture(params=KINDS)
def tokenizer(
    request: pytest.FixtureRequest, trained: BPETokenizer, shuffled: BPETokenizer
) -> Tokenizer:
    return {
        "gpt2": BPETokenizer,
        "bpe": lambda: trained,
        "special": lambda: shuffled,
        "char": lambda: CharTokenizer(TEXT),
        "byte": ByteTokenizer,
    }[request.param]()


@pytest.fixture(scope="module")
def written_before() -> dict[Tokenizer, Path]:
    return {}


@pytest.fixture
def folder(
    tokenizer: Tokenizer,
    written_before: dict[Tokenizer, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The files of the tokenizer, as in the folder of a model. Tests only read them."""
    if tokenizer not in written_before:
        folder = tmp_path_factory.mktemp(tokenizer.kind)
        write_tokenizer(tokenizer, folder, block_size=64)
        (folder / "config.json").write_text('{"model_type": "gpt2"}')
        written_before[tokenizer] = folder
    return written_before[tokenizer]


def plain(tokenizer: Tokenizer, text: str = TEXT) -> str:
    """The text without what the other tools make special tokens of, and ours does not."""
    for special in tokenizer.special if isinstance(tokenizer, BPETokenizer) else ():
        text = text.replace(special, "")
    return text


def random_ids(tokenizer: Tokenizer, count: int = 5000) -> list[int]:
    rng = random.Random(7)
    return [rng.randrange(tokenizer.vocab_size) for _ in range(count)]


# Out --------------------------------------------------------------------------------------------


def test_the_text_is_of_every_kind() -> None:
    assert len(TEXT.encode()) >= 300_000 and mixed_text(300_000, seed=1) != TEXT
    for sample in ("don't", "读书", "👩🏿\u200d🚀", "e\u0301", "\x00", " " * 40, "0" * 40, "שָׁלוֹם"):
        assert sample in TEXT
    assert TEXT.startswith(mixed_text(10_000))


def test_the_fast_tokenizer_agrees_with_ours_on_300_kilobytes(
    tokenizer: Tokenizer, folder: Path
) -> None:
    hf = pytest.importorskip("tokenizers", reason="needs the extra 'oracle'")
    theirs = hf.Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = plain(tokenizer)
    ids = tokenizer.encode(text)
    assert theirs.encode(text).ids == ids
    assert theirs.decode(ids, skip_special_tokens=False) == text
    assert theirs.get_vocab_size() == tokenizer.vocab_size
    loose = random_ids(tokenizer)  # bytes in an order that is no UTF-8
    assert theirs.decode(loose, skip_special_tokens=False) == tokenizer.decode(loose)


def test_autotokenizer_agrees_with_ours_on_300_kilobytes(
    tokenizer: Tokenizer, folder: Path
) -> None:
    hf = pytest.importorskip("transformers", reason="needs the extra 'oracle'")
    theirs = hf.AutoTokenizer.from_pretrained(folder)
    text = plain(tokenizer)
    ids = tokenizer.encode(text)
    assert theirs(text, verbose=False)["input_ids"] == ids
    assert theirs.decode(ids) == text
    assert len(theirs) == tokenizer.vocab_size and theirs.model_max_length == 64


def test_only_a_special_token_of_the_vocabulary_is_made_of_text(
    tokenizer: Tokenizer, folder: Path
) -> None:
    hf = pytest.importorskip("transformers", reason="needs the extra 'oracle'")
    theirs = hf.AutoTokenizer.from_pretrained(folder)
    special = tokenizer.special if isinstance(tokenizer, BPETokenizer) else {}
    if END in special:
        assert theirs(f"a{END}")["input_ids"][-1] == special[END] == theirs.eos_token_id
        assert special[END] not in tokenizer.encode(f"a{END}")
    else:
        assert theirs(f"a{END}")["input_ids"] == tokenizer.encode(f"a{END}")
        assert theirs.all_special_tokens == []


@needs_gpt2
def test_gpt2s_files_are_those_it_was_published_with(tmp_path: Path) -> None:
    write_tokenizer(BPETokenizer(), tmp_path, block_size=1024)
    for ours, published in (("merges.txt", "vocab.bpe"), ("vocab.json", "encoder.json")):
        path = vocabulary.offline_path(published)
        assert path is not None
        assert (tmp_path / ours).read_bytes() == path.read_bytes()
    found = byte_level.vocabulary(BPETokenizer())
    assert found is not None and found.digest == byte_level.GPT2_SHA256


@needs_gpt2
def test_the_older_files_alone_give_the_same_ids(trained: BPETokenizer, tmp_path: Path) -> None:
    hf = pytest.importorskip("transformers", reason="needs the extra 'oracle'")
    for name, tokenizer in (("gpt2", BPETokenizer()), ("trained", trained)):
        write_tokenizer(tokenizer, tmp_path / name, block_size=64)
        files = [str(tmp_path / name / file) for file in ("vocab.json", "merges.txt")]
        theirs = hf.GPT2Tokenizer(*files)
        text = plain(tokenizer, TEXT[:20_000]).replace(END, "")
        assert theirs(text, verbose=False)["input_ids"] == tokenizer.encode(text)


def test_an_unknown_character_is_an_error_there_too(tmp_path: Path) -> None:
    hf = pytest.importorskip("tokenizers", reason="needs the extra 'oracle'")
    write_tokenizer(CharTokenizer("abc\n"), tmp_path, block_size=64)
    theirs = hf.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert theirs.encode("ab\nc").ids == [1, 2, 0, 3]
    with pytest.raises(Exception, match=r"\[UNK\]|<unk>"):
        theirs.encode("abd")


def test_vocabularies_that_other_tools_cannot_tell_are_refused(tmp_path: Path) -> None:
    unreachable = BPETokenizer.from_merges([b"abc"])  # neither ab nor bc is a token
    with pytest.raises(TokenizerError, match=r"Token 256 .* cannot be merged from two lower"):
        write_tokenizer(unreachable, tmp_path, 64)
    doubtful = BPETokenizer.from_merges([b" a"], special={"\u0120a": 257})
    with pytest.raises(TokenizerError, match="is spelled like an ordinary one"):
        write_tokenizer(doubtful, tmp_path, 64)
    other = BPETokenizer.from_merges([b"ab"])
    other._encoding._pat_str = r"\w+"
    with pytest.raises(TokenizerError, match="splits text into words in a way of its own"):
        write_tokenizer(other, tmp_path, 64)
    assert list(tmp_path.iterdir()) == []


# In ---------------------------------------------------------------------------------------------


def test_what_is_written_is_read_back(tokenizer: Tokenizer, folder: Path, tmp_path: Path) -> None:
    found = read_tokenizer(folder)
    assert found == tokenizer and type(found) is type(tokenizer)
    assert tokenizer_from_dict(tokenizer.to_dict()) == tokenizer
    if not isinstance(tokenizer, CharTokenizer):
        for name in ("vocab.json", "merges.txt"):  # the older files say as much
            shutil.copy(folder / name, tmp_path)
        assert read_tokenizer(tmp_path) == tokenizer
        for name in ("vocab.json", "merges.txt"):  # a byte order mark, and line ends of Windows
            text = (tmp_path / name).read_bytes().replace(b"\n", b"\r\n")
            (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text)
        assert read_tokenizer(tmp_path) == tokenizer


def test_a_folder_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    assert read_tokenizer(tmp_path) is None


def test_a_tokenizer_that_others_trained_is_read(tmp_path: Path) -> None:
    hf = pytest.importorskip("tokenizers", reason="needs the extra 'oracle'")
    theirs = hf.ByteLevelBPETokenizer()
    theirs.train_from_iterator([TEXT], 800, special_tokens=["<s>", "<pad>", END])
    theirs.add_special_tokens(["<added>"])
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = read_tokenizer(tmp_path)
    assert isinstance(ours, BPETokenizer) and ours.vocab_size == theirs.get_vocab_size() == 801
    assert ours.special == {"<s>": 0, "<pad>": 1, END: 2, "<added>": 800}
    text = plain(ours)
    ids = theirs.encode(text).ids
    assert ours.encode(text) == ids and ours.decode(ids) == text
    assert ours.decode([0, *ours.encode("text"), 800]) == "<s>text<added>"
    assert tokenizer_from_dict(json.loads(json.dumps(ours.to_dict()))) == ours

    (tmp_path / "tokenizer.json").unlink()
    theirs.save_model(str(tmp_path))
    (tmp_path / "added_tokens.json").write_text('{"<added>": 800}')
    with pytest.raises(TokenizerError, match="'<added>' is taken out of each text"):
        read_tokenizer(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": "<added>"}')
    assert read_tokenizer(tmp_path) == ours


@needs_gpt2
def test_gpt2s_vocabulary_is_known_without_its_own_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpt2 = BPETokenizer()
    write_tokenizer(gpt2, tmp_path, block_size=64)
    monkeypatch.setattr(BPETokenizer, "__init__", refuse)
    nameless = read_tokenizer(tmp_path)
    assert isinstance(nameless, BPETokenizer) and nameless.encode(TEXT) == gpt2.encode(TEXT)
    assert nameless.ranks == gpt2.ranks and nameless.special == gpt2.special


def refuse(*args: object, **kwargs: object) -> None:
    raise TokenizerError("The vocabulary file vocab.bpe is not on this machine.")


# Files of others --------------------------------------------------------------------------------


def fast(**changes: Any) -> dict[str, Any]:
    """A tokenizer.json with three merges; model__vocab goes inside, ... takes away."""
    vocab = {byte_level.spell(bytes([b])): b for b in range(256)} | {
        "ab": 256,
        "abc": 257,
        "cd": 258,
    }
    values: dict[str, Any] = {
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": ["a b", ["ab", "c"], "c d"]},
    }
    for name, value in changes.items():
        *path, last = name.split("__")
        inner = values
        for part in path:
            inner = inner[part]
        if value is ...:
            del inner[last]
        else:
            inner[last] = value(inner[last]) if callable(value) else value
    return values


def read(values: dict[str, Any], folder: Path) -> Tokenizer | None:
    (folder / "tokenizer.json").write_text(json.dumps(values))
    return read_tokenizer(folder)


def test_the_sample_is_read(tmp_path: Path) -> None:
    assert read(fast(), tmp_path) == BPETokenizer.from_merges([b"ab", b"abc", b"cd"])


def without(*texts: str) -> Callable[[dict[str, int]], dict[str, int]]:
    return lambda vocab: {text: i for text, i in vocab.items() if text not in texts}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "names no model"),
        ({"model": ["BPE"]}, "names no model"),
        ({"kind": "byte"}, "names no model"),
        (fast(model={"type": "Unigram", "vocab": [["a", 0.5]]}), "type 'Unigram'"),
        (fast(model__type="Unigram"), r"type 'Unigram' behind ByteLevel\. .* byte-level BPEs"),
        (fast(model__type="WordPiece"), "type 'WordPiece'"),
        (fast(model__type="WordLevel"), "type 'WordLevel'"),
        (fast(model__type=7), "type 7"),
        (fast(pre_tokenizer={"type": "Metaspace"}), "type 'BPE' behind Metaspace"),
        (fast(pre_tokenizer={"type": "Sequence"}), "behind Sequence"),
        (fast(pre_tokenizer=None), "behind nothing"),
        (fast(normalizer={"type": "Lowercase"}), "changes the text first, by Lowercase"),
        (fast(pre_tokenizer__add_prefix_space=True), "add_prefix_space"),
        (fast(pre_tokenizer__use_regex=False), "use_regex=false"),
        (fast(model__byte_fallback=True), "byte_fallback"),
        (fast(model__ignore_merges=True), "ignore_merges"),
        (fast(model__end_of_word_suffix="</w>"), "end_of_word_suffix"),
        (fast(model__dropout=0.1), "dropout"),
        (fast(model__vocab={}), "its vocabulary is a dict of 0"),
        (fast(model__vocab=["a"]), "its vocabulary is a list"),
        (fast(model__vocab={"a": -1}), "has the id -1"),
        (fast(model__vocab={"a": True}), "has the id True"),
        (fast(model__vocab={"a": 2**60}), "has the id 11529"),
        (fast(model__vocab=lambda v: v | {"\ud800": 259}), "lone surrogate"),
        (fast(model__merges="a b"), "merges is 'a b'"),
        (fast(model__merges=["a b c"]), "'a b c' is no merge"),
        (fast(model__merges=["a  b"]), "is no merge"),
        (fast(model__merges=[["a", 1]]), "is no merge"),
        (fast(model__merges=["a 漢"]), "is no merge"),
        (fast(model__merges=lambda m: [*m, "a b"]), "merges the same token twice"),
        (fast(model__merges=lambda m: [*m, "a c"]), "no token for b'ac'"),
        (fast(model__merges=lambda m: [m[1], m[0], m[2]]), "not in the order of its merges"),
        (fast(model__merges=["a b", "b c", "c d"]), "no token for b'bc'"),
        (fast(model__vocab=without("a")), "no token for b'a'"),
        (fast(model__vocab=lambda v: v | {"abc": 300}), "259 is left out|257 is left out"),
        (fast(model__vocab=lambda v: v | {"cd": 257}), "258 is left out or there twice"),
        (fast(model__vocab=lambda v: v | {"漢": 259}), "No merge makes the token '漢'"),
        (
            fast(model__vocab=lambda v: v | {"a": 98, "b": 97, "ab": 0, "Ā": 256}),
            "not in the order",
        ),
        (fast(added_tokens=[{"id": 300, "content": "<s>"}]), "259 is left out"),
        (fast(added_tokens=[{"id": 0, "content": "<s>"}]), "left out or there twice"),
        (fast(added_tokens=[{"id": "0", "content": "<s>"}]), "has the id '0'"),
        (fast(added_tokens=[{"id": 259}]), "an added token has no content"),
        (fast(added_tokens=[{"id": 259, "content": ["<s>"]}]), "an added token has no content"),
        (fast(pre_tokenizer="ByteLevel"), "behind something damaged, 'ByteLevel'"),
        (fast(model__type="WordLevel", pre_tokenizer=...), "'WordLevel' behind nothing"),
        (fast(added_tokens=["<s>"]), "added_tokens is"),
        (fast(added_tokens=[{"id": 259, "content": "\udc00"}]), "lone surrogate"),
        (
            fast(
                model__vocab=lambda v: v | {"<s>": 259},
                added_tokens=[{"id": 260, "content": "<s>"}],
            ),
            "'<s>' has two ids, 260 and 259",
        ),
        (fast(model__vocab=lambda v: v | {f"<{i}>": i for i in range(5000)}), "5,000 tokens"),
        (fast(model__vocab=without("ab", "abc", "cd"), model__merges=[]), None),
    ],
)
def test_what_would_be_another_tokenizer_here_is_refused(
    values: dict[str, Any], message: str | None, tmp_path: Path
) -> None:
    if message is None:
        assert read(values, tmp_path) == ByteTokenizer()
        return
    with pytest.raises(TokenizerError, match=message) as caught:
        read(values, tmp_path)
    assert str(tmp_path / "tokenizer.json") in str(caught.value)


def test_merges_that_ours_would_never_make_are_refused(tmp_path: Path) -> None:
    """By the order of the ids, bc comes before abc; these merges make abc of ab and c."""
    vocab = fast()["model"]["vocab"] | {"ab": 257, "bc": 256, "abc": 258}
    del vocab["cd"]
    values = fast(model__vocab=vocab, model__merges=["b c", "a b", "ab c"])
    with pytest.raises(TokenizerError, match="merges some tokens from others than the order"):
        read(values, tmp_path)


def test_tokens_of_a_length_that_takes_hours_are_refused_at_once(tmp_path: Path) -> None:
    vocab = {byte_level.spell(bytes([b])): b for b in range(256)}
    vocab |= {"a" * 2**n: 255 + n for n in range(1, 15)}
    merges = [["a" * 2**n] * 2 for n in range(14)]
    with pytest.raises(TokenizerError, match="tokens of 16,384 bytes"):
        read(fast(model__vocab=vocab, model__merges=merges), tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.model", "spiece.model", "vocab.txt"])
def test_files_of_other_kinds_are_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(TokenizerError, match=rf"{name}: This is a (SentencePiece|WordPiece)"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b"[" * 10_000, "not JSON"),
        (b"[]", "no JSON object"),
        (b"\xff", "not JSON"),
    ],
)
def test_files_that_are_damaged_are_named(content: bytes, message: str, tmp_path: Path) -> None:
    for name in ("vocab.json", "tokenizer.json"):
        (tmp_path / "merges.txt").write_text("a b\n")
        (tmp_path / name).write_bytes(content)
        with pytest.raises(TokenizerError, match=message) as caught:
            read_tokenizer(tmp_path)
        assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("lost", ["vocab.json", "merges.txt"])
def test_half_a_tokenizer_is_not_taken_for_none(lost: str, tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps(fast()["model"]["vocab"]))
    (tmp_path / "merges.txt").write_text("a b\n")
    (tmp_path / lost).unlink()
    with pytest.raises(TokenizerError, match=f"but {lost} is not"):
        read_tokenizer(tmp_path)


def test_merges_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps(fast()["model"]["vocab"]))
    (tmp_path / "merges.txt").write_bytes(b"#version: 0.2\r\na b\r\nab c\r\nc d\r\n")
    assert read_tokenizer(tmp_path) == BPETokenizer.from_merges([b"ab", b"abc", b"cd"])
    (tmp_path / "merges.txt").write_bytes(b"a \xff\n")
    with pytest.raises(TokenizerError, match=r"merges\.txt is damaged: it is not UTF-8"):
        read_tokenizer(tmp_path)
    (tmp_path / "merges.txt").unlink()
    (tmp_path / "merges.txt").mkdir()
    with pytest.raises(TokenizerError, match=r"merges\.txt cannot be read: Is a directory"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "vocab", [{"a": 1, "b": 0}, {"ab": 0}, {"a": 0, "b": 2}, {"\ud800": 0}, {"": 0}]
)
def test_other_character_vocabularies_are_refused(vocab: dict[str, int], tmp_path: Path) -> None:
    write_tokenizer(CharTokenizer("ab"), tmp_path, 64)
    values = json.loads((tmp_path / "tokenizer.json").read_text())
    values["model"]["vocab"] = vocab
    with pytest.raises(TokenizerError, match=r"single characters in the order|lone surrogate"):
        read(values, tmp_path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=5,
)
PLACES = ["added_tokens", "normalizer", "pre_tokenizer", "model", "model__type", "model__vocab"]


@hypothesis.given(st.sampled_from([*PLACES, "model__merges", "model__dropout"]), json_values)
def test_any_values_give_a_tokenizer_or_a_tokenizer_error(
    tmp_path_factory: pytest.TempPathFactory, place: str, value: object
) -> None:
    with suppress(TokenizerError):
        read(fast(**{place: value}), tmp_path_factory.getbasetemp())
