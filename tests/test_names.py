"""A word that is a name and a path: one rule, said, and what was used is what is written down."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tinygpt.cli.loading import own_validation
from tinygpt.cli.options import DataConfig, resolve
from tinygpt.cli.running import _lasting, gather
from tinygpt.config import GPTConfig, to_toml
from tinygpt.errors import TokenizerError
from tinygpt.files.tensor_file import arrange
from tinygpt.runs import checkpoint
from tinygpt.runs.folder import checkpoint_path, text_of
from tinygpt.text import corpus, tokenizers
from tinygpt.text.corpus import open_corpus
from tinygpt.text.names import is_name, lasting
from tinygpt.text.tokenizers import BPETokenizer, ByteTokenizer, CharTokenizer, make_tokenizer
from tinygpt.text.tokens import data_fingerprint

NAMES = ("pydocs", "./pydocs")
CONFIG = GPTConfig(vocab_size=256, block_size=8, n_layer=1, n_head=1, n_embd=8)
OWN = "a text of one's own, which nobody else has\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a folder or a file for every name."""
    monkeypatch.chdir(tmp_path)
    for name in corpus.NAMES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "own.txt").write_text(OWN)
    for name in ("gpt2", "byte", "char", "bpe:300"):
        CharTokenizer("own").save(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("name", corpus.NAMES)
def test_a_name_is_no_folder_and_a_path_is_no_name(
    name: str, here: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "shakespeare", corpus.pydocs)
    monkeypatch.setattr(corpus, "auto", corpus.pydocs)
    assert open_corpus(name).name == "pydocs" and "own" not in open_corpus(name).description
    assert f"'{name}' is taken as the name. The folder called so is './{name}'" in caplog.text
    for path in (f"./{name}", here / name, Path(name), f"{name}/"):
        assert "".join(open_corpus(path).pieces()) == OWN
    shutil.rmtree(here / name)
    caplog.clear()
    open_corpus(name)
    assert not caplog.text


@pytest.mark.parametrize("name", ["byte", "char", "bpe:300"])
def test_so_it_is_for_tokenizers(name: str, here: Path, caplog: pytest.LogCaptureFixture) -> None:
    kinds = {"byte": ByteTokenizer, "char": CharTokenizer, "bpe:300": BPETokenizer}
    found = make_tokenizer(name, lambda: ["the text, the text"])
    assert type(found) is kinds[name] and found != CharTokenizer("own")
    assert f"The file called so is './{name}'" in caplog.text
    for path in (f"./{name}", here / name, Path(name)):
        assert make_tokenizer(path, lambda: []) == CharTokenizer("own")


def test_what_is_no_name_is_a_path_or_an_error(here: Path) -> None:
    assert not is_name("other", tokenizers.NAMES) and not is_name("bpe:x", tokenizers.NAMES)
    for spec in ("x" * 5000, "a\0b", "bpe:", "gpt3"):
        with pytest.raises(TokenizerError):
            make_tokenizer(spec, lambda: [])


@pytest.mark.parametrize("name", ["pydocs", "shakespeare"])
def test_names_are_written_down_as_names_and_paths_as_places(name: str, here: Path) -> None:
    assert lasting(name, corpus.NAMES) == name
    assert lasting(f"./{name}", corpus.NAMES) == str(here / name)
    given = DataConfig(source="auto", tokenizer="bpe:300", init="byte")
    assert _lasting(given, name) == DataConfig(name, "bpe:300", init=str(here / "byte"))
    given = DataConfig(source="./auto", tokenizer="./gpt2")
    assert _lasting(given, "auto") == DataConfig(str(here / "auto"), str(here / "gpt2"))


def make_run(folder: Path, source: str) -> Path:
    """What a training on that text with the byte tokenizer leaves, but for the weights."""
    wanted = DataConfig(source=source, tokenizer="byte", val_fraction=0.2)
    tables = {"model": CONFIG.to_dict(), "train": {}, "data": wanted.to_dict()}
    material = gather(resolve(tables))
    written = _lasting(wanted, material.name)
    assert material.held_out is not None
    hashes = {"val": data_fingerprint(material.held_out)}
    meta = checkpoint.Meta(0, CONFIG, tokenizer=ByteTokenizer().to_dict(), data=hashes)
    folder.mkdir()
    weights = np.zeros(CONFIG.num_params(), np.float32)
    layout = arrange([("model.x", weights.dtype, weights.shape)])
    checkpoint.stream(checkpoint_path(folder, 0), layout, lambda _: iter([weights]), meta)
    (folder / "config.toml").write_text(to_toml({"model": CONFIG, "data": written}))
    return folder


def measured(run: Path) -> tuple[str, str]:
    """-> what ``eval`` calls the run's own text, and its hash"""
    model: Any = SimpleNamespace(config=CONFIG)
    name, tokens = own_validation(run, model, ByteTokenizer(), "")
    return name, data_fingerprint(tokens)


def test_what_was_trained_on_is_measured_wherever_one_stands(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "pydocs" / "own.txt").write_text(OWN * 9)
    runs = {source: make_run(here / f"run{len(source)}", source) for source in NAMES}
    assert capsys.readouterr().err.count("Python language reference") == 1
    before = {source: measured(run) for source, run in runs.items()}
    assert before["pydocs"][0].startswith("the Python language reference")
    assert before["./pydocs"][0].startswith(f"{here / 'pydocs'} (1 file")
    assert {source: text_of(run) for source, run in runs.items()} == {
        source: source for source in NAMES
    }
    elsewhere = here / "elsewhere"
    (elsewhere / "pydocs").mkdir(parents=True)
    (elsewhere / "pydocs" / "b.txt").write_text("something else " * 9)
    monkeypatch.chdir(elsewhere)
    assert {source: measured(run) for source, run in runs.items()} == before
    assert not any("not what it was" in name for name, _ in before.values())

    (here / "pydocs" / "own.txt").write_text(OWN * 10)
    assert measured(runs["./pydocs"])[0].endswith("(not what it was when the run was trained)")
