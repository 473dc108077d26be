"""Texts to shards: the same ids whatever the processes, and after any kill."""

from __future__ import annotations

import gzip
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.test_documents import CHINESE, TEXTS, jsonl, parquet
from tinygpt.cli import main
from tinygpt.errors import DataError, TokenizerError, UsageError
from tinygpt.machine import subprocesses
from tinygpt.machine.subprocesses import work_in_processes
from tinygpt.text import shard_writer
from tinygpt.text.corpus import open_corpus
from tinygpt.text.shard_writer import write_shards
from tinygpt.text.shards import INDEX, PLAN, open_shards, own_tokenizer, shard_name
from tinygpt.text.tokenizers import BPETokenizer, ByteTokenizer, CharTokenizer, Tokenizer
from tinygpt.text.tokens import data_fingerprint, largest, load_tokens, tokens_of

STORY = "The cat sat on the mat, and she's 12 years old.\n\n"


def made(folder: Path, *sources: Path, size: int = 3000, **how: Any) -> np.ndarray:
    """The tokens of some texts, by way of shards of about ``size`` bytes of text."""
    tokenizer = how.pop("tokenizer", ByteTokenizer())
    opening = {name: how.pop(name) for name in ("field", "glob") if name in how}
    corpora = [open_corpus(source, **opening) for source in sources]
    for _ in write_shards(corpora, folder, tokenizer, size=size, **how):
        pass
    return np.asarray(open_shards(folder))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def with_end(text: str) -> BPETokenizer:
    """A BPE that has a token between texts."""
    merges = list(BPETokenizer.train(text, 300).ranks)[256:]
    return BPETokenizer.from_merges(merges, special={"<|endoftext|>": 256 + len(merges)})


@pytest.fixture
def story(tmp_path: Path) -> Path:
    path = tmp_path / "story.txt"
    path.write_text((STORY + CHINESE) * 400)
    return path


# The ids ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["byte", "char", "bpe"])
def test_the_shards_of_a_text_have_the_tokens_of_the_text(
    tmp_path: Path, story: Path, kind: str
) -> None:
    text = story.read_text()
    kinds: dict[str, Callable[[], Tokenizer]] = {
        "byte": ByteTokenizer,
        "char": lambda: CharTokenizer(text),
        "bpe": lambda: BPETokenizer.train(text, 300),
    }
    tokenizer = kinds[kind]()
    found = made(tmp_path / "out", story, tokenizer=tokenizer)
    np.testing.assert_array_equal(found, tokens_of(open_corpus(story), tokenizer))
    assert (tmp_path / "out" / shard_name(5)).is_file() and found.dtype == np.uint16
    assert own_tokenizer(tmp_path / "out") == tokenizer


def test_documents_end_with_the_token_that_ends_texts(tmp_path: Path, story: Path) -> None:
    (tmp_path / "a.jsonl").write_text(jsonl([*TEXTS, ""]))
    tokenizer = with_end(STORY)
    [end] = tokenizer.ends
    wanted = [i for text in TEXTS for i in (*tokenizer.encode(text), end)]
    assert made(tmp_path / "j", tmp_path / "a.jsonl", tokenizer=tokenizer).tolist() == wanted
    table = parquet(tmp_path / "a.parquet", [*TEXTS, None])
    assert made(tmp_path / "p", table, tokenizer=tokenizer).tolist() == wanted
    whole = [*tokenizer.encode(story.read_text()), end]
    assert made(tmp_path / "t", story, tokenizer=tokenizer).tolist() == whole


def test_a_blank_line_stands_between_documents_where_no_token_does(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, text in enumerate([*TEXTS, "", "The end"]):
        (folder / f"{number}.txt").write_text(text)
    wanted = "".join(open_corpus(folder).pieces()).encode()
    for size in (20, 45, 10_000):
        found = made(tmp_path / str(size), folder, size=size)
        assert bytes(found.tolist()) == wanted


def test_ids_do_not_depend_on_the_size_of_a_shard(tmp_path: Path, story: Path) -> None:
    lines = tmp_path / "a.jsonl"
    lines.write_text(jsonl(TEXTS * 40))
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(lines.read_bytes()))
    tokenizer = BPETokenizer.train(story.read_text(), 300)
    found = [
        made(tmp_path / str(size), story, lines, packed, tokenizer=tokenizer, size=size)
        for size in (500, 3000, 1 << 20)
    ]
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)


@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_makes_the_same_files(
    tmp_path: Path, story: Path, processes: int
) -> None:
    made(tmp_path / "one", story)
    work = partial(work_in_processes, shard_writer.__name__, processes=processes)
    made(tmp_path / "more", story, work=work)
    assert contents(tmp_path / "one") == contents(tmp_path / "more")


def test_progress_goes_from_nothing_to_all(tmp_path: Path, story: Path) -> None:
    seen = list(write_shards([open_corpus(story)], tmp_path / "out", ByteTokenizer(), size=3000))
    assert all(a.read <= b.read <= b.total for a, b in itertools.pairwise(seen))
    assert seen[-1].read == seen[-1].total == seen[-1].tokens == story.stat().st_size
    assert seen[-1].shards == seen[-1].of > 3


# Stopped, killed, and started again -------------------------------------------------------------


def test_a_start_that_was_killed_goes_on_to_the_same_files(
    tmp_path: Path, story: Path, child_environment: dict[str, str]
) -> None:
    made(tmp_path / "whole", story, size=500)
    out = tmp_path / "out"
    code = (
        "import sys; from tinygpt.text import shard_writer; shard_writer.SHARD = 500; "
        "from tinygpt.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["tokenize", str(story), "--out", str(out), "--tokenizer", "byte", "--threads", "2"]
    for shards in (1, 20):
        child = subprocess.Popen(
            [sys.executable, "-c", code, *arguments], env=child_environment, stderr=subprocess.PIPE
        )
        limit = time.monotonic() + 60
        while len(list(out.glob("shard_*"))) < shards and child.poll() is None:
            assert time.monotonic() < limit
            time.sleep(0.002)
        child.kill()
        child.communicate(timeout=60)
        if not (out / INDEX).exists():
            with pytest.raises(DataError, match="not complete"):
                open_shards(out)
    made(out, story, size=500)
    assert contents(out) == contents(tmp_path / "whole")


def test_what_is_missing_or_damaged_is_made_again(tmp_path: Path, story: Path) -> None:
    out = tmp_path / "out"
    made(out, story)
    before = contents(out)
    (out / shard_name(1)).unlink()
    data = bytearray((out / shard_name(3)).read_bytes())
    data[-1] ^= 1
    (out / shard_name(3)).write_bytes(data)
    untouched = (out / shard_name(0)).stat().st_mtime_ns
    made(out, story)
    assert contents(out) == before and (out / shard_name(0)).stat().st_mtime_ns == untouched


def test_an_error_in_a_text_comes_from_any_process(tmp_path: Path, story: Path) -> None:
    lines = tmp_path / "a.jsonl"
    lines.write_text(jsonl(TEXTS * 100) + '{"body": "x"}\n')
    work = partial(work_in_processes, shard_writer.__name__, processes=2)
    for how in ({}, {"work": work}):
        with pytest.raises(DataError, match="has no field 'text'"):
            made(tmp_path / "out", lines, **how)
    with pytest.raises(TokenizerError, match="is not among the 3 characters"):
        made(tmp_path / "char", story, tokenizer=CharTokenizer("abc"), work=work)


def test_a_process_that_dies_is_an_error(
    tmp_path: Path, story: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    children, start = [], subprocesses._start
    monkeypatch.setattr(
        subprocesses, "_start", lambda name: children.append(start(name)) or children[-1]
    )

    def work(jobs: Any) -> Any:
        for number, report in enumerate(work_in_processes(shard_writer.__name__, jobs, 2)):
            if number == 2:
                children[0].kill()
            yield report

    with pytest.raises(DataError, match="ended with exit code -9"):
        made(tmp_path / "out", story, size=300, work=work)
    assert all(child.poll() is not None for child in children)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, story: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="is there already"):
        made(out, story)
    (out / "mine.txt").unlink()
    made(out, story)
    with pytest.raises(UsageError, match="tokens of another tokenizer"):
        made(out, story, tokenizer=CharTokenizer(story.read_text()))
    story.write_text(STORY)
    with pytest.raises(UsageError, match=r"other texts: .*story\.txt was changed since"):
        made(out, story)


def test_two_writers_do_not_share_a_folder(tmp_path: Path, story: Path) -> None:
    first = write_shards([open_corpus(story)], tmp_path / "out", ByteTokenizer(), size=3000)
    next(first)
    with pytest.raises(UsageError, match="Another process"):
        made(tmp_path / "out", story)
    first.close()
    made(tmp_path / "out", story)


# What is read back ------------------------------------------------------------------------------


def test_shards_that_are_not_those_of_the_index_are_refused(tmp_path: Path, story: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    made(out, story)
    made(other, story, tokenizer=CharTokenizer(story.read_text()))
    good = (out / shard_name(2)).read_bytes()
    for bad, message in (
        ((other / shard_name(2)).read_bytes(), "not the shard that shards.json beside it lists"),
        (good[:-2], "has .* bytes, but its header announces"),
        (b"", "cannot be read"),
    ):
        (out / shard_name(2)).write_bytes(bad)
        with pytest.raises(DataError, match=message):
            open_shards(out)
    (out / shard_name(2)).unlink()
    with pytest.raises(DataError, match=r"lacks shard_00002\.npy of its"):
        open_shards(out)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"shards": "many"},
        {"shards": [[1, 2]]},
        {"shards": [[-1, 2, "x"]]},
        {"dtype": "object"},
        {"vocab_size": "x"},
        {"tokenizer": None},
    ],
)
def test_an_index_that_is_damaged_or_newer_is_named(
    tmp_path: Path, story: Path, change: dict[str, Any]
) -> None:
    made(tmp_path / "out", story)
    index = tmp_path / "out" / INDEX
    index.write_text(json.dumps(json.loads(index.read_text()) | change))
    with pytest.raises(DataError, match=r"shards\.json"):
        open_shards(tmp_path / "out")


def test_ids_beyond_the_vocabulary_are_found_by_the_index_and_by_batches(
    tmp_path: Path, story: Path
) -> None:
    out = tmp_path / "out"
    made(out, story)
    shards = load_tokens(out, 256)
    assert largest(shards) == max(story.read_bytes())
    with pytest.raises(DataError, match="out of range: with vocab_size=100"):
        load_tokens(out, 100)
    data = bytearray((out / shard_name(0)).read_bytes())
    data[128:130] = b"\xff\xff"  # after the index was read
    (out / shard_name(0)).write_bytes(data)
    with pytest.raises(DataError, match="Token id 65535 was read"):
        np.asarray(open_shards(out)[:5])


def test_the_fingerprint_of_shards_needs_no_reading_and_knows_every_change(
    tmp_path: Path, story: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(tmp_path / "one", story)
    made(tmp_path / "same", story)
    made(tmp_path / "other", story, size=5000)
    one, same, other = (load_tokens(tmp_path / name) for name in ("one", "same", "other"))
    monkeypatch.setattr("tinygpt.text.tokens.spans", lambda tokens: [][0])
    assert data_fingerprint(one) == data_fingerprint(same) != data_fingerprint(other)
    assert len({data_fingerprint(part) for part in (one, one[1:], one[:-1], one[:500])}) == 4


# On the command line ----------------------------------------------------------------------------

TINY = ("--n-layer", 1, "--n-head", 1, "--n-embd", 8, "--block-size", 8, "--batch-size", 2)
SHORT = (*TINY, "--eval-interval", 5, "--eval-iters", 1, "--seed", 3)


def run(*words: object) -> int:
    return main([str(word) for word in words])


def test_the_command_line_makes_shards_and_trains_on_them(
    tmp_path: Path, story: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shard_writer, "SHARD", 4000)
    out, runs = tmp_path / "out", tmp_path / "runs"
    assert run("tokenize", story, "--out", out, "--tokenizer", "byte", "--json") == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == story.stat().st_size
    assert run("tokenize", story, "--out", out, "--tokenizer", "char") == 2
    assert "another tokenizer" in capsys.readouterr().err
    # the same text in one file gives the same run
    assert run("train", out, "--out", runs / "a", *SHORT, "--max-iters", 5) == 0
    assert "byte of 256" in capsys.readouterr().err
    assert run("train", story, "--tokenizer", "byte", "--out", runs / "b", *SHORT,
               "--max-iters", 5) == 0  # fmt: skip
    rows = [
        json.loads((runs / name / "metrics.jsonl").read_text().splitlines()[-1]) for name in "ab"
    ]
    assert rows[0]["val_loss"] == rows[1]["val_loss"]
    capsys.readouterr()
    assert run("eval", runs / "a", "--json") == 0
    own = json.loads(capsys.readouterr().out)
    assert run("eval", runs / "b", "--json") == 0
    assert json.loads(capsys.readouterr().out)["loss"] == own["loss"]
    assert run("train", "--resume", "--out", runs / "a", "--max-iters", 7,
               "--allow-change", "max_iters") == 0  # fmt: skip
    assert run("train", out, "--init", runs / "b", "--out", runs / "c", "--max-iters", 2,
               "--batch-size", 2, "--eval-interval", 5, "--eval-iters", 1) == 0  # fmt: skip
    assert run("memorization", runs / "a", "--samples", 1, "--max-tokens", 5) == 0
    capsys.readouterr()
    assert run("train", out, "--tokenizer", "gpt2", "--out", runs / "d", *SHORT,
               "--max-iters", 2) == 1  # fmt: skip
    assert "was made with another tokenizer" in capsys.readouterr().err


def test_python_trains_on_a_folder_of_shards(tmp_path: Path, story: Path) -> None:
    from tinygpt import GPT, GPTConfig, TrainConfig, train

    made(tmp_path / "out", story)
    shape = GPTConfig(vocab_size=256, block_size=8, n_layer=1, n_head=1, n_embd=8)
    settings = TrainConfig(max_iters=2, batch_size=2)
    found = [
        train(GPT(shape, seed=1), settings, source, show=False)
        for source in (tmp_path / "out", load_tokens(tmp_path / "out"))
    ]
    assert [result.iter_num for result in found] == [2, 2]


def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    """A shard's own process holds a few megabytes of a text, however long it is."""
    code = (
        "import sys; from tinygpt.text.shard_writer import write_shards; "
        "from tinygpt.text.corpus import open_corpus; from tinygpt.machine import resources; "
        "[0 for _ in write_shards([open_corpus(sys.argv[1])], sys.argv[2], 'byte')]; "
        "print(resources.peak_memory())"
    )
    peaks = []
    for megabytes in (8, 72):
        path = tmp_path / f"{megabytes}.txt"
        with path.open("w") as file:
            for _ in range(megabytes):
                file.write(STORY * (2**20 // len(STORY)))
        done = subprocess.run(
            [sys.executable, "-c", code, path, tmp_path / f"out-{megabytes}"],
            capture_output=True, text=True, check=True, timeout=120,
        )  # fmt: skip
        peaks.append(int(done.stdout))
    assert peaks[1] - peaks[0] < 24 << 20


def test_plan_and_index_are_said_to_be_there(tmp_path: Path, story: Path) -> None:
    made(tmp_path / "out", story)
    assert {INDEX, PLAN, "tokenizer.json", shard_name(0)} <= contents(tmp_path / "out").keys()
