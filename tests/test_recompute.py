"""Activations that are computed again in the backward pass: the same bits from less memory."""

from dataclasses import replace

import numpy as np
import pytest
from tinygrad import Tensor

from tests.device_memory import device_bytes
from tinygpt.api import GPT
from tinygpt.config import GPTConfig, TrainConfig
from tinygpt.model import lora
from tinygpt.training.optim import make_optimizer
from tinygpt.training.recompute import first_that_learns, restart
from tinygpt.training.step import make_train_step

pytestmark = pytest.mark.usefixtures("only_what_is_new_is_counted")

SHAPE = GPTConfig(vocab_size=13, n_layer=3, n_head=2, n_embd=16, block_size=8, dropout=0.2)
TRAIN = TrainConfig(batch_size=2, warmup_steps=0)


def taught(shape, train, steps=2):
    """Losses, norms by layer and weights after some steps, and the bytes that they took."""
    model = GPT(shape, seed=1)
    lora.prepare(model, train)
    step = make_train_step(model, make_optimizer(model.trainable(), train), train)
    A, B, T = train.grad_accum_steps, train.batch_size, shape.block_size
    rng, before, outcomes = np.random.default_rng(0), device_bytes(), []
    for i in range(steps):
        x = rng.integers(0, shape.vocab_size, (A, B, T), dtype=np.int32)
        outcomes.append(step(x, np.roll(x, -1, -1), 1e-2, (3, i)))
    taken = device_bytes() - before
    weights = {name: p.numpy() for name, p in model.parameters().items()}
    return outcomes, weights, taken


@pytest.mark.parametrize(
    ("shape", "train"),
    [
        pytest.param({}, {}, id="dropout"),
        pytest.param({"tie_embeddings": False}, {"grad_accum_steps": 2}, id="accumulation"),
        pytest.param({}, {"dtype": "bfloat16"}, id="bfloat16"),
        pytest.param({"attention": "plain", "bias": False}, {"optimizer": "muon"}, id="plain"),
        pytest.param({}, {"freeze": 1, "lora_rank": 2}, id="adapters"),
        pytest.param({}, {"freeze": 3}, id="only what follows the blocks"),
    ],
)
def test_steps_are_the_same_to_the_bit(shape, train):
    shape, train = replace(SHAPE, **shape), replace(TRAIN, **train)
    expected, weights, _ = taught(shape, train)
    found, again, _ = taught(shape, replace(train, recompute=True))
    assert found == expected
    assert expected[1].norm > 0 and expected[0].taken
    for name, values in weights.items():
        np.testing.assert_array_equal(again[name], values, err_msg=name)


def test_one_block_is_in_memory_at_a_time():
    """Two more blocks add their inputs and what learns, not their activations."""
    small = replace(SHAPE, dropout=0.0, block_size=64)
    train = replace(TRAIN, batch_size=16)
    taken = {}
    for recompute in (False, True):
        for layers in (2, 4):
            shape = replace(small, n_layer=layers)
            taken[recompute, layers] = taught(shape, replace(train, recompute=recompute), 1)[2]
    stream = 4 * 16 * 64 * 16  # bytes of x (B, T, C)
    weights = 4 * 2 * 3300  # of two blocks, whose gradients are there at the end
    kept, again = (taken[r, 4] - taken[r, 2] for r in (False, True))
    assert kept > 2 * 14 * stream
    assert again < 2 * 1.5 * stream + weights


def test_a_block_begins_again_from_a_copy_without_a_gradient():
    x, after = Tensor([[-0.0, 1.0, 2.0]]), Tensor([[3.0, float("inf"), 5.0]])
    again = restart(x, after)
    assert again.numpy().tobytes() == x.numpy().tobytes()
    assert (again * after).sum().gradient(x, after)[0].tolist() == [[0.0] * 3]
    assert np.isnan(restart(x, after * float("nan")).numpy()).all()


def test_the_backward_pass_ends_where_nothing_below_learns():
    assert first_that_learns({"wte.weight": 0, "h.2.mlp.c_fc.weight": 0}) == 0
    assert first_that_learns({"h.2.mlp.c_fc.weight": 0, "h.10.ln_1.bias": 0}) == 2
    assert first_that_learns({"ln_f.weight": 0}) > 1000
