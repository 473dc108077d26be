"""Attention on tensor cores, computed by the device that emulates them, against float64.

Products of linear layers are tinygrad's own there; tests/test_gpu_kernels.py holds that they are
written for tensor cores.
"""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from tinygrad import Tensor, dtypes

from tinygpt.kernels import attention
from tinygpt.kernels.attention import Problem, flash_attention, self_attention, warps
from tinygpt.kernels.check import exact
from tinygpt.kernels.phases import contiguous
from tinygpt.kernels.wmma import CORES, WARP, core_for

NEAR = 8e-3
"""Of the largest number of a result: two roundings of bfloat16, each 2 ** -9, and their sums."""


def rounded(seed: int, *shape: int) -> np.ndarray:
    """Normal numbers that bfloat16 can represent."""
    bits = np.random.default_rng(seed).standard_normal(shape, np.float32).view(np.uint32)
    return (bits & 0xFFFF0000).view(np.float32)


def half(x: np.ndarray) -> Tensor:
    return Tensor(x, device="CPU").cast(dtypes.bfloat16).contiguous().to("PYTHON").realize()


def assert_near(found: list[Tensor], wanted: list[np.ndarray]) -> None:
    Tensor.realize(*found)
    for x, y in zip(found, wanted, strict=True):
        assert x.dtype == dtypes.bfloat16
        got = x.to("CPU").float().numpy()
        assert np.abs(got - y).max() <= NEAR * np.abs(y).max()


@pytest.fixture(params=list(CORES))
def core(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The device PYTHON has these tensor cores."""
    name: str = request.param
    monkeypatch.setattr(attention, "core_of", lambda x: name)
    return name


def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels for tensor cores that are launched from now on."""
    names, run = list[str](), attention.run

    def noted(kernel: object, *args: object, **kwargs: object) -> list[Tensor]:
        names.append(str(kwargs["name"]))
        return run(kernel, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(attention, "run", noted)
    return names


def test_attention_and_its_gradients(core: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More keys than queries, neither a multiple of a tile or a block; two warps of NVIDIA's."""
    names = launched(monkeypatch)
    shapes = ((1, 1, 19, 16), (1, 1, 35, 16), (1, 1, 35, 16), (1, 1, 19, 16))
    q, k, v, grad = (rounded(i, *shape) for i, shape in enumerate(shapes))
    inputs = [half(x) for x in (q, k, v)]
    out = flash_attention(*inputs, is_causal=True)
    found = [out, *out.gradient(*inputs, gradient=half(grad))]
    wide = (x.astype(np.float64) for x in (q, k, v))
    assert_near(found, exact.attention(*wide, True, grad.astype(np.float64)))

    assert len(names) == 3 and all("_warps_" in name for name in names)


def test_the_packed_array_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sequences and two heads, whose gradients share one array."""
    monkeypatch.setattr(attention, "core_of", lambda x: "CUDA")
    qkv, grad = rounded(1, 2, 5, 3 * 2 * 16), rounded(2, 2, 5, 2 * 16)
    x = half(qkv)
    out = self_attention(x, 2)
    found = [out, out.gradient(x, gradient=half(grad))[0]]
    assert_near(found, exact.packed_attention(qkv.astype(np.float64), 2, grad.astype(np.float64)))


@pytest.mark.parametrize("core", CORES)
def test_fragments_cover_their_matrices_once(core: str) -> None:
    """And a result's fragments side by side are the fragment of a left operand."""
    layout = CORES[core]
    threads = range(WARP)
    for place, size, shape in (
        (layout.a, layout.sizes[0], (layout.m, layout.depth)),
        (layout.b, layout.sizes[1], (layout.depth, layout.n)),
        (layout.c, layout.sizes[2], (layout.m, layout.n)),
    ):
        found = [place(t, e) for t in threads for e in range(size)]  # type: ignore[arg-type]
        assert sorted(found) == [(y, x) for y in range(shape[0]) for x in range(shape[1])]
    for t in threads:
        for e in range(layout.sizes[0]):
            n, of_c = divmod(e, layout.sizes[2])
            row, column = layout.c(t, of_c)  # type: ignore[arg-type]
            assert layout.a(t, e) == (row, column + n * layout.n)  # type: ignore[arg-type]
            assert layout.row(of_c) < layout.rows


def test_what_they_are_used_for() -> None:
    sizes = {"B": 1, "H": 2, "Tq": 64, "Tk": 64, "causal": True, "packed": True}
    cuda = CORES["CUDA"]
    assert warps.fits(Problem(D=64, **sizes), cuda)  # type: ignore[arg-type]
    for other in ({"D": 24}, {"D": 256}, {"D": 64, "dropout": 0.1}):
        assert not warps.fits(Problem(**sizes, **other), cuda)  # type: ignore[arg-type]
    assert core_for("CPU", dtypes.bfloat16) is None
    assert core_for("PYTHON", dtypes.bfloat16) is None
    x = half(rounded(0, 1, 4, 3 * 2 * 16))
    assert contiguous(x) is x and attention._core(Problem(D=16, **sizes), x) is None  # type: ignore[arg-type]


CHOSEN = """
from tinygrad import dtypes
from tinygpt.machine import start
start()
from tinygpt.kernels.wmma import core_for
print(*(core_for("PYTHON", t) for t in (dtypes.float32, dtypes.bfloat16, dtypes.float16)))
"""


@pytest.mark.parametrize(
    ("card", "cores"),
    [
        ("sm_70", "None None None"),
        ("sm_90", "None CUDA CUDA"),
        ("METAL", "None METAL METAL"),
        ("gfx1100", "None None None"),
    ],
)
def test_the_card_decides(card: str, cores: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHOSEN],
        env=os.environ | {"DEV": f"PYTHON::{card}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.strip() == cores, done.stderr
