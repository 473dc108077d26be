"""int4 weights: the rounding, the kernels, and a model that writes with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tinygrad import Tensor, dtypes

from tests.conftest import CUTS
from tinygpt import kernels
from tinygpt.api import GPT, load
from tinygpt.config import GPTConfig, SampleConfig
from tinygpt.errors import DataError, UsageError
from tinygpt.generation.decoder import Decoder
from tinygpt.generation.generate import generate_tokens
from tinygpt.interop.gguf.gguf_types import store
from tinygpt.kernels import nibbles, quantized
from tinygpt.kernels.nibbles import int4_linear, plain_int4_linear, unpacked
from tinygpt.machine.transfer import write
from tinygpt.model.int4 import rounded
from tinygpt.model.int8 import compare, quantize, sizes
from tinygpt.model.transformer import Transformer

CONFIG = GPTConfig(vocab_size=67, block_size=24, n_layer=2, n_head=2, n_embd=32)


def tensor(x: np.ndarray) -> Tensor:
    return Tensor(np.ascontiguousarray(x)).realize()


def numbers(packed: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """What they stand for, one byte after another."""
    found = np.zeros((len(packed), 2 * packed.shape[1]))
    for at in range(packed.shape[1]):
        block, j = divmod(at, 16)
        for half, value in ((0, packed[:, at] % 16), (1, packed[:, at] // 16)):
            found[:, 32 * block + 16 * half + j] = scale[:, block] * (value.astype(float) - 8)
    return found


def operands(m: int, o: int, i: int, dtype: str = "float32") -> list[Tensor]:
    rng = np.random.default_rng([m, o, i])
    packed, scale = rounded(rng.standard_normal((o, i)).astype(np.float32))
    floats = (rng.standard_normal(s).astype(dtype) for s in ((m, i), (o,)))
    x, bias = map(tensor, floats)
    return [x, tensor(packed), tensor(scale), bias]


def off_by_rounding(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """By how much y (m, O) may be off if every number of a row of x is off by half a step."""
    return np.abs(x).max(1, keepdims=True) / 65534 * np.abs(weight).sum(1)


@pytest.mark.parametrize("shape", [(1, 43, 64), (1, 5, 32), (3, 61, 96), (16, 8, 64), (17, 33, 64)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_kernels_equal_numpy_and_their_twin(shape: tuple[int, int, int], dtype: str) -> None:
    x, packed, scale, bias = operands(*shape, dtype)
    weight = numbers(packed.numpy(), scale.numpy().astype(np.float64))
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == "float32" else {"rtol": 1e-12, "atol": 1e-12}
    off = 0 if dtype == "float64" else off_by_rounding(x.numpy(), weight)
    for rest in ((), (bias,)):
        wanted = x.numpy().astype(np.float64) @ weight.T + sum(b.numpy() for b in rest)
        got = int4_linear(x, packed, scale, *rest).numpy()
        assert (np.abs(got - wanted) <= off + close["atol"] / 10).all()
        np.testing.assert_allclose(
            plain_int4_linear(x, packed, scale, *rest).numpy(), wanted, **close
        )


@pytest.mark.parametrize("shape", [(1, 2301, 96), (40, 301, 64)])
def test_any_number_of_pieces_gives_the_same_bits(
    shape: tuple[int, int, int], cut: Callable[[int], None]
) -> None:
    given, found = operands(*shape), []
    for pieces in CUTS:
        cut(pieces)
        found.append(int4_linear(*given).numpy())
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)


@pytest.mark.parametrize("kind", [quantized.AVX512, quantized.AVX2, quantized.PORTABLE])
def test_every_kind_of_instructions_computes_the_same(
    kind: quantized.Instructions, monkeypatch: pytest.MonkeyPatch
) -> None:
    native = quantized.instructions("CPU")
    if kind.name and native not in (kind, quantized.AVX512):
        pytest.skip(f"the processor has no {kind.name}")
    given = operands(2, 19, 160)
    wanted = int4_linear(*given).numpy()
    monkeypatch.setattr(nibbles, "instructions", lambda device: kind)
    np.testing.assert_allclose(int4_linear(*given).numpy(), wanted, rtol=1e-5, atol=1e-5)


def test_a_row_gives_the_same_bits_whatever_is_beside_it() -> None:
    x, *rest = operands(9, 43, 64)
    together = int4_linear(x, *rest).numpy()
    alone = int4_linear(tensor(x.numpy()[4:5]), *rest).numpy()
    np.testing.assert_array_equal(alone[0], together[4])


def test_rounding_is_that_of_gguf_bit_for_bit_and_off_by_a_scale_at_most() -> None:
    quants = pytest.importorskip("gguf.quants")
    types = pytest.importorskip("gguf").GGMLQuantizationType
    weight = np.random.default_rng(0).standard_normal((300, 96)).astype(np.float32)
    weight[7], weight[8, :32], weight[9] = 0, -3, weight[9] * 1000
    data, read_again = store(weight, "q4_0")
    np.testing.assert_array_equal(data, quants.quantize(weight, types.Q4_0))
    np.testing.assert_array_equal(read_again, quants.dequantize(data, types.Q4_0))
    packed, scale = rounded(weight)
    np.testing.assert_array_equal(
        unpacked(tensor(packed), tensor(scale).float()).numpy(), read_again
    )
    off = np.abs(read_again - weight).reshape(300, -1, 32)
    assert (off <= np.abs(scale.astype(float))[..., None] * 1.01).all()


def dequantised(model: Transformer) -> Transformer:
    plain = Transformer(model.config)
    values = {name: p.numpy() for name, p in model.parameters().items()}
    for name, p in plain.parameters().items():
        scale = values.get(f"{name.removesuffix('.weight')}.scale")
        write(p, values[name] if scale is None else numbers(values[name], scale.astype(float)))
    return plain.eval()


def spread(model: Transformer) -> Transformer:
    rng = np.random.default_rng(0)
    for name, p in model.parameters().items():
        noise = 0.1 * rng.standard_normal(p.shape)
        write(p, (p.numpy() * (8 if "ln_" not in name else 1) + noise).astype(np.float32))
    return model


def test_a_model_computes_and_writes_as_its_numbers_do() -> None:
    model = spread(Transformer(CONFIG))
    values = {name: p.numpy() for name, p in model.parameters().items()}
    quantize(model, kind="int4")
    plain = dequantised(model)
    assert model.rounded_to == "int4" and model.num_params() == CONFIG.num_params()
    assert model.h[0].mlp.c_fc.weight.dtype == dtypes.uint8
    assert sizes(model)[1] < 0.3 * sizes(model)[0]
    x = tensor(np.random.default_rng(2).integers(0, 67, (2, 11)).astype(np.int32))
    np.testing.assert_allclose(model(x).numpy(), plain(x).numpy(), rtol=1e-3, atol=1e-3)
    with kernels.plain():
        np.testing.assert_allclose(model(x).numpy(), plain(x).numpy(), rtol=1e-3, atol=1e-3)
    greedy, prompt = SampleConfig(temperature=0.0), [list(range(20))]
    texts = [
        [int(t) for (t,) in generate_tokens(Decoder(m), prompt, 8, greedy)] for m in (model, plain)
    ]
    assert texts[0] == texts[1] and len(set(texts[0])) > 2
    found = compare(model, values.__getitem__, np.arange(49) % 67)
    assert found.after != found.before and abs(found.after - found.before) < 2
    with pytest.raises(UsageError, match="int4"):
        model.train()


def test_rows_of_another_length_are_int8() -> None:
    model = quantize(Transformer(GPTConfig(67, 8, n_layer=1, n_head=2, n_embd=24)), kind="int4")
    kinds = {n: p.dtype for n, p in model.parameters().items()}
    assert kinds["h.0.mlp.c_fc.weight"] == dtypes.int8  # rows of 24
    assert kinds["h.0.mlp.c_proj.weight"] == dtypes.uint8  # rows of 96


def test_a_weight_that_is_not_finite_is_refused() -> None:
    model = Transformer(CONFIG)
    broken = {n: p.numpy() for n, p in model.parameters().items()}
    broken["h.1.mlp.c_fc.weight"][3, 5] = np.nan
    with pytest.raises(DataError, match="not finite"):
        quantize(Transformer(CONFIG, seed=None), broken.__getitem__, "int4")


def test_a_checkpoint_is_loaded_as_int4(tmp_path: Path) -> None:
    path = GPT(CONFIG).save_checkpoint(1, folder=tmp_path)
    model, _ = load(path, "int4")
    assert model.rounded_to == "int4" and model.generate([[1, 2]], 3).shape[1] >= 3
