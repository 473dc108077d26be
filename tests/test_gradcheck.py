"""The gate: every gradient agrees with finite differences, and a wrong one does not get through."""

import json
import math

import numpy as np
import pytest
from tinygrad import Tensor, dtypes

from tinygpt import kernels
from tinygpt.config import GPTConfig
from tinygpt.errors import UsageError
from tinygpt.model.transformer import Transformer
from tinygpt.training.gradcheck import gradcheck

SHAPE = {"block_size": 6, "vocab_size": 11, "n_layer": 1, "n_head": 2, "n_embd": 8}
TOKENS = np.random.default_rng(0).integers(0, 11, (2, 7)).astype(np.int32)
X, Y = Tensor(TOKENS[:, :-1].copy()), Tensor(TOKENS[:, 1:].copy())


def checked(samples=2, **settings):
    model = Transformer(GPTConfig(**SHAPE | settings))
    return model, gradcheck(model, X, Y, samples=samples)


@pytest.fixture(scope="module")
def good():
    return checked(dropout=0.5)


def test_every_gradient_agrees_with_finite_differences(good):
    model, report = good
    assert [row.name for row in report.rows] == list(model.parameters())
    assert report.ok and report.worst < 1e-6
    assert all(row.gradient_norm > 0 for row in report.rows)


def test_untied_weights_without_biases_agree_too():
    _, report = checked(tie_embeddings=False, bias=False)
    assert report.ok and report.worst < 1e-6
    assert report.rows[-1].name == "lm_head.weight"


def test_the_model_is_left_as_it_was():
    model = Transformer(GPTConfig(**SHAPE))
    before = {name: (p.uop, p.numpy()) for name, p in model.parameters().items()}

    def broken(*_):
        raise ZeroDivisionError

    for training in (True, False):
        model.train(training)
        model.loss = broken
        with pytest.raises(ZeroDivisionError):
            gradcheck(model, X, Y)
        del model.loss
        assert model.training is training
    gradcheck(model, X, Y, samples=0)
    for name, p in model.parameters().items():
        uop, values = before[name]
        assert p.uop is uop and p.dtype == dtypes.float32
        np.testing.assert_array_equal(p.numpy(), values)


def plant(monkeypatch, name, factor=0.01):
    """Make one operation's gradient wrong by a factor, its value staying what it is."""
    right = getattr(kernels, name)

    def wrong(x, *args):
        y = right(x, *args)
        return y + factor * (y - y.detach())

    monkeypatch.setattr(kernels, name, wrong)


@pytest.mark.parametrize("name", ["gelu", "layer_norm"])
def test_a_planted_wrong_gradient_is_caught(name, monkeypatch):
    plant(monkeypatch, name)
    _, report = checked(samples=0)
    wrong = {row.name for row in report.rows if not row.passed}
    assert not report.ok and report.worst > 1e-3
    assert {"h.0.mlp.c_fc.weight", "h.0.ln_2.weight"} <= wrong
    if name == "gelu":  # nothing behind the fault is blamed
        assert not {"h.0.mlp.c_proj.weight", "ln_f.weight"} & wrong
    assert "WRONG" in report.table() and "gradients are wrong" in report.table()


def test_one_wrong_element_is_caught(monkeypatch):
    right = kernels.linear

    def wrong(x, weight, *args):
        y = right(x, weight, *args)
        if weight.shape != (24, 8):  # c_attn
            return y
        one = weight[3, 5]
        return y + 0.01 * (one - one.detach()) * y.detach().mean()

    monkeypatch.setattr(kernels, "linear", wrong)
    _, report = checked(samples=0)
    assert [row.name for row in report.rows if not row.passed] == ["h.0.attn.c_attn.weight"]


def test_a_parameter_that_is_not_a_number_does_not_pass():
    model = Transformer(GPTConfig(**SHAPE))
    model.ln_f.bias.assign(Tensor.full((8,), float("nan")).contiguous()).realize()
    report = gradcheck(model, X, Y, samples=0)
    assert not report.ok and math.isnan(report.worst)


def test_the_report_is_a_table_and_json(good):
    model, report = good
    lines = report.table().splitlines()
    assert len(lines) == len(model.parameters()) + 2
    assert "11x8" in lines[1] and lines[-1].startswith("all agree: the largest relative error")
    values = json.loads(json.dumps(report.to_dict()))
    assert values["ok"] is True and values["worst"] == report.worst
    assert values["rows"][0]["name"] == "wte.weight" and values["rows"][0]["shape"] == [11, 8]


@pytest.mark.parametrize(
    "wrong", [{"epsilon": 0.0}, {"epsilon": math.nan}, {"tolerance": 2.0}, {"samples": -1}]
)
def test_settings_that_cannot_work_are_errors(wrong, good):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        gradcheck(good[0], X, Y, **wrong)
