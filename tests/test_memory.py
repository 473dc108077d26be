"""What a run takes of memory is foreseen before it starts, and does not grow while it goes on."""

import importlib
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tinygrad import Tensor, dtypes

from tests.device_memory import device_bytes
from tinygpt.api import GPT
from tinygpt.cli import main
from tinygpt.config import PRESETS, GPTConfig, TrainConfig
from tinygpt.errors import UsageError
from tinygpt.machine import resources
from tinygpt.model.transformer import Transformer
from tinygpt.training import preflight, probe
from tinygpt.training.optim import make_optimizer
from tinygpt.training.step import make_evaluate, make_train_step

pytestmark = pytest.mark.usefixtures("only_what_is_new_is_counted")

MB = 1_000_000
BABY = PRESETS["baby"]
TINY = {"vocab_size": 256, "n_layer": 1, "n_embd": 16, "n_head": 2, "block_size": 8}


def measured(folder, model, **train):
    """What `memory_script` tells of a run."""
    settings = {"eval_iters": 1, "max_iters": 2, "eval_interval": 2} | train
    done = subprocess.run(
        [sys.executable, "-m", "tests.memory_script", *map(json.dumps, (model, settings)), folder],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# Foreseen ------------------------------------------------------------------------------------

SMALL = {"n_layer": 4, "n_embd": 128, "n_head": 4, "block_size": 64}


@pytest.mark.parametrize(
    ("model", "train"),
    [
        pytest.param(BABY.model | {"vocab_size": 65}, {"batch_size": 12}, id="baby"),
        pytest.param(SMALL | {"vocab_size": 50257}, {"batch_size": 8}, id="large vocabulary"),
        pytest.param(
            SMALL | {"vocab_size": 65, "block_size": 128},
            {"batch_size": 24, "recompute": True, "dtype": "bfloat16", "grad_accum_steps": 2},
            id="recompute in half precision",
        ),
    ],
)  # fmt: skip
def test_what_is_foreseen_is_what_is_taken(tmp_path, model, train):
    """The peak within a tenth; of what the device counts only sums and the copy are left out."""
    found = measured(tmp_path / "run", model, **train)
    foreseen = found["foreseen"]
    assert 0.9 < foreseen["peak"] / (found["taken"] + foreseen["process"]) < 1.1, found
    elsewhere = foreseen["saving"] + foreseen["sums"] + preflight.COMPILING
    assert 0.85 < (foreseen["needed"] - elsewhere) / found["device"] < 1.15, found


@pytest.mark.slow
def test_all_peaks_are_foreseen_within_a_tenth():
    """Threads, half precision, adapters, Muon, recomputation, accumulation, and combinations."""
    script = Path(__file__).parents[1] / "benchmarks" / "foreseen.py"
    words = [sys.executable, script, "--memory-only", "--steps", "4"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", PRESETS)
def test_the_parts_add_up(name):
    shape = GPTConfig(**{"vocab_size": 65, **PRESETS[name].model})
    train = TrainConfig(**PRESETS[name].train)
    estimate = preflight.preflight(shape, train)
    assert estimate.parameters == shape.num_params()
    assert estimate.weights * 2 == estimate.optimizer == 8 * estimate.parameters
    assert estimate.tokens == train.batch_size * shape.block_size * train.grad_accum_steps
    assert estimate.peak == estimate.needed + estimate.process
    assert estimate.needed > estimate.weights + estimate.optimizer + estimate.activations
    more = preflight.preflight(shape, replace(train, batch_size=2 * train.batch_size))
    assert more.activations == 2 * estimate.activations and more.flops == 2 * estimate.flops


def test_what_saves_memory_is_foreseen_to():
    shape, train = GPTConfig(vocab_size=65, n_layer=12, dropout=0.1), TrainConfig(batch_size=32)

    def foreseen(**changes):
        return preflight.preflight(shape, replace(train, **changes))

    usual, again, half = foreseen(), foreseen(recompute=True), foreseen(dtype="bfloat16")
    assert again.step < usual.step / 4 and half.step < 0.7 * usual.step
    assert again.needed - again.step == usual.needed - usual.step
    summed = foreseen(batch_size=8, grad_accum_steps=4)
    assert summed.sums == 2 * 4 * summed.parameters and usual.sums == 0
    assert summed.gradients < usual.gradients / 5 and summed.step < usual.step / 3
    assert foreseen(devices=2).weights == 2 * usual.weights


def test_operations_are_those_of_the_products():
    shape = GPTConfig(vocab_size=10, n_layer=1, n_embd=4, n_head=1, block_size=2, bias=False)
    products = 4 * 12 + 4 * 4 + 2 * 4 * 16 + 10 * 4  # c_attn, c_proj, the MLP, the output
    norms = 3 * 4
    attention = 6 * 4 * 2
    assert preflight.flops_per_token(shape) == 6 * (products + norms) + attention


# Refused -------------------------------------------------------------------------------------


def free(monkeypatch, megabytes):
    monkeypatch.setattr(resources, "available_memory", lambda: megabytes * MB)


def taken_at_its_word(message, shape, train):
    """The settings after the flags in a message."""
    found = dict(re.findall(r"--((?:model|train)\.[a-z-]+) (\d+)", message))
    changes = {name.replace("-", "_"): int(value) for name, value in found.items()}
    model = {n.removeprefix("model."): v for n, v in changes.items() if n.startswith("model.")}
    other = {n.removeprefix("train."): v for n, v in changes.items() if n.startswith("train.")}
    return replace(shape, **model), replace(train, **other), {*model, *other}


@pytest.mark.parametrize(
    ("megabytes", "flags"),
    [
        (400, {"batch_size", "grad_accum_steps"}),
        (190, {"batch_size", "grad_accum_steps", "block_size"}),
        (100, {"batch_size", "grad_accum_steps", "block_size", "n_layer"}),
    ],
)
def test_what_cannot_fit_is_refused_with_flags_that_fit(monkeypatch, megabytes, flags):
    shape = GPTConfig(vocab_size=256, n_layer=6, n_embd=192, n_head=6, block_size=512)
    train = TrainConfig(batch_size=24)
    assert preflight.preflight(shape, train).needed > 1000 * MB
    free(monkeypatch, megabytes)
    with pytest.raises(UsageError, match=f"only {megabytes} MB are free") as error:
        preflight.check(shape, train)
    smaller, finer, named = taken_at_its_word(str(error.value), shape, train)
    assert named >= flags if "n_layer" in flags else named == flags
    assert preflight.check(smaller, finer).needed <= megabytes * MB
    assert finer.batch_size * finer.grad_accum_steps == 24
    assert preflight.check(shape, train, allow=True).needed > megabytes * MB


def test_where_nothing_would_fit_that_is_said(monkeypatch):
    free(monkeypatch, 10)
    with pytest.raises(UsageError, match="Nothing like it fits"):
        preflight.check(GPTConfig(vocab_size=256), TrainConfig())


def test_where_nobody_knows_nothing_is_refused(monkeypatch):
    free(monkeypatch, 0)
    preflight.check(GPTConfig(vocab_size=256), TrainConfig())


def test_the_command_refuses_before_anything_is_allocated(tmp_path, monkeypatch, capsys):
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question. " * 60)
    monkeypatch.chdir(tmp_path)
    free(monkeypatch, 300)
    made = []
    monkeypatch.setattr(Transformer, "__init__", lambda *given: made.append(given))
    command = ["train", "text.txt", "--tokenizer", "byte", "--model.n-embd", "1024"]
    assert main(command) == 2
    told = capsys.readouterr().err
    assert "--allow-memory" in told and "only 300 MB" in told and "Traceback" not in told
    assert not made and not (tmp_path / "runs").exists()


def test_the_command_says_what_it_expects(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question. " * 60)
    words = "--model.n-layer 1 --model.n-embd 16 --model.n-head 2 --model.block-size 8"
    words += " --train.batch-size 2 --train.max-iters 2 --train.eval-iters 1 --tokenizer byte"
    assert main(["train", str(text), "--out", str(tmp_path / "run"), *words.split()]) == 0
    told = capsys.readouterr().err
    assert re.search(
        r"memory: about [\d.]+ [MG]B at the peak \(weights 0\.0 MB, optimizer 0\.1 MB", told
    )
    assert re.search(r"time: about \d+ ms a step, [\d,]+ tokens/s, \d+s for 2 steps", told)


def test_the_pace_is_that_of_a_product():
    rate = preflight.measured_rate()
    assert 1e8 < rate < 1e15
    estimate = preflight.preflight(GPTConfig(), TrainConfig())
    seconds = preflight.seconds_per_step(estimate, 1e11)
    assert seconds == pytest.approx(estimate.flops / 0.9e11 + 5 * preflight.LAUNCHING)


@pytest.mark.parametrize(
    ("train", "seconds"),
    [
        ({}, 5 + 4 * 3 + 0.5),
        ({"grad_accum_steps": 10}, 10 * (5 + 4 * 3 + 0.5 * probe.ADDING) + 0.5),
        ({"freeze": 1}, 5 + 3 * 3 + 1 + 0.5),
        ({"recompute": True}, 5 + 4 * (3 + 1) + 0.5),
        ({"freeze": 4}, 5 + 4 * 1 + 0.5),
    ],
)
def test_the_pace_adds_up_from_its_parts(monkeypatch, train, seconds):
    parts = {"block": 3.0, "forward": 1.0, "outside": 5.0}
    for name, each in parts.items():
        monkeypatch.setattr(probe.Parts, name, lambda _, each=each: each)
    monkeypatch.setattr(probe, "update_seconds", lambda learning: 0.5 / learning)
    shape, config = GPTConfig(**SMALL, vocab_size=65), TrainConfig(**train)
    assert probe.seconds_per_step(shape, config) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "train", [{"dtype": "bfloat16", "freeze": 0}, {"lora_rank": 2, "optimizer": "muon"}]
)
def test_every_part_can_be_timed(train):
    shape = GPTConfig(**TINY | {"dropout": 0.1, "vocab_size": 13})
    parts = probe.Parts(shape, TrainConfig(batch_size=2, **train))
    assert 0 < parts.forward() < 10 and 0 < parts.outside() < 10
    assert 0 < parts.block() < 10 and 0 < probe.update_seconds(100) < 10


def test_free_memory_is_the_systems_within_the_containers_limit(monkeypatch):
    assert 0 < resources.available_memory() <= resources.total_memory()
    monkeypatch.setattr("tinygpt.machine.groups.memory_left", lambda: 550_000)
    assert resources.available_memory() == 550_000


# Flat ----------------------------------------------------------------------------------------


def slope(found, start):
    """Bytes that the process takes with each step after ``start``, and the device's sizes.

    It is the median of seven stretches: the process takes a megabyte or so at once when a table of
    tinygrad's is made anew, at any time, and that must not count as growth with every step.
    """
    late = np.array([row for row in found["after"] if row[0] >= start])
    assert len(late) > 8
    stretches = np.array_split(np.diff(late[:, :2], axis=0), 7)
    return np.median([np.divide(*s.sum(axis=0)[::-1]) for s in stretches]), set(late[:, 2])


@pytest.mark.parametrize("leak", [0, 60])
def test_a_jump_in_memory_is_no_growth_but_a_leak_is(leak):
    steps = np.arange(1500, 5001, 50)
    for at in (2000, 3250, 4990):
        used = 10**8 + leak * steps // 4096 * 4096 + 10**6 * (steps > at)
        grown, _ = slope({"after": np.stack([steps, used, steps * 0], axis=1)}, 1500)
        assert grown == pytest.approx(leak, abs=8)


def test_memory_is_flat_over_300_steps(tmp_path):
    """With evaluations, samples and checkpoints; what grows with every step is seen here."""
    found = measured(tmp_path / "run", TINY, batch_size=2, max_iters=300, eval_interval=20)
    grown, device = slope(found, start=100)
    assert grown < 10_000, found["after"]
    assert len(device) == 1


@pytest.mark.slow
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_memory_is_flat_over_5000_steps(tmp_path, micro_batches):
    train = {"batch_size": 2, "grad_accum_steps": micro_batches, "max_iters": 5000}
    found = measured(tmp_path / "run", TINY | {"dropout": 0.1}, **train, eval_interval=50)
    grown, device = slope(found, start=1500)  # by then the allocator has what it wants
    assert grown < 50, found["after"]
    assert len(device) == 1


def test_an_evaluation_takes_less_memory_than_a_step():
    """It keeps nothing for a backward pass: tinygrad can use one layer's memory for the next."""
    shape = GPTConfig(vocab_size=16, n_layer=4, n_embd=32, n_head=2, block_size=32)
    model = GPT(shape)
    config = TrainConfig(batch_size=16)
    evaluate = make_evaluate(model)
    step = make_train_step(model, make_optimizer(model.parameters(), config), config)
    x = np.zeros((16, 32), np.int32)
    used = [device_bytes()]
    for work in (lambda: evaluate(x, x), lambda: step(x[None], x[None], 1e-3, (0, 0))):
        work()
        used.append(device_bytes())
    evaluation, training = np.diff(used)
    assert 0 < evaluation < training / 2


def test_what_the_loss_keeps_is_foreseen(monkeypatch):
    """Most of it is what the parts of a small vocabulary add to the gradient of x."""
    shape = GPTConfig(vocab_size=300, n_layer=1, n_embd=64, n_head=1, block_size=64)
    module = importlib.import_module("tinygpt.kernels.loss.fused")
    made, empty = [], module.empty
    monkeypatch.setattr(module, "empty", lambda *a, **o: made.append(empty(*a, **o)) or made[-1])
    x, w = Tensor.zeros(512, 64).contiguous(), Tensor.zeros(300, 64).contiguous()
    targets = Tensor.zeros(512, dtype=dtypes.int32).contiguous()
    module.loss(x, w, targets, gradient=True)
    taken = sum(t.nbytes() for t in made)
    assert 0.8 < preflight.preflight(shape, TrainConfig(batch_size=8)).loss / taken < 1


def test_the_model_is_what_was_foreseen():
    shape = GPTConfig(vocab_size=11, n_layer=1, n_embd=8, n_head=1, block_size=4)
    assert GPT(shape).num_params() == preflight.preflight(shape, TrainConfig()).parameters
