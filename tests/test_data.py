"""Token files, splits and batches."""

from __future__ import annotations

import itertools
import os
import pickle
import re
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from tinygpt.errors import DataError, TokenizerError
from tinygpt.files import folders
from tinygpt.text import tokens as tokens_module
from tinygpt.text.batches import batch, split
from tinygpt.text.corpus import Corpus, open_corpus
from tinygpt.text.tokenizers import BPETokenizer, ByteTokenizer, CharTokenizer
from tinygpt.text.tokens import byte_count, bytes_per_token, data_fingerprint, load_tokens, tokenize

TEXT = "It was the best of times, it was the worst of times. 日本 ¿Qué?\n" * 20


def corpus_of(*pieces: str, name: str = "a test") -> Corpus:
    return Corpus(name, name, lambda: iter(pieces))


# Token files ------------------------------------------------------------------------------------


def test_a_text_becomes_a_memory_mapped_token_file(tmp_path: Path) -> None:
    tokenizer = BPETokenizer.train(TEXT, 300)
    path = tokenize(corpus_of(TEXT), tokenizer, tmp_path / "new")
    tokens = load_tokens(path, tokenizer.vocab_size)
    assert isinstance(tokens, np.memmap) and tokens.dtype == np.uint16
    assert tokens.tolist() == tokenizer.encode(TEXT)
    assert np.load(path).tolist() == tokens.tolist()  # a .npy like any other
    assert [p.name for p in path.parent.iterdir()] == [path.name] and path.name[:7] == "a-test-"


def test_the_pieces_of_a_text_do_not_change_its_tokens(tmp_path: Path, monkeypatch: Any) -> None:
    tokenizer = BPETokenizer.train(TEXT, 300)
    monkeypatch.setattr(tokens_module, "chunks", lambda pieces: _chunks(pieces, 50))
    pieces = [TEXT[i : i + 9] for i in range(0, len(TEXT), 9)]
    path = tokenize(corpus_of(*pieces), tokenizer, tmp_path)
    assert load_tokens(path).tolist() == tokenizer.encode(TEXT)


_chunks = tokens_module.chunks


def test_a_token_file_is_made_once_for_each_text_and_tokenizer(tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()
    path = tokenize(corpus_of("one text"), tokenizer, tmp_path)
    written = path.stat().st_mtime_ns
    assert tokenize(corpus_of("one ", "text"), tokenizer, tmp_path) == path
    assert path.stat().st_mtime_ns == written
    others = {
        tokenize(corpus_of("another"), tokenizer, tmp_path),
        tokenize(corpus_of("one text"), CharTokenizer("one text"), tmp_path),
    }
    assert len(others) == 2 and path not in others


def test_a_damaged_token_file_is_made_again(tmp_path: Path) -> None:
    path = tokenize(corpus_of(TEXT), ByteTokenizer(), tmp_path)
    whole = path.read_bytes()
    middle = whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]
    unsealed = whole[:93] + b" " * 34 + whole[127:]  # as others write it, and we did
    for damaged in (b"", whole[:50], whole[:-1], b"\0" * 200, middle, unsealed):
        path.write_bytes(damaged)
        assert tokenize(corpus_of(TEXT), ByteTokenizer(), tmp_path).read_bytes() == whole


def test_large_vocabularies_take_four_bytes_a_token(tmp_path: Path) -> None:
    tokenizer = CharTokenizer(map(chr, [*range(0xD800), *range(0xE000, 0x11000)]))
    assert tokenizer.vocab_size > 1 << 16
    text = "a\U00010fff"
    tokens = load_tokens(tokenize(corpus_of(text), tokenizer, tmp_path), tokenizer.vocab_size)
    assert tokens.dtype == np.uint32 and tokenizer.decode(tokens) == text


def test_a_failed_tokenization_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="'z'"):
        tokenize(corpus_of("abz"), CharTokenizer("ab"), tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_text_that_changes_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    readings = iter(["first", "second"])
    corpus = Corpus("c", "the log", lambda: iter([next(readings)]))
    with pytest.raises(DataError, match="the log changed while it was read"):
        tokenize(corpus, ByteTokenizer(), tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="could not be written"):
        tokenize(corpus_of("text"), ByteTokenizer(), tmp_path / "file" / "cache")


@pytest.fixture
def homes(monkeypatch: Any, tmp_path: Path) -> tuple[Path, Path]:
    """The user's cache folder, and the one among the temporary files."""
    first, second = tmp_path / "cache", tmp_path / "temporary"
    monkeypatch.setattr(folders, "cache_dir", lambda: first)
    monkeypatch.setattr(folders, "private_temp", lambda: second)
    return first, second


def test_tokens_are_kept_elsewhere_where_the_cache_has_no_room(homes: tuple[Path, Path]) -> None:
    homes[0].write_text("a file in its place")
    path = tokenize(corpus_of(TEXT), ByteTokenizer())
    assert path.parent == homes[1] / "tokens"
    assert tokenize(corpus_of(TEXT), ByteTokenizer()) == path


def test_tokens_stay_in_memory_where_nothing_can_be_written(
    homes: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    for home in homes:
        home.write_text("a file in its place")
    tokenizer = CharTokenizer(TEXT)
    tokens = tokens_module.tokens_of(corpus_of(TEXT), tokenizer, 300)
    assert tokens.tolist() == tokenizer.encode(TEXT) and tokens.dtype == np.uint16
    assert [r.getMessage().count("stay in memory") for r in caplog.records] == [1]
    with pytest.raises(DataError, match=r"There is no room .*Set TINYGPT_CACHE"):
        tokenize(corpus_of(TEXT), tokenizer)


def test_token_files_used_longest_ago_make_room(homes: tuple[Path, Path], monkeypatch: Any) -> None:
    made = [tokenize(corpus_of(f"{n}" * 400), ByteTokenizer()) for n in range(4)]
    for age, path in enumerate(made):
        os.utime(path, (1000 + age, 5000 - age))
    assert tokenize(corpus_of("0" * 400), ByteTokenizer()) == made[0]  # used again
    monkeypatch.setenv("TINYGPT_CACHE_GB", str(3 * made[0].stat().st_size / 1e9))
    new = tokenize(corpus_of("n" * 200), ByteTokenizer())
    assert set(new.parent.iterdir()) == {made[0], made[3], new}
    monkeypatch.setenv("TINYGPT_CACHE_GB", "0")
    last = tokenize(corpus_of("last"), ByteTokenizer())
    assert list(new.parent.iterdir()) == [last]


def test_a_long_text_needs_little_memory(tmp_path: Path) -> None:
    def pieces() -> Iterator[str]:
        for n in range(60):
            yield f"{n} words and numbers\n" * 25_000

    corpus = Corpus("long", "long", pieces)
    tracemalloc.start()
    try:
        path = tokenize(corpus, ByteTokenizer(), tmp_path)
        tokens = load_tokens(path, 256)
        data_fingerprint(tokens)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(tokens) > 30_000_000 and peak < 45_000_000 < path.stat().st_size


def test_the_default_folder_is_in_the_users_cache(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("TINYGPT_CACHE", str(tmp_path))
    assert tokenize(corpus_of("text"), ByteTokenizer()).parent == tmp_path / "tokens"


# Tokens from elsewhere --------------------------------------------------------------------------


class FakeTensor:
    def numpy(self) -> np.ndarray[Any, Any]:
        return np.arange(5, dtype=np.int32)


@pytest.mark.parametrize(
    "source", [[0, 1, 2, 3, 4], (0, 1, 2, 3, 4), np.arange(5, dtype=">i8"), FakeTensor(), range(5)]
)
def test_tokens_come_from_lists_arrays_and_tensors(source: object) -> None:
    assert load_tokens(source, 5).tolist() == [0, 1, 2, 3, 4]


def test_an_array_is_not_copied() -> None:
    tokens = np.arange(5)
    assert load_tokens(tokens) is tokens


def test_nanogpts_bin_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "train.bin"
    np.array([1, 50256, 3], "<u2").tofile(path)
    tokens = load_tokens(str(path), 50257)
    assert tokens.tolist() == [1, 50256, 3] and isinstance(tokens, np.memmap)
    path.write_bytes(b"123")
    with pytest.raises(DataError, match=r"train\.bin has 3 bytes"):
        load_tokens(path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([0.5, 1.0], "float64 are not token ids"),
        (np.array([True]), "bool are not token ids"),
        (["a"], "are not token ids"),
        ([[1, 2], [3, 4]], r"shape \(2, 2\); wanted one flat sequence"),
        ([[1], [2, 3]], "no sequence of token ids"),
        (7, r"shape \(\)"),
        ([], "no tokens in it"),
        ([0, 1, -1], "id -1 at position 2 is out of range"),
        ([0, 10, 11], "id 10 at position 1 is out of range: with vocab_size=10 .* 0 to 9"),
        ([2**70], "are not token ids"),
        (None, r"shape \(\)"),
    ],
)
def test_what_are_no_tokens(source: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_tokens(source, 10)


def test_ids_are_checked_to_the_end_and_even_without_a_vocabulary(monkeypatch: Any) -> None:
    monkeypatch.setattr(tokens_module, "SPAN", 10)
    tokens = np.zeros(95, np.int64)
    tokens[93] = 2**31
    with pytest.raises(DataError, match="id 2147483648 at position 93"):
        load_tokens(tokens)
    tokens[93] = 2**31 - 1
    assert len(load_tokens(tokens)) == 95


def test_files_that_are_no_token_files(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    with pytest.raises(DataError, match=r"no token file '.*x\.npy'"):
        load_tokens(path)
    np.savez(tmp_path / "x.npz", a=np.arange(3))
    np.save(tmp_path / "object.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "good.npy", np.arange(300))
    contents = {
        "empty": b"",
        "text": b"hello world, this is text",
        "pickle": pickle.dumps([1, 2, 3]),
        "zip": (tmp_path / "x.npz").read_bytes(),
        "object": (tmp_path / "object.npy").read_bytes(),
        "truncated": (tmp_path / "good.npy").read_bytes()[:-5],
        "header": b"\x93NUMPY\x01\x00\x76\x00" + b"(" * 117 + b"\n",
    }
    for content in contents.values():
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"x\.npy cannot be read as a token file"):
            load_tokens(path)
    with pytest.raises(DataError, match=r"novel\.txt is no token file .*Text is tokenized first"):
        load_tokens("novel.txt")


def llmc(magic: int, version: int, count: int, tokens: Any, zeros: int = 253) -> bytes:
    """A token file as llm.c writes it: a header of 256 int32, and the tokens."""
    return np.array([magic, version, count] + [0] * zeros, "<i4").tobytes() + tokens.tobytes()


def test_token_files_of_llm_c_and_nanogpt_are_read(tmp_path: Path) -> None:
    ids = np.arange(40000, 50000)
    path = tmp_path / "train.bin"
    for magic, version, dtype in ((20240520, 1, "<u2"), (20240801, 7, "<u4")):
        path.write_bytes(llmc(magic, version, len(ids), ids.astype(dtype)))
        tokens = load_tokens(path, 50257)
        assert isinstance(tokens, np.memmap) and tokens.dtype == dtype
        assert (tokens == ids).all()
    path.write_bytes(ids.astype("<u2").tobytes())
    assert (load_tokens(path) == ids).all()
    path.write_bytes(np.array([7], "<u2").tobytes())  # shorter than a magic number
    assert load_tokens(path).tolist() == [7]


TEN = np.arange(10, dtype="<u2")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (llmc(20240520, 2, 10, TEN), "in version 2; .* version 1 can be read"),
        (llmc(20240801, 1, 10, TEN), "in version 1; .* version 7 can be read"),
        (llmc(20240520, 1, 11, TEN), "announces 11 tokens, .* 1,046 bytes, and it has 1,044"),
        (llmc(20240520, 1, 9, TEN), "announces 9 tokens"),
        (llmc(20240520, 1, -1, TEN), "announces -1 tokens"),
        (llmc(20240520, 1, 2**31 - 1, TEN), "announces 2,147,483,647 tokens"),
        (llmc(20240520, 1, 10, TEN, zeros=5), "ends within the header"),
        (llmc(20240520, 1, 0, TEN[:0]), "no tokens"),
    ],
)  # fmt: skip
def test_a_damaged_file_of_llm_c_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "train.bin"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_tokens(path)


@hypothesis.given(st.integers(0, 127), st.integers(0, 255))
def test_a_flipped_header_is_an_error_or_still_tokens(
    tmp_path_factory: pytest.TempPathFactory, place: int, value: int
) -> None:
    path = tmp_path_factory.mktemp("flip") / "x.npy"
    np.save(path, np.arange(100, dtype="<u2"))
    content = bytearray(path.read_bytes())
    content[place] = value
    path.write_bytes(content)
    with suppress(DataError):
        assert load_tokens(path).ndim == 1


def test_the_fingerprint_is_of_the_values(monkeypatch: Any) -> None:
    tokens = np.arange(1000)
    expected = data_fingerprint(tokens)
    assert all(data_fingerprint(tokens.astype(t)) == expected for t in ("u2", ">u4", "i4"))
    assert data_fingerprint(tokens[::-1]) != expected != data_fingerprint(tokens[:-1])
    monkeypatch.setattr(tokens_module, "SPAN", 7)
    assert data_fingerprint(tokens) == expected


def test_the_bytes_of_a_text_are_counted_from_its_tokens(monkeypatch: Any) -> None:
    monkeypatch.setattr(tokens_module, "SPAN", 100)
    for tokenizer in (ByteTokenizer(), CharTokenizer(TEXT), BPETokenizer.train(TEXT, 300)):
        assert byte_count(tokenizer.encode_array(TEXT), tokenizer) == len(TEXT.encode())


# Training and validation ------------------------------------------------------------------------


def test_split_takes_the_end_for_validation() -> None:
    tokens = np.arange(1_115_394)
    train, val = split(tokens, 0.1, 64)
    assert val is not None and len(train) == 1_003_854 == val[0]  # as nanoGPT splits Shakespeare
    assert len(train) + len(val) == len(tokens) and np.shares_memory(val, tokens)
    train, val = split(tokens, 0.0, 64)
    assert val is None and len(train) == len(tokens)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 1.5, float("nan")])
def test_fractions_out_of_range_are_refused(fraction: float) -> None:
    with pytest.raises(DataError, match=r"val_fraction=.* is out of range"):
        split(np.arange(1000), fraction, 8)


@hypothesis.given(st.integers(1, 3000), st.floats(0, 0.999), st.integers(1, 300))
def test_what_a_too_short_text_is_told_would_work(
    count: int, fraction: float, block_size: int
) -> None:
    tokens = np.arange(count)
    try:
        train, val = split(tokens, fraction, block_size)
    except DataError as error:
        message = str(error)
        assert str(block_size + 1) in message and str(count) in message
        for size in re.findall(r"block_size=(\d+) or less", message):
            split(tokens, fraction, int(size))
            with pytest.raises(DataError):
                split(tokens, fraction, int(size) + 1)
        for other in re.findall(r"What would do.*val_fraction=([0-9.]*[0-9])", message):
            split(tokens, float(other), block_size)
    else:
        assert len(train) > block_size and (val is None or len(val) > block_size)


def test_a_text_shorter_than_a_block_says_what_would_fit() -> None:
    with pytest.raises(DataError) as caught:
        split(np.arange(100), 0.1, 64)
    assert "of its 100 tokens 90 are for training and 10 for validation" in str(caught.value)
    assert "block_size=9 or less, or val_fraction=0 (no validation), or a longer text" in str(
        caught.value
    )
    with pytest.raises(DataError, match=r"has 50 tokens.* needs 65 .*block_size=49 or less"):
        batch(np.arange(50), 0, 0, 4, 64)


# Batches ----------------------------------------------------------------------------------------


def targets_of(
    count: int, block_size: int, seed: int, epoch: int, batch_size: int = 1
) -> list[int]:
    """Where the targets of one epoch stand in a text of ``count`` tokens, in their order."""
    blocks = (count - 1) // block_size
    steps = range(epoch * blocks // batch_size, (epoch + 1) * blocks // batch_size)
    found = [batch(np.arange(count), n, seed, batch_size, block_size)[1] for n in steps]
    return np.concatenate(found).ravel().tolist()


def test_a_batch_is_blocks_of_the_text_and_the_same_one_further() -> None:
    tokens = np.arange(1000, dtype=np.uint16)
    x, y = batch(tokens, 3, 1337, 6, 16)
    assert x.shape == y.shape == (6, 16) and x.dtype == y.dtype == np.int32
    assert (y == x + 1).all() and (np.diff(x) % 999 == 1).all()  # behind the end is the beginning
    assert x.flags.c_contiguous and y.flags.c_contiguous


def test_a_batch_is_a_pure_function_of_step_and_seed() -> None:
    tokens = np.arange(100_000)
    batches = {(s, n): batch(tokens, n, s, 4, 8)[0].tobytes() for s in range(9) for n in range(9)}
    assert len(set(batches.values())) == 81
    np.random.seed(0)
    assert all(batch(tokens, n, s, 4, 8)[0].tobytes() == b for (s, n), b in batches.items())
    assert batch(tokens, np.int64(3), np.int64(4), 4, 8)[0].tobytes() == batches[4, 3]


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(
    st.integers(2, 400), st.integers(1, 40), st.integers(0, 2**63 - 1), st.integers(0, 2**70)
)
def test_in_an_epoch_each_token_is_a_target_once(
    count: int, block_size: int, seed: int, epoch: int
) -> None:
    """Fewer than a block are left out, and the next epoch is another one."""
    block_size = min(block_size, count - 1)
    found = targets_of(count, block_size, seed, epoch)
    assert len(found) == len(set(found)) == count - 1 - (count - 1) % block_size
    assert set(found) <= set(range(1, count))
    if count > 50:
        assert targets_of(count, block_size, seed, epoch + 1) != found


def test_the_size_of_a_batch_does_not_change_the_order() -> None:
    """Nor does its reaching into the next epoch, or over several: there are 15 blocks."""
    alone = [batch(np.arange(125), n, 3, 1, 8)[0] for n in range(120)]
    for size in (4, 15, 40):
        together = [batch(np.arange(125), n, 3, size, 8)[0] for n in range(120 // size)]
        assert (np.concatenate(together) == np.concatenate(alone)).all()


def test_a_text_of_one_block_is_read_from_every_place() -> None:
    found = [targets_of(9, 8, 0, epoch) for epoch in range(100)]
    assert all(sorted(targets) == list(range(1, 9)) for targets in found)
    assert {targets[0] for targets in found} == set(range(1, 9))
    assert [targets_of(2, 1, 0, epoch) for epoch in range(3)] == [[1]] * 3


def test_blocks_of_a_text_are_cut_elsewhere_in_each_epoch_and_none_is_preferred() -> None:
    """Left out are 7 targets of 999; where a block stands says nothing of when it comes."""
    epochs = np.array([targets_of(1000, 16, 0, epoch)[::16] for epoch in range(400)])  # (E, 62)
    assert len({tuple(sorted(epoch)) for epoch in epochs.tolist()}) > 300
    counts = np.bincount(epochs.ravel(), minlength=1000)[1:]
    assert counts.min() > 4 and counts.mean() == pytest.approx(400 * 62 / 999) and counts.max() < 55
    later = (np.diff(epochs, axis=1) > 0).mean()
    assert later == pytest.approx(0.5, abs=0.01)  # four deviations
    same = (np.diff(epochs, axis=1) == 16).mean()
    assert same == pytest.approx(1 / 62, abs=0.004)  # a block after the one before it
    assert abs(np.corrcoef(epochs[:-1].ravel(), epochs[1:].ravel())[0, 1]) < 0.025


def splitmix(state: int) -> int:
    """SplitMix64 as Steele, Lea and Flood (2014) give it, in Python's own integers."""
    mask = (1 << 64) - 1
    z = state + 0x9E3779B97F4A7C15 & mask
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
    return z ^ z >> 31


def start(count: int, block_size: int, seed: int, n: int) -> int:
    """Where block ``n`` of a run begins, by the same network over pairs of digits."""
    blocks = (count - 1) // block_size
    key = splitmix(splitmix(seed) + n // blocks)
    side = next(side for side in itertools.count(1) if side * side >= blocks)
    place = n % blocks
    while True:
        a, b = divmod(place, side)
        for i in range(6):
            a, b = b, (a + splitmix(key + i * 2**32 + b)) % side
        if (place := a * side + b) < blocks:
            return (key + place * block_size) % (count - 1)


def test_batches_are_the_same_on_every_machine() -> None:
    assert splitmix(0) == 0xE220A8397B1DCDAF  # the first output of its authors' program
    x, _ = batch(np.arange(1000), 70, 1337, 4, 8)
    assert x[:, 0].tolist() == [start(1000, 8, 1337, 280 + i) for i in range(4)]
    assert x[:, 0].tolist() == [929, 202, 513, 178]
    for step in (0, 3, 10**12):
        x, _ = batch(np.arange(12), step, 2**63 - 1, 5, 3)
        assert x[:, 0].tolist() == [start(12, 3, 2**63 - 1, 5 * step + i) for i in range(5)]


def test_bytes_per_token_are_those_of_the_tokens_that_are_predicted() -> None:
    tokenizer = CharTokenizer.train(["aé日"])
    tokens = np.array([2, 0, 1, 1])
    sizes = [len(tokenizer.decode([i]).encode()) for i in tokens]
    assert bytes_per_token(tokens, tokenizer) == sum(sizes[1:]) / 3
    assert bytes_per_token(tokens[:1], tokenizer) is None
    assert bytes_per_token(np.array([0, 3]), tokenizer) is None  # of another tokenizer


def test_from_a_file_to_a_batch(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(TEXT, "utf-8")
    corpus = open_corpus(tmp_path / "t.txt")
    tokenizer = CharTokenizer.train(corpus.pieces())
    tokens = load_tokens(tokenize(corpus, tokenizer, tmp_path / "c"), tokenizer.vocab_size)
    train, val = split(tokens, 0.1, 32)
    x, y = batch(train, 0, 1, 2, 32)
    assert tokenizer.decode(x[0])[1:] == tokenizer.decode(y[0])[:-1] in TEXT
    assert val is not None and TEXT.endswith(tokenizer.decode(val))
