"""A text ends where its tokenizer says: nothing is written behind that, and nothing of it shown."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tinygrad import Tensor

from tinygpt import GPT, BPETokenizer, ByteTokenizer, GPTConfig, load, load_pretrained
from tinygpt.cli import main
from tinygpt.config import SampleConfig
from tinygpt.errors import TokenizerError
from tinygpt.generation.stream import generate_text
from tinygpt.interop.gguf.gguf_tokens import tokens_of
from tinygpt.interop.web.page_vocabulary import describe
from tinygpt.server.engine.scheduler import Engine
from tinygpt.server.engine.sequence import Request
from tinygpt.text.tokenizers import END, tokenizer_from_dict

CONFIG = GPTConfig(block_size=16, vocab_size=264, n_layer=1, n_head=1, n_embd=16)
"""More rows than tokens: they pad the vocabulary."""
GREEDY = SampleConfig(temperature=0)


@pytest.fixture(scope="module")
def tokenizer() -> BPETokenizer:
    """256 bytes, two merges, and the end of a text."""
    return BPETokenizer.from_merges([b"ab", b"abab"], special={END: 258, "<|more|>": 259})


def saying(scores: dict[int, float], config: GPTConfig = CONFIG) -> GPT:
    """A model whose logits are these, whatever it reads, and 0 for all other tokens."""
    model = GPT(config).eval()
    rows = np.zeros((config.vocab_size, config.n_embd), np.float32)
    for token, score in scores.items():
        rows[token, 0] = score
    first = np.eye(1, config.n_embd, dtype=np.float32)[0]
    model.ln_f.weight.assign(Tensor(first * 0)).realize()
    assert model.ln_f.bias is not None
    model.ln_f.bias.assign(Tensor(first)).realize()
    model.wte.weight.assign(Tensor(rows)).realize()
    return model


@pytest.fixture(scope="module")
def ending() -> GPT:
    """Ends at once, and would else write x."""
    return saying({258: 30.0, ord("x"): 20.0})


def test_the_end_is_known_kept_and_checked(tokenizer: BPETokenizer):
    assert tokenizer.ends == (258,) and ByteTokenizer().ends == ()
    other = tokenizer.with_ends([259, 258])
    assert other.ends == (259, 258) and other != tokenizer
    assert tokenizer_from_dict(other.to_dict()).ends == (259, 258)  # type: ignore[attr-defined]
    assert "ends" not in other.with_ends([258]).to_dict()
    for wrong in ([260], [-1], ["x"], "258", [True]):
        with pytest.raises(TokenizerError, match="damaged"):
            tokenizer_from_dict(other.to_dict() | {"ends": wrong})


def test_a_text_ends_unless_it_is_told_not_to(tokenizer: BPETokenizer, ending: GPT):
    assert list(generate_text(ending, tokenizer, "a", 5, GREEDY)) == []
    held = saying({ord("E"): 30.0})
    assert "".join(generate_text(held, tokenizer, "a", 2, GREEDY, stop=["EEEE"])) == "EE"
    on = generate_text(ending, tokenizer, "a", 3, GREEDY, ignore_eos=True)
    assert "".join(on) == END * 3


def test_in_python_it_stops_where_an_end_is_known(tokenizer: BPETokenizer, ending: GPT):
    prompt = Tensor([[97]], dtype="int32")
    assert ending.generate(prompt, 4, temperature=0).shape == (1, 5)
    speaking = ending.speaks(tokenizer)
    assert speaking.generate(prompt, 4, temperature=0).tolist() == [[97, 258]]
    assert speaking.generate(prompt, 4, temperature=0, ignore_eos=True).shape == (1, 5)
    ending.speaks(None)


def test_rows_of_a_batch_end_by_themselves(tokenizer: BPETokenizer):
    model = saying({258: 30.0, 97: 29.0}).speaks(tokenizer)
    rows = model.generate(Tensor([[97]] * 8, dtype="int32"), 12, seed=1).numpy()
    lengths = [row.tolist().index(258) for row in rows]
    assert len(set(lengths)) > 1
    for row, length in zip(rows, lengths, strict=True):
        assert set(row[:length]) == {97} and set(row[length:]) == {258}


def test_rows_that_only_pad_a_vocabulary_are_never_written(tokenizer: BPETokenizer):
    model = saying({261: 30.0, 97: 10.0})
    prompt = Tensor([[97]], dtype="int32")
    assert model.generate(prompt, 2, temperature=0).tolist() == [[97, 261, 261]]
    assert model.speaks(tokenizer).generate(prompt, 2, temperature=0).tolist() == [[97] * 3]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tokenizer: BPETokenizer, ending: GPT) -> Path:
    folder = tmp_path_factory.mktemp("ends") / "run"
    ending.save_checkpoint(1, None, folder, tokenizer=tokenizer)
    return folder


def test_a_checkpoint_knows_it(run: Path):
    model, tokenizer = load(run)
    assert model.ends == (258,) and model.limit == 260 and tokenizer is not None
    other = GPT(CONFIG)
    other.load_checkpoint(next(run.glob("*.safetensors")))
    assert (other.ends, other.limit) == ((258,), 260)


@pytest.mark.parametrize(("flags", "texts"), [([], ["a"]), (["--ignore-eos"], ["a" + END * 3])])
def test_the_command(
    run: Path, capsys: pytest.CaptureFixture[str], flags: list[str], texts: list[str]
):
    words = ["generate", str(run), "--prompt", "a", "--max-tokens", "3", "--temperature", "0"]
    assert main([*words, *flags]) == 0
    assert capsys.readouterr().out == texts[0] + "\n"


@pytest.mark.parametrize(("flags", "characters"), [([], 0), (["--ignore-eos"], 3 * len(END))])
def test_what_is_searched_for_passages_ends_too(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    characters: int,
):
    text = tmp_path / "text.txt"
    text.write_text("a cat " * 40)
    words = ["memorization", str(run), "--data", str(text), "--val-fraction", "0", "--json"]
    words += ["--prompt", "a", "--max-tokens", "3", "--temperature", "0", *flags]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ignore_eos"] is bool(flags)
    assert found["temperatures"][0]["characters"] == characters


@pytest.mark.parametrize(
    ("ignore", "reason", "text"), [(False, "stop", ""), (True, "length", END * 2)]
)
def test_a_stream_of_the_server(
    tokenizer: BPETokenizer, ending: GPT, ignore: bool, reason: str, text: str
):
    with Engine(ending, tokenizer, slots=1) as engine:
        stream = engine.submit(Request((97,), 2, GREEDY, ignore_eos=ignore))
        assert "".join(piece.text for piece in stream) == text
        assert stream.finish_reason == reason


def test_a_page_knows_it(tokenizer: BPETokenizer):
    found = describe(tokenizer)
    assert found["ends"] == [258] and found["special"] == {END: 258, "<|more|>": 259}
    assert len(found["tokens"]) == 260
    assert "ends" not in describe(ByteTokenizer())


def test_llama_cpp_is_told(tokenizer: BPETokenizer):
    assert tokens_of(tokenizer, 264).end == 258
    assert tokens_of(tokenizer.with_ends([259, 258]), 264).end == 259


def exported(run: Path, folder: Path) -> dict[str, Any]:
    assert main(["export", "hf", str(run), "--out", str(folder)]) == 0
    return {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}


def test_a_folder_of_transformers_says_it_and_comes_back(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "transformers", None)  # numpy reads it back: quicker
    folder = tmp_path / "hf"
    files = exported(run, folder)
    assert files["config.json"]["eos_token_id"] == 258
    assert files["generation_config.json"]["eos_token_id"] == 258
    assert files["tokenizer_config.json"]["eos_token"] == END
    model, tokenizer = load_pretrained(folder)  # with more rows than tokens
    assert (model.ends, model.limit) == ((258,), 260)
    assert tokenizer is not None and tokenizer.vocab_size == 260
    for ids, ends in (([259, 258], (259, 258)), (259, (259,)), (99_999, (258,)), (None, (258,))):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
        assert load_pretrained(folder)[0].ends == ends, ids
    (folder / "config.json").write_text(json.dumps(files["config.json"] | {"eos_token_id": 99_999}))
    config = files["tokenizer_config.json"] | {"eos_token": {"content": "<|more|>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_pretrained(folder)[0].ends == (259,)
