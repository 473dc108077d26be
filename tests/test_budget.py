"""The rule behind --minutes, its measurements, and what the command line makes of them."""

from __future__ import annotations

import json
import math
import tomllib
from dataclasses import replace

import numpy as np
import pytest

from tests.run_script import MODEL, TOKENS, TRAIN
from tests.run_script import make_run as make_plain_run
from tinygpt import GPT
from tinygpt.cli import main
from tinygpt.cli.budgeting import STARTING, Budget, asked, seconds_of
from tinygpt.config import PRESETS, GPTConfig
from tinygpt.config.devices import device_names
from tinygpt.errors import UsageError
from tinygpt.machine import resources
from tinygpt.runs.run import TrainingRun
from tinygpt.runs.trial import Trial
from tinygpt.text.tokenizers import ByteTokenizer
from tinygpt.training.budget import (
    CLOSING,
    MAX_EPOCHS,
    Pace,
    Text,
    Vocabulary,
    choose,
    fix_steps,
    ladder,
    sized,
)
from tinygpt.training.optim import optimizer_state

LAPTOP = 170e9
"""Floating-point operations per second of two cores."""
VOCABULARIES = {"byte": Vocabulary(256, 1.0), "bpe:1024": Vocabulary(1024, 2.4)}


def text(n_bytes):
    return Text(int(0.9 * n_bytes), int(0.1 * n_bytes), VOCABULARIES)


def best(n_bytes, seconds, model=None, train=None, rate=LAPTOP):
    return choose(text(n_bytes), rate, seconds, model or {}, train or {}, ladder(model or {}))


def blocks_of(shape):
    return shape["n_layer"] * shape["n_embd"] ** 2


# The rule ---------------------------------------------------------------------------------------


def test_more_time_makes_larger_models_until_the_text_is_too_small():
    plans = [best(1e9, seconds) for seconds in (10, 60, 300, 3600, 36_000)]
    sizes = [blocks_of(plan.model) for plan in plans]
    assert sizes == sorted(sizes) and sizes[0] < sizes[2] < sizes[-1]
    assert [p.tokens for p in plans] == sorted(p.tokens for p in plans)
    assert all(plan.epochs < 5 and plan.model["dropout"] == 0 for plan in plans[:3])
    faster = best(1e9, 30, rate=10 * LAPTOP)
    assert blocks_of(faster.model) == pytest.approx(sizes[2], rel=0.5)


def test_what_is_read_again_and_again_gets_dropout_and_an_end():
    plan = best(20_000, 600)
    assert blocks_of(plan.model) == blocks_of(next(ladder({})))
    assert plan.epochs == pytest.approx(MAX_EPOCHS) and plan.model["dropout"] > 0


@pytest.mark.parametrize("n_bytes", [40, 200, 2000, 1e5, 1e12])
@pytest.mark.parametrize("seconds", [1, 300, 1e6])
def test_every_plan_is_one_that_can_be_trained(n_bytes, seconds):
    plan = best(n_bytes, seconds)
    shape = GPTConfig(vocab_size=plan.vocabulary.size, **plan.model)
    assert shape.block_size <= max(1, 0.1 * n_bytes / plan.vocabulary.bytes_per_token)
    assert shape.head_size in (32, 48, 64) and plan.train["batch_size"] >= 1
    assert math.isfinite(plan.bits)


@pytest.mark.parametrize("devices", [2, 3, 8, "CPU,CPU:1,CPU:2"])
@pytest.mark.parametrize("model", [{}, {"block_size": 4096}])
def test_a_planned_batch_divides_by_the_devices(devices, model):
    plan = best(1_000_000, 300, model, {"devices": devices})
    assert plan.train["batch_size"] % len(device_names(devices)) == 0


def test_what_was_given_is_kept():
    given = {"n_layer": 3, "n_embd": 80, "block_size": 32, "dropout": 0.3}
    plan = best(1e6, 60, given, {"batch_size": 7, "optimizer": "adam", "beta2": 0.9})
    assert plan.model == {**given, "n_head": 2}
    assert plan.train["batch_size"] == 7 and plan.train["beta2"] == 0.9
    assert plan.train["optimizer"] == "adam" and "muon_learning_rate" not in plan.train
    assert all(shape["n_embd"] % 5 == 0 for shape in ladder({"n_head": 5}))


def test_a_size_is_the_nearest_shape():
    found = sized(800_000, list(ladder({})))
    assert GPTConfig(vocab_size=1024, **found).num_params() == pytest.approx(8e5, rel=0.25)
    assert blocks_of(sized(10**12, ladder({}))) == max(map(blocks_of, ladder({})))


PACE = Pace(step=0.02, evaluation=0.006, sample=0.2)


def test_steps_evaluations_and_samples_fill_the_time():
    for seconds in (30, 300, 3000):
        found = fix_steps(MODEL, TRAIN, PACE, seconds, 7.0, 10**9)
        evaluations = math.ceil(found["max_iters"] / found["eval_interval"])
        spent = (
            7 + CLOSING + 0.02 * found["max_iters"] + evaluations * (0.006 * TRAIN.eval_iters + 0.2)
        )
        assert spent == pytest.approx(seconds, rel=0.02) and 1 <= evaluations <= 20
        assert 0 < found["warmup_steps"] < found["max_iters"] / 4
        often = fix_steps(MODEL, TRAIN, PACE, seconds, 7.0, 10**9, interval=10)
        assert often["eval_interval"] == 10 and often["max_iters"] < found["max_iters"]


def test_no_text_is_read_until_it_is_known_by_heart():
    found = fix_steps(MODEL, TRAIN, PACE, 3600, 7.0, 1000)
    assert found["max_iters"] == math.ceil(MAX_EPOCHS * 1000 / (4 * 8))


def test_a_time_for_not_even_one_step_is_refused_with_one_that_would_do():
    with pytest.raises(UsageError, match=r"8 seconds are too few for a single step: 7\.5 .* 13s"):
        fix_steps(MODEL, TRAIN, PACE, 8, 7.5, 10**9)


# What is asked for ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "seconds"),
    [("10", 600), ("30s", 30), ("2h", 7200), ("1h30m", 5400), ("0.5", 30), ("90 sec", 90),
     ("1.5 Hours", 5400), ("5min", 300), (".5m", 30)],
)  # fmt: skip
def test_times_are_read(words, seconds):
    assert seconds_of(words) == seconds


@pytest.mark.parametrize(
    ("words", "said"),
    [("0", "no time"), ("0s", "no time"), ("-5", "less than nothing"), ("s", "without a number"),
     ("", "without a number"), ("soon", "without a number"), ("5d", "not a number and a unit"),
     ("5 parsecs", "not a number and a unit"), ("nan", "without a number"), ("1e3", "unit"),
     ("9999999", "100 days"), ("1" * 400, "100 days"), ("5m3", "unit")],
)  # fmt: skip
def test_times_that_are_none_are_refused(words, said):
    with pytest.raises(UsageError, match=said):
        seconds_of(words)


def test_what_else_decides_how_long_a_run_lasts():
    assert asked(None, None, [], None, False).seconds == 300
    assert asked(None, None, ["--preset"], None, False) is None
    assert asked(None, None, [], 100, False) is None
    assert asked(None, None, [], None, True) is None
    assert asked("10", None, ["--config"], None, False).whole is False
    assert asked("10", "3M", [], None, False).size == 3_000_000
    assert asked(None, "baby", [], None, False).size == PRESETS["baby"].model
    for wrong, said in (
        (("10", None, [], 100, False), "--max-iters 100 and --minutes 10 contradict"),
        ((None, "3M", [], 100, False), "--max-iters 100 and --size 3M contradict"),
        (("10", None, [], None, True), "--minutes is for a run that begins"),
        (("10", "3M", ["--preset"], None, False), "--size and --preset"),
        ((None, "big", [], None, False), "no number of parameters and no preset"),
        ((None, "babe", [], None, False), "Did you mean 'baby'"),
        ((None, "12", [], None, False), "12 parameters"),
    ):
        with pytest.raises(UsageError, match=said):
            asked(*wrong)


# Measuring --------------------------------------------------------------------------------------


def test_a_trial_leaves_no_trace_in_the_run_that_follows_it(tmp_path):
    config = replace(TRAIN, max_iters=6, optimizer="muon")
    model = GPT(MODEL, seed=5)
    trial = Trial(model, config)
    state = [*model.parameters().values(), *optimizer_state(trial.optimizer, {}).values()]
    before = [tensor.numpy().copy() for tensor in state]
    pace = trial.pace(TOKENS, 0.01)
    assert min(pace) > 0
    for tensor, values in zip(state, before, strict=True):
        np.testing.assert_array_equal(tensor.numpy(), values)
    options = {"tokenizer": ByteTokenizer(), "folder": tmp_path / "tried"}
    run = TrainingRun(model, config, TOKENS[:-200], TOKENS[-200:], trial=trial, **options)
    tried = [(step.train_loss, step.val_loss, step.sample) for step in run]
    plain = make_plain_run(tmp_path / "plain", config=config)
    assert tried == [(step.train_loss, step.val_loss, step.sample) for step in plain]


def test_the_time_begins_with_the_process_unless_that_is_older(monkeypatch):
    first = resources.process_age()
    assert first > 0 and 0 <= resources.process_age() - first < 60
    for age, gone in ((1.5, 1.5), (3600.0, STARTING)):
        monkeypatch.setattr(resources, "process_age", lambda age=age: age)
        assert gone <= 300 - asked(None, None, [], None, False).left < gone + 60


# The command line -------------------------------------------------------------------------------

TINY = ["--n-layer", "1", "--n-embd", "8", "--n-head", "1", "--block-size", "8"]
TINY += ["--batch-size", "2", "--tokenizer", "byte", "--optimizer", "adam"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a text, one second that is gone, and a machine of a known pace."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cats.txt").write_text("the cat sat on the mat, and the dog on the log.\n" * 60)
    monkeypatch.setattr(Budget, "left", property(lambda self: self.seconds - 1))
    monkeypatch.setattr(Trial, "pace", lambda *_: Pace(step=2.0, evaluation=0.01, sample=0.1))
    return tmp_path


def test_a_planned_run_is_an_ordinary_one(here, capsys):
    assert main(["train", "cats.txt", "--minutes", "15s", *TINY, "--out", "run"]) == 0
    said = capsys.readouterr().err
    for line in ("plan: 15s", "8 tokens/s measured", "steps: 6 of 2 x 8"):
        assert line in said
    config = tomllib.loads((here / "run" / "config.toml").read_text())
    assert config["train"]["max_iters"] == 6 and config["model"]["n_embd"] == 8
    assert config["data"]["plan"].startswith("plan: 15s") and config["data"]["tokenizer"] == "byte"
    assert [row["iter"] for row in rows(here / "run")] == [1, 2, 3, 4, 5, 6]
    assert main(["train", "--resume", "--out", "run"]) == 0
    again = ["train", "cats.txt", "--config", "run/config.toml", "--out", "again"]
    assert main(again) == 0
    losses = [[row["train_loss"] for row in rows(here / name)] for name in ("run", "again")]
    assert losses[0] == losses[1]
    assert "plan" not in tomllib.loads((here / "again" / "config.toml").read_text())["data"]


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_plan_is_shown_without_a_run(here, capsys):
    assert main(["train", "cats.txt", *TINY, "--dry-run"]) == 0
    assert "plan: 5m 00s (--minutes gives another)" in capsys.readouterr().err
    assert main(["train", "cats.txt", "--minutes", "1", *TINY, "--print-config"]) == 0
    printed = tomllib.loads(capsys.readouterr().out)
    assert printed["train"]["max_iters"] == 27 and printed["data"]["plan"].startswith("plan: 1m")
    assert not (here / "runs").exists()


def test_what_is_chosen_agrees_with_what_is_given(here, capsys):
    given = ["--n-head", "5", "--devices", "3"]
    assert main(["train", "cats.txt", *given, "--minutes", "1", "--print-config"]) == 0
    found = tomllib.loads(capsys.readouterr().out)
    assert found["model"]["n_head"] == 5 and found["model"]["n_embd"] % 5 == 0
    assert found["train"]["batch_size"] % 3 == 0


def test_a_preset_or_a_file_keeps_all_but_the_steps(here, capsys):
    assert main(["train", "cats.txt", "--preset", "baby", "--minutes", "1", "--print-config"]) == 0
    found = tomllib.loads(capsys.readouterr().out)
    assert found["model"]["n_embd"] == 128 and found["train"]["learning_rate"] == 1e-3
    assert found["train"]["max_iters"] == 27 and found["train"]["warmup_steps"] == 1
    assert found["data"]["tokenizer"] == "char"


def test_a_machine_with_other_work_gets_a_second_plan(here, capsys, monkeypatch):
    words = np.random.default_rng(0).choice(["cat", "dog", "mat", "log", "and"], 100_000)
    (here / "long.txt").write_text(" ".join(words))
    monkeypatch.setattr("tinygpt.training.preflight.measured_rate", lambda *_: 1e11)
    found = []
    for step in (1e-3, 10.0):
        monkeypatch.setattr(Trial, "pace", lambda *_, step=step: Pace(step, 0.01, 0.1))
        assert main(["train", "long.txt", "--tokenizer", "byte", "--print-config"]) == 0
        said = capsys.readouterr()
        found.append((tomllib.loads(said.out)["model"], "planned again" in said.err))
    (fast, first), (slow, second) = found
    assert (first, second) == (False, True)
    assert slow["n_layer"] * slow["n_embd"] ** 2 < fast["n_layer"] * fast["n_embd"] ** 2


def test_a_time_that_does_not_suffice_is_wrong_use(here, capsys):
    assert main(["train", "cats.txt", "--minutes", "2s", *TINY]) == 2
    assert "2 seconds are too few for a single step" in capsys.readouterr().err
    assert main(["train", "cats.txt", "--minutes", "0", *TINY]) == 2
    assert "--minutes '0' is no time at all" in capsys.readouterr().err
    assert not (here / "runs").exists()
