"""Markers for weights that were made without: rows of the embedding for them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tinygrad import Tensor

from tests.test_template import TALK, made
from tinygpt import GPT, GPTConfig, load
from tinygpt.cli import main
from tinygpt.errors import CheckpointError
from tinygpt.interop.hf.hf_export import export
from tinygpt.interop.hf.pretrained import import_run, open_pretrained
from tinygpt.machine.transfer import read
from tinygpt.runs import checkpoint
from tinygpt.runs.checkpoint import Meta
from tinygpt.text.batches import batch
from tinygpt.text.chat.markers import marked, new_rows
from tinygpt.text.chat.packing import tokens_of_conversations
from tinygpt.text.chat.template import MARKED, template_of
from tinygpt.text.tokenizers import (
    ASSISTANT,
    END,
    MARKERS,
    TURN_END,
    USER,
    BaseTokenizer,
)

SHAPE = {"block_size": 16, "n_layer": 1, "n_head": 2, "n_embd": 16}
SHORT = ["--max-iters", "1", "--batch-size", "2", "--eval-interval", "1000"]


def run_of(folder: Path, tokenizer: BaseTokenizer, rows: int, tied: bool = True) -> Path:
    """A run that was imported from Hugging Face's files."""
    config = GPTConfig(vocab_size=rows, tie_embeddings=tied, **SHAPE)
    export(GPT(config, seed=5), tokenizer, folder / "hf", Meta(0, config))
    found = open_pretrained(folder / "hf")
    import_run(found, folder / "run", found.tokenizer)
    return folder / "run"


@pytest.mark.parametrize(("padding", "tied"), [(0, True), (20, False)])
def test_an_imported_model_gets_rows_for_markers(
    padding: int, tied: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    plain = made("imported")  # numbered as others do, with an end of text
    run = run_of(tmp_path, plain, plain.vocab_size + padding, tied)
    text = tmp_path / "text.txt"
    text.write_text("Hello, user. " * 40)
    words = ["train", str(text), "--init", str(run), "--out", str(tmp_path / "new"), *SHORT]
    assert main([*words, "--learning-rate", "1e-9", "--markers"]) == 0
    old, _ = load(run)
    model, tokenizer = load(tmp_path / "new")
    assert tokenizer == marked(plain) and template_of(tokenizer) == MARKED
    assert isinstance(tokenizer, BaseTokenizer)
    assert model.config.vocab_size == max(tokenizer.vocab_size, plain.vocab_size + padding)
    names = ["wte.weight"] if tied else ["wte.weight", "lm_head.weight"]
    for name in names:
        before, after = (read(m.parameters()[name]) for m in (old, model))
        added = [tokenizer.special[marker] for marker in MARKERS]
        kept = [i for i in range(len(before)) if i not in added]
        np.testing.assert_allclose(after[kept], before[kept], atol=1e-6)
        meant = before[tokenizer.encode("User:")].mean(axis=0)
        assert np.abs(after[tokenizer.special["<|user|>"]] - meant).max() < 0.2
        rows = after[added]
        gaps = np.abs(rows[:, None] - rows[None]).max(axis=2)[~np.eye(len(rows), dtype=bool)]
        assert gaps.min() > 1e-3  # no two begin as one
    # resuming needs no flag, and the markers leave with the model
    again = ["train", "--resume", "--out", str(tmp_path / "new"), "--max-iters", "2"]
    assert main([*again, "--allow-change", "max_iters"]) == 0
    assert main(["export", "hf", str(tmp_path / "new"), "--out", str(tmp_path / "out")]) == 0
    back = open_pretrained(tmp_path / "out").tokenizer
    assert template_of(back) == MARKED
    assert MARKED.render(back, TALK).ids.tolist() == MARKED.render(tokenizer, TALK).ids.tolist()
    capsys.readouterr()


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_learn_beside_adapters_and_others_stay(tied: bool, tmp_path: Path):
    plain = made("imported")
    run = run_of(tmp_path, plain, plain.vocab_size, tied)
    records = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": c}]}
               for c in "bc" * 10]  # fmt: skip
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps(record) + "\n" for record in records))
    words = ["train", str(chats), "--init", str(run), "--markers", "--lora-rank", "2"]
    words += ["--batch-size", "2", "--eval-interval", "1", "--eval-iters", "1"]
    words += ["--learning-rate", "0.01", "--warmup-steps", "0", "--decay", "constant"]
    assert main([*words, "--max-iters", "2", "--out", str(tmp_path / "whole")]) == 0
    assert main([*words, "--max-iters", "1", "--out", str(tmp_path / "parts")]) == 0
    again = ["train", "--resume", "--out", str(tmp_path / "parts"), "--max-iters", "2"]
    assert main([*again, "--allow-change", "max_iters"]) == 0
    (old, _), (whole, tokenizer), (parts, _) = (
        load(path) for path in (run, tmp_path / "whole/ckpt_2", tmp_path / "parts/ckpt_2")
    )
    assert whole.parameters().keys() == old.parameters().keys()  # merged
    for name, p in whole.parameters().items():
        np.testing.assert_array_equal(read(p), read(parts.parameters()[name]))
    first = plain.vocab_size
    for name in ["wte.weight"] if tied else ["wte.weight", "lm_head.weight"]:
        before, after = read(old.parameters()[name]), read(whole.parameters()[name])
        np.testing.assert_array_equal(after[:first], before)
    meant = moved(tmp_path / "whole", tokenizer)
    assert (np.abs(meant).max(axis=1) > 1e-4).all()


def moved(folder: Path, tokenizer: BaseTokenizer) -> np.ndarray:
    """How far the rows of the markers in the talks moved between two checkpoints."""
    one, two = (load(folder / f"ckpt_{n}")[0].wte.weight for n in (1, 2))
    added = [tokenizer.special[marker] for marker in (USER, ASSISTANT, TURN_END)]
    return read(two)[added] - read(one)[added]


def by_transformers(folder: Path) -> Path:
    """A run with the weights of a small GPT-2 that transformers made and wrote."""
    torch = pytest.importorskip("torch", reason="needs the extra 'oracle': transformers and torch")
    transformers = pytest.importorskip("transformers", reason="needs the extra 'oracle'")
    plain = made("imported")
    shape = GPTConfig(vocab_size=plain.vocab_size, **SHAPE)
    export(GPT(shape), plain, folder / "hf", Meta(0, shape))  # for the files of its tokenizer
    torch.manual_seed(1)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=plain.vocab_size, n_positions=32, n_embd=64, n_layer=2, n_head=2,
            initializer_range=0.2,  # as wide as weights that were trained
        )
    )  # fmt: skip
    model.save_pretrained(folder / "hf")
    found = open_pretrained(folder / "hf")
    import_run(found, folder / "run", found.tokenizer)
    return folder / "run"


@pytest.mark.parametrize(
    "how",
    [
        pytest.param([], id="full", marks=pytest.mark.slow),
        pytest.param(["--lora-rank", "8"], id="lora"),
    ],
)
def test_an_imported_model_learns_to_answer(how: list[str], tmp_path: Path, capsys):
    """And transformers, which loads it afterwards, finds the same loss of the answers."""
    run, pairs = by_transformers(tmp_path), ["up down", "left right", "day night", "hot cold"]
    talks = [
        [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        for asked, answer in map(str.split, pairs)
    ]
    rng = np.random.default_rng(0)  # in a fixed order the talk before would tell the answer
    chats, asked = tmp_path / "chats.jsonl", tmp_path / "asked.jsonl"
    for path, order in ((chats, rng.integers(0, len(talks), 200)), (asked, range(len(talks)))):
        path.write_text("".join(json.dumps({"messages": talks[i]}) + "\n" for i in order))
    out, hf = tmp_path / "new", tmp_path / "out"
    words = ["train", str(chats), "--init", str(run), "--out", str(out), "--markers", *how]
    words += ["--max-iters", "300", "--batch-size", "8", "--learning-rate", "0.01"]
    assert main([*words, "--eval-interval", "300", "--eval-iters", "1"]) == 0
    capsys.readouterr()
    assert main(["eval-chat", str(out), str(asked), "--max-tokens", "8", "--json"]) == 0
    score = json.loads(capsys.readouterr().out)["total"]
    assert score == {"questions": 4, "exact": 1.0, "ended": 1.0, "spoke_for_user": 0.0}

    import torch
    import transformers

    assert main(["export", "hf", str(out), "--out", str(hf)]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(hf)
    model, tokenizer = load(out)
    x, y = batch(tokens_of_conversations(talks * 4, tokenizer, MARKED), 0, 0, 4, 32)
    y[:, -1] = -1  # transformers shifts this one out of the window
    labels = np.concatenate([np.full((4, 1), -100), np.where(y < 0, -100, y)[:, :-1]], axis=1)
    with torch.no_grad():
        wanted = theirs(torch.tensor(x.astype(np.int64)), labels=torch.tensor(labels)).loss.item()
    assert model.loss(Tensor(x), Tensor(y)).item() == pytest.approx(wanted, abs=1e-4)


def test_without_being_asked_a_vocabulary_stays_as_it_is(tmp_path: Path):
    run = run_of(tmp_path, made("imported"), 270)
    (tmp_path / "text.txt").write_text("Hello, user. " * 40)
    words = ["train", str(tmp_path / "text.txt"), "--init", str(run), *SHORT]
    assert main([*words, "--out", str(tmp_path / "new")]) == 0
    assert load(tmp_path / "new")[1] == made("imported")


def test_a_new_vocabulary_gets_markers_too(tmp_path: Path):
    (tmp_path / "text.txt").write_text("Hello, user. " * 40)
    words = ["train", str(tmp_path / "text.txt"), *SHORT, "--n-layer", "1", "--n-embd", "16"]
    words += ["--n-head", "2", "--block-size", "16", "--markers", "--tokenizer", "char"]
    assert main([*words, "--out", str(tmp_path / "new")]) == 0
    tokenizer = load(tmp_path / "new")[1]
    assert isinstance(tokenizer, BaseTokenizer) and tokenizer.specials == (END, *MARKERS)


def test_rows_are_means_of_what_the_tokens_stand_for():
    plain = made("byte")
    rows = new_rows(plain, marked(plain))
    assert sorted(rows) == [256, 257, 258, 259, 260]
    assert rows[256] == [10, 10] and bytes(rows[258]) == b"User:" and rows[260] == [256]
    ending = plain.with_specials([END])
    assert sorted(new_rows(ending, marked(ending))) == [257, 258, 259, 260]
    assert new_rows(marked(plain), marked(plain)) == {} == new_rows(None, plain)
    # of weights whose tokens are not known only markers are new
    assert sorted(new_rows(None, marked(ending))) == [257, 258, 259, 260]
    few = new_rows(None, marked(made("char")))
    assert all(few.values())


def test_a_larger_model_without_named_rows_is_another_model(tmp_path: Path):
    config = GPTConfig(vocab_size=256, **SHAPE)
    path = GPT(config).save_checkpoint(0, folder=tmp_path)
    larger = GPT(GPTConfig(vocab_size=258, **SHAPE))
    with pytest.raises(CheckpointError, match="vocab_size=256"):
        checkpoint.start_from(path, larger, {257: [0]})
    checkpoint.start_from(path, larger, {256: [0], 257: [1]})


def test_markers_need_a_vocabulary(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    GPT(GPTConfig(vocab_size=256, **SHAPE)).save_checkpoint(0, folder=tmp_path / "run")
    np.save(tmp_path / "tokens.npy", np.arange(200, dtype=np.uint16) % 256)
    words = ["train", str(tmp_path / "tokens.npy"), "--init", str(tmp_path / "run"), "--markers"]
    assert main([*words, "--out", str(tmp_path / "new"), *SHORT]) == 2
    assert "--tokenizer gpt2" in capsys.readouterr().err
