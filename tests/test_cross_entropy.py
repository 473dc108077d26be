"""The cross-entropy by kernel, against numpy's float64 and its plain twin."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tinygrad import Tensor, TinyJit, dtypes

from tests.conftest import CUTS
from tinygpt.kernels.loss.cross_entropy import cross_entropy, plain_cross_entropy

FEW = settings(max_examples=4, phases=[Phase.generate])  # each shape is compiled: no shrinking
EXTREME = 1e4


@pytest.fixture(autouse=True, scope="module")
def poison() -> Iterator[None]:
    """Outputs start as NaN: what a kernel forgets to write, or reads too early, shows."""

    def empty(t: Tensor, *shape: int, dtype: object = None) -> Tensor:
        kind = dtype or t.dtype
        value = float("nan") if dtypes.is_float(kind) else -(2**31)
        return Tensor.full(shape, value, dtype=kind, device=t.device).contiguous().realize()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["tinygpt.kernels.loss.cross_entropy"], "empty", empty)
        yield


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


@FEW
@given(N=st.integers(1, 30), V=st.sampled_from([1, 16, 65, 130]))
def test_loss_and_gradient_are_those_of_float64(N: int, V: int) -> None:
    logits, targets = numbers(N, V), draw_targets(N, V)
    x = tensor(logits)
    loss, dx = results(cross_entropy(x, tensor(targets)), x, factor=3.0)
    wanted, gradient = exact(logits, targets)
    agree(loss, wanted)
    agree(dx, 3 * gradient)


def test_float64_is_computed_in_float64() -> None:
    logits, targets = numbers(6, 20).astype(np.float64), draw_targets(6, 20)
    x = tensor(logits)
    for got, wanted in zip(
        results(cross_entropy(x, tensor(targets)), x), exact(logits, targets), strict=True
    ):
        agree(got, wanted, 1e-12)


def test_logits_of_ten_thousand_keep_their_digits() -> None:
    logits, targets = numbers(8, 65) * np.float32(EXTREME), draw_targets(8, 65)
    logits[:2] -= logits[:2].max(1, keepdims=True) + 3 * np.float32(EXTREME)  # all far below zero
    logits[3, targets[3]] = logits[3].max()  # a loss of log 2 at most
    x = tensor(logits)
    loss, dx = results(cross_entropy(x, tensor(targets)), x)
    wanted, gradient = exact(logits, targets)
    agree(loss, wanted, 1e-6)
    agree(dx, gradient)


def test_it_agrees_with_its_plain_twin() -> None:
    x, t = tensor(numbers(12, 20)), tensor(draw_targets(12, 20))
    wanted = results(plain_cross_entropy(x, t), x)
    for a, b in zip(results(cross_entropy(x, t), x), wanted, strict=True):
        agree(a, b)


@pytest.mark.parametrize("wrong", [20, 2**31 - 1])
def test_a_target_that_does_not_exist_makes_the_loss_nan(wrong: int) -> None:
    targets = tensor(np.array([0, wrong, -1, 19], np.int32))
    assert np.isnan(cross_entropy(tensor(numbers(4, 20)), targets).item())


def test_no_target_at_all_is_a_loss_of_zero() -> None:
    x, t = tensor(numbers(4, 20)), tensor(np.full(4, -1, np.int32))
    loss, dx = results(cross_entropy(x, t), x)
    assert loss == 0 and not dx.any()


def test_any_number_of_pieces_gives_the_same_bits(cut: Callable[[int], None]) -> None:
    x, t = tensor(numbers(20, 50)), tensor(draw_targets(20, 50))
    found = []
    for pieces in CUTS:
        cut(pieces)
        found.append(results(cross_entropy(x, t), x))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


def test_in_a_jit_it_gives_the_same_as_outside() -> None:
    @TinyJit
    def step(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        y = cross_entropy(x, t)
        dx = y.gradient(x)[0]
        y.realize(dx)
        return y, dx

    for seed in range(5):
        x, t = tensor(numbers(8, 20, seed=seed)), tensor(draw_targets(8, 20)[::-1].copy())
        got = [out.numpy() for out in step(x, t)]
        for a, b in zip(got, results(cross_entropy(x, t), x), strict=True):
            np.testing.assert_array_equal(a, b)
