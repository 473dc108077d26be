"""Embeddings by kernel: rows by id, and their gradient, against numpy's float64."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tinygrad import Tensor, TinyJit, dtypes

from tests.conftest import CUTS
from tinygpt.kernels.embedding import embedding, plain_embedding


@pytest.fixture(autouse=True, scope="module")
def poison() -> Iterator[None]:
    """Outputs start as NaN: what a kernel forgets to write, or reads too early, shows."""

    def empty(t: Tensor, *shape: int, dtype: object = None) -> Tensor:
        full = Tensor.full(shape, float("nan"), dtype=dtype or t.dtype, device=t.device)
        return full.contiguous().realize()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["tinygpt.kernels.embedding"], "empty", empty)
        yield


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def tensor(x: np.ndarray) -> Tensor:
    return Tensor(x).contiguous().realize()


def draw_ids(V: int, B: int, T: int) -> np.ndarray:
    return np.random.default_rng(B + T).integers(0, V, (B, T)).astype(np.int32)


def results(
    ids: Tensor, g: Tensor, *tables: Tensor, by: Callable[..., Tensor] = embedding
) -> list[np.ndarray]:
    """The rows and the gradient of each table."""
    y = by(ids, *tables)
    return [t.numpy() for t in (y, *y.gradient(*tables, gradient=g))]


def scattered(ids: np.ndarray, g: np.ndarray, V: int) -> np.ndarray:
    sums = np.zeros((V, g.shape[-1]))
    np.add.at(sums, ids, g.astype(np.float64))
    return sums


@settings(max_examples=5, phases=[Phase.generate])  # each shape is compiled: no shrinking
@given(V=st.integers(1, 40), C=st.integers(1, 70), B=st.integers(1, 4), T=st.integers(1, 9))
def test_rows_and_scattered_gradient(V: int, C: int, B: int, T: int) -> None:
    ids, g = draw_ids(V, B, T), numbers(B, T, C)
    weight = tensor(numbers(V, C, seed=1))
    y, dw = results(tensor(ids), tensor(g), weight)
    np.testing.assert_array_equal(y, weight.numpy()[ids])
    np.testing.assert_allclose(dw, scattered(ids, g, V), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [5, 8])
def test_positions_are_added_and_get_their_gradient(rows: int) -> None:
    ids, g = draw_ids(11, 3, 5), numbers(3, 5, 24)
    tables = [tensor(numbers(11, 24, seed=1)), tensor(numbers(rows, 24, seed=2))]
    y, dw, dp = results(tensor(ids), tensor(g), *tables)
    np.testing.assert_array_equal(y, tables[0].numpy()[ids] + tables[1].numpy()[:5])
    np.testing.assert_allclose(dw, scattered(ids, g, 11), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dp[:5], g.sum(0), rtol=1e-5, atol=1e-5)
    assert not dp[5:].any()


def test_it_agrees_with_its_plain_twin() -> None:
    ids, g = tensor(draw_ids(7, 2, 6)), tensor(numbers(2, 6, 16))
    weight = tensor(numbers(7, 16, seed=1))
    ours, plain = (results(ids, g, weight, by=f) for f in (embedding, plain_embedding))
    for a, b in zip(ours, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_an_id_without_a_row_gives_nan_and_no_gradient() -> None:
    ids = np.array([[0, 4, 5, -1, 2**31 - 1, -(2**31)]], np.int32)
    weight, g = tensor(numbers(5, 8)), numbers(1, 6, 8)
    y, dw = results(tensor(ids), tensor(g), weight)
    found = np.isnan(y).all(-1)
    np.testing.assert_array_equal(found, [[False, False, True, True, True, True]])
    np.testing.assert_allclose(dw, scattered(ids[:, :2], g[:, :2], 5), rtol=1e-6)


def test_a_half_precision_gradient_is_summed_in_float32() -> None:
    ids = Tensor.zeros(1, 3000, dtype=dtypes.int32).contiguous()
    weight = Tensor.ones(2, 1, dtype=dtypes.float16).contiguous()
    g = Tensor.ones(1, 3000, 1, dtype=dtypes.float16).contiguous()
    dw = embedding(ids, weight).gradient(weight, gradient=g)[0]
    assert dw.dtype == dtypes.float16 and dw.tolist() == [[3000.0], [0.0]]


def test_any_number_of_pieces_gives_the_same_bits(cut: Callable[[int], None]) -> None:
    ids, g = tensor(draw_ids(3, 4, 30)), tensor(numbers(4, 30, 48))
    tables = [tensor(numbers(3, 48, seed=1)), tensor(numbers(30, 48, seed=2))]
    found = []
    for pieces in CUTS:
        cut(pieces)
        found.append(results(ids, g, *tables))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


def test_in_a_jit_it_gives_the_same_as_outside() -> None:
    weight, g = tensor(numbers(9, 20)), tensor(numbers(2, 4, 20, seed=1))

    @TinyJit
    def step(ids: Tensor) -> tuple[Tensor, Tensor]:
        y = embedding(ids, weight)
        dw = y.gradient(weight, gradient=g)[0]
        y.realize(dw)
        return y, dw

    for seed in range(5):
        ids = np.random.default_rng(seed).integers(0, 9, (2, 4)).astype(np.int32)
        y, dw = (t.numpy() for t in step(tensor(ids)))
        np.testing.assert_array_equal(y, weight.numpy()[ids])
        np.testing.assert_allclose(dw, scattered(ids, g.numpy(), 9), rtol=1e-5, atol=1e-6)
