"""benchmarks/gpu.py end to end on a machine without a card, and doctor's line on one with it."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("gpu")
    del sys.modules["gpu"]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(FOLDER / "gpu.py"), *arguments],
        env=os.environ | {"DEV": "CPU"} | environment,
        capture_output=True,
        text=True,
        timeout=280,
    )


def test_without_a_card_it_says_so_and_ends() -> None:
    done = run()
    assert done.returncode == 2 and "There is no GPU here" in done.stdout and not done.stderr
    assert "--smoke" in done.stdout


def test_the_smoke_test_measures_every_stage(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    done = run("--smoke", "--no-peer", "--json", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Nothing below measures a card" in done.stdout
    assert "| training tiny, 2 x 32 bfloat16 |" in done.stdout
    found = json.loads(out.read_text("utf-8"))
    assert not found["gpu"] and not found["failed"] and found["peak"] > 0
    stages = {name.split(",")[0] for name in found["measured"]}
    assert stages == {"check", "product", "train tiny", "attention", "generate"}
    assert all(abs(loss - 4.87) < 0.2 for loss in found["measured"]["train tiny, ours"]["losses"])


def test_a_stage_that_fails_or_takes_too_long_is_a_row(gpu: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="not done in"):
        gpu.run_stage("check", "ours", True, 0.01)
    with pytest.raises(RuntimeError, match="nothing"):
        gpu.run_stage("nothing", "ours", True, 60)


def test_the_table_and_what_disagrees(gpu: ModuleType) -> None:
    losses = [10.0, 9.0]
    both = {"batch": 16, "dtype": "bfloat16", "losses": losses, "tokens_per_second": 400_000}
    half = both | {"tokens_per_second": 500_000, "losses": [10.1, 8.5]}
    found = gpu.Found({("train 124M", "ours"): both, ("train 124M", "torch"): half})
    (row,) = gpu.table(gpu.FULL, found, 989.0)
    assert row[:4] == [
        "training 124M, 16 x 1024 bfloat16", "400,000.0 tokens/s", "500,000.0 tokens/s", "0.80",
    ]  # fmt: skip
    # 123.5 M parameters in products, 6 each; attention 12 x 12 x 768 x 1024: 0.855 GFLOP a token
    assert row[4] == f"{100 * 400_000 * 0.8545e9 / 989e12:.1f} %"
    (told,) = gpu.disagreements(found)
    assert "train 124M" in told and "8.5" in told
    found.results["check", "ours"] = {"wrong": {"norm": ["7x33"]}}
    assert "norm is wrong" in gpu.disagreements(found)[0]


@pytest.mark.parametrize(
    ("card", "peak"),
    [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-40GB", 312)],
)
def test_the_peak_of_a_card(gpu: ModuleType, card: str, peak: int) -> None:
    found = gpu.Found({("product", "ours"): {"tflops": 7.0}})
    assert gpu.peak_of(card, found)[0] == peak
    assert gpu.peak_of("a card of tomorrow", found) == (7.0, gpu.peak_of(None, found)[1])


def test_a_batch_that_does_not_fit_is_followed_by_a_smaller_one(gpu: ModuleType) -> None:
    def measure(size: int) -> dict[str, int]:
        if size > 4:
            raise RuntimeError("CUDA out of memory")
        return {"batch": size}

    assert gpu.smaller((16, 8, 4, 1), measure) == {"batch": 4}
    with pytest.raises(RuntimeError, match="out of memory"):
        gpu.smaller((16, 8), measure)


@pytest.mark.parametrize(
    ("device", "told"),
    [
        ("PYTHON::sm_90", "sm_90: with --dtype bfloat16"),
        ("PYTHON", "no tensor cores that the kernels know"),
        ("CPU", ""),
    ],
)
def test_doctor_says_what_a_gpu_will_do(device: str, told: str) -> None:
    code = "from tinygpt.cli.doctoring import _gpu; print(*(c.found for c in _gpu()), end='')"
    done = subprocess.run(
        [sys.executable, "-c", f"from tinygpt.machine import start; start(); {code}"],
        env=os.environ | {"DEV": device},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (told in done.stdout) if told else not done.stdout, done.stderr


def wheels(root: Path, library: str, headers: str) -> None:
    """What matters of NVIDIA's wheels."""
    for path in (f"{library}/lib/libnvrtc.so.13", f"{headers}/include/cuda_bf16.h"):
        (root / "nvidia" / path).parent.mkdir(parents=True, exist_ok=True)
        (root / "nvidia" / path).touch()


@pytest.mark.parametrize("folders", [("cu13", "cu13"), ("cuda_nvrtc", "cuda_runtime")])
def test_nvidias_compiler_is_found_in_wheels(
    folders: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheels(tmp_path, *folders)
    code = (
        "import os; from tinygpt.machine import device; "
        "device.TOOLKIT_HEADER = device.Path('none/cuda_bf16.h'); device._name_nvrtc(); "
        "print(os.environ.get('NVRTC_PATH'), os.environ.get('CUDA_PATH'))"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    known = {name: value for name, value in os.environ.items() if name != "CUDA_PATH"}

    def named(**more: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=known | {"PYTHONPATH": path} | more,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.stdout.split()

    root = tmp_path / "nvidia"
    assert named() == [str(root / folders[0] / "lib/libnvrtc.so.13"), str(root / folders[1])]
    assert named(CUDA_PATH="/opt/mine") == ["None", "/opt/mine"]


def test_doctor_names_the_compiler_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from tinygpt.kernels import wmma

    assert "nvidia-cuda-nvrtc" not in (wmma.plan("PYTHON") or "")
    monkeypatch.setattr(wmma, "obstacle", lambda t: f"on {t.device} tinygrad's PTXRenderer writes")
    told = wmma.plan("PYTHON") or ""
    assert "no fast kernels" in told and "pip install nvidia-cuda-nvrtc" in told
    assert wmma.plan("CPU") is None
