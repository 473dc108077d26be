"""Weights of 16 bits: what is rounded, what such a model computes, and how it is loaded."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from tinygrad import Tensor, dtypes

from tests.numpy_gpt2 import GPT2
from tinygpt import GPT, GPTConfig, load
from tinygpt.cli import main
from tinygpt.config import Precision, TrainConfig
from tinygpt.errors import DataError, UsageError
from tinygpt.files.tensor_file import from_bfloat16, to_bfloat16
from tinygpt.generation.decoder import Decoder, Sequence
from tinygpt.interop.hf import weight_files
from tinygpt.machine import precision
from tinygpt.machine.transfer import read, write
from tinygpt.model.half import halve
from tinygpt.model.int8 import sizes
from tinygpt.model.lora import prepare
from tinygpt.text.tokenizers import make_tokenizer
from tinygpt.training.gradcheck import gradcheck

SHAPE = GPTConfig(vocab_size=65, block_size=32, n_layer=2, n_head=2, n_embd=32)
HALVES = [name for name in ("bfloat16", "float16") if name in precision.available()]
TEXT = "the cat sat on the mat, and the dog sat on the log.\n" * 40


def test_bfloat16_is_the_nearest_number_that_ends_in_16_zeros() -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate([
        (rng.standard_normal(4000) * 10.0 ** rng.integers(-30, 30, 4000)).astype(np.float32),
        np.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, 0, -0.0, 3.39e38], np.float32),
    ])  # fmt: skip
    below = (x.view(np.uint32) & 0xFFFF0000).view(np.float32)
    above = ((x.view(np.uint32) & 0xFFFF0000) + 0x10000).view(np.float32)
    found = from_bfloat16(to_bfloat16(x))
    wide = x.astype(np.float64)
    down, up = np.abs(wide - below), np.abs(above.astype(np.float64) - wide)
    even = (below.view(np.uint32) >> 16) % 2 == 0
    np.testing.assert_array_equal(
        found, np.where((down < up) | ((down == up) & even), below, above)
    )
    odd = np.array([np.nan, np.inf, -np.inf], np.float32)
    np.testing.assert_array_equal(from_bfloat16(to_bfloat16(odd)), odd)
    given = np.empty(odd.shape, np.float32)
    assert from_bfloat16(to_bfloat16(odd), given) is given
    np.testing.assert_array_equal(given, odd)
    all_bits = np.array([0x7FFFFFFF, 0xFFFFFFFF], np.uint32).view(np.float32)
    assert np.isnan(from_bfloat16(to_bfloat16(all_bits))).all()


@pytest.mark.parametrize("dtype", HALVES)
def test_what_is_written_is_read_again_rounded(dtype: str) -> None:
    values = np.random.default_rng(1).standard_normal((3, 5)).astype(np.float32)
    tensor = write(Tensor.empty(3, 5, dtype=precision.type_of(dtype)), values)
    np.testing.assert_array_equal(read(tensor).astype(np.float32), tensor.float().numpy())
    np.testing.assert_allclose(tensor.float().numpy(), values, rtol=2**-8)


def decoded(model: GPT) -> np.ndarray:
    """Logits behind a prompt, and behind three tokens more, by way of the cache."""
    decoder, sequence = Decoder(model), Sequence(range(1, 9))
    logits = [decoder.next_logits([sequence])[0]]
    for token in (3, 9, 20):
        sequence.ids.append(token)
        logits.append(decoder.next_logits([sequence])[0])
    return np.array(logits)


@pytest.mark.parametrize(("dtype", "error"), [("bfloat16", 6e-3), ("float16", 8e-4)])
def test_a_model_of_rounded_weights_computes_what_numpy_does(
    dtype: Precision, error: float
) -> None:
    if dtype not in HALVES:
        pytest.skip(f"the device has no {dtype}")
    model = halve(GPT(SHAPE, seed=3), dtype)
    ids = [*range(1, 9), 3, 9, 20]
    found = decoded(model)
    weights = {n: read(p).astype(np.float32) for n, p in model.parameters().items()}
    exact = GPT2(weights, SHAPE.n_layer, SHAPE.n_head).logits([ids])[0, 7:]
    assert 0 < np.abs(found - exact).max() < error * np.abs(exact).max()
    whole = model(Tensor([ids], dtype="int32")).numpy()[0, 7:]
    np.testing.assert_allclose(found, whole, atol=error * np.abs(exact).max())
    before, after = sizes(model)
    assert after < 0.53 * before
    cached = {t.dtype for pair in model_cache(model) for t in pair}
    assert cached == {precision.type_of(dtype)}


@pytest.mark.parametrize("dtype", HALVES)
def test_every_way_of_decoding_gives_the_same_logits(dtype: Precision) -> None:
    model = halve(GPT(SHAPE, seed=3), dtype)
    texts = [[1, 2, 3, 4], [9, 8, 7], [5] * 20, list(range(40))]  # the last slides over its window
    alone = [Decoder(model).next_logits([Sequence(text)])[0] for text in texts]
    decoder, sequences = Decoder(model, slots=4), [Sequence(text) for text in texts]
    together = decoder.next_logits(sequences)
    states = [decoder.states([text[-SHAPE.block_size :]])[1][0] for text in texts]
    largest, error = np.abs(alone).max(), 6e-3 if dtype == "bfloat16" else 8e-4
    for found in (together, states):
        np.testing.assert_allclose(found, alone, atol=error * largest)
    for sequence in sequences[:3]:
        sequence.ids.append(6)
    stepped = decoder.next_logits(sequences[:3])
    for logits, text in zip(stepped, texts[:3], strict=True):
        again, sequence = Decoder(model), Sequence(text)
        again.next_logits([sequence])
        sequence.ids.append(6)
        np.testing.assert_array_equal(logits, again.next_logits([sequence])[0])


def model_cache(model: GPT) -> list[tuple[Tensor, Tensor]]:
    from tinygpt.model.cache import KVCache

    return KVCache(model.config, 1, model.half or dtypes.float32).layers


def test_norms_and_biases_stay_float32() -> None:
    model = halve(GPT(SHAPE), HALVES[0])
    kinds = {n: p.dtype == dtypes.float32 for n, p in model.parameters().items()}
    assert {n for n, exact in kinds.items() if exact} == {
        n for n in kinds if ".ln_" in n or n.startswith("ln_f") or n.endswith(".bias")
    }


def test_a_rounded_model_cannot_learn_be_saved_or_rounded_again(tmp_path: Path) -> None:
    model = halve(GPT(SHAPE), HALVES[0])
    with pytest.raises(
        UsageError, match=f'rounded to {HALVES[0]}.*TrainConfig.dtype="{HALVES[0]}"'
    ):
        model.train()
    with pytest.raises(UsageError, match="were rounded: a checkpoint"):
        model.save_checkpoint(1, folder=tmp_path)
    with pytest.raises(UsageError, match=f"rounded to {HALVES[0]}"):
        model.quantize()
    assert halve(model, HALVES[0]) is model
    with pytest.raises(UsageError, match=f"rounded to {HALVES[0]} already"):
        halve(model, "float32")


@pytest.mark.skipif("float16" not in HALVES, reason="the device has no float16")
def test_values_that_float16_lacks_are_refused_and_change_nothing() -> None:
    model = GPT(SHAPE)
    weight = model.h[1].mlp.c_fc.weight
    values = read(weight)
    values[3, 4] = -7e4
    write(weight, values)
    with pytest.raises(DataError, match=r"h\.1\.mlp\.c_fc\.weight holds values beyond 65504"):
        halve(model, "float16")
    assert {p.dtype for p in model.parameters().values()} == {dtypes.float32}
    assert model.rounded_to is None


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = make_tokenizer("char", lambda: [TEXT])
    config = GPTConfig(**{**SHAPE.to_dict(), "vocab_size": tokenizer.vocab_size})
    folder = tmp_path_factory.mktemp("run")
    GPT(config, seed=5).save_checkpoint(7, folder=folder, tokenizer=tokenizer)
    return folder


@pytest.mark.parametrize("dtype", HALVES)
def test_weights_are_rounded_as_they_are_read(run: Path, dtype: Precision) -> None:
    wanted = load(run)[0].cast(dtype)
    found, _ = load(run, dtype=dtype)
    assert found.rounded_to == dtype
    for name, p in wanted.parameters().items():
        np.testing.assert_array_equal(read(p), read(found.parameters()[name]))
    assert found.generate(Tensor([[1, 2]], dtype="int32"), 4, seed=1).shape == (1, 6)
    with pytest.raises(UsageError, match="not both"):
        load(run, quantize="int8", dtype=dtype)


def test_the_command_line_rounds_and_says_so(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    dtype = HALVES[0]
    assert main(["generate", str(run), "the", "--dtype", dtype, "--max-tokens", "3"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("the") and f"{dtype}: the weights take" in err
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    losses = []
    for given in ((), ("--dtype", dtype)):
        assert main(["eval", str(run), "--data", str(text), "--json", *given]) == 0
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert main(["generate", str(run), "--dtype", dtype, "--quantize", "int8"]) == 2
    assert "not both" in capsys.readouterr().err
    assert main(["generate", str(run), "--dtype", "float8"]) == 2
    assert re.search(r"float32.*bfloat16.*float16", capsys.readouterr().err)


@pytest.mark.parametrize(("dtype", "kind"), [("bfloat16", "BF16"), ("float16", "F16")])
def test_an_export_has_the_type_that_is_asked_for(
    run: Path, tmp_path: Path, dtype: str, kind: str
) -> None:
    whole, half = tmp_path / "whole", tmp_path / "half"
    for folder, given in ((whole, ()), (half, ("--dtype", dtype))):
        assert main(["export", "hf", str(run), "--out", str(folder), *given]) == 0
    assert json.loads((half / "config.json").read_text())["torch_dtype"] == dtype
    exact, found = (weight_files.read_file(f / "model.safetensors") for f in (whole, half))
    assert {entry.place.dtype for entry in found.values()} == {kind}
    assert (half / "model.safetensors").stat().st_size < 0.55 * (
        whole / "model.safetensors"
    ).stat().st_size
    for name, entry in found.items():
        np.testing.assert_allclose(entry.floats(), exact[name].floats(), rtol=2**-8, atol=1e-7)


@pytest.mark.parametrize("dtype", HALVES)
def test_gradients_in_half_precision_agree_with_float64(dtype: Precision) -> None:
    config = GPTConfig(vocab_size=11, block_size=4, n_layer=1, n_head=1, n_embd=8)
    tokens = np.random.default_rng(0).integers(0, 11, (2, 5)).astype(np.int32)
    idx, targets = Tensor(tokens[:, :-1].copy()), Tensor(tokens[:, 1:].copy())
    report = gradcheck(GPT(config), idx, targets, samples=0, dtype=dtype)
    assert report.ok
    assert report.worst > 1e-5  # they are not those of float64


def test_adapters_are_merged_before_weights_are_rounded() -> None:
    model, wanted = GPT(SHAPE), GPT(SHAPE)
    prepare(model, TrainConfig(lora_rank=2))
    b = model.h[0].attn.c_attn.lora_b
    write(b, np.full(b.shape, 0.1))
    layer = model.h[0].attn.c_attn
    change = layer.scale * (read(layer.lora_b) @ read(layer.lora_a))
    halve(model, HALVES[0])
    weight = wanted.h[0].attn.c_attn.weight
    write(weight, read(weight) + change)
    halve(wanted, HALVES[0])
    assert model.parameters().keys() == wanted.parameters().keys()
    a, b = (read(m.h[0].attn.c_attn.weight).astype(np.float32) for m in (model, wanted))
    np.testing.assert_allclose(a, b, rtol=2**-7)
