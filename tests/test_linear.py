"""Linear layers through the kernels, alone, with a residual and before GELU: against numpy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tinygrad import Tensor, TinyJit, dtypes
from tinygrad.helpers import GlobalCounters

from tinygpt import kernels
from tinygpt.kernels import matmul as product_module
from tinygpt.kernels.dispatch import obstacle
from tinygpt.kernels.linear import FEW, linear
from tinygpt.kernels.matmul import Plan, matmul, register_tile, register_tiles

ENDINGS = st.sampled_from([None, "gelu", "residual", "residual gelu"])
SIZES = st.one_of(st.integers(1, 40), st.sampled_from([64, 65, 97, 128, 130]))


def numbers(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def tensors(m: int, i: int, o: int, ending: str | None, dtype: str = "float32") -> list[Tensor]:
    """x, W, b, the residual if the ending has one, and a gradient of y."""
    residual = [(m, o)] if "residual" in (ending or "") else []
    shapes = [(m, i), (o, i), (o,), *residual, (m, o)]
    return [Tensor(numbers(*s, seed=n).astype(dtype)).realize() for n, s in enumerate(shapes)]


def gelu(u: np.ndarray) -> np.ndarray:
    return 0.5 * u * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3)))


def gelu_slope(u: np.ndarray) -> np.ndarray:
    h = 1e-5
    return (gelu(u + h) - gelu(u - h)) / (2 * h)


def by_numpy(args: list[Tensor], ending: str | None, dy: Tensor | None = None) -> list[np.ndarray]:
    """y, and with dy the gradients of x, W, b and, if the ending has one, the residual."""
    x, w, b, *r = (t.numpy().astype(np.float64) for t in args)
    activated = "gelu" in (ending or "")
    u = x @ w.T + b + sum(r)
    y = gelu(u) if activated else u
    if dy is None:
        return [y]
    g = dy.numpy().astype(np.float64)
    du = g * gelu_slope(u) if activated else g
    return [y, du @ w, du.T @ x, du.sum(0), *([du] if r else [])]


def layer(args: list[Tensor], ending: str | None) -> Tensor:
    x, w, b, *residual = args
    y = linear(x, w, b) + residual[0] if residual else linear(x, w, b)
    return kernels.gelu(y) if "gelu" in (ending or "") else y


def gradients(y: Tensor, dy: Tensor, of: list[Tensor]) -> list[np.ndarray]:
    """y, and the gradients of the sum of y * dy."""
    grads = y.gradient(*of, gradient=dy)
    Tensor.realize(y, *grads)
    return [t.numpy() for t in (y, *grads)]


def assert_close(got: list[np.ndarray], wanted: list[np.ndarray], tolerance: float) -> None:
    for g, w in zip(got, wanted, strict=True):
        assert g.shape == w.shape
        assert np.abs(g - w).max() <= tolerance * max(1.0, float(np.abs(w).max()))


@given(m=SIZES, i=SIZES, o=SIZES, ending=ENDINGS)
@settings(max_examples=10, deadline=None, derandomize=True)
def test_forward_equals_numpy_in_float64(m: int, i: int, o: int, ending: str | None) -> None:
    *args, _ = tensors(m, i, o, ending)
    y = layer(args, ending)
    assert_close([y.numpy()], by_numpy(args, ending), 2e-6 * np.sqrt(i))


@pytest.mark.parametrize(
    ("m", "i", "o", "ending"),
    [
        (1, 1, 1, None),
        (50, 29, 65, "gelu"),  # ragged in every way
        (FEW, 600, 7, "residual"),
        (FEW, 30, 9, "residual gelu"),
        (20, 1100, 9, "residual gelu"),  # GELU only of the last block's sum
        (20, 1100, 9, None),  # several blocks of depth
        (24, 8, 1801, None),  # several chunks of rows in dW, and blocks of depth in dx
    ],
)
def test_gradients_equal_numpys(m: int, i: int, o: int, ending: str | None) -> None:
    *args, dy = tensors(m, i, o, ending)
    got = gradients(layer(args, ending), dy, args)
    assert_close(got, by_numpy(args, ending, dy), 3e-6 * np.sqrt(max(m, i, o)))


def test_gradients_equal_the_twins_in_float64() -> None:
    *args, dy = tensors(33, 12, 20, "gelu", "float64")
    with kernels.plain():
        wanted = gradients(layer(args, "gelu"), dy, args)
    assert_close(gradients(layer(args, "gelu"), dy, args), wanted, 1e-13)


def test_a_layer_without_a_bias() -> None:
    x, w, _, dy = tensors(20, 12, 9, None)
    y, dx, dw = gradients(linear(x, w), dy, [x, w])
    wanted = [x.numpy() @ w.numpy().T, dy.numpy() @ w.numpy(), dy.numpy().T @ x.numpy()]
    assert_close([y, dx, dw], wanted, 1e-5)


@pytest.mark.parametrize("shape", [(5, 700, 9), (700, 12, 70)])
def test_any_number_of_units_and_pieces_gives_the_same_bits(
    shape: tuple[int, int, int], cut: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    *args, dy = tensors(*shape, "gelu")
    runs = []
    for pieces, cores in ((1, 1), (2, 5), (5, 1000)):
        cut(pieces)
        monkeypatch.setattr(product_module, "CORES", {cores: 1})
        runs.append(gradients(layer(args, "gelu"), dy, args))
    for other in runs[1:]:
        for first, second in zip(runs[0], other, strict=True):
            np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("pieces", [1, 7])
@pytest.mark.parametrize("kind", ["nt", "nn", "tn"])
def test_every_element_of_a_poisoned_output_is_written(
    kind: str, pieces: int, cut: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    m, n, depth = 61, 67, 1030
    a, b = numbers(m, depth, seed=1), numbers(depth, n, seed=2)
    made: list[Tensor] = []

    def poisoned(*shape: int, dtype: object = None, device: object = None) -> Tensor:
        t = Tensor.full(shape, float("nan"), dtype=dtype, device=device).contiguous().realize()
        made.append(t)
        return t

    operands = [
        Tensor(np.ascontiguousarray(t)).realize()
        for t in (a.T if kind == "tn" else a, b.T if kind == "nt" else b)
    ]
    a_strides = (1, m) if kind == "tn" else (depth, 1)
    b_strides = (1, depth) if kind == "nt" else (n, 1)
    monkeypatch.setattr(product_module.Tensor, "empty", staticmethod(poisoned))
    cut(pieces)
    outputs = matmul(*operands, (m, n, depth), a_strides, b_strides, sums=kind == "tn")
    monkeypatch.undo()
    assert len(made) == len(outputs)
    np.testing.assert_allclose(outputs[0].numpy(), a @ b, rtol=1e-10, atol=1e-10)
    if kind == "tn":
        np.testing.assert_allclose(outputs[1].numpy(), a.sum(1), rtol=1e-10, atol=1e-10)


def test_jit_equals_eager_over_many_calls() -> None:
    x, w, b, dy = tensors(24, 20, 33, "gelu")

    def step(x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        y = layer([x.reshape(2, 12, 20), w, b], "gelu")
        grads = (y * dy.reshape(2, 12, 33)).sum().gradient(x, w, b)
        Tensor.realize(y, *grads)
        return (y, *grads)

    jitted = TinyJit(step)
    for n in range(6):
        inputs = [(t + n).contiguous().realize() for t in (x, dy)]
        eager = [t.numpy() for t in step(*inputs)]
        captured = [t.numpy() for t in jitted(*inputs)]
        for one, other in zip(eager, captured, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("dtype", [dtypes.float16, dtypes.bfloat16])
def test_halves_are_summed_in_float32(dtype: object) -> None:
    narrow = [t.cast(dtype).realize() for t in tensors(40, 600, 24, None)[:3]]
    y = linear(*narrow)
    assert y.dtype == dtype
    wanted = by_numpy([t.cast(dtypes.float32) for t in narrow], None)
    step = 2.0**-10 if dtype == dtypes.float16 else 2.0**-7  # only the result is rounded
    assert_close([y.cast(dtypes.float32).numpy()], wanted, step)


def test_a_transposed_view_is_taken_as_it_reads() -> None:
    x, w = Tensor(numbers(20, 24, seed=1)).realize(), Tensor(numbers(20, 9, seed=2)).realize()
    y = linear(x.transpose(0, 1), w.transpose(0, 1))
    np.testing.assert_allclose(y.numpy(), x.numpy().T @ w.numpy(), rtol=1e-12)


def test_what_the_kernels_cannot_take_goes_to_the_twin() -> None:
    x, w, b, _ = tensors(6, 4, 5, None)
    devices = ("CPU", "CPU:1")
    sharded = x.shard(devices, axis=0)
    copies = [t.shard(devices) for t in (w, b)]
    assert obstacle(sharded, *copies)
    np.testing.assert_allclose(
        linear(sharded, *copies).numpy(), linear(x, w, b).numpy(), rtol=1e-5, atol=1e-6
    )
    assert obstacle(x.cast(dtypes.int32))


def test_a_layer_is_one_launch_forward_and_two_backward() -> None:
    *args, dy = tensors(24, 20, 33, None)
    GlobalCounters.reset()
    linear(*args).realize()
    assert GlobalCounters.kernel_count == 1
    gradients(linear(*args), dy, args)
    assert GlobalCounters.kernel_count == 1 + 3


def test_a_register_tile_fits_the_columns() -> None:
    for n in (1, 7, 8, 31, 65, 128, 50257):
        lanes, rows = register_tile(n)
        assert 1 <= lanes <= n and rows >= 1
    assert register_tile(128)[0] == next(iter(register_tiles()))


@pytest.mark.parametrize("depth", [1, 65, 512, 513, 768, 3072, 50257, 1031])
def test_blocks_cover_the_depth_once(depth: int) -> None:
    for a_strides in ((depth, 1), (1, 9)):
        plan = Plan(9, 9, depth, a_strides, (9, 1), rows=3)
        steps = [
            start + index * size + d
            for start, count, size in plan.blocks()
            for index in range(count)
            for d in range(size)
        ]
        assert steps == list(range(depth))
        assert len(plan.blocks()) <= 2
