"""The AdamW kernels against their plain twin, and against numpy's float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from tinygrad import Tensor, TinyJit

from tinygpt.kernels import reference
from tinygpt.kernels.adamw import adamw_update, split

SHAPES = [(5, 7), (7,), (33, 3), (100,), (16, 64), (1,)]
HYPER = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8}
DECAY = 0.1


def draw(shapes: Sequence[tuple[int, ...]], seed: int, size: float = 1.0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [(rng.standard_normal(s) * size).astype(np.float32) for s in shapes]


def tensors(arrays: Sequence[np.ndarray]) -> list[Tensor]:
    return [Tensor(a).contiguous().realize() for a in arrays]


class State:
    """Parameters and moments, updated by the kernels, or by ``update``; a step gives the norm."""

    def __init__(
        self,
        shapes: Sequence[tuple[int, ...]] = SHAPES,
        update: Callable[..., Tensor] = adamw_update,
        **options: float,
    ) -> None:
        self.params = tensors(draw(shapes, 0))
        self.m, self.v = (tensors([np.zeros(s, np.float32) for s in shapes]) for _ in range(2))
        self.b1_t, self.b2_t = tensors([np.ones(1, np.float32)] * 2)
        self.decay = [DECAY if len(s) > 1 else 0.0 for s in shapes]
        self.update, self.options = update, {"clip": 1.0} | HYPER | options

    def step(self, lr: Tensor, *grads: Tensor) -> Tensor:
        moments = (self.m, self.v, lr, self.b1_t, self.b2_t)
        norm = self.update(self.params, grads, *moments, decay=self.decay, **self.options)
        return norm.realize(self.b1_t, self.b2_t, *self.m, *self.v, *self.params)

    def values(self) -> list[np.ndarray]:
        return [t.numpy() for t in (*self.params, *self.m, *self.v, self.b1_t, self.b2_t)]


@pytest.mark.parametrize("size", [1.0, 1e-3])  # clipped, and not
def test_five_jitted_steps_equal_those_of_the_plain_twin(size: float) -> None:
    ours, plain = State(), State(update=reference.adamw_update)
    steps = TinyJit(ours.step), TinyJit(plain.step)
    for i in range(5):
        lr = Tensor([1e-2 / (i + 1)]).realize()
        grads = tensors(draw(SHAPES, i + 1, size))
        norm, wanted = (step(lr, *grads).item() for step in steps)
        assert norm == pytest.approx(wanted, rel=1e-6)
    for a, b in zip(ours.values(), plain.values(), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-7)


def test_steps_equal_float64_with_clipping_off_and_summed_gradients() -> None:
    ours = State(clip=0.0, scale=0.25)
    p = [a.astype(np.float64) for a in draw(SHAPES, 0)]
    m, v = ([np.zeros(s) for s in SHAPES] for _ in range(2))
    for t in range(1, 4):
        grads = draw(SHAPES, t)
        norm = ours.step(Tensor([0.01]).realize(), *tensors(grads)).item()
        flat = np.concatenate([g.ravel() for g in grads]).astype(np.float64)
        assert norm == pytest.approx(0.25 * np.linalg.norm(flat), rel=1e-6)
        for i, g in enumerate(grads):
            g = 0.25 * g.astype(np.float64)
            m[i] = 0.9 * m[i] + 0.1 * g
            v[i] = 0.99 * v[i] + 0.01 * g * g
            step = m[i] / (1 - 0.9**t) / (np.sqrt(v[i] / (1 - 0.99**t)) + 1e-8)
            p[i] = p[i] * (1 - 0.01 * (DECAY if g.ndim > 1 else 0)) - 0.01 * step
    for a, b in zip(ours.values(), (*p, *m, *v), strict=False):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_any_number_of_threads_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for threads in (1, 2, 3):
        monkeypatch.setenv("TINYGPT_THREADS", str(threads))
        ours = State()
        ours.step(Tensor([0.01]).realize(), *tensors(draw(SHAPES, 1)))
        found.append(ours.values())
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_gradient_of_nan_shows_in_every_parameter() -> None:
    ours = State([(3,), (4,)])
    grads = draw([(3,), (4,)], 1)
    grads[0][1] = np.nan
    assert np.isnan(ours.step(Tensor([0.01]).realize(), *tensors(grads)).item())
    assert all(np.isnan(p.numpy()).all() for p in ours.params)


@pytest.mark.parametrize("most", [1, 4, 15, 61])
def test_a_split_covers_all_in_order_within_the_limit(most: int) -> None:
    keys = ("wte", "wpe", *"abcdefghijkl" * 4, "a", "b")
    found = split(keys, most)
    assert [i for i, j in found for i in range(i, j)] == list(range(len(keys)))
    assert all(0 < j - i <= most for i, j in found)


def test_equal_layers_share_a_kernel() -> None:
    keys = ("wte", "wpe", *"abcdefghijkl" * 12, "a", "b")
    found = split(keys, 15)
    assert len({keys[i:j] for i, j in found}) == 2 and len(found) == 13
