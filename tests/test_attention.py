"""Flash attention against float64, for shapes, types, threads and devices."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tinygrad import Tensor, TinyJit, UOp, dtypes
from tinygrad.codegen import full_rewrite_to_sink, line_rewrite, linearize, pm_linearize_cleanups
from tinygrad.dtype import DType
from tinygrad.helpers import Context, Target
from tinygrad.renderer.cstyle import (
    CStyleLanguage,
    CUDARenderer,
    MetalRenderer,
    OpenCLRenderer,
)
from tinygrad.renderer.wgsl import WGSLRenderer

import tinygpt.kernels.attention as attention
from tests.conftest import CUTS
from tinygpt import GPT, kernels, load
from tinygpt.config import GPTConfig, TrainConfig
from tinygpt.errors import ConfigError, KernelError, UsageError
from tinygpt.generation.decoder import Decoder, Sequence
from tinygpt.kernels.attention import (
    backward,
    flash_attention,
    plain_attention,
    rows,
    self_attention,
)
from tinygpt.kernels.attention.forward import forward
from tinygpt.kernels.attention.tiles import Problem
from tinygpt.kernels.phases import build, empty
from tinygpt.model.transformer import Dropout, Transformer
from tinygpt.training.loop import train_steps
from tinygpt.training.optim import make_optimizer

Shape = tuple[int, int, int, int, int]  # B, H, Tq, Tk, D
SHAPE = (1, 2, 20, 37, 16)


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory starts as NaN: what a kernel forgets to write, or reads too early, shows."""

    def poisoned(like: Tensor, *shape: int, dtype: DType | None = None) -> Tensor:
        values = np.full(shape, np.nan, np.float32)
        return tensor(values, dtype or like.dtype, like.device)

    monkeypatch.setattr(attention, "empty", poisoned)


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def tensor(
    x: np.ndarray, dtype: DType = dtypes.float32, device: str | tuple[str, ...] | None = None
) -> Tensor:
    return Tensor(x, device=device).cast(dtype).contiguous().realize()


def problem(B: int, H: int, Tq: int, Tk: int, D: int) -> list[np.ndarray]:
    """q, k, v and the gradient of the result."""
    lengths = enumerate((Tq, Tk, Tk, Tq))
    return [numbers(B, H, T, D, seed=i) for i, T in lengths]


def exact(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, grad: np.ndarray, causal: bool
) -> list[np.ndarray]:
    """The result and the gradients of q, k and v, in float64, from the formulas."""
    q, k, v, grad = (x.astype(np.float64) for x in (q, k, v, grad))
    (Tq, D), Tk = q.shape[2:], k.shape[2]
    scores = q @ k.swapaxes(2, 3) / math.sqrt(D)
    if causal:
        scores = np.where(np.tri(Tq, Tk, Tk - Tq, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    dw = grad @ v.swapaxes(2, 3)
    ds = weights * (dw - (dw * weights).sum(-1, keepdims=True)) / math.sqrt(D)
    return [weights @ v, ds @ k, ds.swapaxes(2, 3) @ q, weights.swapaxes(2, 3) @ grad]


def flash(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    grad: np.ndarray,
    causal: bool,
    dtype: DType = dtypes.float32,
    device: str | None = None,
) -> list[np.ndarray]:
    """The same by the kernels."""
    inputs = [tensor(x, dtype, device) for x in (q, k, v)]
    out = flash_attention(*inputs, is_causal=causal)
    found = [out, *out.gradient(*inputs, gradient=tensor(grad, dtype, device))]
    assert all(x.dtype == dtype for x in found)
    wide = dtypes.float64 if dtype == dtypes.float64 else dtypes.float32
    return [x.cast(wide).numpy() for x in found]


def assert_near(found: list[np.ndarray], wanted: list[np.ndarray], error: float = 1e-5) -> None:
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, wanted, strict=False):
        np.testing.assert_allclose(
            a, b, rtol=error, atol=error * max(1, abs(b).max()), err_msg=name
        )


def check(shape: Shape, causal: bool, error: float = 1e-5) -> None:
    given = problem(*shape)
    assert_near(flash(*given, causal), exact(*given, causal), error)


@pytest.mark.parametrize(
    ("shape", "causal"),
    [
        ((1, 2, 1, 1, 16), True),
        ((2, 1, 7, 7, 32), True),
        ((1, 2, 64, 64, 32), True),
        ((1, 1, 1000, 1000, 16), True),
        ((1, 1, 20, 20, 128), True),
        (SHAPE, True),  # the last 20 of 37 positions
        ((1, 2, 33, 50, 20), False),  # nothing that lanes or blocks divide
    ],
)
def test_results_and_gradients_are_those_of_float64(shape: Shape, causal: bool) -> None:
    check(shape, causal)


@settings(max_examples=2)
@given(
    st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 40), st.integers(0, 40)),
    st.sampled_from([16, 17, 40]),
    st.booleans(),
)
def test_any_sizes_will_do(sizes: tuple[int, int, int, int], D: int, causal: bool) -> None:
    B, H, Tq, more = sizes
    check((B, H, Tq, Tq + more, D), causal)


def test_results_and_gradients_are_those_of_the_plain_twin() -> None:
    arrays = problem(*SHAPE)
    q, k, v, grad = (tensor(x) for x in arrays)
    twin = plain_attention(q, k, v, True)
    wanted = [twin, *twin.gradient(q, k, v, gradient=grad)]
    assert_near(flash(*arrays, True), [x.numpy() for x in wanted])


@pytest.mark.parametrize(
    ("dtype", "error"), [(dtypes.half, 4e-3), (dtypes.bfloat16, 3e-2), (dtypes.float64, 1e-12)]
)
def test_other_types(dtype: DType, error: float) -> None:
    wide = dtypes.float64 if dtype == dtypes.float64 else dtypes.float32
    rounded = [tensor(x, dtype).cast(wide).numpy() for x in problem(*SHAPE)]
    assert_near(flash(*rounded, True, dtype), exact(*rounded, True), error)


def test_half_is_added_up_in_float32() -> None:
    T = 4096  # in half, adding ones stops at 2048
    q, k, v = (
        tensor(np.zeros((1, 1, T, 16))),
        tensor(np.zeros((1, 1, T, 16))),
        numbers(1, 1, T, 16),
    )
    out = flash_attention(q[:, :, :1].cast("half"), k.cast("half"), tensor(v + 1, dtypes.half))
    np.testing.assert_allclose(out.float().numpy()[0, 0, 0], (v + 1).mean((0, 1, 2)), rtol=2e-3)


@pytest.mark.parametrize("dtype", [dtypes.float32, dtypes.half])
@pytest.mark.parametrize("T", [1, 40])
def test_packed_attention_is_the_same_without_transposes(dtype: DType, T: int) -> None:
    B, H, D = 2, 3, 16
    rounded = [tensor(x, dtype).float().numpy() for x in problem(B, H, T, T, D)]
    out, *gradients = exact(*rounded, True)
    qkv = np.stack(rounded[:3]).transpose(1, 3, 0, 2, 4).reshape(B, T, 3 * H * D)
    x = tensor(qkv, dtype)
    y = self_attention(x, H)
    grad = tensor(rounded[3].transpose(0, 2, 1, 3).reshape(B, T, H * D), dtype)
    dx = y.gradient(x, gradient=grad)[0]
    assert y.shape == (B, T, H * D) and y.dtype == dx.dtype == dtype
    error = 1e-5 if dtype == dtypes.float32 else 4e-3
    found = y.float().numpy().reshape(B, T, H, D).transpose(0, 2, 1, 3)
    parts = dx.float().numpy().reshape(B, T, 3, H, D).transpose(2, 0, 3, 1, 4)
    assert_near([found, *parts], [out, *gradients], error)


def test_results_are_bitwise_the_same_for_any_number_of_pieces(
    cut: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, grad = tensor(numbers(1, 37, 96)), tensor(numbers(1, 37, 32))
    results = []
    for pieces, heads in itertools.product(CUTS, (1, 3)):  # below, other backward kernels
        cut(pieces)
        monkeypatch.setattr(attention, "HEADS", heads)
        y = self_attention(x, 2)
        dx = y.gradient(x, gradient=grad)[0]  # before y is realized: a value has no gradient
        results.append((y.numpy(), dx.numpy()))
        assert results[-1][1].any()
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


def test_large_scores_are_no_trouble() -> None:
    q, k, v, grad = problem(*SHAPE)
    q *= 1e4 / np.abs(q @ k.swapaxes(2, 3) / 4).max()
    found, wanted = flash(q, k, v, grad, True), exact(q, k, v, grad, True)
    assert all(np.isfinite(x).all() for x in found)
    assert_near(found, wanted, 5e-3)  # the unit in the last place of a score of 1e4 is 1e-3


def test_a_jitted_step_equals_an_eager_one() -> None:
    def step(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
        out = flash_attention(q, k, v, is_causal=True)
        found = [out, *out.gradient(q, k, v, gradient=grad)]
        Tensor.realize(*found)
        return found

    jitted = TinyJit(step)
    for seed in range(5):
        inputs = [tensor(x + seed) for x in problem(*SHAPE)]
        for a, b in zip(jitted(*inputs), step(*inputs), strict=True):
            np.testing.assert_array_equal(a.numpy(), b.numpy())


def test_a_query_does_not_see_behind_itself() -> None:
    q, k, v, _ = problem(1, 2, 64, 64, 32)
    before = flash_attention(tensor(q), tensor(k), tensor(v), True).numpy()
    k[:, :, 30:], v[:, :, 30:] = 1e30, np.nan
    after = flash_attention(tensor(q), tensor(k), tensor(np.nan_to_num(v, nan=1e30)), True).numpy()
    np.testing.assert_array_equal(before[:, :, :30], after[:, :, :30])


@pytest.mark.parametrize("D", [16, 20])
def test_decoding_equals_full_attention_at_every_length(D: int) -> None:
    q, k, v, _ = problem(2, 2, 1, 100, D)
    slots = tensor(np.arange(2), dtypes.int32)
    step = TinyJit(lambda *inputs: rows.rows_attention(*inputs).realize())
    for n in (1, 2, 64, 65, 100, 7):
        keys, values = k.copy(), v.copy()
        keys[:, :, n - 1 :] = values[:, :, n - 1 :] = np.nan  # never written, so never read
        qkv = np.stack([q[:, :, 0], k[:, :, n - 1], v[:, :, n - 1]], axis=1).reshape(2, 6 * D)
        positions = tensor(np.full(2, n - 1), dtypes.int32)
        got = step(tensor(qkv), tensor(keys), tensor(values), slots, positions).numpy()
        assert_near([got.reshape(q.shape)], exact(q, k[:, :, :n], v[:, :, :n], q, False))


def test_what_does_not_fit_is_refused_with_advice() -> None:
    x = Tensor.empty(1, 2, 5, 16)
    with pytest.raises(UsageError, match="do not fit together"):
        flash_attention(x, x, x[:, :, :, :8])
    with pytest.raises(UsageError, match="more queries than keys"):
        flash_attention(x, x[:, :, :3], x[:, :, :3], is_causal=True)
    with pytest.raises(UsageError, match="Cast them to one"):
        flash_attention(x, x, x.half())
    with pytest.raises(UsageError, match="does not split into"):
        self_attention(Tensor.empty(1, 5, 50), 4)


@pytest.mark.skipif(os.environ.get("DEV", "CPU") != "CPU", reason="once is enough")
def test_the_kernels_for_gpus_are_right_on_the_device_that_emulates_one() -> None:
    given = problem(1, 1, 5, 6, 4)
    assert_near(flash(*given, True, device="PYTHON"), exact(*given, True))


RENDERERS = {
    "CUDA": CUDARenderer,
    "METAL": MetalRenderer,
    "CL": OpenCLRenderer,
    "WEBGPU": WGSLRenderer,
}


THREAD = {
    "CUDA": "threadIdx.x",
    "METAL": "lid.x",
    "CL": "get_local_id(0)",
    "WEBGPU": "i32(lindex.x)",
}


@pytest.mark.parametrize("name", RENDERERS)
def test_the_kernels_can_be_written_for_gpus(name: str) -> None:
    sizes = Problem(1, 2, 40, 40, 16, causal=True, packed=True)
    n, rows = 40 * 32, 80
    kernels = [
        (forward, 2, (n, rows, 3 * n), {"p": sizes}),
        (backward.deltas, 1, (rows, n, n), {"p": sizes}),
        (backward.queries, 1, (3 * n, n, rows, rows, 3 * n), {"p": sizes}),
        (backward.keys, 1, (3 * n, n, rows, rows, 3 * n), {"p": sizes}),
    ]
    for kernel, outputs, lengths, constants in kernels:
        source = render(name, kernel, outputs, lengths, constants)
        assert THREAD[name] in source
        assert "long" not in source and "i64" not in source  # WebGPU has no 64-bit integers


def render(
    name: str,
    kernel: Callable[..., None],
    outputs: int,
    lengths: tuple[int, ...],
    constants: dict[str, Any],
) -> str:
    """The kernel's source. A renderer is made without its compiler, which this machine may lack."""
    renderer = RENDERERS[name].__new__(RENDERERS[name])
    CStyleLanguage.__init__(renderer, Target(device=name))
    # a length, and keys of dropout, the second one that of a part
    integers = {1: dtypes.int32, 2: dtypes.uint32, 3: dtypes.uint32}
    types = [integers.get(n, dtypes.float32) for n in lengths]
    sizes = enumerate(zip(lengths, types, strict=True))
    buffers = tuple(UOp.placeholder((n,), dtype, i) for i, (n, dtype) in sizes)
    fixed = tuple(sorted(constants.items()))
    sink = build(kernel, buffers, outputs, 32, False, True, None, 0, fixed)
    uops = linearize(full_rewrite_to_sink(sink, renderer, optimize=False))
    return renderer.render(line_rewrite(uops, pm_linearize_cleanups))


def test_lengths_that_fill_no_group_of_tiles_can_be_compiled_for_many_heads() -> None:
    # With as many units as lanes, tinygrad once left an index inside a loop that another one used.
    check((4, 4, 70, 70, 16), causal=True)


@pytest.mark.slow
@settings(max_examples=40)
@given(
    st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 150), st.integers(0, 100)),
    st.sampled_from([16, 17, 32, 40, 64, 128]),
    st.booleans(),
)
def test_any_larger_sizes_will_do_too(
    sizes: tuple[int, int, int, int], D: int, causal: bool
) -> None:
    B, H, Tq, more = sizes
    check((B, H, Tq, Tq + more, D), causal)


# --- the option of the config -------------------------------------------------

SMALL = {"block_size": 8, "vocab_size": 16, "n_layer": 1, "n_head": 2, "n_embd": 16}
IDS = np.random.default_rng(0).integers(0, 16, (2, 8)).astype(np.int32)


# tinygrad's optimiser, for all but our kernels, takes longer than running such a model.
QUICKLY = Context(NOOPT=1)


@QUICKLY
def results(**options: Any) -> list[np.ndarray]:
    """Loss and gradients of training, then logits of a prompt and of decoding behind it."""
    model = Transformer(GPTConfig(**SMALL | options))
    drop = Dropout(model.config.dropout, Tensor([1, 2], dtype=dtypes.uint32))
    loss = model.loss(Tensor(IDS), Tensor(np.roll(IDS, 1)), drop)
    found = [loss, *loss.gradient(*model.parameters().values())]
    Tensor.realize(*found)
    decoder = Decoder(model)
    sequences = [Sequence(row[:2].tolist()) for row in IDS]
    cached = []
    for n in (2, 3, 4):
        for sequence, row in zip(sequences, IDS, strict=True):
            sequence.ids.append(int(row[n]))
        cached.append(decoder.next_logits(sequences))
    return [x.numpy() for x in found] + cached


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_auto_and_flash_are_the_kernels_and_plain_is_the_same_to_rounding(dropout: float) -> None:
    auto, flash_, plain = (
        results(attention=way, dropout=dropout) for way in ("auto", "flash", "plain")
    )
    for a, b, c in zip(auto, flash_, plain, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_allclose(a, c, rtol=1e-4, atol=1e-5)
    assert any((a != c).any() for a, c in zip(auto, plain, strict=True))


FLASH = ((attention, "_attention"), (rows, "decode_rows"))  # what the ways come down to
PLAIN = ((attention, "plain_attention"), (rows, "_in_place"))


@pytest.mark.parametrize(("way", "others"), [("plain", FLASH), ("flash", PLAIN)])
def test_the_option_holds_for_training_prompts_and_decoding(
    way: str, others: tuple[tuple[Any, str], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError(f"attention={way!r} took another way")

    for module, name in others:
        monkeypatch.setattr(module, name, forbidden)
    results(attention=way)


def test_a_checkpoint_loads_into_a_model_that_computes_attention_otherwise(tmp_path: Path) -> None:
    saved = GPT(GPTConfig(**SMALL, attention="plain"), seed=1)
    path = saved.save_checkpoint(1, folder=tmp_path)
    other = GPT(GPTConfig(**SMALL), seed=2)
    assert other.load_checkpoint(path) == 1
    np.testing.assert_array_equal(other.wte.weight.numpy(), saved.wte.weight.numpy())
    model, _ = load(path)
    assert model.config.attention == "plain"


def test_a_config_from_before_the_option_is_auto() -> None:
    values = {k: v for k, v in GPTConfig(**SMALL).to_dict().items() if k != "attention"}
    assert GPTConfig.from_dict(values).attention == "auto"
    with pytest.raises(ConfigError, match="'auto', 'flash', 'plain'"):
        GPTConfig(**SMALL, attention="fast")  # type: ignore[arg-type]


@QUICKLY
def losses(steps: int, plainly: bool) -> list[float]:
    """Of training a tiny model, clipping and decay included."""
    rng = np.random.default_rng(0)
    tokens = np.cumsum(rng.integers(0, 3, 2000)) % 16  # something to learn
    model = Transformer(GPTConfig(**SMALL))
    config = TrainConfig(
        batch_size=4, max_iters=steps, warmup_steps=5, learning_rate=3e-3, weight_decay=0.1
    )
    optimizer = make_optimizer(model.parameters(), config)
    with kernels.plain() if plainly else contextlib.nullcontext():
        return [s.train_loss for s in train_steps(model, optimizer, config, tokens)]


def test_training_by_the_kernels_and_by_the_twins_has_the_same_losses() -> None:
    fast, plain = losses(200, plainly=False), losses(200, plainly=True)
    assert len(fast) == len(plain) == 200 and fast != plain
    assert fast[-1] < fast[0] - 0.1
    np.testing.assert_allclose(fast, plain, rtol=0, atol=1e-3)


@pytest.mark.parametrize("axis", [0, 1])
def test_tensors_cut_over_devices_are_computed_where_they_lie(
    axis: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "empty", empty)  # not poisoned: that would be on one device
    monkeypatch.setenv("TINYGPT_STRICT", "1")  # no falling back
    devices = ("CPU:0", "CPU:1")
    arrays = [numbers(2, 2, 9, 16, seed=i) for i in range(4)]

    def computed(cut: bool, jitted: bool = False) -> list[np.ndarray]:
        tensors = [Tensor(a).shard(devices, axis=axis) if cut else Tensor(a) for a in arrays]
        Tensor.realize(*tensors)

        def step(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, ...]:
            out = flash_attention(q, k, v, is_causal=True)
            results = (out, *(out * g).sum().gradient(q, k, v))
            Tensor.realize(*results)
            return results

        run = TinyJit(step) if jitted else step
        for _ in range(4 if jitted else 1):
            results = run(*tensors)
        return [r.numpy() for r in results]

    whole = computed(cut=False)
    for jitted in (False, True):
        for ours, wanted in zip(computed(True, jitted), whole, strict=True):
            np.testing.assert_array_equal(ours, wanted)


def test_dropout_over_devices_takes_the_plain_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    q = Tensor(numbers(2, 2, 4, 16)).shard(("CPU:0", "CPU:1"), axis=0).realize()
    key = Tensor([1, 2], dtype=dtypes.uint32)
    monkeypatch.setenv("TINYGPT_STRICT", "1")
    with pytest.raises(KernelError, match="several devices"):
        flash_attention(q, q, q, dropout=0.5, key=key)
