"""Folders of token files, ours and other tools', are read as one sequence of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinygpt.cli import budgeting
from tinygpt.cli.budgeting import figures
from tinygpt.cli.options import resolve
from tinygpt.cli.running import gather, read_source
from tinygpt.errors import DataError
from tinygpt.text.batches import batch, split
from tinygpt.text.corpus import open_corpus
from tinygpt.text.shards import Shards, is_tokens, open_shards
from tinygpt.text.tokens import data_fingerprint, largest, load_tokens


def llmc(ids: Any, magic: int = 20240520, version: int = 1, kind: str = "<u2") -> bytes:
    """A token file of llm.c: 256 int32, then the tokens."""
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids)
    return header.tobytes() + np.asarray(ids, kind).tobytes()


def datatrove(path: Path, ids: Any, name: str = "gpt2", width: int = 2) -> None:
    """A .ds file with its index of document ends and its metadata."""
    path.write_bytes(np.asarray(ids, f"<u{width}").tobytes())
    Path(f"{path}.index").write_bytes(np.array([len(ids) // 2, len(ids)], "<u8").tobytes())
    Path(f"{path}.metadata").write_text(f"{name}|{width}\n{len(ids)}\n{len(ids)} T")


def npy_folder(folder: Path, lengths: list[int]) -> np.ndarray:
    """A folder of .npy shards, and the same tokens in one array."""
    whole = np.arange(sum(lengths), dtype=np.uint16)
    folder.mkdir()
    for number, part in enumerate(np.split(whole, np.cumsum(lengths)[:-1])):
        np.save(folder / f"part_{number}.npy", part)
    return whole


# One sequence -----------------------------------------------------------------------------------


def test_shards_read_like_the_array_of_their_tokens(tmp_path: Path) -> None:
    whole = npy_folder(tmp_path / "s", [5, 1, 17, 40, 2])
    shards = open_shards(tmp_path / "s")
    rng = np.random.default_rng(0)
    assert len(shards) == len(whole) and shards.shape == whole.shape
    np.testing.assert_array_equal(np.asarray(shards), whole)
    for _ in range(50):
        a, b = sorted(rng.integers(-70, 70, 2).tolist())
        np.testing.assert_array_equal(np.asarray(shards[a:b]), whole[a:b])
        view, same = shards[3:60][a:b], whole[3:60][a:b]
        np.testing.assert_array_equal(np.asarray(view), same)
        if len(same):
            places = rng.integers(-len(same), len(same), (3, 4))
            np.testing.assert_array_equal(view[places], same[places])
    np.testing.assert_array_equal(shards[::-3], whole[::-3])
    assert shards[0] == 0 and shards[-1] == whole[-1] and list(shards[4:7]) == [4, 5, 6]
    with pytest.raises(IndexError):
        shards[len(whole)]


def test_batches_of_shards_are_those_of_one_file(tmp_path: Path) -> None:
    whole = npy_folder(tmp_path / "s", [50, 3, 97, 13])
    shards = load_tokens(tmp_path / "s")
    for step in (0, 1, 7, 1000):
        for one, other in zip(
            batch(shards, step, 7, 3, 8), batch(whole, step, 7, 3, 8), strict=True
        ):
            np.testing.assert_array_equal(one, other)
            assert one.dtype == np.int32
    assert data_fingerprint(shards) == data_fingerprint(whole)
    assert largest(shards) == largest(whole)


def test_each_token_is_a_target_once_in_an_epoch_over_shards(tmp_path: Path) -> None:
    npy_folder(tmp_path / "s", [50, 3, 97, 11])
    shards = load_tokens(tmp_path / "s")  # 160 targets: 20 blocks of 8, 5 batches of 4
    seen = np.concatenate([batch(shards, step, 3, 4, 8)[1].ravel() for step in range(5)])
    np.testing.assert_array_equal(np.sort(seen), np.arange(1, 161))


def test_more_shards_than_are_mapped_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinygpt.text.shards.OPEN", 2)
    whole = npy_folder(tmp_path / "s", [3] * 20)
    shards = open_shards(tmp_path / "s")
    places = np.random.default_rng(1).integers(0, 60, 500)
    np.testing.assert_array_equal(shards[places], whole[places])
    assert len(shards.parts[0].files.open) == 2  # type: ignore[attr-defined]


def test_a_token_file_is_looked_through_once_for_a_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "a.npy", np.arange(900, dtype=np.uint16) % 300)
    data = {"source": str(tmp_path / "a.npy")}
    settings = resolve({"model": {"block_size": 8}, "train": {}, "data": data})
    source = read_source(settings)
    assert source.vocab_size == 300
    monkeypatch.setattr("tinygpt.text.tokens.spans", lambda tokens: [][0])  # nothing is read again
    assert figures(settings, source, None, 60).training > 0
    assert gather(settings, None, source).shape.vocab_size == 300


def test_the_size_of_a_plain_text_comes_from_its_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some words. " * 300_000)
    corpus, read = open_corpus(tmp_path / "a.txt"), 0

    def pieces() -> Iterator[str]:
        nonlocal read
        for piece in corpus.pieces():
            read += len(piece)
            yield piece

    sample, total = budgeting._beginning_of(replace(corpus, pieces=pieces))
    assert total == 3_600_000 and len(sample) == budgeting.SAMPLE
    assert read <= 2 * budgeting.SAMPLE


# Other tools' files -----------------------------------------------------------------------------


def test_the_shards_of_llmc_and_their_validation(tmp_path: Path) -> None:
    for number in (1, 2, 10, 3, *range(4, 10)):
        name = f"fineweb_train_{number:06d}.bin"
        (tmp_path / name).write_bytes(llmc([number] * 20))
    (tmp_path / "fineweb_val_000000.bin").write_bytes(llmc([99] * 30))
    (tmp_path / "notes.md").write_text("no tokens")
    shards = load_tokens(tmp_path, 100)
    assert isinstance(shards, Shards) and is_tokens(tmp_path)
    np.testing.assert_array_equal(np.asarray(shards), np.repeat(np.arange(1, 11), 20))
    training, held_out = split(shards, 0.1, 8)
    assert len(training) == 200 and held_out is not None and set(held_out) == {99}
    assert split(shards, 0, 8)[1] is None
    with pytest.raises(DataError, match="token id 99"):
        load_tokens(tmp_path, 50)


def test_the_files_of_nanogpt_and_of_llama(tmp_path: Path) -> None:
    (tmp_path / "g").mkdir()
    np.arange(40, dtype="<u2").tofile(tmp_path / "g" / "train.bin")
    np.arange(20, dtype="<u2").tofile(tmp_path / "g" / "val.bin")
    shards = open_shards(tmp_path / "g")
    assert len(shards) == 40 and shards.held_out is not None and len(shards.held_out) == 20
    (tmp_path / "l").mkdir()
    (tmp_path / "l" / "a.bin").write_bytes(llmc([100_000, 5], 20240801, 7, "<u4"))
    assert np.asarray(open_shards(tmp_path / "l")).tolist() == [100_000, 5]


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("beside", ["metadata", "index", "old metadata"])
def test_the_files_of_datatrove(tmp_path: Path, width: int, beside: str) -> None:
    for number in range(3):
        path = tmp_path / f"{number:05d}_shuffled.ds"
        datatrove(path, np.arange(10) + 10 * number, width=width)
        if beside == "index":
            Path(f"{path}.metadata").unlink()
        elif beside == "metadata":
            Path(f"{path}.index").unlink()
        else:
            Path(f"{path}.metadata").write_text("gpt2\n10\n10 T")
    shards = open_shards(tmp_path)
    assert np.asarray(shards).tolist() == list(range(30)) and shards.dtype.itemsize == width


def test_a_damaged_file_of_datatrove(tmp_path: Path) -> None:
    path = tmp_path / "a.ds"
    datatrove(path, np.arange(10))
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"wanted 10 tokens of 2 bytes, and it has 18 bytes"):
        load_tokens(path)


def test_files_of_two_tokenizers_are_refused(tmp_path: Path) -> None:
    datatrove(tmp_path / "00000.ds", np.arange(10))
    datatrove(tmp_path / "00001.ds", np.arange(10), name="llama")
    with pytest.raises(DataError, match=r"00001.ds was made with the tokenizer 'llama'"):
        open_shards(tmp_path)


def test_files_of_two_types_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a_0.bin").write_bytes(llmc([1, 2]))
    (tmp_path / "a_1.bin").write_bytes(llmc([1, 2], 20240801, 7, "<u4"))
    with pytest.raises(DataError, match=r"a_1\.bin holds uint32, and the files before it uint16"):
        open_shards(tmp_path)


def test_a_file_missing_in_the_middle_is_named(tmp_path: Path) -> None:
    for number in (1, 2, 4):
        (tmp_path / f"t_{number:03d}.bin").write_bytes(llmc([number] * 3))
    with pytest.raises(DataError, match=r"t_003.bin is missing.*--glob 't_\*.bin'"):
        open_shards(tmp_path)
    assert len(open_shards(tmp_path, "t_*.bin")) == 9  # what was named is meant


def test_a_file_cut_off_or_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.bin").write_bytes(llmc([1, 2, 3])[:-2])
    with pytest.raises(DataError, match="incomplete"):
        open_shards(tmp_path)
    (tmp_path / "t.bin").write_bytes(b"")
    with pytest.raises(DataError, match="0 bytes"):
        open_shards(tmp_path)


def test_a_folder_with_texts_is_one_of_texts(tmp_path: Path) -> None:
    (tmp_path / "train.bin").write_bytes(llmc([1, 2, 3]))
    assert is_tokens(tmp_path)
    (tmp_path / "a.txt").write_text("a text")
    assert not is_tokens(tmp_path) and is_tokens(tmp_path, "*.bin")
    assert not is_tokens(tmp_path / "nothing") and not is_tokens("pydocs")
