"""int8 weights: the kernels, what rounding changes, and that such a model writes and no more."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tinygrad import Tensor, dtypes
from tinygrad.helpers import GlobalCounters

from tests.conftest import CUTS
from tinygpt import kernels
from tinygpt.api import GPT, load, train
from tinygpt.cli import main
from tinygpt.config import GPTConfig, SampleConfig, TrainConfig
from tinygpt.errors import CheckpointError, DataError, UsageError
from tinygpt.generation.decoder import Decoder, Sequence
from tinygpt.generation.generate import generate_tokens
from tinygpt.kernels import quantized
from tinygpt.kernels.embedding import embedding, plain_embedding
from tinygpt.kernels.quantized import dequantized, plain_quantized_linear, quantized_linear
from tinygpt.machine.transfer import read, write
from tinygpt.model.int8 import (
    QuantizedEmbedding,
    QuantizedLinear,
    compare,
    quantize,
    rounded,
    sizes,
    streamed_loss,
)
from tinygpt.model.lora import prepare
from tinygpt.model.transformer import Linear, Transformer
from tinygpt.runs import checkpoint
from tinygpt.runs.folder import list_checkpoints
from tinygpt.text.tokenizers import make_tokenizer

CONFIG = GPTConfig(vocab_size=67, block_size=24, n_layer=2, n_head=2, n_embd=20)
UNTIED = GPTConfig(
    vocab_size=67, block_size=24, n_layer=1, n_head=2, n_embd=20, tie_embeddings=False, bias=False
)
TEXT = "the cat sat on the mat, and the dog sat on the log.\n" * 40
ROWS = st.one_of(st.integers(1, 20), st.just(40))
SIZES = st.one_of(st.integers(1, 40), st.sampled_from([64, 65, 97, 130]))


def tensor(x: np.ndarray) -> Tensor:
    return Tensor(np.ascontiguousarray(x)).realize()


def operands(m: int, o: int, i: int, dtype: str = "float32") -> list[Tensor]:
    """x, the weight and its scale, and a bias."""
    rng = np.random.default_rng([m, o, i])
    q = rng.integers(-127, 128, (o, i)).astype(np.int8)
    scale = rng.uniform(0.001, 0.01, o).astype(dtype)
    floats = (rng.standard_normal(s).astype(dtype) for s in ((m, i), (o,)))
    x, bias = map(tensor, floats)
    return [x, tensor(q), tensor(scale), bias]


def by_numpy(given: list[Tensor]) -> np.ndarray:
    x, q, scale, bias = (t.numpy().astype(np.float64) for t in given)
    return x @ (q * scale[:, None]).T + bias


def off_by_rounding(given: list[Tensor]) -> np.ndarray:
    """By how much y (m, O) may be off if every number of a row of x is off by half a step."""
    x, q, scale, _ = (t.numpy().astype(np.float64) for t in given)
    step = np.abs(x).max(1, keepdims=True) / quantized.LARGEST
    return step / 2 * (np.abs(q).sum(1) * scale)


@given(m=ROWS, o=SIZES, i=SIZES)
@settings(max_examples=14, deadline=None, derandomize=True)
def test_the_kernels_equal_numpy_in_float64(m: int, o: int, i: int) -> None:
    given = operands(m, o, i)
    off = np.abs(quantized_linear(*given).numpy() - by_numpy(given))
    assert (off <= off_by_rounding(given) + 1e-5).all()


def by_integers(given: list[Tensor]) -> np.ndarray:
    """What the kernels compute for few rows, in float64 but for the rounding of x."""
    x, q, scale, bias = (t.numpy() for t in given)
    step = np.abs(x).max(1, keepdims=True).astype(np.float64) / quantized.LARGEST
    return (np.rint(x / step) * step) @ (q * scale[:, None].astype(np.float64)).T + bias


@pytest.mark.parametrize("kind", [quantized.AVX512, quantized.AVX2, quantized.PORTABLE])
@pytest.mark.parametrize("shape", [(1, 19, 300), (5, 9, 64), (7, 3, 97)])
def test_every_kind_of_instructions_computes_with_rounded_rows(
    kind: quantized.Instructions, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    native = quantized.instructions("CPU")
    if kind.name and native not in (kind, quantized.AVX512):
        pytest.skip(f"the processor has no {kind.name}")
    monkeypatch.setattr(quantized, "instructions", lambda device: kind)
    given = operands(*shape)
    # a number half-way between two steps may go either way in float32: few of them do
    step = np.abs(given[0].numpy()).max(1, keepdims=True) / quantized.LARGEST
    largest = 127 * given[2].numpy()
    off = np.abs(quantized_linear(*given).numpy() - by_integers(given))
    assert (off <= 6 * step * largest + 1e-5).all()


def test_the_longest_rows_of_the_largest_numbers_do_not_overflow() -> None:
    n = 32 * quantized.MOST_STEPS * 2 + 96
    q, x = np.full((2, n), 127, np.int8), np.full((1, n), 3.0, np.float32)
    q[1] = -127
    given = [tensor(x), tensor(q), tensor(np.ones(2, np.float32))]
    wanted = 3.0 * 127 * n
    np.testing.assert_allclose(quantized_linear(*given).numpy()[0], [wanted, -wanted], rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_that_is_not_finite_shows_and_no_other(bad: float) -> None:
    x, *rest = operands(3, 9, 40)
    values = x.numpy().copy()
    values[1, 39], values[2] = bad, 0
    y = quantized_linear(tensor(values), *rest).numpy()
    assert np.isfinite(y[0]).all() and not np.isfinite(y[1]).any()
    np.testing.assert_array_equal(y[2], rest[-1].numpy())


@pytest.mark.parametrize("m", [1, 2, 5, 16, 17, 33])
def test_the_kernels_equal_their_twin(m: int) -> None:
    x, q, scale, bias = operands(m, 43, 77, "float64")
    for rest in ((), (bias,)):
        got = quantized_linear(x, q, scale, *rest).numpy()
        wanted = plain_quantized_linear(x, q, scale, *rest).numpy()
        np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 301, 70), (40, 301, 70)])
def test_any_number_of_pieces_gives_the_same_bits(
    shape: tuple[int, int, int], cut: Callable[[int], None]
) -> None:
    given, found = operands(*shape), []
    for pieces in CUTS:
        cut(pieces)
        found.append(quantized_linear(*given).numpy())
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)


@pytest.mark.parametrize("m", [2, 3, 16])
def test_a_row_gives_the_same_bits_whatever_is_beside_it(m: int) -> None:
    x, q, scale, bias = operands(m, 43, 77)
    together = quantized_linear(x, q, scale, bias).numpy()
    for i in (0, m - 1):
        alone = quantized_linear(tensor(x.numpy()[i : i + 1]), q, scale, bias)
        np.testing.assert_array_equal(alone.numpy()[0], together[i])


def test_many_rows_give_the_bits_of_the_dequantised_weight() -> None:
    x, q, scale, bias = operands(40, 65, 97)
    weight = dequantized(q, scale).contiguous().realize()
    wanted = kernels.linear(x, weight, bias).numpy()
    np.testing.assert_array_equal(quantized_linear(x, q, scale, bias).numpy(), wanted)


def test_every_output_of_few_rows_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    given = operands(3, 61, 9)[:3]

    def poisoned(*shape: int, dtype: object = None, device: object = None) -> Tensor:
        value = 0 if dtype == dtypes.int16 else float("nan")
        return Tensor.full(shape, value, dtype=dtype, device=device).contiguous().realize()

    monkeypatch.setattr(quantized.Tensor, "empty", staticmethod(poisoned))
    y = quantized_linear(*given)
    monkeypatch.undo()
    assert np.isfinite(y.numpy()).all()


def test_a_layer_is_two_launches_of_few_rows_and_one_of_many() -> None:
    for m, launches in ((1, 2), (40, 1)):
        given = operands(m, 30, 20)
        GlobalCounters.reset()
        quantized_linear(*given).realize()
        assert GlobalCounters.kernel_count == launches


def test_what_the_kernels_cannot_take_goes_to_the_twin() -> None:
    x, q, scale, *_ = operands(6, 8, 10)
    sharded = x.shard(("CPU", "CPU:1"), axis=0)
    copies = [t.shard(("CPU", "CPU:1")) for t in (q, scale)]
    got = quantized_linear(sharded, *copies).numpy()
    off = np.abs(got - quantized_linear(x, q, scale).numpy())
    assert (off <= off_by_rounding([x, q, scale, scale]) + 1e-5).all()


def test_rows_of_tokens_equal_the_twins_and_an_unknown_id_shows() -> None:
    _, q, scale, *_ = operands(1, 30, 21)
    tokens = tensor(np.array([[0, 29, 4], [4, 1, 2]], np.int32))
    positions = tensor(np.random.default_rng(1).standard_normal((5, 21)).astype(np.float32))
    for table in (None, positions):
        got = embedding(tokens, q, table, scale).numpy()
        np.testing.assert_array_equal(got, plain_embedding(tokens, q, table, scale).numpy())
    unknown = embedding(tensor(np.array([[30, 1, -1]], np.int32)), q, scale=scale).numpy()
    assert np.isnan(unknown[0, [0, 2]]).all() and np.isfinite(unknown[0, 1]).all()


# Rounding ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (7, 30), (2000, 600)])
def test_no_weight_is_off_by_more_than_half_a_scale(shape: tuple[int, int]) -> None:
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    weight[0] *= 1000  # one row's large numbers do not spoil the others
    q, scale = rounded(weight)
    assert q.dtype == np.int8 and scale.dtype == np.float32
    assert (np.abs(q.astype(int)).max(1) == 127).all()
    off = np.abs(q * scale[:, None].astype(np.float64) - weight)
    assert (off <= scale[:, None] * 0.500001).all() and (off.max() > 0 or shape == (1, 1))


def test_rows_of_zeros_and_the_smallest_numbers_stay_finite() -> None:
    weight = np.array([[0, 0], [1e-45, -1e-45], [3e38, -3e38]], np.float32)
    q, scale = rounded(weight)
    assert q[0].tolist() == [0, 0] and q[2].tolist() == [127, -127]
    assert np.isfinite(scale).all() and np.isfinite(q * scale[:, None]).all()


def dequantised(model: Transformer) -> Transformer:
    """A float32 model of the numbers that the int8 ones stand for."""
    plain = Transformer(model.config)
    values = {name: p.numpy() for name, p in model.parameters().items()}
    for name, p in plain.parameters().items():
        scale = values.get(f"{name.removesuffix('.weight')}.scale")
        write(p, values[name] if scale is None else values[name] * scale[:, None])
    return plain.eval()


def spread(model: Transformer) -> Transformer:
    """Larger weights than those of a new model, whose biases are 0 and whose texts are dull."""
    rng = np.random.default_rng(0)
    for name, p in model.parameters().items():
        noise = 0.1 * rng.standard_normal(p.shape)
        write(p, (p.numpy() * (8 if "ln_" not in name else 1) + noise).astype(np.float32))
    return model


@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied"])
def test_logits_and_loss_are_those_of_the_dequantised_model(config: GPTConfig) -> None:
    model = quantize(spread(Transformer(config)))
    plain = dequantised(model)
    rng = np.random.default_rng(2)
    x, y = (tensor(rng.integers(0, 67, (2, 11)).astype(np.int32)) for _ in range(2))
    np.testing.assert_allclose(model(x).numpy(), plain(x).numpy(), rtol=1e-4, atol=1e-4)
    y[0, :3] = -1
    assert model.loss(x, y).item() == pytest.approx(plain.loss(x, y).item(), abs=1e-5)
    with kernels.plain():
        np.testing.assert_allclose(model(x).numpy(), plain(x).numpy(), rtol=1e-4, atol=1e-4)


def test_the_loss_adds_up_over_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantize(spread(Transformer(CONFIG)))
    x = tensor(np.arange(20, dtype=np.int32).reshape(2, 10))
    whole = model.loss(x, x).item()
    monkeypatch.setattr("tinygpt.model.int8.LOGITS", 67 * 3)
    assert model.loss(x, x).item() == pytest.approx(whole, abs=1e-5)  # few rows are rounded


def test_the_greedy_text_is_that_of_the_dequantised_model() -> None:
    model = quantize(spread(Transformer(CONFIG)))
    greedy = SampleConfig(temperature=0.0)
    prompt = [list(range(20)), list(range(20, 40))]  # and on beyond block_size
    texts = [
        np.stack(list(generate_tokens(m, prompt, 10, greedy))) for m in (model, dequantised(model))
    ]
    np.testing.assert_array_equal(*texts)
    assert len(np.unique(texts[0])) > 3  # no single token over and over


def test_weights_that_are_quantised_are_seen_by_a_decoder_that_has_written() -> None:
    model = spread(Transformer(CONFIG)).eval()
    decoder = Decoder(model)
    before = decoder.next_logits([Sequence([1, 2, 3])])
    quantize(model)
    after = decoder.next_logits([Sequence([1, 2, 3])])
    fresh = Decoder(model).next_logits([Sequence([1, 2, 3])])
    assert not np.array_equal(before, after)
    np.testing.assert_array_equal(after, fresh)


def test_a_trained_models_loss_hardly_changes_and_its_parts_are_int8() -> None:
    ids = np.frombuffer(TEXT.encode(), np.uint8)
    model = GPT(GPTConfig(vocab_size=128, block_size=16, n_layer=1, n_head=2, n_embd=32))
    recipe = TrainConfig(max_iters=60, eval_interval=60, warmup_steps=5, learning_rate=1e-2)
    train(model, recipe, ids, show=False)
    values = {name: p.numpy() for name, p in model.parameters().items()}
    found = compare(model.quantize(), values.__getitem__, ids[:300])
    assert found.tokens == 18 * 16
    assert found.before < 2.5  # it has learned, from ln 128 = 4.9
    assert 0 < abs(found.after - found.before) < 0.02
    assert {p.dtype for n, p in model.parameters().items() if n in values and p.ndim == 2} == {
        dtypes.int8,
        dtypes.float32,  # of the positions
    }


def test_the_loss_of_one_block_after_another_is_that_of_the_whole_model() -> None:
    for config in (CONFIG, UNTIED):
        model = spread(Transformer(config)).eval()
        weights = {name: p.numpy() for name, p in model.parameters().items()}
        x = tensor(np.arange(48, dtype=np.int32).reshape(2, 24))
        y = tensor(np.arange(1, 49, dtype=np.int32).reshape(2, 24))
        found = streamed_loss(config, weights.__getitem__, x.numpy(), y.numpy())
        assert found == pytest.approx(model.loss(x, y).item(), abs=1e-6)


# The model --------------------------------------------------------------------------------------


def test_every_linear_layer_is_rounded_and_the_rest_is_not() -> None:
    model = Transformer(UNTIED)
    before = {name: p.numpy() for name, p in model.parameters().items()}
    quantize(model)
    named = model.parameters()
    names = [n.removesuffix(".scale") for n in model.parameters() if n.endswith(".scale")]
    assert len(names) == 2 + 4 and type(model.layer(names[0])) is QuantizedEmbedding
    assert all(type(model.layer(name)) is QuantizedLinear for name in names[1:])
    for name, value in before.items():
        if name == "wpe.weight" or ".ln_" in f".{name}":
            np.testing.assert_array_equal(named[name].numpy(), value)
        else:
            assert named[name].dtype == dtypes.int8
            scale = named[name.replace("weight", "scale")].numpy()[:, None]
            assert np.abs(named[name].numpy() * scale - value).max() <= scale.max() * 0.5001
    assert model.num_params() == UNTIED.num_params()
    floats, ints = sizes(model)
    assert floats == 4 * UNTIED.num_params() and ints < 0.4 * floats


def test_a_quantised_model_does_not_learn_and_is_not_saved(tmp_path: Path) -> None:
    model = GPT(CONFIG).quantize()
    with pytest.raises(UsageError, match="generation only"):
        model.train()
    with pytest.raises(UsageError, match="generation only"):
        train(model, TrainConfig(max_iters=1), np.arange(60) % 60, show=False)
    with pytest.raises(UsageError, match="quantised"):
        model.save_checkpoint(1, folder=tmp_path)
    assert not list(tmp_path.iterdir())
    assert model.quantize() is model  # twice is once


def test_a_copy_of_a_quantised_model_computes_the_same() -> None:
    model, x = GPT(CONFIG).quantize(), tensor(np.array([[1, 2, 3]], np.int32))
    np.testing.assert_array_equal(copy.deepcopy(model)(x).numpy(), model(x).numpy())


def test_adapters_are_merged_first() -> None:
    model = Transformer(CONFIG)
    prepare(model, TrainConfig(lora_rank=2))
    adapter = model.h[0].mlp.c_fc
    write(adapter.lora_b, np.ones(adapter.lora_b.shape))
    wanted = read(adapter.weight) + adapter.scale * read(adapter.lora_b) @ read(adapter.lora_a)
    quantize(model)
    layer = model.h[0].mlp.c_fc
    assert type(layer) is QuantizedLinear
    got = layer.weight.numpy() * layer.scale.numpy()[:, None]
    assert np.abs(got - wanted).max() <= layer.scale.numpy().max() * 0.5001


def test_weights_that_are_not_finite_are_refused_by_name() -> None:
    model = Transformer(CONFIG)
    bad = model.h[1].attn.c_proj.weight
    write(bad, np.where(np.eye(20) > 0, np.nan, bad.numpy()))
    before = model.parameters()
    with pytest.raises(DataError, match=r"h\.1\.attn\.c_proj\.weight"):
        quantize(model)
    # what it had it still has: nothing was rounded, and it can go on being trained
    after = model.parameters()
    assert not model.quantized and model.training and list(after) == list(before)
    assert all(after[name] is parameter for name, parameter in before.items())


def test_a_refused_model_keeps_its_adapters() -> None:
    model = Transformer(CONFIG)
    prepare(model, TrainConfig(lora_rank=2))
    write(model.h[1].mlp.c_fc.lora_b, np.full((80, 2), np.inf))
    before = list(model.parameters())
    with pytest.raises(DataError, match=r"h\.1\.mlp\.c_fc\.lora_b"):
        quantize(model)
    assert list(model.parameters()) == before


# From a file ------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return spread(GPT(CONFIG)).save_checkpoint(3, folder=tmp_path)


def test_rounding_while_reading_gives_the_same_model(saved: Path) -> None:
    quickly, _ = load(saved, quantize="int8")
    slowly = load(saved)[0].quantize()
    assert quickly.quantized and not quickly.training
    for (name, a), b in zip(
        quickly.parameters().items(), slowly.parameters().values(), strict=True
    ):
        np.testing.assert_array_equal(a.numpy(), b.numpy(), err_msg=name)


def test_damaged_weights_are_not_rounded(saved: Path) -> None:
    data = bytearray(saved.read_bytes())
    data[-200] ^= 1
    saved.write_bytes(data)
    with pytest.raises(CheckpointError, match="do not match their hash"):
        load(saved, quantize="int8")


def test_weights_of_another_model_are_refused(saved: Path) -> None:
    other = Transformer(UNTIED, seed=None)
    with pytest.raises(CheckpointError, match="another model"), checkpoint.weights(saved, other):
        pass


MEMORY = """
import sys
from tinygpt.api import load

def peak():
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

load(sys.argv[1], quantize="int8")  # of something small: all that is loaded once is there
before = peak()
model, _ = load(sys.argv[2], quantize=sys.argv[3] if len(sys.argv) > 3 else None)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_a_model_that_is_rounded_while_it_is_read_takes_less_than_half(
    tmp_path: Path, saved: Path, child_environment: dict[str, str]
) -> None:
    config = GPTConfig(vocab_size=512, block_size=64, n_layer=4, n_head=4, n_embd=512)
    large = GPT(config).save_checkpoint(1, folder=tmp_path / "large")
    taken = [
        int(subprocess.run(
            [sys.executable, "-c", MEMORY, saved, large, *quantized],
            env=child_environment, capture_output=True, text=True, check=True, timeout=120,
        ).stdout)
        for quantized in ([], ["int8"])
    ]  # fmt: skip
    floats = 4 * config.num_params()
    assert taken[0] > floats
    assert taken[1] < floats / 2


# The command line -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    text = folder / "cats.txt"
    text.write_text(TEXT, encoding="utf-8")
    size = "--model.n-layer 1 --model.n-embd 16 --model.n-head 1 --model.block-size 16"
    steps = "--tokenizer char --train.max-iters 20 --train.eval-interval 10 --train.batch-size 4"
    arguments = ["train", text, *size.split(), *steps.split(), "--out", folder / "cats"]
    assert main([str(a) for a in arguments]) == 0
    return folder / "cats"


def generate(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["generate", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err


def test_generate_says_what_rounding_saves_and_costs(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--prompt", "the cat", "--temperature", "0", "--max-tokens", "20"]
    code, out, err = generate(capsys, run, *flags, "--quantize", "int8")
    assert code == 0 and out.startswith("the cat") and len(out) > 20
    assert "the weights take" in err and "its last 10%" in err
    after, before, change = map(
        float, re.search(r": ([\d.]+) instead of ([\d.]+) \(([+-][\d.]+)\)", err).groups()
    )
    assert after - before == pytest.approx(change, abs=2e-4) and abs(change) < 0.05


def test_a_text_can_be_given_and_a_run_without_one_still_writes(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    [*_, newest] = list_checkpoints(run)
    alone = tmp_path / newest.name
    alone.write_bytes(newest.read_bytes())
    flags = ["--quantize", "int8", "--max-tokens", "3"]
    code, out, err = generate(capsys, alone, *flags)
    assert code == 0 and out and "not compared" in err and "--quantize-data" in err
    text = tmp_path / "more.txt"
    text.write_text("the dog sat on the cat.\n" * 4, encoding="utf-8")
    code, _, err = generate(capsys, alone, *flags, "--quantize-data", text)
    assert code == 0 and "loss on" in err and "more.txt" in err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--quantize", "int2"], "int4"),
        (["--quantize-data", "x.txt"], "--quantize int8"),
        (["--quantize", "int8", "--quantize-data", "nowhere.txt"], "nowhere.txt"),
        (["--quantize", "int8", "--quantize-data", "EMPTY"], "EMPTY"),
    ],
)
def test_what_cannot_be_quantised_is_said(
    run: Path,
    flags: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("EMPTY").touch()
    code, _, err = generate(capsys, run, "--max-tokens", "2", *flags)
    assert code != 0 and said in err


def test_a_tokenizer_and_a_plain_model_are_still_what_they_were(run: Path) -> None:
    model, tokenizer = load(run)
    assert not model.quantized and type(model.h[0].mlp.c_fc) is Linear
    assert tokenizer is not None and tokenizer.encode("cat") == make_tokenizer(
        str(run / "tokenizer.json"), lambda: []
    ).encode("cat")
