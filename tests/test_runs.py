"""A run folder holds everything, and a run that stops goes on as if it had not."""

import gc
import importlib
import json
import math
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.run_script import MODEL, TOKENS, TRAIN, make_run
from tinygpt.api import load
from tinygpt.config import GPTConfig, TrainConfig
from tinygpt.errors import CheckpointError, DataError, TrainingError, UsageError
from tinygpt.runs import checkpoint
from tinygpt.runs.folder import best_checkpoint, list_checkpoints

SCRIPT = Path(__file__).with_name("run_script.py")
VARYING = {"elapsed", "tokens_per_second", "memory"}


def in_new_process(folder, steps, *resume):
    root = SCRIPT.parents[1]
    subprocess.run(
        [sys.executable, "-m", "tests.run_script", folder, str(steps), *resume],
        check=True, cwd=root, capture_output=True, timeout=300,
    )  # fmt: skip


def rows(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in VARYING} for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    for _ in make_run(folder):
        pass
    return folder


def test_a_run_folder_holds_everything(whole):
    names = {p.name for p in whole.iterdir()}
    assert {"config.toml", "metrics.jsonl", "samples.jsonl", "tokenizer.json", "best.json"} <= names
    assert {"ckpt_4.safetensors", "ckpt_8.safetensors", "ckpt_12.safetensors"} <= names
    config = tomllib.loads((whole / "config.toml").read_text())
    assert GPTConfig.from_dict(config["model"]) == MODEL
    assert TrainConfig.from_dict(config["train"]) == TRAIN
    history = rows(whole)
    assert [row["iter"] for row in history] == list(range(1, 13))
    evaluated = [row for row in history if "val_loss" in row]
    assert [row["iter"] for row in evaluated] == [3, 6, 9, 12]
    for row in evaluated:  # a token of this tokenizer is a byte
        assert row["val_bits_per_byte"] == pytest.approx(row["val_loss"] / math.log(2))
    for row in history:
        assert row["train_bits_per_byte"] == pytest.approx(row["train_loss"] / math.log(2))
    assert json.loads((whole / "run.json").read_text())["bytes_per_token"] == 1
    assert {"train_loss", "lr", "grad_norm"} <= set(history[0])
    samples = [json.loads(line) for line in (whole / "samples.jsonl").read_text().splitlines()]
    assert [sample["iter"] for sample in samples] == [3, 6, 9, 12]
    assert all(sample["text"].startswith("\n") for sample in samples)


def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(whole, tmp_path):
    folder = tmp_path / "parts"
    in_new_process(folder, 6)
    assert [p.name for p in list_checkpoints(folder)][-1] == "ckpt_6.safetensors"
    in_new_process(folder, 12, "resume")
    assert rows(folder) == rows(whole)
    one = load_file(whole / "ckpt_12.safetensors")
    two = load_file(folder / "ckpt_12.safetensors")
    assert set(one) == set(two)
    assert [name for name in one if one[name].tobytes() != two[name].tobytes()] == []
    first, second = (checkpoint.read_meta(f / "ckpt_12.safetensors") for f in (whole, folder))
    assert first.progress["best_val_loss"] == second.progress["best_val_loss"]
    assert (whole / "samples.jsonl").read_text() == (folder / "samples.jsonl").read_text()


def test_rows_after_the_checkpoint_are_taken_again_once(tmp_path):
    run = make_run(tmp_path)
    for step in run:
        if step.iter == 6:  # two steps after ckpt_4, as if the machine had died here
            break
    assert run.iter_num == 6
    (tmp_path / "ckpt_6.safetensors").unlink(missing_ok=True)  # the best one so far
    resumed = make_run(tmp_path, resume=True)
    assert resumed.iter_num == 4
    for _ in resumed:
        pass
    assert [row["iter"] for row in rows(tmp_path)] == list(range(1, 13))


def test_a_folder_with_a_run_is_not_overwritten(whole):
    with pytest.raises(UsageError, match="Resume it, or choose another folder"):
        make_run(whole)


def test_a_finished_run_has_nothing_to_resume_but_stale_files_go(whole):
    (whole / ".ckpt_9.safetensors.tinygpt-0123456789ab.tmp").write_bytes(b"half")
    run = make_run(whole, resume=True)
    assert not list(whole.glob(".*"))
    assert list(run) == []
    assert run.result.iter_num == 12
    assert not run.result.stopped


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"config": TrainConfig(**{**TRAIN.to_dict(), "learning_rate": 0.5})},
         "learning_rate (was 0.001, now 0.5)"),
        ({"tokens": TOKENS[::-1]}, "data (was 'train "),
    ],
)  # fmt: skip
def test_other_settings_or_data_are_not_resumed(whole, change, words):
    with pytest.raises(CheckpointError) as error:
        make_run(whole, resume=True, **change)
    assert words in str(error.value)


def test_settings_that_only_watch_may_change(whole):
    config = TrainConfig(**{**TRAIN.to_dict(), "eval_iters": 7, "keep_last": 5})
    assert make_run(whole, resume=True, config=config).iter_num == 12


def test_the_folder_is_free_once_a_run_that_holds_it_is_gone(whole):
    config = TrainConfig(**{**TRAIN.to_dict(), "eval_iters": 7})
    gc.disable()  # no circle of references may keep the run, and with it the lock
    try:
        for _ in range(2):
            assert make_run(whole, resume=True, config=config).iter_num == 12
    finally:
        gc.enable()


def test_another_model_is_not_resumed(whole):
    other = GPTConfig(**{**MODEL.to_dict(), "n_head": 4})
    with pytest.raises(CheckpointError, match=r"n_head \(was 2, now 4\)"):
        make_run(whole, resume=True, model=other)


def test_load_needs_nothing_but_the_folder(whole):
    model, tokenizer = load(whole)
    assert model.config == MODEL
    assert tokenizer.decode(tokenizer.encode("ä")) == "ä"
    assert model.training is False
    best = json.loads((whole / "best.json").read_text())["checkpoint"]
    expected = load_file(whole / best)["model.wte.weight"]
    assert (model.wte.weight.numpy() == expected).all()


def test_only_the_last_and_the_best_checkpoints_stay(tmp_path):
    config = TrainConfig(**{**TRAIN.to_dict(), "keep_last": 1, "checkpoint_interval": 1})
    for _ in make_run(tmp_path, config=config):
        pass
    best = best_checkpoint(tmp_path)
    newest = tmp_path / "ckpt_12.safetensors"
    assert set(list_checkpoints(tmp_path)) == {best, newest}


def test_early_stopping_waits_for_its_patience_and_saves(tmp_path, monkeypatch):
    worse = iter([2.0, 1.0, 1.5, 1.2, 9.0, 9.0])
    module = importlib.import_module("tinygpt.training.loop")
    monkeypatch.setattr(module, "evaluate", lambda *_: next(worse))
    config = TrainConfig(
        **{**TRAIN.to_dict(), "early_stop_patience": 2, "eval_interval": 1, "max_iters": 6}
    )
    run = make_run(tmp_path, config=config)
    assert [step.iter for step in run] == [1, 2, 3, 4]
    assert run.result.stopped
    assert run.result.best_val_loss == 1.0
    assert best_checkpoint(tmp_path).name == "ckpt_2.safetensors"
    assert (tmp_path / "ckpt_4.safetensors").exists()


def test_training_that_gives_up_names_the_last_checkpoint(tmp_path, monkeypatch):
    from tinygpt.runs import run as runs

    def broken(*args, **kwargs):
        for step in train_steps(*args, **kwargs):
            if step.iter == 5:
                raise TrainingError("No step is taken any more.")
            yield step

    train_steps = runs.train_steps
    monkeypatch.setattr(runs, "train_steps", broken)
    with pytest.raises(TrainingError, match=r"any more\. The last checkpoint is .*ckpt_4"):
        for _ in make_run(tmp_path):
            pass


def test_a_text_shorter_than_a_block_is_refused_before_anything_is_written(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(DataError, match="too short"):
        make_run(folder, tokens=TOKENS[:203])
    assert not folder.exists()


def test_an_unwritable_folder_is_said_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not be written"):
        make_run(tmp_path / "file")


def test_a_folder_without_checkpoints_names_runs_nearby(whole):
    with pytest.raises(CheckpointError, match="whole"):
        load(whole.parent / "hole")
