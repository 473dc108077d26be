"""Several devices: the same training as on one, with the same kernels; or an error that helps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tinygpt.api import GPT, train
from tinygpt.cli import main
from tinygpt.config import GPTConfig, TrainConfig
from tinygpt.config.devices import device_names
from tinygpt.errors import ConfigError, DeviceError, TrainingError
from tinygpt.kernels import dispatch
from tinygpt.machine import several
from tinygpt.runs.run import TrainingRun
from tinygpt.runs.trial import Trial
from tinygpt.training.optim import make_optimizer
from tinygpt.training.preflight import preflight
from tinygpt.training.shares import owners

SHAPE = GPTConfig(block_size=16, vocab_size=50, n_layer=1, n_head=2, n_embd=32)
CONFIG = TrainConfig(
    batch_size=8, max_iters=50, eval_interval=25, eval_iters=1, warmup_steps=2, keep_last=0
)
TOKENS = np.random.default_rng(0).integers(0, 50, 2000).astype(np.uint16)


@pytest.fixture(autouse=True)
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel may fall back to its plain twin."""
    monkeypatch.setenv(dispatch.STRICT, "1")


def trained(
    config: TrainConfig, shape: GPTConfig = SHAPE, **options: object
) -> tuple[list[float], np.ndarray]:
    """All losses and gradient norms of a run, and its weights."""
    model = GPT(shape)
    result = train(model, config, TOKENS[:1500], TOKENS[1500:], show=False, **options)  # type: ignore[arg-type]
    keys = ("train_loss", "val_loss", "grad_norm")
    numbers = [row[key] for row in result.history for key in keys if key in row]
    return numbers, np.concatenate([p.numpy().ravel() for p in model.parameters().values()])


@pytest.fixture(scope="module")
def on_one() -> tuple[list[float], np.ndarray]:
    return trained(CONFIG)


@pytest.mark.parametrize(
    ("devices", "sharded"), [(2, False), ("CPU:0,CPU:1,CPU:2,CPU:3", False), (2, True)]
)
def test_fifty_steps_on_several_devices_are_those_of_one(
    devices: int | str, sharded: bool, on_one: tuple[list[float], np.ndarray]
) -> None:
    numbers, weights = trained(replace(CONFIG, devices=devices, shard_optimizer=sharded))
    assert len(numbers) == 102
    np.testing.assert_allclose(numbers, on_one[0], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(weights, on_one[1], atol=1e-4)


def test_a_run_goes_on_with_another_number_of_devices(tmp_path: Path) -> None:
    steady = replace(CONFIG, decay="constant", eval_interval=10)
    for steps, devices in ((10, 1), (20, 4), (30, None)):
        numbers, weights = trained(
            replace(steady, devices=devices, shard_optimizer=devices == 4, max_iters=steps),
            out_dir=tmp_path,
            resume=steps > 10,
            allow_change=("max_iters",) * (steps > 10),
        )
    wanted = trained(replace(steady, max_iters=30))
    np.testing.assert_allclose(numbers[-21:], wanted[0][-21:], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(weights, wanted[1], atol=1e-4)


def test_the_command_says_what_it_trains_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 40)
    small = "--n-layer 1 --n-head 1 --n-embd 16 --block-size 8 --tokenizer char --batch-size 4"
    words = ["train", str(text), *small.split(), "--max-iters", "2", "--out"]
    assert main([*words, str(tmp_path / "run"), "--devices", "2", "--shard-optimizer"]) == 0
    said = capsys.readouterr().err
    assert "devices: CPU, CPU:1, each with 2 of the 4 sequences of a micro-batch; the " in said
    assert "moments divided among them" in said
    assert "devices = 2\n" in (tmp_path / "run" / "config.toml").read_text()
    assert '"devices": 2' in (tmp_path / "run" / "metrics.jsonl").read_text()
    found = list[dict[str, Any]]()
    for flags in ([], ["--devices", "2", "--batch-size", "6"]):
        assert main(["eval", str(tmp_path / "run"), "--data", str(text), "--json", *flags]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-6)
    assert main(["eval", str(tmp_path / "run"), "--data", str(text), "--devices", "3"]) == 2
    assert "batch_size=16 does not divide by the 3 devices" in capsys.readouterr().err
    assert main([*words, str(tmp_path / "no"), "--devices", "3"]) == 2
    assert "batch_size=4 does not divide by the 3 devices" in capsys.readouterr().err
    assert main([*words, str(tmp_path / "no"), "--devices", "CPU:1,CPU:2"]) == 1
    assert "Name CPU too" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_the_estimate_is_of_all_devices_and_of_the_first() -> None:
    one = preflight(SHAPE, replace(CONFIG, batch_size=2))
    four = preflight(SHAPE, replace(CONFIG, devices=4))
    shares = preflight(SHAPE, replace(CONFIG, devices=4, shard_optimizer=True))
    assert (four.weights, four.optimizer) == (4 * one.weights, one.optimizer)
    assert (four.kept, four.tokens, four.flops) == (4 * one.kept, 4 * one.tokens, 4 * one.flops)
    assert four.needed == shares.needed < 4 * one.needed
    moments = one.optimizer + 3 * one.gradients  # the first adds up those of the other three
    assert four.on_first - shares.on_first == moments - moments // 4
    summed = preflight(SHAPE, replace(CONFIG, devices=2, grad_accum_steps=2))
    alone = preflight(SHAPE, replace(CONFIG, batch_size=4, grad_accum_steps=2))
    assert summed.sums == 2 * alone.sums + 2 * 4 * one.parameters  # a copy, and what comes of it
    assert "on the first of 4 devices" in str(four) and "devices" not in str(one)


def settings(**given: Any) -> TrainConfig:
    return replace(CONFIG, **{"max_iters": 3, "eval_interval": 3} | given)


@pytest.mark.parametrize(
    "given",
    [
        {"grad_accum_steps": 2, "recompute": True, "lora_rank": 2},
        {"dropout": 0.2},
        {"grad_accum_steps": 2, "shard_optimizer": True, "grad_clip": 0.01},
        {"optimizer": "muon", "shard_optimizer": True},
        {"optimizer": "muon"},
    ],
)
def test_what_else_a_step_can_do_is_the_same_on_two_devices(given: dict[str, Any]) -> None:
    given = dict(given)
    shape = replace(SHAPE, dropout=given.pop("dropout", 0.0))
    numbers, weights = trained(settings(devices=2, **given), shape)
    given.pop("shard_optimizer", None)
    wanted = trained(settings(**given), shape)
    # Muon brings the smallest singular values near 1, and what was rounded in them with them
    tolerance = 1e-3 if "optimizer" in given else 1e-5
    np.testing.assert_allclose(numbers, wanted[0], rtol=tolerance / 10, atol=1e-6)
    np.testing.assert_allclose(weights, wanted[1], atol=tolerance)


def test_the_moments_are_divided_and_come_back() -> None:
    model = GPT(SHAPE)
    config = settings(devices=2, shard_optimizer=True)
    optimizer = train(model, config, TOKENS, show=False).optimizer
    held = dict.fromkeys(("CPU", "CPU:1"), 0)
    for moment in optimizer.m + optimizer.v:  # type: ignore[attr-defined]
        held[moment.device] += moment.numel()
    assert max(held.values()) < 0.6 * sum(held.values())
    assert all(p.device == "CPU" for p in model.parameters().values())
    config = replace(config, devices=None, shard_optimizer=False)
    train(model, config, TOKENS, optimizer=optimizer, show=False)
    assert {m.device for m in optimizer.m + optimizer.v} == {"CPU"}  # type: ignore[attr-defined]


def test_a_step_that_is_skipped_changes_nothing_on_any_device() -> None:
    model = GPT(SHAPE)
    config = settings(devices=2, shard_optimizer=True, max_skipped=1)
    model.h[0].mlp.c_fc.weight.assign(model.h[0].mlp.c_fc.weight * float("nan")).realize()
    optimizer = make_optimizer(model.parameters(), config)
    before = [p.numpy() for p in (*model.parameters().values(), *optimizer.m, optimizer.b1_t)]
    with pytest.raises(TrainingError, match="had to be skipped"):
        train(model, config, TOKENS, optimizer=optimizer, show=False)
    after = [p.numpy() for p in (*model.parameters().values(), *optimizer.m, optimizer.b1_t)]
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)


def test_weights_that_were_put_back_reach_every_device() -> None:
    """As ``--minutes`` does after its trial."""
    model = GPT(SHAPE)
    config = settings(devices=2, max_iters=4)
    trial = Trial(model, config)
    trial.pace(TOKENS, 0.0)
    run = TrainingRun(model, config, TOKENS[:1500], TOKENS[1500:], trial=trial)
    found = [step.train_loss for step in run]
    wanted = trained(replace(config, devices=None))[0]
    np.testing.assert_allclose(found[:3], [wanted[0], wanted[2], wanted[4]], rtol=1e-6)


@pytest.mark.parametrize("sizes", [[5, 3, 3, 1], [7], [1] * 9])
def test_every_parameter_has_an_owner_and_shares_are_as_equal_as_can_be(sizes: list[int]) -> None:
    found = owners(sizes, 3)
    loads = [sum(s for s, o in zip(sizes, found, strict=True) if o == d) for d in range(3)]
    assert len(found) == len(sizes) and sum(loads) == sum(sizes)
    assert max(loads) - min(loads) <= max(sizes)


@pytest.mark.parametrize(
    ("given", "kind", "names"),
    [
        (None, "CUDA", ("CUDA",)),
        (1, "CPU", ("CPU",)),
        (3, "CL", ("CL", "CL:1", "CL:2")),
        ("2", "CPU", ("CPU", "CPU:1")),
        ("cpu:0, CPU:1", "", ("CPU", "CPU:1")),
        ("CL:1,CL", "", ("CL:1", "CL")),
    ],
)
def test_devices_are_a_number_or_a_list(
    given: int | str | None, kind: str, names: tuple[str, ...]
) -> None:
    assert device_names(given, kind) == names


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (0, "from 1 to 64"),
        (65, "from 1 to 64"),
        ("-2", "from 1 to 64"),
        ("", "neither a number nor a list"),
        ("CPU:0,,CPU:1", "neither a number nor a list"),
        ("CPU:0,CUDA:1", "several kinds"),
        ("CPU:0,CPU", "twice"),
    ],
)
def test_what_cannot_be_devices_is_refused(given: int | str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        TrainConfig(batch_size=64, devices=given)


def test_a_batch_that_does_not_divide_is_an_error_with_those_that_do() -> None:
    with pytest.raises(ConfigError, match=r"batch_size=7 does not divide by the 2.*=6 or 8"):
        TrainConfig(batch_size=7, devices=2)
    with pytest.raises(ConfigError, match=r"batch_size=1 does not divide by the 4 .*=4\."):
        TrainConfig(batch_size=1, devices=4)


def test_a_device_that_is_not_there_is_an_error_with_those_that_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(several, "_opens", lambda name: name in ("CPU", "CPU:0", "CPU:1"))
    with pytest.raises(DeviceError, match=r"no device CPU:2.*there are CPU:0, CPU:1"):
        several.open_devices(3)
    with pytest.raises(DeviceError, match=r"no device CL, CL:1.*kind CL .*those that can are CPU"):
        several.open_devices("CL:0,CL:1")
    with pytest.raises(DeviceError, match=r"default device, CPU, must be one of.*Name CPU too"):
        several.open_devices("CPU:1")
    assert several.open_devices("CPU:1,CPU") == several.open_devices(2) == ("CPU", "CPU:1")


def test_cards_without_the_first_can_be_the_only_ones_that_are_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(several, "_opens", lambda name: name.startswith("CUDA"))
    monkeypatch.setattr(several, "Device", SimpleNamespace(DEFAULT="CUDA", canonicalize=str))
    monkeypatch.setattr(several.pool, "extend", lambda name: None)
    with pytest.raises(DeviceError, match=r"CUDA_VISIBLE_DEVICES=2,3 and --devices 2\."):
        several.open_devices("CUDA:2,CUDA:3")
    assert several.open_devices("CUDA:3,CUDA:0") == ("CUDA", "CUDA:3")


def test_a_device_that_is_not_there_leaves_no_folder(tmp_path, capsys):
    text = tmp_path / "a.txt"
    text.write_text("the cat sat on the mat. " * 50)
    assert main(["train", str(text), "--devices", "CUDA:0", "--out", str(tmp_path / "run")]) != 0
    assert "There is no device CUDA" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
