"""The model against the numpy oracle, and what it promises about modes, noise, shapes and names."""

import functools
import math

import numpy as np
import pytest
from tinygrad import Tensor, TinyJit, dtypes, nn
from tinygrad.helpers import Context

from tests.numpy_gpt2 import GPT2
from tinygpt import kernels
from tinygpt.config import GPTConfig
from tinygpt.errors import UsageError
from tinygpt.model.transformer import INFERENCE, Dropout, Transformer

V, BLOCK = 17, 8
TIED = GPTConfig(block_size=BLOCK, vocab_size=V, n_layer=2, n_head=2, n_embd=16)
UNTIED = GPTConfig(
    block_size=BLOCK, vocab_size=V, n_layer=1, n_head=4, n_embd=16, bias=False, tie_embeddings=False
)
DROPPING = GPTConfig(block_size=BLOCK, vocab_size=V, n_layer=1, n_head=1, n_embd=8, dropout=0.4)
RNG = np.random.default_rng(0)
X, Y = (RNG.integers(0, V, (3, BLOCK)).astype(np.int32) for _ in range(2))
Y[0, :5] = -1  # left out of the loss


class Case:
    """A model with large random weights, and its oracle."""

    def __init__(self, config):
        self.model = Transformer(config).eval()
        self.parameters = self.model.parameters()
        for p in self.parameters.values():
            p.assign(Tensor(RNG.normal(0, 0.4, p.shape).astype(np.float32)).realize()).realize()
        weights = {name: p.numpy() for name, p in self.parameters.items()}
        self.oracle = GPT2(weights, config.n_layer, config.n_head)

    @functools.cached_property
    def logits(self):
        return self.model(Tensor(X)).numpy()


@pytest.fixture(scope="module", params=[TIED, UNTIED], ids=["tied", "untied without biases"])
def case(request):
    return Case(request.param)


@pytest.fixture(scope="module")
def dropping():
    """(model in training mode, its jitted loss of x, y and a key)"""
    model = Case(DROPPING).model.train()

    @TinyJit
    def loss(x, y, key):
        return model.loss(x, y, dropout(key)).realize()

    return model, loss


def key(*values):
    return Tensor(list(values), dtype=dtypes.uint32).realize()


def dropout(key):
    return Dropout(DROPPING.dropout, key)


def batch(x=X, y=Y):
    return Tensor(x).realize(), Tensor(y).realize()


# Against the oracle


def test_logits_equal_the_oracle(case):
    np.testing.assert_allclose(case.logits, case.oracle.logits(X), atol=2e-5)


def test_loss_and_gradients_equal_the_oracle(case):
    deep = case.model.config.n_layer > 1  # making optimised kernels for it would take 10 s
    with Context(NOOPT=int(deep)):
        loss = case.model.loss(Tensor(X), Tensor(Y))
        gradients = loss.gradient(*case.parameters.values())
        Tensor.realize(loss, *gradients)
    wanted_loss, wanted = case.oracle.loss_and_gradients(X, Y)
    assert loss.item() == pytest.approx(wanted_loss, rel=1e-5)
    assert set(wanted) == set(case.parameters)
    for name, gradient in zip(case.parameters, gradients, strict=True):
        scale = np.abs(wanted[name]).max()
        np.testing.assert_allclose(gradient.numpy(), wanted[name], atol=2e-5 * scale, err_msg=name)


def test_the_future_does_not_change_the_past(case):
    changed = X.copy()
    changed[:, 5] = (changed[:, 5] + 1) % V
    logits = case.model(Tensor(changed)).numpy()
    np.testing.assert_array_equal(logits[:, :5], case.logits[:, :5])
    assert (np.abs(logits[:, 5:] - case.logits[:, 5:]).max(-1) > 1e-3).all()


# Parameters


def test_gpt2_has_as_many_parameters_as_gpt2():
    assert GPTConfig(1024, 50257, 12, 12, 768).num_params() == 124_439_808


def test_the_model_has_as_many_parameters_as_its_config_says(case):
    assert case.model.num_params() == case.model.config.num_params()
    assert case.model.num_params() == sum(p.numel() for p in case.parameters.values())


def test_tinygrad_finds_exactly_the_parameters(case):
    found = nn.state.get_state_dict(case.model)
    assert {name: id(p) for name, p in found.items()} == {
        name: id(p) for name, p in case.parameters.items()
    }


def test_names_and_shapes_are_gpt2s():
    C = 16
    shapes = {name: p.shape for name, p in Transformer(TIED).parameters().items()}
    assert list(shapes)[:2] == ["wte.weight", "wpe.weight"] and list(shapes)[-1] == "ln_f.bias"
    assert shapes["h.1.attn.c_attn.weight"] == (3 * C, C)
    assert shapes["h.0.mlp.c_fc.weight"] == (4 * C, C)
    assert shapes["h.0.mlp.c_proj.weight"] == (C, 4 * C)
    assert "lm_head.weight" not in shapes
    untied = Transformer(UNTIED).parameters()
    assert untied["lm_head.weight"].shape == (V, C)
    assert not any(name.endswith("bias") for name in untied)


def test_initial_weights_are_gpt2s():
    config = GPTConfig(block_size=32, vocab_size=200, n_layer=3, n_head=2, n_embd=48)
    parameters = Transformer(config).parameters()
    for name, p in parameters.items():
        values = p.numpy()
        if name.endswith("bias"):
            assert (values == 0).all(), name
        elif "ln_" in name:
            assert (values == 1).all(), name
        else:
            deviation = 0.02 / math.sqrt(2 * 3) if name.endswith("c_proj.weight") else 0.02
            assert values.std() == pytest.approx(deviation, rel=0.06), name
            assert abs(values.mean()) < 4 * deviation / math.sqrt(values.size), name


def test_a_seed_gives_the_same_initial_weights():
    a, b, c = (Transformer(UNTIED, seed).wte.weight.numpy() for seed in (1, 1, 2))
    assert (a == b).all() and (a != c).any()


# Modes and noise


def test_dropout_is_on_in_training_and_off_in_evaluation(dropping):
    model, loss = dropping
    first, other = (loss(*batch(), key(1, i)).item() for i in (0, 1))
    assert first != other
    assert loss(*batch(), key(1, 0)).item() == first
    assert loss(*batch(), key(2, 0)).item() != first
    try:
        quiet = model.loss(*batch(), INFERENCE).item()
        assert quiet == model.eval().loss(*batch()).item()
    finally:
        model.train()
    assert abs(quiet - first) > 1e-3


def test_without_a_key_dropout_draws_from_tinygrads_generator(dropping):
    model, _ = dropping
    Tensor.manual_seed(3)
    a, b = (model.loss(*batch()).item() for _ in range(2))
    Tensor.manual_seed(3)
    assert model.loss(*batch()).item() == a != b


def test_the_jitted_loss_equals_the_eager_one(dropping):
    model, loss = dropping
    for i in range(4):  # captured on the second call, replayed from the third
        x, y = np.roll(X, i, 0), np.roll(Y, i, 0)
        eager = model.loss(*batch(x, y), dropout(key(7, i))).item()
        assert loss(*batch(x, y), key(7, i)).item() == pytest.approx(eager, rel=1e-6)


def test_no_dropout_means_training_and_evaluation_agree():
    model = Transformer(UNTIED)
    training, evaluating = model.train()(Tensor(X)), model.eval()(Tensor(X))
    np.testing.assert_array_equal(training.numpy(), evaluating.numpy())


def test_modes_return_the_model():
    model = Transformer(UNTIED)
    assert model.training
    assert model.eval() is model and not model.training
    assert model.train() is model and model.training


def test_dropout_zeroes_its_share_and_scales_the_rest():
    x = Tensor.full((200, 100), 3.0).contiguous()
    out = kernels.dropout(x, 0.25, key(5, 6)).numpy()
    assert set(np.unique(out)) == {0.0, 4.0}
    assert (out == 0).mean() == pytest.approx(0.25, abs=0.015)


def test_draws_of_one_dropout_are_independent():
    drop, x = Dropout(0.5, key(5, 6)), Tensor.ones(64, 64).contiguous()
    a, b = (drop(x) for _ in range(2))
    agreement = (a == b).float().mean().item()
    assert agreement == pytest.approx(0.5, abs=0.04)


# Bad input


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        (np.zeros(4, np.int32), r"shape \(4,\).*wanted integers of shape \(batch, time\)"),
        (np.zeros((1, 2, 3), np.int32), r"shape \(1, 2, 3\)"),
        (np.zeros((1, 4), np.float32), "dtype float"),
        (np.zeros((1, BLOCK + 1), np.int32), f"{BLOCK + 1} positions.*block_size={BLOCK}"),
        (np.zeros((1, 0), np.int32), "0 positions"),
    ],
)
def test_tokens_of_a_wrong_shape_or_type_are_errors(tokens, says):
    model = Transformer(UNTIED)
    with pytest.raises(UsageError, match=says):
        model(Tensor(tokens))


def test_targets_of_another_shape_are_errors():
    with pytest.raises(UsageError, match=r"targets of shape \(3, 7\).*\(3, 8\)"):
        Transformer(UNTIED).loss(Tensor(X), Tensor(Y[:, 1:]))
