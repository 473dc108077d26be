"""~ is the home folder wherever a path is given, also where no shell replaces it."""

from __future__ import annotations

import pwd
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest

import tinygpt
from tests.run_script import make_run
from tinygpt.cli import main, running
from tinygpt.config import GPTConfig
from tinygpt.errors import UsageError
from tinygpt.files.atomic import user_path
from tinygpt.interop.hf import hf_export, pretrained
from tinygpt.runs import checkpoint, plots
from tinygpt.runs import history as metrics
from tinygpt.text import corpus, tokenizers, tokens

MODEL = GPTConfig(block_size=8, vocab_size=256, n_layer=1, n_head=1, n_embd=8)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The home folder; the current one is another, and nothing may appear in that."""
    for name in ("home", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    yield tmp_path / "home"
    assert list((tmp_path / "here").iterdir()) == []


def test_a_home_folder_is_found_or_missed_in_words(home, monkeypatch):
    assert user_path("~/a") == user_path(Path("~/a")) == home / "a"
    assert user_path("a~/~") == Path("a~/~")
    with pytest.raises(UsageError, match=r"in full .*/here/~nobody-at-all/x"):
        user_path("~nobody-at-all/x")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", lambda number: {}[number])
    with pytest.raises(UsageError, match="Write the path in full"):
        user_path("~/x")


def test_every_path_of_the_python_api_knows_home(home, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)  # which takes seconds to import
    model = tinygpt.GPT(MODEL)
    assert model.save_checkpoint(1, None, "~/made") == home / "made" / "ckpt_1.safetensors"
    assert model.load_checkpoint("~/made/ckpt_1.safetensors") == 1
    assert tinygpt.load("~/made")[0].config == MODEL
    assert checkpoint.read_meta("~/made/ckpt_1.safetensors").iter_num == 1
    assert tinygpt.ByteTokenizer().save("~/vocabulary.json") == home / "vocabulary.json"
    assert tokenizers.load_tokenizer("~/vocabulary.json").kind == "byte"
    assert tinygpt.ByteTokenizer.load("~/vocabulary.json").kind == "byte"
    assert tokenizers.make_tokenizer("~/vocabulary.json", list).kind == "byte"
    (home / "a.txt").write_text("a text")
    assert "".join(corpus.open_corpus("~/a.txt").pieces()) == "a text"
    np.save(home / "tokens.npy", np.arange(5, dtype=np.uint16))
    assert len(tokens.load_tokens("~/tokens.npy")) == 5
    history = metrics.History("~/metrics.jsonl")
    history.append({"iter": 1, "train_loss": 1.0})
    history.close()
    assert [row["iter"] for row in metrics.read("~/metrics.jsonl")] == [1]
    assert plots.read_curves("~/metrics.jsonl").train == [(1, 1.0)]
    run = make_run("~/run", model=MODEL)
    run.close()
    assert run.folder == home / "run" and (home / "run" / "config.toml").is_file()
    with pytest.raises(UsageError, match="own"):  # it was found
        pretrained.open_pretrained("~/made")
    hf_export.export(model, None, Path("~/hf"), checkpoint.Meta(1, MODEL))
    assert (home / "hf" / "model.safetensors").is_file()
    path = pretrained.import_run(pretrained.open_pretrained("~/hf"), Path("~/imported"), None)
    assert path == home / "imported" / "ckpt_0.safetensors"


def test_every_path_of_the_command_line_knows_home(home, capsys):
    tinygpt.GPT(MODEL).save_checkpoint(1, None, home / "made", tokenizer=tinygpt.ByteTokenizer())
    (home / "a.txt").write_text("a text, and more of it")
    (home / "c.toml").write_text("[train]\nmax_iters = 7\n")
    for line in (
        ["info", "~/made"],
        ["verify", "~/made"],
        ["compare", "~/made", "~/made/ckpt_1.safetensors"],
        ["tokenizer", "train", "~/a.txt", "--vocab-size=257", "--out=~/bpe.json"],
        ["tokenizer", "info", "~/bpe.json"],
        ["train", "~/a.txt", "--config=~/c.toml", "--print-config"],
    ):
        assert main(line) == 0, (line, capsys.readouterr().err)
    assert "max_iters = 7" in capsys.readouterr().out
    assert (home / "bpe.json").is_file()


def test_a_home_that_is_not_known_is_wrong_use(capsys):
    assert main(["info", "~nobody-at-all/run"]) == 2
    assert "~nobody-at-all/run begins with a home folder" in capsys.readouterr().err


def test_a_run_remembers_where_its_text_is_in_full(home):
    (home / "a.txt").write_text("a text")
    given = running.DataConfig(source="~/a.txt", tokenizer="byte")
    kept = running._lasting(given, "a")
    assert (kept.source, kept.tokenizer) == (str(home / "a.txt"), "byte")


# Runs without a name ----------------------------------------------------------------------------


class Noon(datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2026, 1, 2, 12)


def test_runs_that_begin_in_one_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(running, "datetime", Noon)
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(running.new_folder, ["a b.txt"] * 8))
    assert len(set(folders)) == 8 and all(folder.is_dir() for folder in folders)
    assert Path("runs/a-b.txt-20260102-120000") in folders


def test_a_run_that_does_not_begin_leaves_no_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("a text of some length " * 20)

    def refuse(*_, **__):
        raise UsageError("no")

    monkeypatch.setattr("tinygpt.cli.training.make_run", refuse)
    assert (
        main(["train", "a.txt", "--tokenizer", "byte", "--block-size", "8", "--max-iters", "1"])
        == 2
    )
    assert capsys.readouterr().err.endswith("error: no\n")
    assert list(Path("runs").iterdir()) == []
