"""The optimizer against tinygrad's own and against the formulas."""

import math
from itertools import pairwise

import numpy as np
import pytest
from tinygrad import Tensor
from tinygrad.helpers import Context
from tinygrad.nn import optim

from tinygpt.config import TrainConfig
from tinygpt.kernels.adamw import global_norm, plain_scaling
from tinygpt.training.optim import AdamW, learning_rate, optimizer_state


def test_the_rate_warms_up_then_decays_to_its_minimum():
    config = TrainConfig(learning_rate=1e-3, min_lr=1e-4, warmup_steps=10, max_iters=110)
    rates = [learning_rate(config, step) for step in range(120)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[9] == rates[10] == 1e-3
    assert rates[60] == pytest.approx((1e-3 + 1e-4) / 2)
    assert rates[110:] == pytest.approx([1e-4] * 10)
    assert all(a >= b for a, b in pairwise(rates[10:]))


@pytest.mark.parametrize(
    ("decay", "middle"), [("linear", 5.5e-4), ("constant", 1e-3), ("sqrt", 3.6360389693e-4)]
)
def test_the_other_decays(decay, middle):
    config = TrainConfig(min_lr=1e-4, warmup_steps=0, max_iters=100, decay=decay)
    assert learning_rate(config, 50) == pytest.approx(middle)


@pytest.mark.parametrize("decay", ["linear", "cosine", "sqrt"])
def test_the_rate_is_held_before_it_decays(decay):
    times = {"warmup_steps": 10, "max_iters": 110, "decay": decay, "min_lr": 1e-4}
    rates = [learning_rate(TrainConfig(**times, decay_start=0.4), step) for step in range(111)]
    assert set(rates[9:51]) == {1e-3} and rates[51] < 1e-3
    assert rates[110] == pytest.approx(1e-4)
    short = TrainConfig(**{**times, "warmup_steps": 0, "max_iters": 60})
    assert rates[50:] == pytest.approx([learning_rate(short, step) for step in range(61)])


def test_clipping_scales_to_the_limit_and_leaves_small_gradients_alone():
    gradients = [Tensor([3.0, 0.0]), Tensor([[4.0]])]
    norm = global_norm(gradients)
    assert norm.item() == pytest.approx(5.0)
    assert plain_scaling(norm, 1.0, 1.0).item() == pytest.approx(0.2)
    assert plain_scaling(norm, 10.0, 1.0).item() == 1.0


def test_adamw_is_the_papers_formula_and_tinygrads_adam():
    rng = np.random.default_rng(0)
    start = {"w": rng.normal(size=(3, 4)), "b": rng.normal(size=4)}
    gradients = [{k: rng.normal(size=v.shape) for k, v in start.items()} for _ in range(5)]
    decay, lr, b1, b2, eps = 0.1, 1e-2, 0.9, 0.99, 1e-8

    def tensors():
        return {k: Tensor(v.astype(np.float32)).realize() for k, v in start.items()}

    ours, theirs = tensors(), tensors()
    mine = AdamW(ours, lr, b1, b2, eps, decay)
    stock = [
        optim.AdamW([theirs["w"]], lr, b1, b2, eps, decay),
        optim.Adam([theirs["b"]], lr, b1, b2, eps),
    ]
    exact = {k: v.copy() for k, v in start.items()}
    m = {k: np.zeros_like(v) for k, v in start.items()}
    v2 = {k: np.zeros_like(v) for k, v in start.items()}
    for t, step in enumerate(gradients, start=1):
        for named in (ours, theirs):
            for k, p in named.items():
                p.grad = Tensor(step[k].astype(np.float32))
        with Context(TRAINING=1):
            for optimizer in [mine, *stock]:
                optimizer.step()
        for k, g in step.items():
            m[k] = b1 * m[k] + (1 - b1) * g
            v2[k] = b2 * v2[k] + (1 - b2) * g * g
            update = (m[k] / (1 - b1**t)) / (np.sqrt(v2[k] / (1 - b2**t)) + eps)
            exact[k] = exact[k] * (1 - lr * (decay if exact[k].ndim > 1 else 0)) - lr * update
    for k in exact:
        np.testing.assert_allclose(ours[k].numpy(), exact[k], rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(ours[k].numpy(), theirs[k].numpy(), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["ours", "Adam", "AdamW", "SGD"])
def test_the_state_names_every_moment_by_its_parameter(kind):
    named = {"w": Tensor.zeros(2, 2).contiguous(), "b": Tensor.zeros(2).contiguous()}
    make = {
        "ours": lambda: AdamW(named),
        "Adam": lambda: optim.Adam(list(named.values())),
        "AdamW": lambda: optim.AdamW(list(named.values())),
        "SGD": lambda: optim.SGD(list(named.values()), momentum=0.9),
    }
    state = optimizer_state(make[kind](), named)
    moments = {"b.w", "b.b"} if kind == "SGD" else {"m.w", "m.b", "v.w", "v.b"}
    scalars = {"lr"} if kind == "SGD" else {"lr", "b1_t", "b2_t"}
    assert set(state) == moments | scalars


def test_a_missing_gradient_is_said():
    with pytest.raises(RuntimeError, match="1 of 1"):
        AdamW({"w": Tensor.zeros(2).contiguous()}).step()


def test_the_rate_of_the_warm_up_is_never_zero():
    config = TrainConfig(warmup_steps=5)
    assert all(learning_rate(config, step) > 0 for step in range(5))
    assert math.isclose(learning_rate(config, 4), config.learning_rate)
