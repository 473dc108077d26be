"""Half precision: products in bfloat16 or float16; weights and all that is summed, float32."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tinygrad import Device, Tensor, dtypes

from tinygpt import GPT, GPTConfig, TrainConfig, kernels, train
from tinygpt.config import PRECISIONS, PRESETS
from tinygpt.errors import CheckpointError, ConfigError, DeviceError, UsageError
from tinygpt.machine import precision
from tinygpt.model import lora
from tinygpt.runs.checkpoint import read_meta
from tinygpt.runs.run import TrainingRun
from tinygpt.text.batches import batch
from tinygpt.text.corpus import pydocs
from tinygpt.training import scaling
from tinygpt.training.loop import train_steps
from tinygpt.training.optim import make_optimizer
from tinygpt.training.scaling import LossScale
from tinygpt.training.step import Outcome, make_train_step

SHAPE = GPTConfig(vocab_size=64, block_size=32, n_layer=2, n_head=2, n_embd=32)
TOKENS = np.arange(3000) * 7 % 61
HALVES = [name for name in PRECISIONS if name != "float32" and name in precision.available()]


def losses(dtype: str, **settings) -> list[float]:
    config = TrainConfig(
        **{"max_iters": 6, "batch_size": 4, "warmup_steps": 0, "dtype": dtype} | settings
    )
    model = GPT(SHAPE)
    lora.prepare(model, config)
    steps = train_steps(model, make_optimizer(model.trainable(), config), config, TOKENS)
    return [step.train_loss for step in steps]


@pytest.fixture(scope="module")
def exact() -> list[float]:
    return losses("float32")


@pytest.mark.parametrize("dtype", HALVES)
def test_training_in_half_precision_follows_float32(dtype: str, exact: list[float]) -> None:
    found = losses(dtype)
    assert found != exact  # it is computed in another type
    np.testing.assert_allclose(found, exact, rtol=2e-3)


def test_an_unknown_type_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"dtype='half' is not one of 'float32', 'bfloat16'"):
        TrainConfig(dtype="half")
    with pytest.raises(UsageError, match=r"no dtype 'bfloat' *.*'bfloat16'.*Known: float32"):
        precision.type_of("bfloat")


def test_a_type_that_the_device_lacks_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    renderer = type(Device[Device.DEFAULT].renderer)
    there = {precision.type_of("float32"), precision.type_of("float16")}
    monkeypatch.setattr(renderer, "supported_dtypes", lambda self: there)
    with pytest.raises(DeviceError, match=r"in bfloat16\. It has: float32, float16\.$"):
        precision.require("bfloat16")
    with pytest.raises(DeviceError, match="It has: float32, float16"):
        train(GPT(SHAPE), TrainConfig(dtype="bfloat16"), TOKENS, out_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(DeviceError, match="It has: float32, float16"):
        GPT(SHAPE).cast("bfloat16")
    precision.require("float16")


# ---- the loss scale of float16 ----


def outcome(norm: float, loss: float = 1.0) -> Outcome:
    return Outcome(loss, norm, math.isfinite(loss + norm))


def test_a_step_that_overflows_is_taken_again_at_half_the_scale() -> None:
    scale, tried = LossScale("float16"), []

    def step(value: float) -> Outcome:
        tried.append(value)
        return outcome(math.inf if value > 2**14 else 1.0)

    found, again = scale.take(step)
    assert (found.taken, again, tried) == (True, 2, [2.0**16, 2.0**15, 2.0**14])
    assert scale.value == 2.0**14


def test_the_scale_is_doubled_after_many_steps_without_an_overflow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scaling, "INTERVAL", 3)
    scale = LossScale("float16")
    values = [scale.take(lambda _: outcome(1.0)) and scale.value for _ in range(6)]
    assert values == [2.0**16, 2.0**16, 2.0**17, 2.0**17, 2.0**17, 2.0**18]


def test_what_no_scale_mends_is_no_fault_of_the_scale() -> None:
    scale = LossScale("float16")
    assert scale.take(lambda _: outcome(math.nan))[1] == 16  # down to 1, in vain
    assert scale.value == 2.0**16
    assert scale.take(lambda _: outcome(1.0, loss=math.nan))[1] == 0  # the forward pass
    assert scale.value == 2.0**16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_types_are_never_scaled(dtype: str) -> None:
    scale = LossScale(dtype)
    assert scale.take(lambda value: outcome(math.inf * value)) == (outcome(math.inf), 0)
    assert (scale.value, scale.state()) == (1.0, None)
    scale.load({"value": 4.0, "steps": 1})  # of a run that was float16 before
    assert scale.value == 1.0


@pytest.mark.parametrize(
    "state",
    [{}, {"value": 3.0, "steps": 1}, {"value": 4.0, "steps": -1}, {"value": "4", "steps": 1}, 7],
)
def test_a_damaged_scale_is_refused(state: object) -> None:
    with pytest.raises(CheckpointError, match="loss scale is damaged"):
        LossScale("float16").load(state)  # type: ignore[arg-type]


@pytest.mark.skipif("float16" not in HALVES, reason="the device has no float16")
def test_scaling_saves_the_gradients_that_float16_has_no_numbers_for() -> None:
    def norms(dtype: str, scale: float) -> np.ndarray:
        config = TrainConfig(batch_size=4, dtype=dtype)
        model = GPT(SHAPE)
        step = make_train_step(model, make_optimizer(model.parameters(), config), config)
        x, y = (a.reshape(1, 4, 32) for a in batch(TOKENS, 0, 1, 4, 32))
        return np.array(list(step(x, y, 0.0, (1, 0), scale=scale).norms.values()))

    exact = norms("float32", 1.0)
    error = {s: np.abs(norms("float16", s) / exact - 1).max() for s in (2.0**-12, 2.0**16, 2.0**40)}
    assert error[2.0**16] < 2e-3
    assert error[2.0**-12] > 0.05  # what a model of much smaller gradients has without a scale
    assert not np.isfinite(error[2.0**40])  # reported, so that the scale can be halved


def run_of(folder: Path, steps: int, dtype: str, **options) -> TrainingRun:
    config = TrainConfig(
        max_iters=8, batch_size=4, warmup_steps=0, eval_interval=4, eval_iters=1, dtype=dtype
    )
    run = TrainingRun(GPT(SHAPE), config, TOKENS, folder=folder, **options)
    for step in run:
        if step.iter == steps:
            run.stop()
    return run


@pytest.mark.skipif("float16" not in HALVES, reason="the device has no float16")
def test_a_float16_run_goes_on_with_its_scale_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling, "INTERVAL", 3)
    monkeypatch.setattr(scaling, "FIRST", 2.0**30)  # so large that the first step overflows
    monkeypatch.setattr(scaling, "MOST", 2.0**30)
    whole = run_of(tmp_path / "whole", 8, "float16")
    run_of(tmp_path / "two", 5, "float16")
    again = run_of(tmp_path / "two", 8, "float16", resume=True)
    wanted = [(row["train_loss"], row["loss_scale"]) for row in whole.history]
    assert [(row["train_loss"], row["loss_scale"]) for row in again.history] == wanted
    assert wanted[0][1] < 2.0**30  # it was halved, and no step was lost
    assert whole.result.skipped == 0
    assert "step 1: gradients overflowed float16; the loss scale is" in whole.result.notices[0]
    assert len({value for _, value in wanted}) > 1  # and doubled on the way
    for name, p in whole.model.parameters().items():
        np.testing.assert_array_equal(p.numpy(), again.model.parameters()[name].numpy())


def test_a_run_goes_on_in_another_type_and_says_so(tmp_path: Path) -> None:
    dtype = HALVES[0]
    run_of(tmp_path, 4, "float32")
    assert read_meta(tmp_path / "ckpt_4.safetensors").train.dtype == "float32"
    again = run_of(tmp_path, 8, dtype, resume=True)
    notice = f"changed from here on: dtype (was 'float32', now '{dtype}')"
    assert notice in again.result.notices
    assert read_meta(tmp_path / "ckpt_8.safetensors").train.dtype == dtype
    assert f'dtype = "{dtype}"' in (tmp_path / "config.toml").read_text()
    assert all(p.dtype == dtypes.float32 for p in again.model.parameters().values())
    assert [row["iter"] for row in again.history] == list(range(1, 9))


@pytest.mark.parametrize(
    "settings",
    [
        {"grad_accum_steps": 2, "optimizer": "muon", "batch_size": 2},
        {"lora_rank": 2},
        {"freeze": 1, "recompute": True},
        {"devices": "2"},
    ],
    ids=["accumulated muon", "lora", "freeze and recompute", "two devices"],
)
def test_half_precision_goes_with_other_ways_to_train(settings: dict[str, Any]) -> None:
    wanted, found = (losses(dtype, **settings) for dtype in ("float32", HALVES[-1]))
    np.testing.assert_allclose(found, wanted, rtol=2e-3)
    assert found != wanted


# ---- what stays float32 ----


@pytest.mark.parametrize("dtype", HALVES)
def test_twins_and_kernels_compute_half_precision_in_float32(dtype: str) -> None:
    kind, rng = precision.type_of(dtype), np.random.default_rng(0)
    x = Tensor(rng.standard_normal((2, 16, 24)).astype(np.float32) * 8).cast(kind).realize()
    wide, error = x.float().realize(), 2.0 ** (-7 if dtype == "bfloat16" else -10)
    targets = Tensor(rng.integers(0, 24, 32).astype(np.int32))
    largest = float(wide.abs().max().item())
    for compute, weights in (
        (kernels.gelu, 0.0),
        (lambda x: kernels.layer_norm(x, Tensor.ones(24), None), 0.0),
        (lambda x: kernels.self_attention(x, 2), error / 4),  # products of pairs round these too
        (lambda x: kernels.cross_entropy(x.reshape(32, 24), targets), 0.0),
    ):
        exact = compute(wide).numpy()
        with kernels.plain():
            plain = compute(x).float().numpy()
        for found in (compute(x).float().numpy(), plain):
            few = 1e-6 + weights * largest
            np.testing.assert_allclose(found, exact, rtol=error, atol=few)  # rounded once


@pytest.mark.slow
def test_curves_are_within_one_percent_over_500_steps_of_baby() -> None:
    text = "".join(pydocs().pieces())[:400_000]
    chars = {c: i for i, c in enumerate(sorted(set(text)))}
    ids = np.array([chars[c] for c in text], np.int32)
    preset, curves = PRESETS["baby"], {}
    for dtype in ("float32", *HALVES):
        settings = {"max_iters": 500, "eval_interval": 50, "dtype": dtype}
        config = TrainConfig(**{**preset.train, **settings})
        model = GPT(GPTConfig(vocab_size=len(chars), **preset.model))
        optimizer = make_optimizer(model.parameters(), config)
        steps = train_steps(model, optimizer, config, ids[:-40_000], ids[-40_000:])
        curves[dtype] = [(s.train_loss, s.val_loss) for s in steps if s.val_loss is not None]
    for dtype in HALVES:
        np.testing.assert_allclose(curves[dtype], curves["float32"], rtol=0.01)
