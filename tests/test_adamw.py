"""The AdamW kernels against their plain twin, and against numpy's float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from tinygrad import Device, Tensor, TinyJit

from tests.conftest import CUTS
from tinygpt.kernels import adamw
from tinygpt.kernels.adamw import adamw_update, plain_adamw_update, split

SHAPES = [(5, 7), (7,), (33, 3), (100,), (16, 64), (1,)]
HYPER = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8}
DECAY = 0.1


def draw(shapes: Sequence[tuple[int, ...]], seed: int, size: float = 1.0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [(rng.standard_normal(s) * size).astype(np.float32) for s in shapes]


def tensors(arrays: Sequence[np.ndarray]) -> list[Tensor]:
    return [Tensor(a).contiguous().realize() for a in arrays]


class State:
    """Parameters and moments, updated by the kernels, or by ``update``."""

    def __init__(
        self,
        shapes: Sequence[tuple[int, ...]] = SHAPES,
        update: Callable[..., Tensor] = adamw_update,
        **options: Any,
    ) -> None:
        self.params = tensors(draw(shapes, 0))
        self.m, self.v = (tensors([np.zeros(s, np.float32) for s in shapes]) for _ in range(2))
        self.b1_t, self.b2_t = tensors([np.ones(1, np.float32)] * 2)
        self.decay = [DECAY if len(s) > 1 else 0.0 for s in shapes]
        self.update, self.options = update, {"clip": 1.0} | HYPER | options

    def step(self, lr: Tensor, *grads: Tensor) -> Tensor:
        """-> the gradients' norm"""
        return self.judged(lr, None, None, *grads)[1]

    def judged(
        self, lr: Tensor, loss: Tensor | None, limits: Tensor | None, *grads: Tensor
    ) -> Tensor:
        """-> loss, norm, taken, the norm of each gradient (3 + n,)"""
        moments = (self.m, self.v, lr, self.b1_t, self.b2_t)
        judges = {"loss": loss, "limits": limits}
        report = self.update(
            self.params, grads, *moments, decay=self.decay, **judges, **self.options
        )
        return report.realize(self.b1_t, self.b2_t, *self.m, *self.v, *self.params)

    def values(self) -> list[np.ndarray]:
        return [t.numpy() for t in (*self.params, *self.m, *self.v, self.b1_t, self.b2_t)]


@pytest.mark.parametrize("size", [1.0, 1e-3])  # clipped, and not
def test_five_jitted_steps_equal_those_of_the_plain_twin(size: float) -> None:
    ours, plain = State(), State(update=plain_adamw_update)
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


def test_any_number_of_pieces_gives_the_same_bits(cut: Callable[[int], None]) -> None:
    found = []
    for pieces in CUTS:
        cut(pieces)
        ours = State()
        ours.step(Tensor([0.01]).realize(), *tensors(draw(SHAPES, 1)))
        found.append(ours.values())
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


INF = math.inf
FINE = (1.0, 1.0, (INF, INF))
"""Loss, what is added to the gradients, and limits, of a step that is taken."""
BAD = [
    (math.nan, 1.0, (INF, INF)),
    (INF, 1.0, (INF, INF)),
    (-INF, 1.0, (INF, INF)),
    (1.0, math.nan, (INF, INF)),
    (1.0, INF, (INF, INF)),
    (1.0, -INF, (INF, INF)),
    (1.0, 3e38, (INF, INF)),  # finite, but its square is not
    (3.5, 1.0, (3.4, INF)),
    (1.0, 1.0, (INF, 5.0)),
    (1.0, 1.0, (1.0, INF)),  # a limit is not below itself
]


def bits(state: State) -> bytes:
    return b"".join(a.tobytes() for a in state.values())


@pytest.mark.parametrize(("clip", "threads"), [(0.0, "1"), (1.0, "2")])
@pytest.mark.parametrize("wrap", [TinyJit, lambda f: f], ids=["jitted", "eager"])
@pytest.mark.parametrize(
    "update",
    [adamw_update, pytest.param(plain_adamw_update, marks=pytest.mark.slow)],
    ids=["fast", "plain"],
)
def test_a_bad_step_changes_no_bit_and_the_next_goes_on_as_if_it_had_not_been(
    update: Callable[..., Tensor],
    wrap: Callable[..., Callable[..., Tensor]],
    clip: float,
    threads: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TINYGPT_THREADS", threads)
    tried, spared = (State(update=update, clip=clip) for _ in range(2))
    step, other = wrap(tried.judged), wrap(spared.judged)

    def take(
        step: Callable[..., Tensor], i: int, loss: float, extra: float, limits: tuple[float, float]
    ) -> np.ndarray:
        grads = draw(SHAPES, i)
        grads[2][7, 1] += np.float32(extra)
        given = [Tensor([0.01]), Tensor([loss]), Tensor(list(limits))]
        return step(*(t.contiguous().realize() for t in given), *tensors(grads)).numpy()

    bad = BAD if wrap is TinyJit else BAD[:4]  # eagerly the same kernels run, slowly
    for i in range(len(bad) + 5):
        loss, norm, taken, *_ = take(step, i, *FINE)
        assert (loss, taken) == (1.0, 1.0) and norm > 5
        take(other, i, *FINE)
        before = bits(tried)
        assert before == bits(spared)
        if i < len(bad):
            report = take(step, i + 100, *bad[i])
            assert report[2] == 0.0 and bits(tried) == before
            np.testing.assert_array_equal(report[0], np.float32(bad[i][0]))
        elif i == len(bad) and wrap is not TinyJit:
            break


def test_summed_losses_are_averaged_before_they_are_judged() -> None:
    limits, loss = Tensor([2.0, INF]).realize(), Tensor([6.0]).realize()
    for update in (adamw_update, plain_adamw_update):
        ours = State([(3,), (4,)], update, scale=0.25)
        grads = tensors(draw([(3,), (4,)], 1))
        report = ours.judged(Tensor([0.01]).realize(), loss, limits, *grads).numpy()
        assert report[0] == 1.5 and report[2] == 1.0


@pytest.mark.parametrize("update", [adamw_update, plain_adamw_update], ids=["fast", "plain"])
@pytest.mark.parametrize("most", [62, 6, 5])  # buffers: all gradients in one launch, or in several
def test_every_gradient_has_the_norm_that_numpy_finds(
    update: Callable[..., Tensor], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(adamw.BUFFERS, Device.DEFAULT, most)
    ours, grads = State(update=update, scale=0.5), draw(SHAPES, 1)
    report = ours.judged(Tensor([0.01]).realize(), None, None, *tensors(grads)).numpy()
    wanted = [0.5 * math.sqrt(float(np.sum(g.astype(np.float64) ** 2))) for g in grads]
    np.testing.assert_allclose(report[3:], wanted, rtol=1e-6)
    assert report[1] == pytest.approx(math.hypot(*wanted), rel=1e-6)


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
