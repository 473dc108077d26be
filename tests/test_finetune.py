"""`tinygpt train TEXT --init RUN`: a new run begins with the weights, the shape and the tokens."""

import json
import re
import shlex
import shutil
import sys
import tomllib

import numpy as np
import pytest

from tests.test_memory import measured
from tinygpt.api import GPT, load
from tinygpt.cli import main
from tinygpt.config import GPTConfig, TrainConfig, fine_tuning
from tinygpt.errors import CheckpointError, UsageError
from tinygpt.machine import resources
from tinygpt.model.lora import linear
from tinygpt.runs import checkpoint
from tinygpt.training import preflight

FIRST = "the cat sat on the mat, and the dog sat on the log.\n" * 40
SECOND = FIRST[::-1]
SHAPE = {"block_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 16}
TINY = shlex.split(
    "--tokenizer char --model.n-layer 2 --model.n-embd 16 --model.n-head 2 --model.block-size 8"
    " --train.batch-size 4 --train.eval-iters 4 --train.max-iters 60 --train.eval-interval 60"
    " --train.warmup-steps 0 --train.learning-rate 1e-2"
)
SHORT = shlex.split("--train.batch-size 4 --train.max-iters 1 --train.eval-iters 4")
LONG = shlex.split(
    "--train.batch-size 4 --train.max-iters 60 --train.eval-interval 20 --train.eval-iters 4"
    " --train.learning-rate 3e-2 --lora-rank 4"
)


@pytest.fixture
def run_cli(capsys, monkeypatch):
    """Call the program; -> exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/tinygpt"])

    def call(*arguments):
        code = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for name, text in (("first", FIRST), ("second", SECOND)):
        (folder / f"{name}.txt").write_text(text)
    return folder / "first.txt", folder / "second.txt"


@pytest.fixture(scope="module")
def base(texts, tmp_path_factory):
    """A run that knows the first text."""
    folder = tmp_path_factory.mktemp("runs") / "base"
    assert main(["train", str(texts[0]), *TINY, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def tuned(texts, base, tmp_path_factory):
    """A run of adapters that begins with it, and learns the second text."""
    folder = tmp_path_factory.mktemp("runs") / "tuned"
    words = ["--init", base, "--out", folder]
    assert main(["train", str(texts[1]), *LONG, *map(str, words)]) == 0
    return folder


@pytest.fixture
def fine_tune(run_cli, texts, base, tmp_path):
    def call(*words, init=base, out=tmp_path / "run"):
        return run_cli("train", texts[1], "--init", init, *SHORT, "--out", out, *words)

    return call


def printed(run_cli, *words):
    code, out, err = run_cli("train", "text.txt", *words, "--print-config")
    assert code == 0, err
    return tomllib.loads(out)


def loss_on(run_cli, run, text):
    return json.loads(run_cli("eval", run, "--data", text, "--json")[1])["loss"]


# ---- from one text to another ----


def test_adapters_learn_the_other_text_and_every_command_takes_the_merged_model(
    run_cli, texts, base, tuned
):
    before, after = (loss_on(run_cli, run, texts[1]) for run in (base, tuned))
    assert after < 0.7 * before
    (model, tokenizer), (first, own) = load(tuned), load(base)
    assert tokenizer.to_dict() == own.to_dict() and tokenizer.kind == "char"
    changed = {
        name
        for (name, p), q in zip(
            first.parameters().items(), model.parameters().values(), strict=True
        )
        if p.numpy().tobytes() != q.numpy().tobytes()
    }
    assert changed == {weight.name for weight in linear(model.config)}
    prompt = ["--prompt", "a log", "--max-tokens", "20", "--temperature", "0"]
    written = run_cli("generate", tuned, *prompt)[1]
    assert written.startswith("a log") and written != run_cli("generate", base, *prompt)[1]

    path = model.save_checkpoint(0, folder=tuned.parent / "merged", tokenizer=tokenizer)
    assert run_cli("generate", path, *prompt)[1] == written
    assert loss_on(run_cli, path, texts[1]) == pytest.approx(after, abs=1e-6)
    assert path.stat().st_size < max(tuned.glob("ckpt_*")).stat().st_size


def test_the_run_says_where_it_began(run_cli, base, tuned):
    origin = checkpoint.origin(base / "ckpt_60.safetensors")
    assert origin["iter_num"] == 60 and origin["run"] == checkpoint.read_meta(origin["path"]).run
    meta = checkpoint.read_meta(tuned / "ckpt_60.safetensors")
    assert meta.init == origin and meta.run != origin["run"]
    data = tomllib.loads((tuned / "config.toml").read_text())["data"]
    assert (data["init"], data["init_sha256"]) == (origin["path"], origin["sha256"])
    assert f"began with  {origin['path']}, step 60" in run_cli("info", tuned)[1]


def test_all_weights_learn_without_adapters_and_some_with_freeze(fine_tune, base, tmp_path):
    first = load(base)[0].parameters()
    for name, words, frozen in (
        ("whole", [], ()),
        ("frozen", ["--train.freeze", 1], ("wte.", "wpe.", "h.0.")),
    ):
        code, _, err = fine_tune(*words, out=tmp_path / name)
        assert code == 0 and ("of which" in err) == bool(frozen)
        assert re.search("^model: .* parameters.*, learning rate [0-9]", err, re.MULTILINE)
        found = load(tmp_path / name)[0].parameters()
        same = {n for n in first if first[n].numpy().tobytes() == found[n].numpy().tobytes()}
        assert same == {n for n in first if n.startswith(frozen or "-")}


def test_a_shorter_block_keeps_the_first_positions(fine_tune, base, tmp_path):
    words = ["--model.block-size", 4, "--model.dropout", 0.1, "--lora-rank", 1]
    assert fine_tune(*words)[0] == 0
    found, first = load(tmp_path / "run")[0], load(base)[0]
    assert found.config.block_size == 4 and found.config.dropout == 0.1
    np.testing.assert_array_equal(found.wpe.weight.numpy(), first.wpe.weight.numpy()[:4])


def test_a_stopped_run_needs_its_own_checkpoints_only(run_cli, texts, base, tuned, tmp_path):
    gone, folder = tmp_path / "gone", tmp_path / "run"
    shutil.copytree(base, gone)
    words = ["--init", gone, *LONG, "--out", folder]
    assert run_cli("train", texts[1], *words)[0] == 0
    (folder / "ckpt_60.safetensors").unlink()
    shutil.rmtree(gone)
    code, _, err = run_cli("train", "--resume", "--out", folder)
    assert code == 0 and "from step 40" in err
    assert loss_on(run_cli, folder, texts[1]) == loss_on(run_cli, tuned, texts[1])
    assert checkpoint.read_meta(folder / "ckpt_60.safetensors").init["path"].startswith(str(gone))


def test_a_run_without_a_checkpoint_begins_again_with_the_same_weights(
    fine_tune, run_cli, base, tmp_path
):
    copy, folder = tmp_path / "copy", tmp_path / "run"
    shutil.copytree(base, copy)
    assert fine_tune(init=copy)[0] == 0
    wanted = checkpoint.read(folder / "ckpt_1.safetensors")[1]
    (folder / "ckpt_1.safetensors").unlink()
    assert run_cli("train", "--resume", "--out", folder)[0] == 0
    found = checkpoint.read(folder / "ckpt_1.safetensors")[1]
    assert all(found[name].tobytes() == wanted[name].tobytes() for name in wanted)

    for path in (folder / "ckpt_1.safetensors", copy / "ckpt_60.safetensors"):
        path.unlink()
    shutil.copy(tuned_elsewhere(copy), copy / "ckpt_60.safetensors")
    code, _, err = run_cli("train", "--resume", "--out", folder)
    assert code == 1 and "no longer holds the weights that this run begins with" in err


def tuned_elsewhere(folder):
    """A checkpoint of the same shape and step with other weights."""
    settings = tomllib.loads((folder / "config.toml").read_text())["model"]
    return GPT(GPTConfig(**settings), seed=9).save_checkpoint(60, folder=folder / "other")


@pytest.mark.slow
def test_resuming_a_fine_tuned_run_is_proved_on_the_machine(run_cli, tuned):
    code, out, _ = run_cli("verify-resume", tuned)
    assert code == 0 and "Resuming is exact" in out


# ---- settings ----


def test_the_defaults_are_those_of_fine_tuning_and_the_shape_is_that_of_the_weights(run_cli, base):
    found = printed(run_cli, "--init", base)
    assert {k: found["model"][k] for k in SHAPE} == SHAPE
    assert found["model"]["vocab_size"] == load(base)[0].config.vocab_size
    assert found["data"]["init"] == str(base / "ckpt_60.safetensors")
    whole, adapters = found["train"], printed(run_cli, "--init", base, "--lora-rank", 8)["train"]
    assert adapters["lora_rank"] == 8 and "lora_rank" not in whole
    assert adapters["learning_rate"] == 10 * whole["learning_rate"] == 5e-4
    for train in (whole, adapters):
        assert train["min_lr"] == train["learning_rate"] / 10 and train["max_iters"] == 500
        assert 0.04 <= train["warmup_steps"] / train["max_iters"] <= 0.1
    assert TrainConfig(**fine_tuning({"learning_rate": 1e-6, "max_iters": 5})).min_lr == 1e-7


def test_presets_files_and_flags_win_over_them(run_cli, base, tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("[model]\nn_embd = 16\n[train]\nmax_iters = 40\nlora_rank = 2\n")
    words = ["--init", base, "--preset", "baby", "--config", file, "--train.lora-rank", "3"]
    found = printed(run_cli, *words)
    assert found["train"]["batch_size"] == 12 and found["train"]["beta2"] == 0.99  # the preset
    assert found["train"]["max_iters"] == 40 and found["train"]["lora_rank"] == 3
    assert found["model"]["n_layer"] == 2 and "tokenizer" not in found["data"]  # the weights'
    assert printed(run_cli, "--init", base, "--train.max-iters", 40)["train"]["warmup_steps"] == 2


def test_a_printed_config_begins_the_same_run(run_cli, base, tmp_path):
    _, text, _ = run_cli("train", "text.txt", "--init", base, "--lora-rank", "2", "--print-config")
    (tmp_path / "c.toml").write_text(text)
    assert run_cli("train", "--config", tmp_path / "c.toml", "--print-config")[1] == text


def test_the_own_tokenizer_may_be_named(fine_tune, base):
    assert fine_tune("--tokenizer", base / "tokenizer.json")[0] == 0


def test_weights_without_a_tokenizer_need_one_to_be_named(fine_tune, tmp_path):
    GPT(GPTConfig(**SHAPE, vocab_size=256)).save_checkpoint(0, folder=tmp_path / "bare")
    code, _, err = fine_tune(init=tmp_path / "bare")
    assert code == 2 and "holds no tokenizer. Name the one" in err
    assert fine_tune("--tokenizer", "byte", init=tmp_path / "bare")[0] == 0


# ---- refused ----

REFUSED = {
    "--model.n-embd 32 --model.n-layer 3": "n_layer=3 (it has 2), n_embd=32 (it has 16). Leave",
    "--model.no-bias": "bias=False (it has True)",
    "--model.block-size 16": "block_size=16 is more than the 8 positions",
    "--tokenizer byte": "--tokenizer byte is not the one that",
    "--tokenizer bpe:300": "'bpe:300' has to be trained first",
    "--tokenizer char": "'char' has to be trained first",
    "--lora-rank 0": "lora_rank=0 is too small",
    "--lora-rank -3": "lora_rank=-3 is too small",
    "--lora-rank 17": "lora_rank=17 is larger than n_embd=16",
    "--train.freeze 3": "freeze=3 is more than the n_layer=2 blocks",
    "--train.freeze 2 --lora-rank 1": "there is no layer left",
    "--train.lora-layers head": '"all", "attn", "mlp"',
    "--resume": "",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_contradicts_the_weights_is_refused(fine_tune, tmp_path, words):
    code, out, err = fine_tune(*shlex.split(words))
    assert code in (1, 2) and out == "" and REFUSED[words] in err
    assert not (tmp_path / "run").exists()


def test_a_place_without_weights_is_refused(fine_tune, base, tmp_path):
    (tmp_path / "empty").mkdir()
    code, _, err = fine_tune(init=tmp_path / "empty")
    assert code == 1 and "There is no checkpoint in" in err
    assert fine_tune(init=tmp_path / "nowhere")[0] == 1
    (tmp_path / "empty" / "config.json").write_text("{}")
    code, _, err = fine_tune(init=tmp_path / "empty")
    assert code == 2 and "tinygpt import hf" in err
    (tmp_path / "ckpt_1.safetensors").write_bytes(b"\x00" * 100)
    assert fine_tune(init=tmp_path / "ckpt_1.safetensors")[0] == 1


def test_a_run_does_not_go_where_it_began(fine_tune, base, tmp_path):
    for init in (base, base / "ckpt_60.safetensors"):
        code, _, err = fine_tune(init=init, out=base)
        assert code == 2 and "nothing there is overwritten" in err


def test_text_that_the_tokenizer_cannot_hold_is_refused(run_cli, base, tmp_path):
    (tmp_path / "text.txt").write_text("猫坐在垫子上。" * 100, encoding="utf-8")
    words = ["--init", base, *SHORT, "--out", tmp_path / "run"]
    code, _, err = run_cli("train", tmp_path / "text.txt", *words)
    assert code == 1 and "猫" in err and not (tmp_path / "run").exists()


def test_random_weights_are_neither_frozen_nor_adapted(run_cli, texts):
    for words, name in ((["--lora-rank", 2], "lora_rank"), (["--train.freeze", 1], "freeze")):
        code, _, err = run_cli("train", texts[0], *words)
        assert code == 2 and f"{name} is for weights that have learned" in err


def test_a_run_that_goes_on_keeps_what_it_began_with(run_cli, base, tuned, tmp_path):
    before = (tuned / "config.toml").read_bytes()
    code, _, err = run_cli("train", "--resume", "--out", tuned, "--init", base)
    assert code == 2 and "--init is for a run that begins" in err
    for words in (["--lora-rank", 8], ["--train.freeze", 1], ["--train.lora-layers", "mlp"]):
        code, _, err = run_cli("train", "--resume", "--out", tuned, *words)
        assert code == 1 and "start a new one from it, with --init" in err
    code, _, err = run_cli("train", "--resume", "--out", base, "--lora-rank", 2)
    assert code == 1 and "lora_rank (was None, now 2)" in err
    code, _, err = run_cli("train", "--resume", "--out", tuned, "--allow-change", "init")
    assert code == 2 and "init cannot change within a run" in err
    assert (tuned / "config.toml").read_bytes() == before


def test_weights_of_another_shape_are_refused_in_python(base):
    path, shape = base / "ckpt_60.safetensors", load(base)[0].config.to_dict()
    for name, value, words in (("block_size", 9, "8 positions"), ("n_layer", 1, "n_layer=2")):
        with pytest.raises(CheckpointError, match=words):
            checkpoint.start_from(path, GPT(GPTConfig(**shape | {name: value})))


# ---- memory ----

WIDE = {"vocab_size": 1000, "n_layer": 4, "n_embd": 256, "n_head": 4, "block_size": 128}


@pytest.mark.parametrize(
    "train",
    [
        pytest.param({"lora_rank": 8}, id="adapters"),
        pytest.param({"freeze": 3}, id="frozen", marks=pytest.mark.slow),
        pytest.param(
            {"lora_rank": 8, "grad_accum_steps": 2, "lora_layers": "attn"},
            id="accumulation", marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_what_is_foreseen_is_what_is_taken(tmp_path, train):
    found = measured(tmp_path / "run", WIDE, batch_size=8, **train)
    foreseen = found["foreseen"]
    assert 0.5 < foreseen["needed"] / found["taken"] < 2
    on_device = foreseen["needed"] - foreseen["saving"] - preflight.COMPILING
    assert 0.7 < on_device / found["device"] < 1.4
    whole = preflight.preflight(GPTConfig(**WIDE), TrainConfig(batch_size=8))
    assert foreseen["needed"] < whole.needed - whole.optimizer / 2


def test_where_training_all_weights_does_not_fit_adapters_are_advised(monkeypatch):
    shape = GPTConfig(vocab_size=1000, n_layer=12, n_embd=512, n_head=8, block_size=64)
    whole = TrainConfig(batch_size=1)
    needed = preflight.preflight(shape, whole).needed
    monkeypatch.setattr(resources, "available_memory", lambda: needed // 2)
    with pytest.raises(
        UsageError, match=r"Adapters alone .* --train\.lora-rank 8\. To try"
    ) as error:
        preflight.check(shape, whole, given=True)
    assert "--model" not in str(error.value)
    with pytest.raises(UsageError, match="A smaller model"):
        preflight.check(shape, whole)
    preflight.check(shape, TrainConfig(batch_size=1, lora_rank=8), given=True)
