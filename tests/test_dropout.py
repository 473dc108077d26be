"""Dropout: its masks, and the kernels that make them where they are used."""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from tinygrad import Tensor, TinyJit, dtypes
from tinygrad.dtype import DType

import tinygpt.kernels.attention as attention
from tests.test_attention import RENDERERS, exact, problem, render, tensor
from tinygpt import kernels
from tinygpt.config import GPTConfig
from tinygpt.errors import UsageError
from tinygpt.generation.decoder import Decoder, Sequence
from tinygpt.kernels.attention import (
    backward,
    flash_attention,
    plain_self_attention,
    self_attention,
)
from tinygpt.kernels.attention.forward import forward
from tinygpt.kernels.attention.tiles import Problem
from tinygpt.kernels.dropout import dropout, mix, plain_mask
from tinygpt.model.transformer import Dropout, Transformer
from tinygpt.training.gradcheck import gradcheck

dropout_module = importlib.import_module("tinygpt.kernels.dropout")  # kernels.dropout: a function

KEY = (1337, 42)
P = 0.3
CONFIG = {"block_size": 8, "vocab_size": 16, "n_layer": 1, "n_head": 2, "n_embd": 16}


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory starts as NaN: what a kernel forgets to write shows."""

    def poisoned(like: Tensor, *shape: int, dtype: DType | None = None) -> Tensor:
        return tensor(np.full(shape, np.nan, np.float32), dtype or like.dtype, like.device)

    for module in (attention, dropout_module):
        monkeypatch.setattr(module, "empty", poisoned)


def key_of(first: int, second: int, device: str | None = None) -> Tensor:
    return Tensor([first, second], dtype=dtypes.uint32, device=device).realize()


def python_mix(x: int) -> int:
    x = (x ^ x >> 16) * 0x7FEB352D % 2**32
    x = (x ^ x >> 15) * 0x846CA68B % 2**32
    return x ^ x >> 16


def python_mask(rows: int, columns: int, p: float, first: int, second: int) -> np.ndarray:
    """The mask by Python's own numbers, which do not wrap."""
    mask = np.zeros((rows, columns), bool)
    for row in range(rows):
        start = python_mix((python_mix(row ^ first) + second) % 2**32)
        stride = python_mix((python_mix(row ^ second) + first + 0x9E3779B9) % 2**32) | 1
        for column in range(columns):
            bits = python_mix((start + stride * column) % 2**32)
            mask[row, column] = bits < min(round((1 - p) * 2**32), 2**32 - 1)
    return mask


def mask_of(rows: int, columns: int, p: float, first: int, second: int) -> np.ndarray:
    return plain_mask(rows, columns, p, key_of(first, second)).numpy()


def weights_mask(B: int, H: int, Tq: int, Tk: int, p: float, key: tuple[int, int]) -> np.ndarray:
    """(B, H, Tq, Tk): rows of the mask are keys."""
    return mask_of(B * H * Tk, Tq, p, *key).reshape(B, H, Tk, Tq).swapaxes(2, 3)


# The masks themselves


@pytest.mark.parametrize("key", [KEY, (0, 0), (2**32 - 1, 2**31)])
@pytest.mark.parametrize("p", [0.1, 0.5, 1e-12])
def test_the_twins_mask_is_what_is_written_down(key: tuple[int, int], p: float) -> None:
    np.testing.assert_array_equal(mask_of(21, 37, p, *key), python_mask(21, 37, p, *key))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_a_mask_keeps_its_share_overall_and_by_rows_and_columns(p: float) -> None:
    n = 1024
    mask = mask_of(n, n, p, *KEY)
    assert abs(mask.mean() - (1 - p)) < 4 * math.sqrt(p * (1 - p) / n**2)
    for axis in (0, 1):
        # the mean of n squares of normal numbers is 1, give or take sqrt(2 / n)
        squares = ((mask.sum(axis) - n * (1 - p)) ** 2 / (n * p * (1 - p))).mean()
        assert abs(squares - 1) < 4 * math.sqrt(2 / n)


def assert_independent(a: np.ndarray, b: np.ndarray, p: float, what: object) -> None:
    """Their correlation is within 5 deviations of that of independent masks: many are tried."""
    products = (a - (1 - p)) * (b - (1 - p))
    assert abs(products.mean()) * math.sqrt(products.size) < 5 * p * (1 - p), what


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_neighbours_are_independent(p: float) -> None:
    n = 1024
    mask = mask_of(n, n, p, *KEY)
    for down in range(4):
        for right in range(-4, 5):
            if down or right > 0:
                here = mask[: n - down, max(0, -right) : n - max(0, right)]
                there = mask[down:, max(0, right) : n - max(0, -right)]
                assert_independent(here, there, p, (down, right))


def test_the_corners_of_rectangles_are_independent() -> None:
    """What a mix of a row's number and a column's number, each by itself, would not be."""
    sign = mask_of(1024, 1024, 0.5, *KEY) * 2.0 - 1
    for down in (1, 2, 16, 512):
        pairs = sign[down:] * sign[:-down]
        for right in (1, 2, 16, 512):
            corners = pairs[:, right:] * pairs[:, :-right]
            assert abs(corners.mean()) * math.sqrt(corners.size) < 4, (down, right)


def test_layers_steps_and_seeds_have_masks_of_their_own() -> None:
    first, second = KEY
    drop = Dropout(P, key_of(first, second))
    keys = {(first, second), (first, second + 1), (first + 1, second), (second, first)}
    keys |= {(first ^ 1 << bit, second) for bit in (8, 16, 31)}
    keys |= {(first, second ^ 1 << bit) for bit in (8, 16, 31)}
    keys |= {tuple(map(int, drop.draw().numpy())) for _ in range(3)}
    masks = [(key, mask_of(512, 512, P, *key)) for key in sorted(keys)]
    assert len(masks) == 13
    for i, (a, left) in enumerate(masks):
        for b, right in masks[:i]:
            assert_independent(left, right, P, (a, b))
            assert_independent(left[1:], right[:-1], P, (a, b))


def test_each_bit_of_a_number_changes_each_bit_of_its_hash_half_of_the_time() -> None:
    n = 4096
    x = np.random.default_rng(0).integers(0, 2**32, n, np.uint32)
    hashed = mix(Tensor(x)).numpy()
    assert hashed[0] == python_mix(int(x[0]))
    for bit in range(32):
        changed = hashed ^ mix(Tensor(x ^ np.uint32(1 << bit))).numpy()
        shares = (changed[:, None] >> np.arange(32, dtype=np.uint32) & 1).mean(0)
        assert abs(shares - 0.5).max() < 5 * 0.5 / math.sqrt(n), bit


def test_keys_of_a_step_follow_one_another_and_do_not_depend_on_the_process() -> None:
    drop = Dropout(P, key_of(2**32 - 1, 5))
    assert drop.draw().tolist() == [0x9E3779B8, 0x9E3779BE]
    assert drop.draw().tolist() == [0x3C6EF371, 0x3C6EF377]


# Dropout of activations


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (3, 11, 40), (64, 128)])
def test_activations_are_dropped_by_the_mask(shape: tuple[int, ...]) -> None:
    mask = mask_of(math.prod(shape[:-1]), shape[-1], 0.5, *KEY).reshape(shape)
    x, residual, grad = (np.random.default_rng(i).normal(size=shape) for i in range(3))
    given = [tensor(a.astype(np.float32)) for a in (x, residual)]
    y = dropout(given[0], 0.5, key_of(*KEY)) + given[1]
    found = y.gradient(*given, gradient=tensor(grad.astype(np.float32)))
    np.testing.assert_allclose(y.numpy(), residual + mask * x * 2, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(found[0].numpy(), mask * grad.astype(np.float32) * 2)
    np.testing.assert_array_equal(found[1].numpy(), grad.astype(np.float32))
    alone = dropout(given[0], 0.5, key_of(*KEY)).numpy()
    np.testing.assert_array_equal(alone, mask * x.astype(np.float32) * 2)


@pytest.mark.parametrize("dtype", [dtypes.half, dtypes.bfloat16, dtypes.float64])
def test_activations_of_other_types(dtype: DType) -> None:
    x = Tensor.ones(9, 20, dtype=dtype).contiguous()
    y = dropout(x, 0.5, key_of(*KEY))
    assert y.dtype == dtype
    np.testing.assert_array_equal(y.float().numpy(), 2 * mask_of(9, 20, 0.5, *KEY))


def test_dropped_activations_are_those_of_the_plain_twin() -> None:
    x = tensor(np.random.default_rng(0).normal(size=(2, 9, 20)).astype(np.float32))
    given = (x, P, key_of(*KEY))
    with kernels.plain():
        wanted = kernels.dropout(*given).numpy()
    np.testing.assert_allclose(kernels.dropout(*given).numpy(), wanted, rtol=1e-6, atol=1e-7)


# Dropout of attention weights


@pytest.mark.parametrize(("Tq", "Tk"), [(1, 1), (7, 7), (64, 64), (65, 65), (130, 130), (33, 70)])
def test_weights_are_dropped_by_the_mask(Tq: int, Tk: int) -> None:
    """Equal weights, and the identity for values: the result is the mask."""
    q, k = (tensor(np.zeros((1, 2, T, Tk), np.float32)) for T in (Tq, Tk))
    v = tensor(np.tile(np.eye(Tk, dtype=np.float32), (1, 2, 1, 1)))
    out = flash_attention(q, k, v, False, P, key_of(*KEY)).numpy()
    np.testing.assert_array_equal(out != 0, weights_mask(1, 2, Tq, Tk, P, KEY))
    np.testing.assert_allclose(out[out != 0], 1 / Tk / (1 - P), rtol=1e-5)


def in_float64(
    given: list[np.ndarray], causal: bool, mask: np.ndarray, p: float
) -> list[np.ndarray]:
    """The result and the gradients of q, k and v, from the formulas with a mask."""
    q, k, v, grad = (x.astype(np.float64) for x in given)
    (Tq, D), Tk = q.shape[2:], k.shape[2]
    scores = q @ k.swapaxes(2, 3) / math.sqrt(D)
    if causal:
        scores = np.where(np.tri(Tq, Tk, Tk - Tq, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    scale = mask / (1 - p)
    dw = scale * (grad @ v.swapaxes(2, 3))
    ds = weights * (dw - (dw * weights).sum(-1, keepdims=True)) / math.sqrt(D)
    dropped = weights * scale
    return [dropped @ v, ds @ k, ds.swapaxes(2, 3) @ q, dropped.swapaxes(2, 3) @ grad]


def assert_near(found: list[np.ndarray], wanted: list[np.ndarray], error: float = 1e-5) -> None:
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True):
        limit = error * max(1, abs(b).max())
        np.testing.assert_allclose(a, b, rtol=error, atol=limit, err_msg=name)


def flash(
    arrays: list[np.ndarray], causal: bool, dtype: DType = dtypes.float32, device: str | None = None
) -> list[np.ndarray]:
    q, k, v, grad = (tensor(x, dtype, device) for x in arrays)
    out = flash_attention(q, k, v, causal, P, key_of(*KEY, device))
    found = [out, *out.gradient(q, k, v, gradient=grad)]
    wide = dtypes.float64 if dtype == dtypes.float64 else dtypes.float32
    return [x.cast(wide).numpy() for x in found]


@pytest.mark.parametrize(
    ("shape", "causal"),
    [
        ((2, 1, 1, 1, 16), True),
        ((1, 2, 7, 7, 32), True),
        ((1, 1, 64, 64, 64), True),
        ((1, 2, 65, 65, 16), True),
        ((1, 1, 130, 130, 128), True),
        ((1, 2, 33, 50, 20), False),
    ],
)
def test_attention_and_its_gradients_are_those_of_float64(
    shape: tuple[int, int, int, int, int], causal: bool
) -> None:
    arrays = problem(*shape)
    mask = weights_mask(*shape[:4], P, KEY)
    assert_near(flash(arrays, causal), in_float64(arrays, causal, mask, P))


@pytest.mark.parametrize(("dtype", "error"), [(dtypes.half, 4e-3), (dtypes.float64, 1e-12)])
def test_attention_of_other_types(dtype: DType, error: float) -> None:
    shape = (1, 2, 20, 37, 16)  # the last 20 of 37 positions
    wide = dtypes.float64 if dtype == dtypes.float64 else dtypes.float32
    arrays = [tensor(x, dtype).cast(wide).numpy() for x in problem(*shape)]
    wanted = in_float64(arrays, True, weights_mask(*shape[:4], P, KEY), P)
    assert_near(flash(arrays, True, dtype), wanted, error)


@pytest.mark.parametrize("T", [1, 20])
def test_packed_attention_and_its_gradient_are_those_of_the_plain_twin(T: int) -> None:
    rng = np.random.default_rng(0)
    x = tensor(rng.normal(size=(2, T, 96)).astype(np.float32))
    grad = tensor(rng.normal(size=(2, T, 32)).astype(np.float32))
    found = []
    for function in (self_attention, plain_self_attention):
        y = function(x, 2, P, key_of(*KEY))
        found.append([t.numpy() for t in (*y.gradient(x, gradient=grad), y)])
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_the_mean_over_many_keys_is_attention_without_dropout() -> None:
    n, arrays = 4000, problem(1, 1, 8, 8, 4)
    q, k, v = (tensor(np.repeat(x, n, 0)) for x in arrays[:3])
    mean = flash_attention(q, k, v, True, P, key_of(*KEY)).numpy().mean(0)
    np.testing.assert_allclose(mean, exact(*arrays, True)[0][0], atol=0.06)


# Wherever it runs, the same


def test_results_are_bitwise_the_same_for_any_number_of_pieces(
    cut: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    x, grad = (tensor(rng.normal(size=(1, 37, n)).astype(np.float32)) for n in (96, 32))
    results = []
    for pieces, heads in ((1, 1), (3, 1), (2, 3)):  # below 3 heads, other backward kernels
        cut(pieces)
        monkeypatch.setattr(attention, "HEADS", heads)
        y = self_attention(x, 2, P, key_of(*KEY))
        z = dropout(y, P, key_of(*KEY))
        results.append([t.numpy() for t in (*z.gradient(x, gradient=grad), y, z)])
        assert all((found != 0).any() for found in results[-1])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_jitted_step_equals_an_eager_one() -> None:
    def step(x: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        drop = Dropout(P, key)
        y = dropout(self_attention(x, 2, P, drop.draw()), P, drop.draw()) + x[:, :, :32]
        found = y, y.gradient(x, gradient=x[:, :, 32:64].contiguous())[0]
        Tensor.realize(*found)
        return found

    jitted, seen = TinyJit(step), []
    x = tensor(np.random.default_rng(0).normal(size=(1, 20, 96)).astype(np.float32))
    for number in range(5):
        key = key_of(7, number)
        found = [t.numpy() for t in jitted(x, key)]
        for a, b in zip(found, step(x, key), strict=True):
            np.testing.assert_array_equal(a, b.numpy())
        assert all((found[0] != other).any() for other in seen)
        seen.append(found[0])


@pytest.mark.skipif(os.environ.get("DEV", "CPU") != "CPU", reason="once is enough")
def test_the_kernels_for_gpus_make_the_same_mask() -> None:
    arrays = problem(1, 1, 5, 6, 4)
    wanted = in_float64(arrays, True, weights_mask(1, 1, 5, 6, P, KEY), P)
    assert_near(flash(arrays, True, device="PYTHON"), wanted)
    x = Tensor.ones(3, 5, device="PYTHON").contiguous()
    for device in ("PYTHON", None):  # with a key from another device it is the twin
        y = dropout(x, 0.5, key_of(*KEY, device)).numpy()
        np.testing.assert_array_equal(y, 2 * mask_of(3, 5, 0.5, *KEY))


def test_tensors_on_several_devices_go_to_the_plain_twins() -> None:
    x = np.random.default_rng(0).normal(size=(2, 5, 12)).astype(np.float32)
    wanted = self_attention(tensor(x), 2, P, key_of(*KEY)).numpy()
    several = Tensor(x).shard(("CPU", "CPU:1"), axis=0)
    found = self_attention(several, 2, P, key_of(*KEY)).numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    wanted = dropout(tensor(x), P, key_of(*KEY)).numpy()
    found = dropout(several, P, key_of(*KEY)).numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize("plainly", [False, True])
def test_the_masks_of_parts_of_a_batch_are_together_that_of_the_whole(plainly: bool) -> None:
    """Each part has a key that says where it begins, on the second layer's mask as on the first."""
    x = np.random.default_rng(0).normal(size=(6, 5, 12)).astype(np.float32)

    def dropped(rows: np.ndarray, key: Tensor) -> list[np.ndarray]:
        key, given = kernels.next_key(key), tensor(rows)
        results = [dropout(given, P, key), self_attention(given, 2, P, key)]
        results += [r.square().sum().gradient(given)[0] for r in results]
        return [r.numpy() for r in results]

    def part(begin: int, end: int) -> list[np.ndarray]:
        return dropped(x[begin:end], Tensor([*KEY, begin], dtype=dtypes.uint32).realize())

    with kernels.use("plain" if plainly else "auto"):
        whole, parts = dropped(x, key_of(*KEY)), [part(0, 2), part(2, 5), part(5, 6)]
    for i, wanted in enumerate(whole):
        np.testing.assert_allclose(
            np.concatenate([p[i] for p in parts]), wanted, rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("name", RENDERERS)
def test_the_kernels_can_be_written_for_gpus(name: str) -> None:
    sizes = Problem(1, 2, 40, 40, 16, causal=True, packed=True, dropout=P)
    n, rows = 40 * 32, 80
    written = [
        (forward, 2, (n, rows, 3 * n, 2), {"p": sizes}),
        (backward.queries, 1, (3 * n, n, rows, rows, 3 * n, 2), {"p": sizes}),
        (backward.keys, 1, (3 * n, n, rows, rows, 3 * n, 2), {"p": sizes}),
        (dropout_module._dropout, 1, (n, n, 2), {"rows": 40, "width": 32, "p": P}),
        (forward, 2, (n, rows, 3 * n, 3), {"p": replace(sizes, part=True)}),
        (dropout_module._dropout, 1, (n, n, 3), {"rows": 40, "width": 32, "p": P, "each": 40}),
    ]
    for kernel, outputs, lengths, constants in written:
        source = render(name, kernel, outputs, lengths, constants)
        assert str(0x846CA68B) in source
        assert "long" not in source and "i64" not in source  # WebGPU has no 64-bit integers


# In the model


def model_of(p: float, seed: int = 1) -> Transformer:
    model = Transformer(GPTConfig(**CONFIG, dropout=p), seed)
    for i, weight in enumerate(model.parameters().values()):
        values = np.random.default_rng(i).normal(0, 0.3, weight.shape)
        weight.assign(Tensor(values.astype(np.float32)).realize()).realize()
    return model


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return Tensor(np.random.default_rng(seed).integers(0, 16, shape).astype(np.int32)).realize()


@pytest.mark.slow
def test_a_model_with_dropout_trains_by_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = model_of(P), tokens(3, 8), tokens(3, 8, seed=1)
    weights = [model.wte.weight, model.h[0].attn.c_attn.weight, model.h[0].mlp.c_fc.weight]

    def loss_and_gradients() -> list[np.ndarray]:
        loss = model.loss(x, y, Dropout(P, key_of(*KEY)))
        found = [loss, *loss.gradient(*weights)]
        Tensor.realize(*found)
        return [t.numpy() for t in found]

    with kernels.plain():
        wanted = loss_and_gradients()
    monkeypatch.delattr(attention, "plain_attention")
    monkeypatch.delattr(dropout_module, "plain_mask")
    for a, b in zip(loss_and_gradients(), wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * max(1, abs(b).max()))


def test_every_place_in_the_model_has_a_mask_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def dropped(x: Tensor, p: float, key: Tensor) -> Tensor:
        seen.append(("residual", p, tuple(key.tolist())))
        return x

    def attended(qkv: Tensor, n_head: int, p: float, key: Tensor) -> Tensor:
        seen.append(("weights", p, tuple(key.tolist())))
        return qkv[:, :, : CONFIG["n_embd"]]

    monkeypatch.setattr(kernels, "dropout", dropped)
    monkeypatch.setattr(kernels, "self_attention", attended)
    Transformer(GPTConfig(**CONFIG | {"n_layer": 2}, dropout=P))(tokens(1, 8))
    # the embedding; then in each layer the attention, its output and the MLP's
    places = ["residual", *["weights", "residual", "residual"] * 2]
    assert [(place, p) for place, p, _ in seen] == [(place, P) for place in places]
    assert len({key for *_, key in seen}) == len(seen)


def test_inference_and_decoding_know_nothing_of_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    with_it, without = model_of(P).eval(), model_of(0.0).eval()
    x = tokens(1, 8)
    np.testing.assert_array_equal(with_it(x).numpy(), without(x).numpy())
    monkeypatch.delattr(kernels, "dropout")
    monkeypatch.delattr(kernels, "next_key")
    assert decoded(with_it) == decoded(without)


def decoded(model: Transformer) -> list[float]:
    decoder, sequence, logits = Decoder(model), Sequence([1, 2]), list[float]()
    for i in range(3):
        sequence.ids.append(i)
        logits += decoder.next_logits([sequence])[0].tolist()
    return logits


def test_every_gradient_agrees_with_finite_differences_under_dropout() -> None:
    model, x, y = model_of(P), tokens(2, 6), tokens(2, 6, seed=1)
    report = gradcheck(model, x, y, samples=1, dropout_key=KEY)
    assert report.ok and report.worst < 1e-6
    assert all(row.gradient_norm > 0 for row in report.rows)
    quiet = gradcheck(model, x, y, samples=0)
    assert quiet.loss != report.loss
    assert report.loss == pytest.approx(model.loss(x, y, Dropout(P, key_of(*KEY))).item(), rel=1e-4)


def test_what_does_not_fit_is_refused_with_advice() -> None:
    x = Tensor.empty(1, 4, 24)
    with pytest.raises(UsageError, match=r"dropout=0\.5 needs a key.*given was none"):
        self_attention(x, 2, 0.5)
    with pytest.raises(UsageError, match=r"\(3,\) float"):
        self_attention(x, 2, 0.5, Tensor.empty(3))
    for p in (1.0, -0.1, math.nan):
        with pytest.raises(UsageError, match="not a probability"):
            self_attention(x, 2, p, key_of(*KEY))
