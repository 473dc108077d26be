"""Half precision: products in bfloat16 or float16; weights and all that is summed, float32."""

import numpy as np
import pytest
from tinygrad import Device

from tinygpt import GPT, GPTConfig, TrainConfig
from tinygpt.config import PRECISIONS
from tinygpt.errors import ConfigError, DeviceError, UsageError
from tinygpt.machine import precision
from tinygpt.training.loop import train_steps
from tinygpt.training.optim import make_optimizer

SHAPE = GPTConfig(vocab_size=64, block_size=32, n_layer=2, n_head=2, n_embd=32)
TOKENS = np.arange(3000) * 7 % 61
HALVES = [name for name in PRECISIONS if name != "float32" and name in precision.available()]


def losses(dtype: str, **settings) -> list[float]:
    config = TrainConfig(max_iters=6, batch_size=4, warmup_steps=0, dtype=dtype, **settings)
    model = GPT(SHAPE)
    steps = train_steps(model, make_optimizer(model.parameters(), config), config, TOKENS)
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


def test_a_type_that_the_device_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    renderer = type(Device[Device.DEFAULT].renderer)
    there = {precision.type_of("float32"), precision.type_of("float16")}
    monkeypatch.setattr(renderer, "supported_dtypes", lambda self: there)
    with pytest.raises(DeviceError, match=r"in bfloat16\. It has: float32, float16\.$"):
        precision.require("bfloat16")
    precision.require("float16")
