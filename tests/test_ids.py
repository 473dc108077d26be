"""Ids without a row: the fast kernels and their plain twins say the same of them."""

from __future__ import annotations

import numpy as np
import pytest
from tinygrad import Tensor

from tinygpt import GPT, ByteTokenizer, GPTConfig, TrainConfig, kernels, load, train
from tinygpt.errors import UsageError
from tinygpt.interop.web import export_web

IDS = np.array([[0, -1, 7, 8, 3, 2**31 - 1]], np.int32)
V, C = 8, 16


def both(compute, *given) -> tuple[np.ndarray, np.ndarray]:
    with kernels.plain():
        twin = compute(*given).numpy()
    return compute(*given).numpy(), twin


@pytest.mark.parametrize("positions", [False, True])
def test_a_row_that_is_not_there_is_nan(positions: bool):
    draw = np.random.default_rng(0).standard_normal
    weight, table = Tensor(draw((V, C), np.float32)), Tensor(draw((6, C), np.float32))
    given = [Tensor(IDS), weight, *([table] if positions else [])]
    fast, twin = both(kernels.embedding, *given)
    np.testing.assert_array_equal(fast, twin)
    assert np.isnan(fast[0]).all(-1).tolist() == [False, True, False, True, False, True]


def test_a_row_of_int8_that_is_not_there_is_nan():
    numbers = np.arange(V * C).reshape(V, C).astype(np.int8)
    weight, scale = Tensor(numbers), Tensor(np.arange(1, V + 1, dtype=np.float32))
    fast, twin = both(kernels.embedding, Tensor(IDS), weight, None, scale)
    np.testing.assert_array_equal(fast, twin)
    assert np.isnan(fast[0]).all(-1).tolist() == [False, True, False, True, False, True]


def test_they_have_no_gradient_either():
    def gradient(weight: Tensor) -> Tensor:
        rows = kernels.embedding(Tensor(IDS), weight)
        return (rows.isnan().where(0, rows)).sum().gradient(weight)[0]

    fast, twin = both(gradient, Tensor(np.ones((V, C), np.float32)))
    np.testing.assert_array_equal(fast, twin)
    assert fast[:, 0].tolist() == [1, 0, 0, 1, 0, 0, 0, 1]


@pytest.mark.parametrize(
    ("targets", "counts"), [([1, -1, 7], True), ([1, 8, 7], False), ([-1, -5, -1], True)]
)
def test_targets_without_a_row(targets: list[int], counts: bool):
    x = Tensor(np.random.default_rng(0).standard_normal((3, C), np.float32))
    weight = Tensor(np.random.default_rng(1).standard_normal((V, C), np.float32))
    found = [
        *both(kernels.cross_entropy, x @ weight.T, Tensor(targets, dtype="int32")),
        *both(lambda *g: kernels.loss(*g, gradient=False), x, weight, Tensor(targets)),
        *both(lambda *g: kernels.loss(*g, gradient=True), x, weight, Tensor(targets)),
    ]
    assert [bool(np.isfinite(loss)) for loss in found] == [counts] * 6
    np.testing.assert_allclose(found, found[0], rtol=1e-5)


# What only looks like a yes ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("load") / "run"
    GPT(GPTConfig(8, 256, n_layer=1, n_head=1, n_embd=16)).save_checkpoint(1, None, folder)
    return folder


@pytest.mark.parametrize(
    ("quantize", "quantized"), [(None, False), (False, False), ("int8", True), ("int4", True)]
)
def test_weights_are_rounded_if_that_is_asked_for(run, quantize, quantized: bool):
    assert load(run, quantize=quantize)[0].quantized is quantized


@pytest.mark.parametrize("quantize", ["int2", "", True, 0, 8, ["int8"]])
def test_anything_else_is_refused(run, quantize):
    with pytest.raises(UsageError, match="Wanted: 'int8', 'int4', or None"):
        load(run, quantize=quantize)


def test_a_page_s_weights_have_a_kind_that_is_known(tmp_path):
    model = GPT(GPTConfig(8, 256, n_layer=1, n_head=1, n_embd=16))
    with pytest.raises(UsageError, match="Wanted: float16, float32, int8"):
        export_web(model, ByteTokenizer(), tmp_path / "page.html", kind="int4")  # type: ignore[arg-type]


# A sample that fails -----------------------------------------------------------------------------


def test_a_sample_that_fails_ends_no_run(monkeypatch: pytest.MonkeyPatch, tmp_path):
    from tinygpt.runs import run

    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("by chance")

    monkeypatch.setattr(run, "generate_tokens", fail)
    model = GPT(GPTConfig(8, 256, n_layer=1, n_head=1, n_embd=16))
    config = TrainConfig(max_iters=2, sample_interval=1, batch_size=1, eval_interval=2)
    text = np.arange(200, dtype=np.int32) % 256
    result = train(model, config, text, tokenizer=ByteTokenizer(), out_dir=tmp_path, show=False)
    assert result.iter_num == 2
