"""``tinygpt eval`` and the module behind it: windows, their losses, and transformers' figures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.numpy_gpt2 import GPT2
from tests.test_oracle import random_params
from tinygpt.cli import main
from tinygpt.config import GPTConfig
from tinygpt.errors import DataError, UsageError
from tinygpt.machine.transfer import write
from tinygpt.model.transformer import Transformer
from tinygpt.text.tokenizers import make_tokenizer
from tinygpt.training import evaluation
from tinygpt.training.evaluation import batch_losses, batches, measure, windows

V, BLOCK, C, H, LAYERS = 13, 8, 16, 2, 2  # those of test_oracle
CONFIG = GPTConfig(vocab_size=V, block_size=BLOCK, n_layer=LAYERS, n_head=H, n_embd=C)


@pytest.mark.parametrize("count", [2, 3, 8, 9, 10, 17, 30])
@pytest.mark.parametrize("stride", [None, 1, 3, 8])
def test_every_token_but_the_first_is_predicted_once_with_enough_before_it(
    count: int, stride: int | None
) -> None:
    tokens = np.arange(100, 100 + count)
    seen = []
    found = list(windows(tokens, 3, BLOCK, stride))
    for x, y, real in found:
        assert x.shape == y.shape == (3, BLOCK) and real == (y >= 0).sum()
        for row, column in np.argwhere(y >= 0):
            target, before = y[row, column], x[row, : column + 1]
            assert before.tolist() == list(range(target - column - 1, target))
            wanted = BLOCK - (stride or BLOCK) if target - 100 > BLOCK else 0
            assert len(before) >= max(1, min(wanted, target - 100))
            seen.append(int(target))
    assert seen == tokens[1:].tolist()
    assert len(found) == batches(BLOCK, tokens, 3, stride)


def test_a_whole_block_as_stride_is_what_the_default_does() -> None:
    tokens = np.random.default_rng(0).integers(0, V, 50)
    for one, other in zip(windows(tokens, 2, BLOCK), windows(tokens, 2, BLOCK, BLOCK), strict=True):
        np.testing.assert_array_equal(one[0], other[0])
        np.testing.assert_array_equal(one[1], other[1])


@pytest.mark.parametrize("count", [2, 9, 50, 65])
def test_the_loss_of_a_whole_text_weighs_every_token_alike(
    monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    tokens = np.arange(count) % 7
    model = SimpleNamespace(config=SimpleNamespace(block_size=4))

    def make_evaluate(model):  # a "loss" that is the mean of the targets that count
        return lambda x, y: float(y[y >= 0].mean())

    monkeypatch.setattr(evaluation, "make_evaluate", make_evaluate)
    for stride in (None, 1, 3):
        total = math.fsum(batch_losses(model, tokens, 3, stride))
        assert total / (count - 1) == pytest.approx(tokens[1:].mean())


def oracle_model() -> tuple[Transformer, dict[str, np.ndarray]]:
    params = random_params()
    model = Transformer(CONFIG, seed=None)
    for name, parameter in model.parameters().items():
        write(parameter, params[name])
    return model.eval(), params


@pytest.mark.parametrize("stride", [1, 3, 8])
def test_the_loss_equals_the_numpy_oracles_on_single_windows(stride: int) -> None:
    model, params = oracle_model()
    tokens = np.random.default_rng(3).integers(0, V, 31)
    oracle, total = GPT2(params, LAYERS, H), 0.0
    for x, y, count in windows(tokens, 1, BLOCK, stride):
        end = int(np.flatnonzero(y[0] >= 0).max()) + 1
        total += oracle.loss(x[:, :end], y[:, :end]) * count
    found = measure(model, tokens, make_tokenizer("byte", lambda: []), 4, stride)
    assert found.tokens == 30 and found.loss == pytest.approx(total / 30, abs=1e-5)


@pytest.mark.parametrize("stride", [2, 5, 8])
def test_perplexity_equals_that_of_transformers_on_the_same_windows(stride: int) -> None:
    torch = pytest.importorskip("torch", reason="needs the extra 'oracle': transformers and torch")
    transformers = pytest.importorskip("transformers", reason="needs the extra 'oracle'")
    model, params = oracle_model()
    config = transformers.GPT2Config(
        vocab_size=V, n_positions=BLOCK, n_embd=C, n_layer=LAYERS, n_head=H,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    theirs = transformers.GPT2LMHeadModel(config).eval()
    turned = {  # their linear layers keep their weights (in, out)
        f"transformer.{name}": torch.tensor(p.T.copy() if ".c_" in name and p.ndim == 2 else p)
        for name, p in params.items()
    }
    assert theirs.load_state_dict(turned, strict=False).unexpected_keys == []
    tokens = np.random.default_rng(4).integers(0, V, 60)
    total, done = 0.0, 0
    for start in range(0, len(tokens), stride):  # written as their documentation does it
        window = torch.tensor(tokens[start : start + BLOCK + 1])
        new = start + len(window) - 1 - done
        if new <= 0:
            break
        with torch.no_grad():
            logits = theirs(window[None, :-1]).logits[0]
        losses = torch.nn.functional.cross_entropy(logits, window[1:], reduction="none")
        total, done = total + losses[-new:].sum().item(), done + new
    assert done == len(tokens) - 1
    found = measure(model, tokens, make_tokenizer("byte", lambda: []), 3, stride).to_dict()
    assert found["loss"] == pytest.approx(total / done, abs=1e-4)
    assert found["perplexity"] == pytest.approx(math.exp(total / done), rel=1e-4)


@pytest.mark.parametrize("stride", [0, -1, BLOCK + 1])
def test_a_stride_that_cannot_be_is_refused(stride: int) -> None:
    with pytest.raises(UsageError, match=r"--stride.*1 to 8"):
        list(batch_losses(Transformer(CONFIG, seed=None), np.arange(9), 2, stride))
    with pytest.raises(DataError, match="at least 2"):
        evaluation.check(BLOCK, np.arange(1), 2, None)


# The command line -------------------------------------------------------------------------------

TEXT = "the cat sat on the mat, and the dog sat on the log.\n" * 40


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    (folder / "cats.txt").write_text(TEXT, encoding="utf-8")
    size = "--model.n-layer 1 --model.n-embd 8 --model.n-head 1 --model.block-size 8"
    steps = "--tokenizer char --train.max-iters 4 --train.eval-interval 2 --train.batch-size 2"
    arguments = ["train", folder / "cats.txt", *size.split(), *steps.split(), "--out"]
    assert main([str(a) for a in [*arguments, folder / "cats"]]) == 0
    return folder / "cats"


def evaluate(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["eval", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err


def test_eval_takes_a_stride_and_tells_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = evaluate(capsys, run, "--stride", "2", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["stride"] == 2
    assert found["tokens"] == len(TEXT) - int(len(TEXT) * 0.9) - 1
    assert found["bits_per_byte"] == pytest.approx(found["loss"] / math.log(2))
    whole = json.loads(evaluate(capsys, run, "--json")[1])
    assert whole["stride"] == 8 and whole["tokens"] == found["tokens"]
    assert whole["loss"] != found["loss"]


def test_eval_reads_chinese(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "诗.txt"
    text.write_text("床前明月光,疑是地上霜。\n" * 20, encoding="utf-8")
    size = "--model.n-layer 1 --model.n-embd 8 --model.n-head 1 --model.block-size 8"
    steps = "--tokenizer char --train.max-iters 2 --train.batch-size 2"
    arguments = ["train", text, *size.split(), *steps.split(), "--out", tmp_path / "run"]
    assert main([str(a) for a in arguments]) == 0
    found = json.loads(evaluate(capsys, tmp_path / "run", "--json", "--data", text)[1])
    characters = len(text.read_text(encoding="utf-8")) - 1
    assert found["tokens"] == characters
    n_bytes = len(text.read_bytes()) - 3  # but for the first character
    bits = found["loss"] * characters / math.log(2) / n_bytes
    assert found["bits_per_byte"] == pytest.approx(bits)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--stride", "0"], "--stride 0"),
        (["--stride", "9"], "1 to 8"),
        (["--batch-size", "0"], "for --batch-size. It must be at least 1"),
        (["--data", "EMPTY"], "EMPTY"),
        (["--data", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_what_cannot_be_measured_is_said(
    run: Path,
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("EMPTY").touch()
    code, _, err = evaluate(capsys, run, *arguments)
    assert code != 0 and said in err
