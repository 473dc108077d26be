"""The loss fused with the projection, against numpy's float64 and the two by themselves."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from tinygrad import Tensor, TinyJit, dtypes
from tinygrad.helpers import GlobalCounters

from tests.conftest import CUTS
from tinygpt.kernels.linear import plain_linear
from tinygpt.kernels.loss.cross_entropy import cross_entropy
from tinygpt.kernels.loss.fused import loss as linear_cross_entropy

EXTREME = 1e4
N_C_V = (70, 16, 100)  # most tests' sizes: three chunks of rows, three parts


@pytest.fixture(autouse=True, scope="module")
def poison() -> Iterator[None]:
    """Outputs start as NaN: what a kernel forgets to write, or reads too early, shows."""

    def empty(t: Tensor, *shape: int, dtype: object = None) -> Tensor:
        kind = dtype or t.dtype
        value = float("nan") if dtypes.is_float(kind) else -(2**31)
        return Tensor.full(shape, value, dtype=kind, device=t.device).contiguous().realize()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["tinygpt.kernels.loss.fused"], "empty", empty)
        yield


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks of rows and several parts, at sizes that are quick."""
    monkeypatch.setattr(sys.modules["tinygpt.kernels.loss.chunked"], "CHUNK", 32)


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def tensor(x: np.ndarray) -> Tensor:
    return Tensor(x).contiguous().realize()


def draw_targets(N: int, V: int) -> np.ndarray:
    """Every third of them is left out, but for the first."""
    targets = np.random.default_rng(N).integers(0, V, N).astype(np.int32)
    targets[2::3] = -1
    return targets


def exact(logits: np.ndarray, targets: np.ndarray) -> tuple[float, np.ndarray]:
    """The loss and its gradient, in float64."""
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(1, keepdims=True)
    z = np.exp(shifted).sum(1, keepdims=True)
    counted, rows = targets >= 0, np.arange(len(targets))
    losses = np.log(z[:, 0]) - shifted[rows, targets]
    gradient = np.exp(shifted) / z
    gradient[rows, targets] -= 1
    n = max(counted.sum(), 1)
    return losses[counted].sum() / n, gradient * counted[:, None] / n


def results(loss: Tensor, *sources: Tensor, factor: float = 1.0) -> list[np.ndarray]:
    """The loss, and the gradients of ``factor`` times the loss."""
    return [t.numpy() for t in (loss, *(loss * factor).gradient(*sources))]


def agree(got: np.ndarray, wanted: np.ndarray | float, tolerance: float = 1e-5) -> None:
    size = np.abs(wanted).max()
    np.testing.assert_allclose(got, wanted, rtol=tolerance, atol=tolerance * size)


def fused(gradient: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda x, w, t: linear_cross_entropy(x, w, t, gradient=gradient)


def test_it_agrees_with_the_two_by_themselves() -> None:
    x, w, t = (
        tensor(numbers(70, 16)),
        tensor(numbers(100, 16, seed=1)),
        tensor(draw_targets(70, 100)),
    )
    wanted = results(cross_entropy(plain_linear(x, w), t), x, w)
    for a, b in zip(results(fused(True)(x, w, t), x, w), wanted, strict=True):
        agree(a, b)


@pytest.mark.parametrize("size", [(1, 8, 3), (37, 33, 96), (70, 5, 1000), N_C_V])
def test_fused_loss_and_gradients_are_those_of_float64(size: tuple[int, int, int]) -> None:
    N, C, V = size
    x, w, targets = numbers(N, C), numbers(V, C, seed=1), draw_targets(N, V)
    given = tensor(x), tensor(w)
    loss, dx, dw = results(fused(True)(*given, tensor(targets)), *given, factor=0.5)
    wanted, dlogits = exact(x.astype(np.float64) @ w.T.astype(np.float64), targets)
    agree(loss, wanted)
    agree(dx, 0.5 * dlogits @ w)
    agree(dw, 0.5 * dlogits.T @ x)


@pytest.mark.parametrize("gradient", [True, False])
def test_a_frozen_weight_changes_no_other_number_and_takes_a_third_less(gradient: bool) -> None:
    N, C, V = N_C_V
    x, w, t = tensor(numbers(N, C)), tensor(numbers(V, C, seed=1)), tensor(draw_targets(N, V))
    work, wanted = [], []
    for frozen in (False, True):
        GlobalCounters.reset()
        loss = linear_cross_entropy(x, w, t, gradient=gradient, frozen=frozen)
        found = results(loss, x, factor=0.5)
        work.append(GlobalCounters.global_ops)
        for a, b in zip(found, wanted or found, strict=True):
            np.testing.assert_array_equal(a, b)
        wanted = found
    product = 2 * 96 * C * V  # 70 rows in three chunks of 32
    assert work[0] - work[1] >= product


def test_fused_logits_of_ten_thousand_stay_finite() -> None:
    x, w, targets = numbers(70, 16), numbers(100, 16, seed=1), draw_targets(70, 100)
    x *= np.float32(EXTREME)
    given = tensor(x), tensor(w)
    loss, dx, dw = results(fused(True)(*given, tensor(targets)), *given)
    wanted, dlogits = exact(x.astype(np.float64) @ w.T.astype(np.float64), targets)
    agree(loss, wanted, 1e-5)
    agree(dx, dlogits @ w, 1e-3)  # float32 logits of 10⁴ are known to 10⁻³
    agree(dw, dlogits.T @ x, 1e-3)


@pytest.mark.parametrize("gradient", [True, False])
def test_the_fused_results_may_be_realized_in_any_order(gradient: bool) -> None:
    x, w, targets = numbers(70, 16), numbers(100, 16, seed=1), draw_targets(70, 100)
    wanted, dlogits = exact(x.astype(np.float64) @ w.T.astype(np.float64), targets)
    expected = [wanted, 0.5 * dlogits @ w, 0.5 * dlogits.T @ x]
    for order in ([0, 1, 2], [1, 0, 2], [2, 1, 0], [2, 0, 1]):
        given = tensor(x), tensor(w)
        loss = fused(gradient)(*given, tensor(targets))
        found = [loss, *(loss * 0.5).gradient(*given)]
        for i in order:
            agree(found[i].numpy(), expected[i])
        for i in order:  # nothing that came later has spoilt it
            agree(found[i].numpy(), expected[i])


def test_gradients_can_be_taken_twice() -> None:
    x, w, t = (
        tensor(numbers(70, 16)),
        tensor(numbers(100, 16, seed=1)),
        tensor(draw_targets(70, 100)),
    )
    loss = fused(True)(x, w, t)
    once, twice = (loss * 1).gradient(x, w), (loss * 2).gradient(x, w)
    for a, b in zip(once, twice, strict=True):
        agree(2 * a.numpy(), b.numpy())


@pytest.mark.parametrize("loss", [fused(True), fused(False)])
def test_a_target_that_does_not_exist_makes_the_loss_nan(loss: Callable[..., Tensor]) -> None:
    x, w = tensor(numbers(4, 8)), tensor(numbers(20, 8, seed=1))
    for wrong in (20, 2**31 - 1):
        t = tensor(np.array([0, wrong, -1, 19], np.int32))
        assert np.isnan(loss(x, w, t).item())


def test_no_target_at_all_is_a_loss_of_zero() -> None:
    x, w, t = tensor(numbers(4, 8)), tensor(numbers(20, 8)), tensor(np.full(4, -1, np.int32))
    found, dx, dw = results(fused(True)(x, w, t), x, w)
    assert found == 0 and not dx.any() and not dw.any()


def test_any_number_of_pieces_gives_the_same_bits(cut: Callable[[int], None]) -> None:
    x, w = tensor(numbers(70, 16)), tensor(numbers(100, 16, seed=1))
    t = tensor(draw_targets(70, 100))
    found = []
    for pieces in CUTS:
        cut(pieces)
        found.append(results(fused(True)(x, w, t), x, w))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


def test_in_a_jit_it_gives_the_same_as_outside() -> None:
    w = tensor(numbers(100, 16))

    @TinyJit
    def step(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = fused(True)(x, w, t)
        dx, dw = y.gradient(x, w)
        y.realize(dx, dw)
        return y, dx, dw

    for seed in range(4):
        x, t = tensor(numbers(70, 16, seed=seed)), tensor(draw_targets(70, 100)[::-1].copy())
        got = [out.numpy() for out in step(x, t)]
        for a, b in zip(got, results(fused(True)(x, w, t), x, w), strict=True):
            np.testing.assert_array_equal(a, b)
