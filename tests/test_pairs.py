"""bfloat16 products by the processor's instruction for pairs: against numpy, and without it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tinygrad import Tensor, dtypes

from tinygpt import kernels
from tinygpt.kernels import matmul as product_module
from tinygpt.kernels import pairs
from tinygpt.kernels.attention import flash_attention, plain_attention
from tinygpt.kernels.check.cases import rounded
from tinygpt.kernels.linear import linear
from tinygpt.kernels.matmul import Plan, matmul

here = pytest.mark.skipif(
    not pairs.available("CPU"), reason="this processor has no products of bfloat16 pairs"
)
SIZES = st.one_of(st.integers(1, 40), st.sampled_from([64, 65, 97, 130]))


def numbers(*shape: int, seed: int) -> np.ndarray:
    drawn = np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32)
    return rounded(drawn)


def products(kind: str, m: int, n: int, depth: int, weight: str = "float32") -> list[np.ndarray]:
    """out and, for "tn", the sums, of our kernel; then the same by numpy in float64."""
    a, b = numbers(m, depth, seed=1), numbers(depth, n, seed=2)
    given = Tensor(np.ascontiguousarray(a.T if kind == "tn" else a)).cast(dtypes.bfloat16)
    other = Tensor(np.ascontiguousarray(b.T if kind == "nt" else b)).cast(weight)
    a_strides = (1, m) if kind == "tn" else (depth, 1)
    b_strides = (1, depth) if kind == "nt" else (n, 1)
    tensors = given.realize(), other.realize()
    found = matmul(*tensors, (m, n, depth), a_strides, b_strides, sums=kind == "tn")
    wide = a.astype(np.float64)
    wanted = [wide @ b.astype(np.float64), wide.sum(1)]
    return [*(t.numpy() for t in found), *wanted[: len(found)]]


def assert_equal_to_rounding(found: list[np.ndarray], tolerance: float = 2e-6) -> None:
    half = len(found) // 2
    for one, other in zip(found[:half], found[half:], strict=True):
        scale = max(1.0, np.abs(other).max())
        np.testing.assert_allclose(one / scale, other / scale, rtol=0, atol=tolerance)


@settings(max_examples=12)
@given(st.sampled_from(["nt", "nn", "tn"]), SIZES, SIZES, SIZES)
def test_any_small_sizes(kind: str, m: int, n: int, depth: int) -> None:
    assert_equal_to_rounding(products(kind, m, n, depth))


@pytest.mark.parametrize("weight", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["nt", "nn", "tn"])
def test_several_blocks_and_beyond_the_ends(kind: str, weight: str) -> None:
    depth = 515 if kind == "tn" else 4610
    assert_equal_to_rounding(products(kind, 61, 67, depth, weight), 1e-5)


@pytest.mark.parametrize("depth", [4, 1031, 4097, 4098, 2 * 4096 + 2, 10_007])
def test_blocks_of_pairs_cover_the_depth_once_and_have_two_steps(depth: int) -> None:
    for a_strides in ((depth, 1), (1, 9)):
        plan = Plan(9, 9, depth, a_strides, (9, 1), rows=3, pairs=True)
        covered = [
            start + index * size + d
            for start, count, size in plan.blocks()
            for index in range(count)
            for d in range(size)
        ]
        assert covered == list(range((depth + 1) // 2))
        assert all(size > 1 for _, _, size in plan.blocks())


def test_the_layer_of_training_has_the_types_of_mixed_precision() -> None:
    x, w, b = (Tensor(numbers(*s, seed=1)).realize() for s in ((40, 64), (48, 64), (48,)))
    half = x.cast(dtypes.bfloat16).realize()
    y = linear(half, w, b)
    grads = y.float().sum().gradient(half, w, b)
    assert [t.dtype for t in (y, *grads)] == [dtypes.bfloat16] * 2 + [dtypes.float32] * 2
    with kernels.plain():
        twin = linear(half, w, b)
        twins = twin.float().sum().gradient(half, w, b)
    assert [t.dtype for t in (twin, *twins)] == [dtypes.bfloat16] * 2 + [dtypes.float32] * 2
    for one, other in zip((y, *grads), (twin, *twins), strict=True):
        np.testing.assert_allclose(
            one.float().numpy(), other.float().numpy(), rtol=2**-7, atol=2**-7
        )


def test_weights_in_bfloat16_leave_activations_alone() -> None:
    """As in generation: sums are float32 of float32 activations, for few rows and for many."""
    w = numbers(48, 64, seed=1)
    for rows in (1, 40):
        x = np.random.default_rng(rows).standard_normal((rows, 64), np.float32)
        y = linear(Tensor(x), Tensor(w).cast(dtypes.bfloat16).realize())
        assert y.dtype == dtypes.float32
        np.testing.assert_allclose(y.numpy(), x @ w.T, rtol=1e-5, atol=1e-5)


@here
@pytest.mark.parametrize("kind", ["nt", "nn", "tn"])
def test_pairs_and_conversion_are_one_product(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = products(kind, 50, 64, 96)
    monkeypatch.setattr(pairs, "available", lambda device: False)
    assert_equal_to_rounding([fast[0], products(kind, 50, 64, 96)[0]])


@here
@pytest.mark.parametrize("kind", ["nt", "tn"])
def test_any_number_of_units_and_pieces_gives_the_same_bits(
    kind: str, cut: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    for pieces, cores in ((1, 1), (5, 1000)):
        cut(pieces)
        monkeypatch.setattr(product_module, "CORES", {cores: 1})
        runs.append(products(kind, 300, 70, 520))
    for first, second in zip(*runs, strict=True):
        np.testing.assert_array_equal(first, second)


@here
def test_what_is_not_finite_stays_so() -> None:
    x = numbers(24, 32, seed=1)
    x[3, 7], x[5, 8] = np.nan, np.inf
    y = linear(Tensor(x).cast(dtypes.bfloat16), Tensor(np.abs(numbers(16, 32, seed=2)))).float()
    found = y.numpy()
    assert np.isnan(found[3]).all() and np.isinf(found[5]).all()
    assert np.isfinite(np.delete(found, [3, 5], 0)).all()


def loss_and_gradients(C: int = 33, V: int = 300, N: int = 70) -> list[Tensor]:
    x = Tensor(numbers(N, C, seed=1)).cast(dtypes.bfloat16).realize()
    weight = Tensor(numbers(V, C, seed=2) / 4).realize()
    targets = np.random.default_rng(3).integers(0, V, N).astype(np.int32)
    targets[::7] = -1
    loss = kernels.loss(x, weight, Tensor(targets), gradient=True)
    found = [loss, *(loss * N).gradient(x, weight)]
    Tensor.realize(*found)
    return found


@pytest.mark.parametrize("sizes", [(33, 300, 70), (4, 17, 40), (64, 5000, 600)])
def test_the_loss_equals_its_twin_and_keeps_the_types(sizes: tuple[int, int, int]) -> None:
    found = loss_and_gradients(*sizes)
    with kernels.plain():
        wanted = loss_and_gradients(*sizes)
    types = [dtypes.float32, dtypes.bfloat16, dtypes.float32]
    assert [t.dtype for t in found] == [t.dtype for t in wanted] == types
    assert abs(found[0].item() - wanted[0].item()) < 1e-5
    for one, other in zip(found[1:], wanted[1:], strict=True):
        a, b = one.float().numpy(), other.float().numpy()
        assert np.abs(a - b).max() <= 2**-7 * np.abs(b).max()


@here
def test_the_loss_has_the_same_bits_for_any_number_of_pieces(cut: Callable[[int], None]) -> None:
    runs = []
    for pieces in (1, 7):
        cut(pieces)
        runs.append([t.float().numpy() for t in loss_and_gradients(32, 4000)])
    for first, second in zip(*runs, strict=True):
        np.testing.assert_array_equal(first, second)


@here
def test_the_loss_without_the_instruction_is_as_near(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = [t.float().numpy() for t in loss_and_gradients()]
    monkeypatch.setattr(pairs, "available", lambda device: False)
    for one, other in zip(fast, loss_and_gradients(), strict=True):
        b = other.float().numpy()
        assert np.abs(one - b).max() <= 2**-7 * np.abs(b).max()


def test_why_a_processor_has_no_pairs_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "processor_flags", lambda: ["avx2"])
    assert "AVX512_BF16" in (pairs.obstacle("CPU") or "kernels are made for")
    assert "C compiler" in (pairs.obstacle("PYTHON") or "")


@here
@pytest.mark.parametrize(
    ("H", "Tq", "Tk", "D", "dropout"),
    [(2, 37, 70, 64, 0.0), (12, 33, 33, 6, 0.2)],
    ids=["keys and queries apart", "a head in a unit, with dropout"],
)
def test_attention_in_pairs_equals_the_formula_in_float64(
    monkeypatch: pytest.MonkeyPatch, H: int, Tq: int, Tk: int, D: int, dropout: float
) -> None:
    shapes = [(1, H, T, D) for T in (Tq, Tk, Tk, Tq)]
    *given, gradient = (numbers(*shape, seed=i) for i, shape in enumerate(shapes))
    key = Tensor(np.array([1, 2], np.uint32))

    def computed(attention: Callable[..., Tensor], dtype: str) -> list[np.ndarray]:
        q, k, v, g = (Tensor(x).cast(dtype).realize() for x in (*given, gradient))
        y = attention(q, k, v, True, dropout, key if dropout else None)
        return [t.double().numpy() for t in (y, *y.gradient(q, k, v, gradient=g))]

    exact, ours = computed(plain_attention, "float64"), computed(flash_attention, "bfloat16")
    monkeypatch.setattr(pairs, "available", lambda device: False)
    others = computed(flash_attention, "bfloat16")
    for wanted, found, by_float32 in zip(exact, ours, others, strict=True):
        scale = np.abs(wanted).max()
        np.testing.assert_allclose(found / scale, wanted / scale, rtol=0, atol=1e-2)
        assert (found != by_float32).any()  # rounded elsewhere: these were pairs
