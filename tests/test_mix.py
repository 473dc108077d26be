"""Sources mixed by weight: exact shares, the same rows for ever, each row once an epoch."""

from __future__ import annotations

import json
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.test_ranks import differing, needs_mpi, on_ranks
from tinygpt.cli import main
from tinygpt.cli.loading import own_source
from tinygpt.errors import DataError, UsageError
from tinygpt.text.batches import batch, split
from tinygpt.text.mix import Mix
from tinygpt.text.mix_shares import is_mix, parse_mix, write_mix
from tinygpt.text.tokenizers import ByteTokenizer
from tinygpt.text.tokens import bytes_per_token, data_fingerprint, largest, load_tokens

T = 4


def mix_of(shares: dict[str, Any], lengths: dict[str, int] | None = None) -> Mix:
    """Source number i has the ids from 1000 i on."""
    sources = {
        name: np.arange((lengths or {}).get(name, 81), dtype=np.uint16) + 1000 * number
        for number, name in enumerate(shares)
    }
    return Mix(sources, shares)


def source_of(rows: np.ndarray) -> np.ndarray:
    return rows[:, 0] // 1000


# Shares -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shares",
    [
        {"a": 0.7, "b": 0.3},
        {"a": "1/3", "b": "1/3", "c": "1/3"},
        {"a": 0.05, "b": 0.25, "c": 0.7},
        {"a": 0.999, "b": 0.001},
        {"a": 1},
    ],
)
@pytest.mark.parametrize("batch_size", [1, 7])
def test_each_source_has_its_exact_share(shares: dict[str, Any], batch_size: int) -> None:
    mix = mix_of(shares)
    seen = Counter[int]()
    steps = -(-2 * mix.period // batch_size)
    for step in range(steps):
        x, y = batch(mix, step, 3, batch_size, T)
        assert x.shape == y.shape == (batch_size, T)
        np.testing.assert_array_equal(source_of(x), source_of(y))
        seen.update(source_of(x).tolist())
        rows = (step + 1) * batch_size
        for number, share in enumerate(mix.shares.values()):
            assert abs(seen[number] - share * rows) <= (len(shares) + 1) / 2
            if rows % mix.period == 0:
                assert seen[number] == share * rows


def test_each_source_deals_out_its_rows_once_an_epoch_and_then_anew() -> None:
    mix = mix_of({"a": 0.75, "b": 0.25}, {"a": 121, "b": 41})  # 30 blocks, 10 blocks
    rows = [batch(mix, step, 9, 8, T)[1] for step in range(10)]  # 80 rows: 60 of a, 20 of b
    for number, (blocks, length) in enumerate(((30, 121), (10, 41))):
        own = np.concatenate([y[source_of(y) == number] for y in rows]) - 1000 * number
        assert len(own) == 2 * blocks
        for epoch in np.split(own, 2):
            np.testing.assert_array_equal(np.sort(epoch.ravel()), np.arange(1, length))
        first, second = (tuple(epoch[:, 0]) for epoch in np.split(own, 2))
        assert first != second


def test_a_batch_is_a_function_of_the_step_and_the_seed() -> None:
    mix = mix_of({"a": 0.6, "b": 0.4})
    steps = [3, 0, 10**15, 3]
    found = [batch(mix, step, 5, 8, T) for step in steps]
    np.testing.assert_array_equal(found[0], found[3])
    assert not np.array_equal(found[0], batch(mix, 3, 6, 8, T))
    # one large batch is the small ones behind one another: nothing depends on how rows are shared
    small = np.concatenate([batch(mix, step, 5, 4, T)[0] for step in (6, 7)])
    np.testing.assert_array_equal(batch(mix, 3, 5, 8, T)[0], small)


def test_a_mix_of_one_source_is_that_source() -> None:
    mix = mix_of({"a": 1})
    for step in (0, 5, 99):
        np.testing.assert_array_equal(
            batch(mix, step, 1, 6, T), batch(mix.sources["a"], step, 1, 6, T)
        )


def test_every_source_keeps_its_end_for_validation() -> None:
    mix = mix_of({"a": 0.5, "b": 0.5}, {"a": 100, "b": 200})
    training, held_out = split(mix, 0.1, T)
    assert isinstance(training, Mix) and isinstance(held_out, Mix)
    assert [len(t) for t in training.sources.values()] == [90, 180]
    assert [t[0] for t in held_out.sources.values()] == [90, 1180]
    assert split(mix, 0, T)[1] is None and held_out.shares == mix.shares
    with pytest.raises(DataError, match="a: The text is too short"):
        split(mix, 0.01, T)


def test_what_is_known_of_a_mix() -> None:
    sources = {"a": np.full(50, 65), "b": np.full(30, 66)}
    mix = Mix(sources, {"a": 0.5, "b": 0.5})
    assert largest(mix) == 66 and len(mix) == 80 and bytes_per_token(mix, ByteTokenizer()) == 1
    assert load_tokens(mix, 67) is mix
    with pytest.raises(DataError, match="token id 66 at position 50"):
        load_tokens(mix, 66)
    prints = {
        data_fingerprint(m)
        for m in (mix, Mix(sources, {"a": 0.4, "b": 0.6}), Mix(sources, {"a": 0.5, "b": 0.5}))
    }
    assert len(prints) == 2
    assert not isinstance(mix[1:], Mix) and np.asarray(mix[49:51]).tolist() == [65, 66]


# What is written --------------------------------------------------------------------------------


def test_a_mix_is_read_as_it_is_written() -> None:
    found = parse_mix("wiki=0.7, a=b.txt=0.1,code=1/5")
    assert found == {"wiki": Fraction(7, 10), "a=b.txt": Fraction(1, 10), "code": Fraction(1, 5)}
    assert parse_mix(write_mix(found)) == found
    thirds = {"a": Fraction(1, 3), "b": Fraction(2, 3)}
    assert parse_mix(write_mix(thirds)) == thirds


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a", "'a' is no source with its share"),
        ("a=", "no source with its share"),
        ("=1", "no source with its share"),
        ("a=x,b=1", "'a=x' is no source"),
        ("a=nan,b=1", "no source"),
        ("a=1/0,b=1", "no source"),
        ("a=1e-1,b=0.9", "no source"),
        ("a=0,b=1", "gives a the share 0"),
        ("a=-0.5,b=1.5", "the share -0.5"),
        ("a=0.5,a=0.5", "names 'a' twice"),
        ("a=2,b=3", r"sum to 5, and not to 1\. .*--mix a=0.4,b=0.6"),
        ("a=0.333,b=0.333,c=0.333", "sum to 0.999"),
        ("a=0.1234567,b=0.8765433", "too many decimals"),
    ],
)
def test_a_mix_that_cannot_be_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_mix(text)


def test_what_is_meant_as_a_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a=1").write_text("a file")
    assert is_mix("a=0.7,b=0.3") and is_mix("a=2,b=3")  # the second with an error that says why
    assert not is_mix("a=1") and not is_mix("notes=old.txt") and not is_mix(Path("a=0.5,b=0.5"))


def test_shares_without_their_sources_are_refused() -> None:
    with pytest.raises(UsageError, match="has the sources a and shares of b"):
        Mix({"a": np.arange(9)}, {"b": 1})


# On the command line ----------------------------------------------------------------------------

TINY = ("--n-layer", 1, "--n-head", 1, "--n-embd", 8, "--block-size", 8, "--batch-size", 4)
SHORT = (*TINY, "--eval-interval", 4, "--eval-iters", 1, "--seed", 3)


def run(*words: object) -> int:
    return main([str(word) for word in words])


def losses(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row["train_loss"] for row in map(json.loads, lines) if "train_loss" in row]


def test_a_run_learns_from_a_mix_and_goes_on_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("abcdefgh" * 60)
    np.save("b.npy", np.frombuffer(b"stuvwxyz" * 20, np.uint8).astype(np.uint16))
    mixed = ("train", "--mix", "a.txt=0.75,b.npy=0.25", "--tokenizer", "byte", *SHORT)
    assert run(*mixed, "--max-iters", 12, "--out", "whole") == 0
    said = capsys.readouterr().err
    assert "mix: 0.75 of a.txt, 432 tokens, which are read 0.679 times\n" in said
    assert "mix: 0.25 of b.npy, 144 tokens, which are read 0.706 times" in said
    assert run(*mixed, "--max-iters", 4, "--out", "part") == 0
    assert run(*mixed, "--max-iters", 12, "--out", "part", "--resume",
               "--allow-change", "max_iters") == 0  # fmt: skip
    assert losses(Path("part")) == losses(Path("whole"))
    source = own_source(Path("whole")).source
    assert source == f"{tmp_path}/a.txt=0.75,{tmp_path}/b.npy=0.25"
    monkeypatch.chdir("/")
    capsys.readouterr()
    assert run("eval", tmp_path / "whole", "--json") == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 48 + 16 - 1
    other = source.replace("0.75", "0.5").replace("0.25", "0.5")
    assert run("train", "--mix", other, "--resume", "--out", tmp_path / "whole") == 1
    assert "data" in capsys.readouterr().err


@needs_mpi
def test_ranks_that_share_a_mix_leave_the_bits_of_one_process(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcdefgh" * 60)
    np.save(tmp_path / "b.npy", np.frombuffer(b"stuvwxyz" * 20, np.uint8).astype(np.uint16))
    mix = f"{tmp_path}/a.txt=0.7,{tmp_path}/b.npy=0.3"
    words = ("train", "--mix", mix, "--tokenizer", "byte", *SHORT, "--max-iters", 8,
             "--grad-accum-steps", 2)  # fmt: skip
    assert run(*words, "--out", tmp_path / "one") == 0
    done = on_ranks(2, *words, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert differing(tmp_path / "one", tmp_path / "two") == {}
    assert losses(tmp_path / "two") and losses(tmp_path / "one") == losses(tmp_path / "two")


def test_a_mix_and_a_source_contradict_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", "pydocs", "--mix", "a=0.5,b=0.5") == 2
    assert "both say what to read" in capsys.readouterr().err
    assert run("train", "--mix", "a=0.5,b=0.4") == 2
    assert "sum to 0.9" in capsys.readouterr().err
    assert run("train", "--mix", f"{tmp_path / 'no.txt'}=1", "--max-iters", 1) == 1
    assert "no file or folder" in capsys.readouterr().err.lower()


def test_a_mix_of_two_tokenizers_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("abcdefgh" * 60)
    for kind in ("byte", "char"):
        assert run("tokenize", tmp_path / "a.txt", "--out", tmp_path / kind,
                   "--tokenizer", kind) == 0  # fmt: skip
    mixed = f"{tmp_path / 'byte'}=0.5,{tmp_path / 'char'}=0.5"
    assert run("train", "--mix", mixed, *SHORT, "--max-iters", 1, "--out", tmp_path / "r") == 1
    assert "made with another tokenizer" in capsys.readouterr().err
