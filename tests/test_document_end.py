"""A token parts documents: vocabularies made for them have it, models learn it and stop there."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.test_template import made
from tinygpt import load
from tinygpt.cli import main
from tinygpt.cli.budgeting import figures
from tinygpt.cli.loading import own_validation, read_tokens
from tinygpt.cli.options import DataConfig, resolve
from tinygpt.text.corpus import open_corpus
from tinygpt.text.shard_writer import write_shards
from tinygpt.text.shards import open_shards
from tinygpt.text.sources import corpus_of, specials_for
from tinygpt.text.tokenizers import END, BaseTokenizer, load_tokenizer, make_tokenizer
from tinygpt.text.tokens import bytes_per_token, tokens_of

DOCUMENTS = ["one\n", "two words, here", "né\n\nthree"]
SMALL = "--n-layer 1 --n-embd 16 --n-head 2 --block-size 16 --batch-size 16 --eval-interval 1000"


def folder_of(path: Path, documents: list[str]) -> Path:
    path.mkdir()
    for number, document in enumerate(documents):
        (path / f"{number}.txt").write_text(document)
    return path


def jsonl_of(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


@pytest.fixture(params=["folder", "jsonl"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    documents = [*DOCUMENTS[:1], "", *DOCUMENTS[1:]]  # an empty one is none
    if request.param == "folder":
        return folder_of(tmp_path / "texts", documents)
    return jsonl_of(tmp_path / "texts.jsonl", documents)


@pytest.mark.parametrize("spec", ["byte", "char", "bpe:300", "gpt2"])
def test_each_document_ends_in_training_and_in_shards(source: Path, spec: str, tmp_path: Path):
    if spec == "gpt2":
        made("gpt2")  # or skip
    corpus = open_corpus(source)
    tokenizer = make_tokenizer(spec, corpus.pieces, specials_for([corpus]))
    assert isinstance(tokenizer, BaseTokenizer) and tokenizer.specials == (END,)
    assert tokenizer.special_id(END) == tokenizer.vocab_size - 1
    tokens = np.asarray(tokens_of(corpus, tokenizer))
    assert tokenizer.decode(tokens) == "".join(text + END for text in DOCUMENTS)
    alone = [[*tokenizer.encode(text), tokenizer.special[END]] for text in DOCUMENTS]
    assert tokens.tolist() == [i for ids in alone for i in ids]
    size = len("".join(DOCUMENTS).encode()) - len(tokenizer.decode_bytes([tokens[0]]))
    assert bytes_per_token(tokens, tokenizer) == size / (len(tokens) - 1)
    for _ in write_shards([corpus], tmp_path / "shards", spec):
        pass
    assert load_tokenizer(tmp_path / "shards") == tokenizer
    assert np.asarray(open_shards(tmp_path / "shards")).tolist() == tokens.tolist()


def test_the_size_of_a_vocabulary_includes_its_special_tokens():
    text = ["the cat sat on the mat and the dog sat on the log, " * 9]
    assert make_tokenizer("bpe:270", lambda: text, [END]).vocab_size == 270
    assert make_tokenizer("bpe:270", lambda: text).vocab_size == 270


def test_one_plain_text_has_the_vocabulary_and_tokens_it_had(tmp_path: Path):
    alone = folder_of(tmp_path / "alone", ["a text\n\nwith a blank line"])
    for path in (alone, alone / "0.txt"):
        corpus = open_corpus(path)
        assert corpus.documents is None and specials_for([corpus]) == ()
        tokenizer = make_tokenizer("byte", corpus.pieces, specials_for([corpus]))
        assert tokenizer.to_dict() == {"kind": "byte"}
        assert bytes(tokens_of(corpus, tokenizer).tolist()) == b"a text\n\nwith a blank line"
    assert specials_for([open_corpus("pydocs")]) == ()


def test_texts_that_differ_only_in_where_documents_end_have_other_tokens(tmp_path: Path):
    tokenizer = made("byte").with_specials([END])
    split = [["ab", "c"], ["a", "bc"], ["a\n\nb", "c"], ["a", "b", "c"]]
    found = [
        np.asarray(tokens_of(open_corpus(jsonl_of(tmp_path / f"{n}.jsonl", texts)), tokenizer))
        for n, texts in enumerate(split)
    ]
    shown = [tokenizer.decode(tokens) for tokens in found]
    assert shown == ["".join(text + END for text in texts) for texts in split]


def test_a_vocabulary_without_the_token_and_who_asks_for_it_have_blank_lines(source: Path):
    blank = "one\n\ntwo words, here\n\nné\n\nthree"
    plain, ending = made("byte"), made("byte").with_specials([END])
    assert plain.decode(tokens_of(open_corpus(source), plain)) == blank
    corpus = corpus_of(str(source), separator="blank")
    assert ending.decode(tokens_of(corpus, ending)) == blank and specials_for([corpus]) == ()


def test_what_minutes_plans_with_has_the_token(tmp_path: Path):
    texts = ["a sentence of some words and more of them\n" * 40] * 20
    source = str(jsonl_of(tmp_path / "t.jsonl", texts))
    for separator, more in (("end", 1), ("blank", 0)):
        settings = resolve({"data": {"source": source, "separator": separator}})
        corpus = corpus_of(source, separator=separator)
        found = figures(settings, corpus, None, 60.0).vocabularies
        assert found["byte"].size == 256 + more
        assert all(v.size <= int(str(n)[4:]) for n, v in found.items() if n != "byte")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on documents of one word each."""
    folder = tmp_path_factory.mktemp("learned")
    source = jsonl_of(folder / "words.jsonl", ["apple", "bread", "cheese", "dates"] * 100)
    words = ["train", str(source), "--tokenizer", "byte", "--out", str(folder / "run")]
    words += [*SMALL.split(), "--max-iters", "150", "--learning-rate", "0.02"]
    assert main(words) == 0
    return folder / "run"


def test_the_end_is_learned_and_obeyed(run: Path, capsys: pytest.CaptureFixture[str]):
    _, tokenizer = load(run)
    assert tokenizer is not None and tokenizer.vocab_size == 257
    words = ["generate", str(run), "--prompt", "chee", "--max-tokens", "20", "--temperature", "0"]
    assert main(words) == 0
    assert capsys.readouterr().out == "cheese\n"
    assert main([*words, "--ignore-eos"]) == 0
    assert capsys.readouterr().out.startswith(f"cheese{END}")


def test_bits_per_byte_count_the_text_alone(run: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["eval", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    model, tokenizer = load(run)
    assert tokenizer is not None
    _, tokens = own_validation(run, model, tokenizer, "")
    held = np.asarray(tokens)[1:]
    text = len(held) - int((held == 256).sum())  # bytes
    assert 0.1 < text / len(held) < 0.9
    expected = found["loss"] / np.log(2) * len(held) / text
    assert found["bits_per_byte"] == pytest.approx(expected, rel=1e-6)


def test_a_run_that_is_older_than_the_token_goes_on_with_blank_lines(run: Path, tmp_path: Path):
    """GPT-2's vocabulary has always had the token; runs of then have blank lines all the same."""
    kept = (run / "config.toml").read_text()
    assert tomllib.loads(kept)["data"]["separator"] == "end"
    old = tmp_path / "old"
    old.mkdir()
    lines = [line for line in kept.splitlines() if not line.startswith("separator")]
    (old / "config.toml").write_text("\n".join(lines))
    from tinygpt.cli.options import run_tables

    data = DataConfig.from_dict(run_tables(old)["data"])
    assert data.separator == "blank"
    model, tokenizer = load(run)
    assert tokenizer is not None
    _, tokens = read_tokens(data, model, tokenizer)
    assert 256 not in np.asarray(tokens) and 256 in np.asarray(
        read_tokens(DataConfig(source=data.source), model, tokenizer)[1]
    )


def test_a_run_goes_on_with_its_tokens(run: Path, capsys: pytest.CaptureFixture[str]):
    words: list[Any] = ["train", "--resume", "--out", run, "--max-iters", "151"]
    assert main([*map(str, words), "--allow-change", "max_iters"]) == 0
    assert "not what it was" not in capsys.readouterr().err
