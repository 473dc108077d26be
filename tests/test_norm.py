"""Layer normalisation by kernel, against its formulas in numpy's float64 and its plain twin."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tinygrad import Tensor, TinyJit, dtypes

from tests.conftest import CUTS
from tinygpt.kernels.norm import layer_norm, plain_layer_norm

EPS = 1e-5


@pytest.fixture(autouse=True, scope="module")
def poison() -> Iterator[None]:
    """Outputs start as NaN: what a kernel forgets to write, or reads too early, shows."""

    def empty(t: Tensor, *shape: int, dtype: object = None) -> Tensor:
        full = Tensor.full(shape, float("nan"), dtype=dtype or t.dtype, device=t.device)
        return full.contiguous().realize()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["tinygpt.kernels.norm"], "empty", empty)
        yield


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def tensor(x: np.ndarray) -> Tensor:
    return Tensor(x).contiguous().realize()


def exact(x: np.ndarray, w: np.ndarray, b: np.ndarray, g: np.ndarray) -> list[np.ndarray]:
    """y, dx, dweight, dbias for rows x, in float64."""
    x, w, b, g = (a.astype(np.float64) for a in (x, w, b, g))
    rstd = 1 / np.sqrt(x.var(1, keepdims=True) + EPS)
    normal = (x - x.mean(1, keepdims=True)) * rstd
    h = g * w
    dx = rstd * (h - h.mean(1, keepdims=True) - normal * (h * normal).mean(1, keepdims=True))
    return [normal * w + b, dx, (g * normal).sum(0), g.sum(0)]


def results(
    norm: Callable[..., Tensor], x: Tensor, w: Tensor, b: Tensor | None, g: Tensor
) -> list[np.ndarray]:
    y = norm(x, w, b)
    sources = [x, w] if b is None else [x, w, b]
    return [t.numpy() for t in (y, *y.gradient(*sources, gradient=g))]


def agree(got: list[np.ndarray], wanted: list[np.ndarray], tolerance: float = 1e-5) -> None:
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * (1 + np.abs(b).max()))


@settings(max_examples=5, phases=[Phase.generate])  # each shape is compiled: no shrinking
@given(rows=st.integers(1, 40), width=st.integers(1, 70), bias=st.booleans())
def test_forward_and_gradients_are_those_of_float64(rows: int, width: int, bias: bool) -> None:
    x, g = numbers(rows, width, seed=1), numbers(rows, width, seed=2)
    w, b = numbers(width, seed=3), numbers(width, seed=4) * bias
    got = results(layer_norm, tensor(x), tensor(w), tensor(b) if bias else None, tensor(g))
    agree(got, exact(x, w, b, g)[: len(got)])


def test_it_agrees_with_its_plain_twin() -> None:
    x, g = tensor(numbers(2, 12, 48)), tensor(numbers(2, 12, 48, seed=1))
    w, b = tensor(numbers(48, seed=2)), tensor(numbers(48, seed=3))
    agree(results(layer_norm, x, w, b, g), results(plain_layer_norm, x, w, b, g))


def test_float64_is_computed_in_float64() -> None:
    x, w, b, g = (numbers(*s, seed=i) for i, s in enumerate([(4, 20), (20,), (20,), (4, 20)]))
    given = [tensor(a.astype(np.float64)) for a in (x, w, b, g)]
    agree(results(layer_norm, *given), exact(x, w, b, g), 1e-12)


def test_half_precision_is_summed_in_float32() -> None:
    x = numbers(3, 64).astype(np.float16)
    x[:, :32] += 2000  # the sum of a row is beyond half precision's range
    one = Tensor.ones(64, dtype=dtypes.float16).contiguous()
    got = layer_norm(tensor(x), one, None)
    assert got.dtype == dtypes.float16
    wanted = exact(x, np.ones(64), np.zeros(64), np.zeros((3, 64)))[0]
    np.testing.assert_allclose(got.numpy(), wanted, atol=2e-3)


@pytest.mark.parametrize("size", [1e-6, 1e4])
def test_extreme_rows_stay_finite(size: float) -> None:
    x, g = numbers(4, 32) * np.float32(size), numbers(4, 32, seed=1)
    w, b = np.ones(32, np.float32), np.zeros(32, np.float32)
    got = results(layer_norm, *map(tensor, (x, w, b, g)))
    agree(got, exact(x, w, b, g))


def test_any_number_of_pieces_gives_the_same_bits(cut: Callable[[int], None]) -> None:
    given = [tensor(numbers(*s, seed=i)) for i, s in enumerate([(44, 33), (33,), (33,), (44, 33)])]
    found = []
    for pieces in CUTS:
        cut(pieces)
        found.append(results(layer_norm, *given))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


def test_in_a_jit_it_gives_the_same_as_outside() -> None:
    w, b, g = tensor(numbers(24)), tensor(numbers(24, seed=1)), tensor(numbers(8, 24, seed=2))

    @TinyJit
    def step(x: Tensor) -> list[Tensor]:
        y = layer_norm(x, w, b)
        grads = y.gradient(x, w, b, gradient=g)
        y.realize(*grads)
        return [y, *grads]

    for seed in range(5):
        x = tensor(numbers(8, 24, seed=seed))
        got = [t.numpy() for t in step(x)]
        for a, c in zip(got, results(layer_norm, x, w, b, g), strict=True):
            np.testing.assert_array_equal(a, c)
