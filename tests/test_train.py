"""The training step learns, accumulates like a big batch, and keeps its promises about modes."""

import numpy as np
import pytest
from tinygrad import Tensor, nn
from tinygrad.helpers import Context

from tinygpt.config import GPTConfig, TrainConfig
from tinygpt.model.transformer import Transformer
from tinygpt.training.loop import train_steps
from tinygpt.training.optim import make_optimizer
from tinygpt.training.step import evaluate, make_evaluate, make_train_step

CONFIG = GPTConfig(block_size=8, vocab_size=13, n_layer=1, n_head=2, n_embd=16)
TOKENS = (np.arange(600) % 13).astype(np.uint16)


def losses(model_config=CONFIG, **settings):
    config = TrainConfig(**{"max_iters": 6, "warmup_steps": 0, "batch_size": 4} | settings)
    model = Transformer(model_config)
    optimizer = make_optimizer(model.parameters(), config)
    return [s.train_loss for s in train_steps(model, optimizer, config, TOKENS)], model


def weights(model):
    return np.concatenate([p.numpy().ravel() for p in model.parameters().values()])


def test_a_pattern_is_learned_and_the_same_seed_gives_the_same_losses():
    first, model = losses(max_iters=40, learning_rate=1e-2)
    assert first[0] == pytest.approx(np.log(13), abs=0.1)
    assert first[-1] < 1.0
    again, twin = losses(max_iters=40, learning_rate=1e-2)
    assert again == first
    np.testing.assert_array_equal(weights(twin), weights(model))
    assert losses(max_iters=2, seed=2)[0][0] != first[0]


def test_the_jitted_step_is_the_eager_one():
    jitted, model = losses(learning_rate=1e-2)
    config = TrainConfig(max_iters=6, warmup_steps=0, batch_size=4, learning_rate=1e-2)
    eager = Transformer(CONFIG)
    optimizer = make_optimizer(eager.parameters(), config)
    take = make_train_step(eager, optimizer, config)
    from tinygpt.text.batches import batch
    from tinygpt.training.optim import learning_rate

    with Context(JIT=0):
        for i in range(6):
            x, y = batch(TOKENS, i, config.seed, 4, 8)
            loss, *_ = take(x[None], y[None], learning_rate(config, i), (config.seed, i))
            assert loss == pytest.approx(jitted[i], abs=1e-5)
    np.testing.assert_allclose(weights(eager), weights(model), atol=1e-5)


def test_accumulated_micro_batches_equal_one_big_batch():
    big, one = losses(batch_size=6, learning_rate=1e-2)
    small, many = losses(batch_size=2, grad_accum_steps=3, learning_rate=1e-2)
    assert small == pytest.approx(big, abs=1e-5)
    # Where a gradient is nearly zero, Adam's step of up to 1e-2 follows from its last digits.
    np.testing.assert_allclose(weights(many), weights(one), atol=1e-4)


def test_gradients_are_clipped_and_their_norm_is_told():
    config = TrainConfig(max_iters=1, warmup_steps=0, batch_size=4, grad_clip=1e-3)
    model = Transformer(CONFIG)
    before = weights(model)
    optimizer = nn.optim.SGD(list(model.parameters().values()), lr=1.0)
    (step,) = train_steps(model, optimizer, TrainConfig(**config.to_dict()), TOKENS)
    assert step.grad_norm > 0.1
    moved = np.linalg.norm(weights(model) - before) / step.lr
    assert moved == pytest.approx(1e-3, rel=1e-3)


def test_gradients_are_freed_after_the_update():
    _, model = losses(max_iters=2)
    assert all(p.grad is None for p in model.parameters().values())


def test_dropout_is_on_in_training_off_in_evaluation_and_the_mode_is_put_back():
    config = GPTConfig(**{**CONFIG.to_dict(), "dropout": 0.5})
    model = Transformer(config).eval()
    x, y = TOKENS[:16].reshape(2, 8), TOKENS[1:17].reshape(2, 8)
    evaluate_batch = make_evaluate(model)
    once = [evaluate_batch(x, y) for _ in range(4)]
    assert len(set(once)) == 1
    settings = TrainConfig(max_iters=5, warmup_steps=0, learning_rate=1e-9, batch_size=4, seed=3)
    optimizer = make_optimizer(model.parameters(), settings)
    same = np.tile(TOKENS[:9], 20)[:9]  # a text of one block: every batch is the same
    drawn = [s.train_loss for s in train_steps(model, optimizer, settings, same)]
    assert len(set(drawn)) == 5  # yet every step drops something else
    assert model.training is False
    assert evaluate_batch(x, y) == pytest.approx(once[0], abs=1e-6)
    model.train()
    evaluate_batch(x, y)
    assert model.training is True


def test_an_evaluation_is_the_mean_loss_of_fixed_batches():
    model = Transformer(CONFIG)
    evaluate_batch = make_evaluate(model)
    first = evaluate(evaluate_batch, TOKENS, 3, 2, 8)
    assert first == evaluate(evaluate_batch, TOKENS, 3, 2, 8)
    from tinygpt.text.batches import batch
    from tinygpt.training.step import EVAL_SEED

    batches = [batch(TOKENS, i, EVAL_SEED, 2, 8) for i in range(3)]
    plain = [model.loss(Tensor(x), Tensor(y)).item() for x, y in batches]
    assert first == pytest.approx(np.mean(plain), abs=1e-5)


def test_steps_tell_what_happened():
    config = TrainConfig(max_iters=4, warmup_steps=2, eval_interval=3, eval_iters=1, batch_size=2)
    model = Transformer(CONFIG)
    steps = list(
        train_steps(model, make_optimizer(model.parameters(), config), config, TOKENS, TOKENS)
    )
    assert [s.iter for s in steps] == [1, 2, 3, 4]
    assert [s.val_loss is not None for s in steps] == [False, False, True, True]
    assert steps[0].lr == pytest.approx(5e-4)
    assert all(s.tokens_per_second > 0 and s.grad_norm > 0 for s in steps)


def test_a_run_that_starts_at_a_step_takes_the_batches_of_that_step():
    config = TrainConfig(max_iters=3, warmup_steps=0, batch_size=2, learning_rate=1e-9)
    model = Transformer(CONFIG)
    optimizer = make_optimizer(model.parameters(), config)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 13, 600).astype(np.uint16)
    whole = [s.train_loss for s in train_steps(model, optimizer, config, tokens)]
    rest = [s.train_loss for s in train_steps(model, optimizer, config, tokens, start=2)]
    assert rest == pytest.approx(whole[2:], abs=1e-4)
