"""Several devices: the same training as on one, with the same kernels; or an error that helps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tinygpt.api import GPT, train
from tinygpt.config import GPTConfig, TrainConfig
from tinygpt.config.devices import device_names
from tinygpt.errors import ConfigError, DeviceError
from tinygpt.kernels import dispatch
from tinygpt.machine import several

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


@pytest.mark.parametrize("devices", [2, "CPU:0,CPU:1,CPU:2,CPU:3"])
def test_fifty_steps_on_several_devices_are_those_of_one(
    devices: int | str, on_one: tuple[list[float], np.ndarray]
) -> None:
    numbers, weights = trained(replace(CONFIG, devices=devices))
    assert len(numbers) == 102
    np.testing.assert_allclose(numbers, on_one[0], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(weights, on_one[1], atol=1e-4)


def test_a_run_goes_on_with_another_number_of_devices(tmp_path: Path) -> None:
    steady = replace(CONFIG, decay="constant", eval_interval=10)
    for steps, devices in ((10, 1), (20, 4), (30, None)):
        numbers, weights = trained(
            replace(steady, devices=devices, max_iters=steps),
            out_dir=tmp_path,
            resume=steps > 10,
            allow_change=("max_iters",) * (steps > 10),
        )
    wanted = trained(replace(steady, max_iters=30))
    np.testing.assert_allclose(numbers[-21:], wanted[0][-21:], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(weights, wanted[1], atol=1e-4)


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
    with pytest.raises(DeviceError, match=r"no device CL, CL:1.*No device of the kind CL"):
        several.open_devices("CL:0,CL:1")
    with pytest.raises(DeviceError, match=r"must be the default device, CPU.*Name CPU first"):
        several.open_devices("CPU:1,CPU")
    assert several.open_devices(2) == ("CPU", "CPU:1")
