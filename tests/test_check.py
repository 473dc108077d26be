"""``tinygpt check``, and what happens where a fast kernel cannot run."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tinygrad import Tensor, UOp, dtypes

from tinygpt import cli, kernels
from tinygpt.config import GPTConfig
from tinygpt.errors import KernelError
from tinygpt.kernels import check, dispatch, pairs
from tinygpt.kernels.attention import flash_attention, plain_attention
from tinygpt.kernels.check import (
    TOLERANCE,
    cases,
    check_case,
    check_kernel,
    exact,
    gains,
    time_case,
)
from tinygpt.model.transformer import Transformer
from tinygpt.training.gradcheck import gradcheck

TWO = ("CPU", "CPU:1")
SMALL = {"block_size": 8, "vocab_size": 16, "n_layer": 1, "n_head": 2, "n_embd": 16}


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    dispatch.say_once.cache_clear()
    monkeypatch.setenv(dispatch.STRICT, "0")


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """No device can run the kernels."""
    monkeypatch.setattr(dispatch, "_renderer_obstacle", lambda device: f"{device} is a toaster")


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    assert all(record.levelno == logging.WARNING for record in caplog.records)
    return [record.getMessage() for record in caplog.records]


# --- the check ---------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["norm", "embedding"])
def test_every_shape_of_a_kernel_agrees_with_float64(kernel: str) -> None:
    report = check_kernel(kernel, timed=False)
    assert report.ok and len(report.rows) >= 3 and not report.note
    assert 0 < report.worst < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kernel", cases.KERNELS)
def test_every_kernel_agrees_with_float64_and_is_timed(kernel: str) -> None:
    report = check_kernel(kernel)
    assert report.ok and report.speed is not None
    assert report.speed.ours > 0 and report.speed.twin > 0


def test_an_operation_that_no_case_checks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check.unchecked() == []
    monkeypatch.setattr(dispatch, "OPERATIONS", dict(dispatch.OPERATIONS))
    monkeypatch.setattr(check, "OPERATIONS", dispatch.OPERATIONS)

    @dispatch.operation("norm", lambda x: x)
    def root_mean_square(x: Tensor) -> Tensor:
        return x

    assert check.unchecked() == ["root_mean_square"]


def test_what_bfloat16_gains_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gains, "LAYER", (24, 32, 32))
    monkeypatch.setattr(gains, "WEIGHTS", (2, 32, 32))
    found = gains.gains()
    assert found is not None and found.training > 0 and found.decoding > 0
    assert ("AVX512_BF16" in found.way or "for" in found.way) or pairs.available("CPU")
    monkeypatch.setattr(gains.precision, "available", lambda: ["float32"])
    assert gains.gains() is None


norm_case = cases.KERNELS["norm"][0][0]  # before a test puts another in its place


def scaled(function: cases.Results, number: int, factor: float) -> cases.Results:
    """The function with an error in one of its results."""

    def results(*inputs: Tensor) -> list[Tensor]:
        found = function(*inputs)
        found[number] = found[number] * factor
        return found

    return results


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_small_error_in_a_result_or_a_gradient_is_found(number: int) -> None:
    case = norm_case()
    assert check_case(case).passed
    wrong = check_case(replace(case, ours=scaled(case.ours, number, 1.001)))
    assert not wrong.passed
    error = wrong.gradients if number else wrong.forward
    assert error is not None and error > 10 * TOLERANCE
    assert not check_case(replace(case, twin=scaled(case.twin, number, 1.001))).passed


def test_what_is_no_number_is_wrong() -> None:
    case = norm_case()
    row = check_case(replace(case, ours=scaled(case.ours, 0, math.nan)))
    assert not row.passed and row.forward is not None and math.isnan(row.forward)


def test_a_kernel_that_a_device_refuses_is_wrong_and_says_why() -> None:
    def refused(*_: Tensor) -> list[Tensor]:
        raise RuntimeError("register pressure\nand a thousand lines")

    row = check_case(replace(norm_case(), ours=refused))
    assert not row.passed and row.failure == "RuntimeError: register pressure"


def test_both_ways_are_timed() -> None:
    speed = time_case(norm_case())
    assert speed.ratio == speed.twin / speed.ours > 0


def differences(function: Callable[..., Any], inputs: list[np.ndarray], grad: Any) -> list[Any]:
    """The gradients of sum(function(inputs) * grad), from differences of fourth order."""
    found = []
    for x in inputs:
        slope = np.zeros_like(x)
        for at in np.ndindex(x.shape):
            kept, total = x[at], 0.0
            for steps, factor in ((-2, 1), (-1, -8), (1, 8), (2, -1)):
                x[at] = kept + steps * 1e-3
                total += factor * float(np.sum(function(*inputs) * grad))
            x[at] = kept
            slope[at] = total / 12e-3
        found.append(slope)
    return found


def wide(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


TOKENS = np.array([[2, 0, 2], [1, 2, 2]])
TARGETS = np.array([1, -1, 4])
THREE = [wide(3, 4), wide(5, 4, seed=1), wide(5, seed=2)]  # x, weight, bias
FORMULAS: dict[str, tuple[Callable[..., list[Any]], list[np.ndarray], tuple[int, ...]]] = {
    "attention": (
        lambda q, k, v, grad: exact.attention(q, k, v, True, grad),
        [wide(1, 2, 2, 3), wide(1, 2, 4, 3, seed=1), wide(1, 2, 4, 3, seed=2)],
        (1, 2, 2, 3),
    ),
    "all to all": (
        lambda q, k, v, grad: exact.attention(q, k, v, False, grad),
        [wide(1, 1, 3, 2), wide(1, 1, 2, 2, seed=1), wide(1, 1, 2, 2, seed=2)],
        (1, 1, 3, 2),
    ),
    "packed": (
        lambda qkv, grad: exact.packed_attention(qkv, 2, grad),
        [wide(1, 3, 12)],
        (1, 3, 4),
    ),
    "linear": (exact.linear, THREE, (3, 5)),
    "gelu": (exact.gelu, [wide(3, 5)], (3, 5)),
    "norm": (exact.layer_norm, [wide(3, 5), wide(5, seed=1), wide(5, seed=2)], (3, 5)),
    "embedding": (
        lambda weight, at, grad: exact.embedding(weight, at, TOKENS, grad),
        [wide(4, 2), wide(3, 2, seed=1)],
        (2, 3, 2),
    ),
    "logits": (
        lambda logits, grad: exact.cross_entropy(logits, TARGETS, grad),
        [wide(3, 5)],
        (),
    ),
    "loss": (
        lambda x, weight, grad: exact.loss(x, weight, TARGETS, grad),
        [wide(3, 4), wide(5, 4, seed=1)],
        (),
    ),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_the_gradients_in_float64_are_those_of_differences(name: str) -> None:
    function, inputs, shape = FORMULAS[name]
    grad = wide(*shape, seed=9)
    out, *analytic = function(*inputs, grad)
    assert np.shape(out) == shape
    numeric = differences(lambda *x: function(*x, grad)[0], inputs, grad)
    for a, b in zip(analytic, numeric, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-8)


# --- the command -------------------------------------------------------------


def test_the_command_prints_a_table_and_its_verdict(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(cases.KERNELS, "norm", ([norm_case], norm_case))
    assert cli.main(["check", "norm", "norm"]) == 0
    out, err = capsys.readouterr()
    assert err == "checking norm\n" and out.startswith("norm on CPU\n")
    assert "1x16 " in out and "WRONG" not in out
    assert "norm: all agree, the largest error is " in out and " times as fast as " in out


def test_the_command_fails_where_a_kernel_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = norm_case()
    wrong = replace(case, ours=scaled(case.ours, 1, math.nan))
    monkeypatch.setitem(cases.KERNELS, "norm", ([lambda: case, lambda: wrong], norm_case))
    monkeypatch.setitem(cases.KERNELS, "adamw", ([lambda: case], norm_case))
    assert cli.main(["check", "norm", "adamw"]) == 1
    out = capsys.readouterr().out
    assert "norm: 1 of 2 shapes are wrong\n" in out and out.endswith("These are wrong: norm.\n")
    assert sum(line.endswith(" WRONG") for line in out.splitlines()) == 1
    assert cli.main(["check", "norm", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    [report] = found["kernels"]
    assert found["ok"] is report["ok"] is False and report["speed"] is None
    assert [row["passed"] for row in report["rows"]] == [True, False]
    assert report["rows"][1]["gradients"] is None  # JSON has no NaN


def test_an_unknown_kernel_is_refused_with_advice(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "attenton"]) == 2
    assert "Did you mean 'attention'? Kernels: attention, linear" in capsys.readouterr().err


# --- falling back ------------------------------------------------------------


def qkv() -> Tensor:
    return Tensor(np.random.default_rng(0).standard_normal((2, 8, 48), np.float32)).realize()


def test_a_fallback_is_told_once_for_each_kernel_and_reason(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = kernels.self_attention(qkv(), 2).numpy()
    assert told(caplog) == []
    for _ in range(2):
        kernels.self_attention(qkv().cast(dtypes.fp8e4m3), 2)
    [message] = told(caplog)
    assert " for attention here: " in message and "float8" in message
    monkeypatch.setattr(dispatch, "_renderer_obstacle", lambda device: f"{device} is a toaster")
    for _ in range(2):
        found = kernels.self_attention(qkv(), 2).numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert len(told(caplog)) == 2 and "CPU is a toaster" in told(caplog)[1]
    kernels.layer_norm(qkv(), Tensor.ones(48), None)
    assert len(told(caplog)) == 3 and " for norm here: " in told(caplog)[2]


def calls() -> dict[str, Callable[[], Any]]:
    """Every kernel, by its name in the log."""
    x, w = Tensor.ones(4, 16).contiguous(), Tensor.ones(8, 16).contiguous()
    ids = Tensor([1, 2, 3, 4])
    parts = [[x.clone()] for _ in range(4)]
    scalars = [Tensor([0.5]).contiguous() for _ in range(3)]
    settings = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "decay": [0.0]}
    muon = {"ratio": 1.0, "momentum": 0.9, "decay": 0.0}
    report = Tensor([1.0, 1.0, 1.0]).contiguous()
    return {
        "linear": lambda: kernels.linear(x, w),
        "gelu": lambda: kernels.gelu(x),
        "norm": lambda: kernels.layer_norm(x, w[0], None),
        "embedding": lambda: kernels.embedding(ids.reshape(4, 1), w),
        "attention": lambda: kernels.self_attention(qkv(), 2),
        "dropout": lambda: kernels.dropout(x, 0.5, Tensor([1, 2], dtype=dtypes.uint32)),
        "loss": lambda: kernels.loss(x, w, ids, gradient=True),
        "adamw": lambda: kernels.adamw_update(*parts, *scalars, **settings),
        "muon": lambda: kernels.muon_update(*parts[:3], [1], *scalars[:1], report, **muon),
    }


@pytest.mark.parametrize("kernel", calls())
def test_strict_makes_an_error_of_every_kernels_fallback(
    kernel: str,
    nowhere: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    call = calls()[kernel]
    with kernels.plain():
        call()  # on purpose
    assert told(caplog) == []
    call()
    assert [f" for {kernel} here: " in message for message in told(caplog)] == [True]
    monkeypatch.setenv(dispatch.STRICT, "1")
    with pytest.raises(KernelError, match=f"for {kernel} here: CPU is a toaster.*--strict"):
        call()
    with kernels.plain():
        call()


def test_copies_on_several_devices_are_updated_by_the_kernel(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def step(device: str | tuple[str, ...], plainly: bool) -> np.ndarray:
        start = [Tensor(np.full((3, 5), x, np.float32)) for x in (1.0, 2.0, 0.5, 0.25)]
        p, g, m, v = ([t.to(device).contiguous().realize()] for t in start)
        scalars = [Tensor([x]).to(device).contiguous().realize() for x in (0.1, 0.9, 0.99)]
        rates = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8}
        with kernels.plain() if plainly else contextlib.nullcontext():
            report = kernels.adamw_update(p, g, m, v, *scalars, decay=[0.1], **rates)
        Tensor.realize(report, *p, *m, *v)
        return p[0].numpy()

    np.testing.assert_allclose(step(TWO, False), step("CPU", True), rtol=1e-6)
    assert told(caplog) == []


def test_flash_raises_where_it_cannot_run_and_plain_says_nothing(
    nowhere: None, caplog: pytest.LogCaptureFixture
) -> None:
    q = qkv().reshape(2, 2, 8, 24)
    with kernels.use("flash"):
        with pytest.raises(KernelError, match=r"attention='flash'.*toaster.*attention='auto'"):
            kernels.self_attention(qkv(), 2)
        with pytest.raises(KernelError, match="attention='flash'"):
            flash_attention(q[:, :, :1], q, q)
    with kernels.use("plain"):
        plain = kernels.self_attention(qkv(), 2).numpy()
    assert told(caplog) == []
    with kernels.use("auto"):
        np.testing.assert_array_equal(kernels.self_attention(qkv(), 2).numpy(), plain)
        step = flash_attention(q[:, :, :1], q, q).numpy()
    np.testing.assert_allclose(step, plain_attention(q[:, :, :1], q, q).numpy(), atol=1e-6)
    assert len(told(caplog)) == 1


def test_a_device_that_cannot_run_kernels_is_not_checked(
    nowhere: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = check_kernel("attention")
    assert report.ok and report.rows == () and "toaster" in report.note
    monkeypatch.setenv(dispatch.STRICT, "1")
    with pytest.raises(KernelError, match="toaster"):
        check_kernel("attention")


def test_what_cannot_run_is_recognised() -> None:
    x, ids = Tensor.ones(2, 3), Tensor([1, 2])
    assert dispatch.obstacle(x, x.half(), x.double(), x.bfloat16(), ids=[ids]) is None
    size = Tensor.ones(4, 3)[: UOp.variable("n", 1, 4).bind(2)]
    assert "not a fixed number" in (dispatch.obstacle(x, size) or "")
    assert "size is 0" in (dispatch.obstacle(x[:0]) or "")
    assert "type int" in (dispatch.obstacle(ids) or "")
    assert "several devices" in (dispatch.obstacle(x.to(TWO)) or "")
    assert dispatch.obstacle(x.to(TWO), copies=True) is None
    assert "several devices" in (dispatch.obstacle(x.shard(TWO, axis=0), copies=True) or "")


def test_a_small_models_training_and_gradcheck_never_fall_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(dispatch.STRICT, "1")
    ids = Tensor(np.arange(8, dtype=np.int32).reshape(1, 8)).realize()
    assert gradcheck(Transformer(GPTConfig(**SMALL)), ids, ids, samples=0).ok  # in float64


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The program, in a process where no device can run the kernels."""
    code = (
        "import sys; from tinygpt.cli import main; from tinygpt.kernels import dispatch\n"
        "dispatch._renderer_obstacle = lambda device: f'{device} is a toaster'\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300
    )


def test_the_program_tells_a_fallback_in_one_plain_line() -> None:
    done = run("check", "norm", "embedding", "norm")
    assert done.returncode == 0
    lines = done.stderr.splitlines()
    assert lines == [
        "checking norm",
        "There is no fast kernel for norm here: CPU is a toaster. "
        "The plain formula is used, which is slower.",
        "checking embedding",
        "There is no fast kernel for embedding here: CPU is a toaster. "
        "The plain formula is used, which is slower.",
    ]


def test_strict_ends_the_program_with_one_plain_line() -> None:
    done = run("check", "norm", "--strict")
    assert done.returncode == 1
    [_, line] = done.stderr.splitlines()
    assert line.startswith(
        "tinygpt: error: There is no fast kernel for norm here: CPU is a toaster"
    )
    assert "--strict" in line


def test_strict_stands_anywhere_but_behind_two_dashes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(cases.KERNELS, "norm", ([], norm_case))
    words = ["tokenizer", "encode", "byte", "a"]
    for arguments in (["--strict", *words], [*words, "--strict"]):
        monkeypatch.setenv(dispatch.STRICT, "0")
        assert cli.main(arguments) == 0
        assert cli.os.environ[dispatch.STRICT] == "1"
    monkeypatch.setenv(dispatch.STRICT, "0")
    assert cli.main(["check", "--", "--strict"]) == 2
    assert "no kernel '--strict'" in capsys.readouterr().err
    assert cli.os.environ[dispatch.STRICT] == "0"
    assert cli.STRICT == dispatch.STRICT
