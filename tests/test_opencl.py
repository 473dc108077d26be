"""OpenCL on the processor (pocl): a second backend, which is used only when it is asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinygpt.machine import choice, doctor, pace

needs_opencl = pytest.mark.skipif(
    not choice.has_opencl(), reason="no OpenCL driver is installed (pocl-opencl-icd)"
)

CHECK = """
import sys
from tinygpt.machine import precision, start
start()
from tinygrad import Device
from tinygpt.kernels.check import KERNELS, check_case
smallest = sys.argv[1:] == ["smallest"]
for name, (cases, _) in KERNELS.items():
    made = [make() for make in cases]
    if smallest:
        by_size = sorted(made, key=lambda case: -sum(x.size for x in case.inputs))
        made = list({case.operation: case for case in by_size}.values())
    if name == "bfloat16" and name not in precision.available():
        made = []
    for case in made:
        row = check_case(case)
        print(Device.DEFAULT, name, case.operation, row.passed, row.failure, sep=";", flush=True)
"""
"""Every kernel, or the smallest shape of every operation, against its twin and float64."""


def checked(*arguments: str, seconds: int) -> list[list[str]]:
    done = subprocess.run(
        [sys.executable, "-c", CHECK, *arguments],
        env=os.environ | {"DEV": "CL"},
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, done.stderr
    return [line.split(";") for line in done.stdout.splitlines()]


@needs_opencl
@pytest.mark.timeout(300)
def test_every_operation_is_right_on_opencl() -> None:
    rows = checked("smallest", seconds=280)
    assert {row[2] for row in rows} >= {"flash_attention", "self_attention", "linear", "loss"}
    assert not [row for row in rows if row[0] != "CL" or row[3] != "True"]


@needs_opencl
@pytest.mark.slow
def test_every_shape_of_every_kernel_is_right_on_opencl() -> None:
    rows = checked(seconds=3000)
    assert len(rows) > 40 and not [row for row in rows if row[3] != "True"]


@needs_opencl
@pytest.mark.parametrize(
    ("code", "device", "told"),
    [
        ("from tinygpt import GPT; import tinygrad; print(tinygrad.Device.DEFAULT)", "CPU", ""),
        ("import tinygrad; from tinygpt import GPT; print(tinygrad.Device.DEFAULT)", "CPU", ""),
        (
            "from tinygrad import Device; print(Device.DEFAULT); from tinygpt import GPT",
            "CL",
            "DEV=CPU",
        ),
    ],
)
def test_it_is_not_the_default_in_whatever_order_things_are_imported(
    code: str, device: str, told: str
) -> None:
    given = {name: value for name, value in os.environ.items() if name not in ("DEV", "PARALLEL")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=given, capture_output=True, text=True, timeout=100
    )
    assert done.stdout.split() == [device], done.stderr
    assert told in done.stderr if told else not done.stderr


@needs_opencl
@pytest.mark.timeout(320)
def test_a_short_training_runs_on_opencl() -> None:
    seconds = pace.seconds_per_step("CL")
    assert seconds is not None and seconds > 0


TWO = """
from tinygpt.machine import device
device.prefer("CL:0,CL:1")
from tests.test_opencl import losses
print(*losses(devices="CL:0,CL:1", shard_optimizer=True))
"""


def losses(**settings: Any) -> list[float]:
    """Those of three steps of a small model."""
    from tinygpt import GPT, GPTConfig, TrainConfig
    from tinygpt.training.loop import train_steps
    from tinygpt.training.optim import make_optimizer

    model = GPT(GPTConfig(block_size=8, vocab_size=13, n_layer=1, n_head=2, n_embd=16))
    config = TrainConfig(batch_size=4, max_iters=3, warmup_steps=0, **settings)
    optimizer = make_optimizer(model.parameters(), config)
    tokens = (np.arange(600) % 13).astype(np.uint16)
    return [step.train_loss for step in train_steps(model, optimizer, config, tokens)]


@needs_opencl
@pytest.mark.timeout(400)
def test_two_opencl_devices_train_as_one_processor_does() -> None:
    """pocl makes a device of each word; what the word is depends on its version."""
    for word in ("cpu", "pthread"):
        given = os.environ | {"POCL_DEVICES": f"{word} {word}", "TINYGPT_STRICT": "1"}
        done = subprocess.run(
            [sys.executable, "-c", TWO],
            env=given,
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            timeout=380,
        )
        if done.returncode == 0:
            break
    else:
        if "no device CL" in done.stderr:
            pytest.skip("this OpenCL driver cannot be made to have two devices")
        pytest.fail(done.stderr)
    found = [float(word) for word in done.stdout.split()]
    np.testing.assert_allclose(found, losses(), rtol=1e-6)


def test_doctor_times_a_step_on_every_device(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"CL": 0.5, "CPU": 0.02, "CUDA": None}
    monkeypatch.setenv("DEV", "CPU")
    monkeypatch.setattr(pace, "candidates", lambda: list(times))
    monkeypatch.setattr(pace, "seconds_per_step", times.__getitem__)
    found = {check.name: check.found for check in doctor.time_devices()}
    assert found == {
        "device CL": "500.0 ms for a small step; DEV=CL chooses it",
        "device CPU": "20.0 ms for a small step; used now",
    }


def test_one_device_alone_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "candidates", lambda: ["CPU"])
    monkeypatch.setattr(pace, "seconds_per_step", lambda name: 1 / 0)
    assert list(doctor.time_devices()) == []
