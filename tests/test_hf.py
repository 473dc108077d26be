"""GPT-2 from Hugging Face folders and back: the same logits, the same bytes, or a clear refusal."""

import errno
import json
import os
import struct
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tinygrad import Tensor

from tests.numpy_gpt2 import GPT2
from tinygpt import GPT, ByteTokenizer, GPTConfig, TrainConfig, load_pretrained
from tinygpt.api import load
from tinygpt.cli import main
from tinygpt.config.weights import weights
from tinygpt.errors import CheckpointError, InteropError, UsageError
from tinygpt.files import atomic
from tinygpt.files.tensor_file import CODES
from tinygpt.interop import parity
from tinygpt.interop.hf import hf_export, layout, pretrained
from tinygpt.interop.hf.hf_config import config_to_hf, read_config
from tinygpt.interop.hf.hf_export import export, read_back, write_weights
from tinygpt.interop.hf.weight_files import read_file, write_file
from tinygpt.machine.transfer import write
from tinygpt.model.transformer import Transformer
from tinygpt.runs import checkpoint

SMALL = GPTConfig(block_size=16, vocab_size=256, n_layer=2, n_head=2, n_embd=16)


def random_model(config=SMALL, seed=1):
    """Every weight is random, also biases and norms, so that no mix-up goes unnoticed."""
    model = GPT(config, seed=None).eval()
    rng = np.random.default_rng(seed)
    for name, parameter in model.parameters().items():
        centre = 1.0 if ".ln_" in f".{name}" and name.endswith("weight") else 0.0
        write(parameter, rng.normal(centre, 0.2, parameter.shape).astype(np.float32))
    return model


def logits(model, ids):
    return model(Tensor(ids, dtype="int32")).numpy()


def save(folder, model, iter_num=0, tokenizer=None):
    return model.save_checkpoint(iter_num, folder=folder, tokenizer=tokenizer)


def tensors(path):
    return {name: entry.floats().copy() for name, entry in read_file(path).items()}


@pytest.fixture
def exported(tmp_path):
    """A folder of ours, made without a check by others, to be damaged."""
    folder = tmp_path / "hf"
    folder.mkdir()
    make_folder(folder, random_model())
    return folder


def make_folder(folder, model):
    write_weights(model, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config_to_hf(model.config, None)))


def edit_config(folder, **changes):
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    kept = {name: value for name, value in values.items() if value is not ...}
    path.write_text(json.dumps(kept))


def rewrite(folder, change):
    """Write the weights again as ``change`` leaves them."""
    path = folder / "model.safetensors"
    found = tensors(path)
    change(found)
    write_file(path, {name: value.shape for name, value in found.items()}, found.__getitem__)


def renamed(old, new):
    return lambda found: found.update({new: found.pop(old)})


def raw(header, data=b""):
    """The bytes of a safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


# Against transformers ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="needs the extra 'oracle': transformers and torch")


@pytest.fixture(scope="module")
def transformers(torch):
    found = pytest.importorskip("transformers", reason="needs the extra 'oracle'")
    found.utils.logging.disable_progress_bar()
    return found


@pytest.fixture
def theirs(transformers, torch):
    """Makes GPT-2s of theirs with random weights everywhere."""

    def make(kind="GPT2LMHeadModel", **changes):
        sizes = {"vocab_size": 97, "n_positions": 16, "n_embd": 24, "n_layer": 2, "n_head": 3}
        config = transformers.GPT2Config(**sizes | {"bos_token_id": 0, "eos_token_id": 0} | changes)
        generator = torch.Generator().manual_seed(3)
        model = getattr(transformers, kind)(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
        return model

    return make


def their_logits(torch, model, ids):
    with torch.no_grad():
        return model(torch.tensor(ids).long()).logits.numpy()


SHAPES = [
    {},
    {"n_layer": 1, "n_head": 1, "n_embd": 16, "vocab_size": 300},
    {"n_layer": 3, "n_head": 4, "n_embd": 32, "n_positions": 40},
    {"tie_word_embeddings": False},
    {"n_inner": 96, "activation_function": "gelu_pytorch_tanh"},
]


@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_what_transformers_saves_computes_the_same_here_and_comes_back_bit_for_bit(
    tmp_path, theirs, torch, changes
):
    model = theirs(**changes)
    model.save_pretrained(tmp_path / "theirs")
    ours = GPT.from_pretrained(tmp_path / "theirs")
    ids = parity.fixed_prompt(ours.config)
    wanted = their_logits(torch, model, ids)
    assert np.abs(logits(ours, ids) - wanted).max() <= 1e-4 < np.abs(wanted).max() / 1000
    assert not ours.training
    command = ["import", "hf", str(tmp_path / "theirs"), "--out", str(tmp_path / "run")]
    assert main([*command, "--check"]) == 0
    words = ["export", "hf", str(tmp_path / "run"), "--tokenizer", "none"]
    assert main([*words, "--out", str(tmp_path / "back")]) == 0
    one, two = (tmp_path / name / "model.safetensors" for name in ("theirs", "back"))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(
    ("dtype", "tied"), [("float16", True), ("bfloat16", True), ("bfloat16", False)]
)
def test_half_precision_is_read_as_the_same_numbers(tmp_path, theirs, torch, dtype, tied):
    model = theirs(tie_word_embeddings=tied).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path)
    ids = parity.fixed_prompt(ours.config)
    difference = np.abs(logits(ours, ids) - their_logits(torch, model.float(), ids)).max()
    assert difference <= 1e-4


def test_a_checkpoint_of_nanogpt_comes_in_by_the_documents_lines(
    tmp_path, transformers, torch, monkeypatch, capsys
):
    """As its train.py writes it with torch.compile and without biases."""
    model = random_model(replace(SMALL, bias=False))
    weights = {
        f"_orig_mod.{name if name == 'lm_head.weight' else 'transformer.' + name}":
        torch.tensor(p.numpy()) for name, p in model.parameters().items()
    }  # fmt: skip
    weights["_orig_mod.lm_head.weight"] = weights["_orig_mod.transformer.wte.weight"]
    args = {"block_size": 16, "vocab_size": 256, "n_layer": 2, "n_head": 2, "n_embd": 16}
    monkeypatch.chdir(tmp_path)
    torch.save({"model": weights, "model_args": args | {"bias": False}, "iter_num": 9}, "ckpt.pt")
    page = (Path(__file__).parents[1] / "docs" / "interop.md").read_text(encoding="utf-8")
    exec(page.partition("```python\nimport torch\n")[2].partition("```")[0], {"torch": torch})
    assert main(["import", "hf", "nanogpt-hf", "--tokenizer", "byte", "--out", "run"]) == 0
    capsys.readouterr()
    ids = [[3, 1, 4, 1, 5, 9, 2, 6]]
    assert np.allclose(logits(load("run")[0], ids), logits(model, ids), atol=1e-6)


def test_prefixes_of_compiled_and_distributed_models_are_dropped(exported):
    [path] = exported.glob("*.safetensors")
    before = tensors(path)
    rewrite(path.parent, lambda found: [
        found.update({f"module._orig_mod.{name}": found.pop(name)}) for name in list(found)
    ])  # fmt: skip
    model = GPT.from_pretrained(exported)
    assert np.array_equal(model.wte.weight.numpy(), before["transformer.wte.weight"])


@pytest.mark.parametrize("given", ["models--gpt2", "hub", "."])
def test_a_folder_of_the_hubs_cache_names_the_model_in_it(tmp_path, exported, capsys, given):
    place = tmp_path / "a cache" / "hub" / "models--gpt2" / "snapshots" / "0123"
    place.parent.mkdir(parents=True)
    exported.rename(place)
    folder = next(p for p in (place, *place.parents) if given in (p.name, ".") and p != place)
    folder = tmp_path / "a cache" if given == "." else folder
    refused(folder, capsys, wanted=f"give the folder of one model in it: '{place}'")


def test_shards_names_without_prefix_and_old_buffers(tmp_path, theirs, torch):
    model = theirs()
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    ids = parity.fixed_prompt(GPTConfig(vocab_size=97, block_size=16))
    wanted = their_logits(torch, model, ids)
    assert np.abs(logits(GPT.from_pretrained(tmp_path / "shards"), ids) - wanted).max() <= 1e-4

    model.transformer.save_pretrained(tmp_path / "bare")  # a GPT2Model
    bare = tensors(tmp_path / "bare" / "model.safetensors")
    assert not any(name.startswith("transformer.") for name in bare)
    assert np.abs(logits(GPT.from_pretrained(tmp_path / "bare"), ids) - wanted).max() <= 1e-4

    mask = np.tril(np.ones((1, 1, 16, 16), np.float32))
    masks = {"h.0.attn.bias": mask, "h.1.attn.masked_bias": np.float32(-1e4)[None]}
    rewrite(tmp_path / "bare", lambda found: found.update(masks))
    found = GPT.from_pretrained(tmp_path / "bare" / "model.safetensors")
    assert np.abs(logits(found, ids) - wanted).max() <= 1e-4


OURS = [
    SMALL,
    GPTConfig(block_size=24, vocab_size=65, n_layer=1, n_head=3, n_embd=48, tie_embeddings=False),
    GPTConfig(block_size=16, vocab_size=65, n_layer=2, n_head=2, n_embd=16, bias=False),
]


@pytest.mark.parametrize("config", OURS, ids=["biased", "untied", "unbiased"])
def test_transformers_loads_an_export_with_the_same_logits(tmp_path, transformers, torch, config):
    model = random_model(config)
    meta = checkpoint.Meta(5, config, TrainConfig())
    proved = export(model, None, tmp_path / "out", meta)
    assert proved.reader.startswith("transformers") and 0 <= proved.difference <= 1e-4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, said = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", output_loading_info=True
        )
    assert not any(said.values())
    ids = parity.fixed_prompt(config)
    assert np.abs(their_logits(torch, found, ids) - logits(model, ids)).max() <= 1e-4
    back = GPT.from_pretrained(tmp_path / "out")
    assert back.config.bias  # zeros, where there were none
    assert np.abs(logits(back, ids) - logits(model, ids)).max() <= 1e-6


# Without transformers ---------------------------------------------------------------------------


@pytest.mark.parametrize("config", OURS, ids=["biased", "untied", "unbiased"])
def test_the_plain_forward_pass_is_the_oracle(tmp_path, config):
    model = random_model(config)
    make_folder(tmp_path, model)
    found = pretrained.open_pretrained(tmp_path)
    ids = parity.fixed_prompt(config)
    params = {name: p.numpy() for name, p in model.parameters().items()}
    wanted = GPT2(params, config.n_layer, config.n_head).logits(ids)[0]
    plain = parity.plain_logits(found.fetch, found.config, ids)
    np.testing.assert_allclose(plain, wanted, atol=1e-4)


def test_without_transformers_numpy_reads_the_folder_back(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    model = random_model()
    proved = export(model, None, tmp_path / "out", checkpoint.Meta(0, SMALL))
    assert proved.reader == f"numpy {np.__version__}" and proved.difference <= 1e-4
    record = json.loads((tmp_path / "out" / "tinygpt.json").read_text())
    assert record["parity"]["difference"] == proved.difference


def test_the_prompt_is_always_the_same_and_reaches_both_ends_of_the_vocabulary():
    ids = parity.fixed_prompt(GPTConfig(vocab_size=50257, block_size=1024))
    assert ids.shape == (1, 64) and ids.min() == 0 and ids.max() == 50256
    assert len(set(ids[0].tolist())) == 64
    assert (ids == parity.fixed_prompt(GPTConfig(vocab_size=50257, block_size=64))).all()


def test_a_difference_and_what_is_no_number_are_failures():
    ours = np.zeros((3, 5), np.float32)
    found = parity.compare(ours, ours + np.float32(5e-5), rounding=pytest.fail)
    assert found.difference == pytest.approx(5e-5) and found.allowed == parity.TOLERANCE
    for theirs in (ours + 2e-4, np.full((3, 5), np.nan), np.zeros((3, 4))):
        with pytest.raises(InteropError, match="Nothing was written"):
            parity.compare(ours, theirs)


def test_where_float32_itself_errs_by_more_more_is_allowed(tmp_path):
    """With large weights no two programs agree to 1e-4; that is not taken for a fault."""
    model = random_model(SMALL)
    for name, parameter in model.parameters().items():
        if name.endswith("weight") and parameter.ndim == 2:
            parameter.assign(parameter * 30).realize()
    ids = parity.fixed_prompt(SMALL)
    ours, fetch = parity.our_logits(model, ids), layout.fetch_from(model)
    exact = parity.plain_logits(fetch, SMALL, ids, np.float64)
    error = parity.rounding_error(fetch, SMALL, ids)
    assert np.abs(exact).max() > 30 and error > 0
    apart = ours + np.float32(3 * max(error, parity.TOLERANCE))
    found = parity.compare(ours, apart, rounding=lambda: 4 * max(error, parity.TOLERANCE))
    assert parity.TOLERANCE < found.difference < found.allowed
    with pytest.raises(InteropError, match="is allowed"):  # never more than a ten-thousandth
        parity.compare(ours, ours * np.float32(1.001), rounding=lambda: 1e9)
    assert export(model, None, tmp_path / "out", checkpoint.Meta(0, SMALL)).difference < 1e-2


# As a run ---------------------------------------------------------------------------------------


def test_an_imported_run_is_a_run_like_any_other(tmp_path, exported, capsys):
    run, out = tmp_path / "run", tmp_path / "out"
    assert main(["import", "hf", str(exported), "--out", str(run), "--tokenizer", "byte"]) == 0
    assert main(["verify", str(run)]) == 0
    assert main(["info", str(run)]) == 0
    (tmp_path / "text.txt").write_text("some words in Chinese: 猫坐在垫子上。 " * 20)
    capsys.readouterr()
    assert main(["generate", str(run), "--prompt", "猫", "--max-tokens", "5", "--seed", "1"]) == 0
    assert capsys.readouterr().out.startswith("猫")
    assert main(["eval", str(run), "--data", str(tmp_path / "text.txt"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] > 0
    model, tokenizer = load(run)
    assert tokenizer == ByteTokenizer()
    expected = random_model()
    for name, parameter in model.parameters().items():
        assert parameter.numpy().tobytes() == expected.parameters()[name].numpy().tobytes()
    assert main(["export", "hf", str(run), "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parity"]["difference"] <= 1e-4
    model, tokenizer = load_pretrained(out)
    assert tokenizer == ByteTokenizer() and model.config.vocab_size == 256


def test_the_card_has_the_figures_and_no_path(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    run = tmp_path / "run"
    prints = {"train": "ab" * 32, "val": "cd" * 32}
    progress = {"best_val_loss": 1.25, "best_iter": 40}
    meta = checkpoint.Meta(50, SMALL, TrainConfig(), data=prints, progress=progress)
    checkpoint.save(run / "ckpt_50.safetensors", random_model(), None, meta)
    (run / "config.toml").write_text(f'[data]\nsource = "{tmp_path}/my|novel.txt"\n')
    words = ["export", "hf", str(run), "--tokenizer", "none", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    for wanted in ("1.2500", "| 50 |", "ab" * 32, "my\\|novel.txt", "learning_rate = 0.001"):
        assert wanted in card, card
    assert "largest difference" in card and "AutoTokenizer" not in card
    written = "".join(path.read_text() for path in (tmp_path / "out").glob("*.[jm][sd]*"))
    assert str(tmp_path) not in written


def test_weights_go_into_the_buffers_that_are_there(exported):
    model = Transformer(SMALL, seed=3)
    before = model.wte.weight.uop.base.buffer
    pretrained.load_weights(model, pretrained.open_pretrained(exported))
    assert model.wte.weight.uop.base.buffer is before
    assert model.wte.weight.numpy().tobytes() == random_model().wte.weight.numpy().tobytes()


# Bad input --------------------------------------------------------------------------------------


def refused(folder, capsys, *words, wanted):
    """The command line says ``wanted`` and no more than that; nothing is left behind."""
    out = folder.parent / "imported"
    before = sorted(folder.parent.iterdir())
    assert main(["import", "hf", str(folder), "--out", str(out), *words]) in (1, 2)
    said = capsys.readouterr().err
    for part in [wanted] if isinstance(wanted, str) else wanted:
        assert part in said, said
    assert "Traceback" not in said and "should not happen" not in said
    assert sorted(folder.parent.iterdir()) == before


@pytest.mark.parametrize(
    ("kept", "wanted"),
    [(0, "is empty (0 bytes)"), (5, "cannot hold the header"), (2000, "Fetch it again")],
)
def test_a_file_that_broke_off_is_to_be_fetched_again(exported, kept, wanted, capsys):
    os.truncate(exported / "model.safetensors", kept)
    refused(exported, capsys, wanted=(wanted, "Fetch it again"))


CONFIGS = [
    ({"model_type": "llama"}, "model_type 'llama'"),
    ({"model_type": ...}, "names no model_type"),
    ({"activation_function": "relu"}, "activation_function='relu'"),
    ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon=1e-06"),
    ({"scale_attn_weights": False}, "scale_attn_weights=False"),
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
    ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn=True"),
    ({"add_cross_attention": True}, "add_cross_attention=True"),
    ({"n_inner": 100}, "n_inner=100"),
    ({"quantization_config": {}}, "quantized"),
    ({"n_layer": ...}, "lacks n_layer"),
    ({"n_positions": ..., "n_ctx": ...}, "lacks n_positions"),
    ({"n_head": 3}, "not divisible by n_head=3"),
    ({"n_embd": "16"}, "n_embd='16'"),
    ({"vocab_size": 10**12}, "parameters"),
    ({"n_layer": 10**9}, "n_layer=1000000000"),
    ({"tie_word_embeddings": "yes"}, "tie_embeddings='yes'"),
    ({"resid_pdrop": 7}, "resid_pdrop=7"),
    ({"n_layer": 3}, ("lacks 12 weights", "h.2.ln_1.weight", "config.json of another model")),
    ({"n_layer": 1}, ("holds 12 weights", "h.1.")),
    (
        {"n_positions": 32, "n_ctx": 32},
        ("wpe.weight has shape (16, 16)", "(32, 16)", "another model?"),
    ),
    ({"tie_word_embeddings": False}, "lacks 1 weight: lm_head.weight"),
]


@pytest.mark.parametrize(("changes", "wanted"), CONFIGS, ids=lambda v: str(v)[:40])
def test_a_config_that_does_not_fit_is_refused_by_name(exported, capsys, changes, wanted):
    edit_config(exported, **changes)
    refused(exported, capsys, wanted=wanted)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"{}" * 10**6, b"[" * 10**5])
def test_a_config_that_is_none_is_refused(exported, capsys, content):
    (exported / "config.json").write_bytes(content)
    refused(exported, capsys, wanted="config.json")


WTE = "transformer.wte.weight"


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (renamed(WTE, "transformer.wte.wieght"), ("lacks 1 weight", "Did you mean 'wte.wieght'")),
        (lambda f: f.pop("transformer.h.1.mlp.c_fc.bias"), "h.1.mlp.c_fc.bias"),
        (lambda f: f.update({"score.weight": f[WTE]}), "holds 1 weight"),
        (lambda f: f.update({"wte.weight": f[WTE]}), "with and without the prefix"),
        (lambda f: f.update({WTE: f[WTE][:, :8]}), "wte.weight has shape (256, 8)"),
        (lambda f: f.update({"lm_head.weight": f[WTE] + 1}), "lm_head.weight differs"),
        (
            lambda f: f[WTE].__setitem__((9, 9), np.nan),
            "wte.weight holds values that are not finite",
        ),
    ],
    ids=["renamed", "missing", "more", "twice", "shape", "head", "nan"],
)
def test_weights_that_do_not_fit_are_named(exported, capsys, change, wanted):
    rewrite(exported, change)
    refused(exported, capsys, wanted=wanted)


def test_tied_embeddings_may_be_stored_under_either_name_or_both(exported):
    wanted = random_model().wte.weight.numpy()
    rewrite(exported, lambda f: f.update({"lm_head.weight": f[WTE].copy()}))
    assert (GPT.from_pretrained(exported).wte.weight.numpy() == wanted).all()
    rewrite(exported, lambda f: f.pop(WTE))
    assert (GPT.from_pretrained(exported).wte.weight.numpy() == wanted).all()


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
FILES = {
    "empty": (b"", "0 bytes"),
    "short": (b"\x00" * 7, "7 bytes"),
    "no header": (b"\xff" * 64, "cannot hold the header"),
    "long header": (struct.pack("<Q", 1 << 40) + b"{}", "cannot hold the header"),
    "html": (
        b"<!DOCTYPE html><html>not found</html>",
        "is a web page. Perhaps the page about the file was downloaded",
    ),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
    "zip": (b"PK\x03\x04" + b"\0" * 90, "pickle"),
    "no json": (raw(b"{nope}"), "header"),
    "list": (raw([]), "header is no object"),
    "deep": (raw(b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}"), "nested too deeply"),
    "twice": (raw(b'{"a":1,"a":2}'), "same name twice"),
    "big number": (raw(b'{"a":{"shape":[' + b"9" * 5000 + b"]}}"), "too large"),
    "gap": (raw({"a": ENTRY | {"data_offsets": [8, 16]}}, b"\0" * 16), "leaves a gap"),
    "overlap": (raw({"a": ENTRY, "b": ENTRY}, b"\0" * 8), "overlaps"),
    "outside": (raw({"a": ENTRY | {"shape": [9], "data_offsets": [0, 36]}}, b"\0" * 8), "36 bytes"),
    "rest": (raw({"a": ENTRY}, b"\0" * 9), "9 are there"),
    "negative": (raw({"a": ENTRY | {"shape": [-2]}}, b"\0" * 8), "cannot be"),
    "fraction": (raw({"a": ENTRY | {"shape": [2.0]}}, b"\0" * 8), "cannot be"),
    "bool": (raw({"a": ENTRY | {"data_offsets": [False, 8]}}, b"\0" * 8), "cannot be"),
    "axes": (raw({"a": ENTRY | {"shape": [1] * 9 + [2]}}, b"\0" * 8), "cannot be"),
    "huge": (raw({"a": ENTRY | {"shape": [2**62, 2**62]}}, b"\0" * 8), "another shape"),
    "type": (raw({"a": ENTRY | {"dtype": "F31"}}, b"\0" * 8), "unknown type 'F31'"),
    "no type": (raw({"a": ENTRY | {"dtype": [1]}}, b"\0" * 8), "unknown type"),
    "fields": (raw({"a": {"dtype": "F32"}}), "not described"),
    "integers": (raw({"wte.weight": ENTRY | {"dtype": "I32"}}, b"\0" * 8), "lacks 27 weights"),
}


@pytest.mark.parametrize(("content", "wanted"), FILES.values(), ids=FILES)
def test_a_hostile_file_is_refused(exported, capsys, content, wanted):
    (exported / "model.safetensors").write_bytes(content)
    refused(exported, capsys, wanted=wanted)


def test_weights_of_a_type_that_is_none_are_refused(exported, capsys):
    path = exported / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"dtype":"F32"', b'"dtype":"I32"', 1))
    refused(exported, capsys, wanted="is of type I32")
    assert CODES["I32"][1] == CODES["F32"][1]  # of equal width


def test_pipes_sparse_files_and_truncated_ones_are_refused(exported, capsys):
    path = exported / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    refused(exported, capsys, wanted="damaged or incomplete")
    path.unlink()
    os.mkfifo(path)
    refused(exported, capsys, wanted="no ordinary file")
    path.unlink()
    header = raw({"a": ENTRY | {"shape": [1 << 28], "data_offsets": [0, 1 << 30]}})
    path.write_bytes(header)
    os.truncate(path, len(header) + (1 << 30))
    refused(exported, capsys, wanted="never written")


def make_index(folder, **changes):
    """Two shards and their index, in which some weights are said to be elsewhere."""
    path = folder / "model.safetensors"
    found, names = tensors(path), []
    for number, part in enumerate((sorted(found)[::2], sorted(found)[1::2])):
        name = f"model-{number + 1:05}-of-00002.safetensors"
        shapes = {key: found[key].shape for key in part}
        write_file(folder / name, shapes, found.__getitem__)
        names += [(key, name) for key in part]
    path.unlink()
    places = dict(names) | changes
    index = {"metadata": {}, "weight_map": {k: v for k, v in places.items() if v is not ...}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


PLACES = [
    "../../x.safetensors",
    "/etc/passwd",
    "a/b.safetensors",
    "..",
    ".hidden.safetensors",
    "C:\\x.safetensors",
    "x.safetensors\n",
    "pytorch_model.bin",
    7,
    ["x"],
    "x" * 500,
]


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_an_index_names_nothing_but_files_beside_it(exported, capsys, place):
    make_index(exported, **{WTE: place})
    refused(exported, capsys, wanted=("wte.weight", "is not opened"))


def test_an_index_that_is_wrong_is_refused(exported, capsys):
    make_index(exported)
    assert GPT.from_pretrained(exported).config == SMALL
    index = exported / "model.safetensors.index.json"
    good = index.read_text()
    places = json.loads(good)["weight_map"]
    other = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    [elsewhere] = other - {places[WTE]}
    for changes, wanted in [
        ({WTE: elsewhere}, "the index says that it is in"),
        ({"more": elsewhere}, "lacks 'more'"),
        ({WTE: "model-00003-of-00002.safetensors"}, "not beside it: model-00003"),
    ]:
        index.write_text(json.dumps({"weight_map": places | changes}))
        refused(exported, capsys, wanted=wanted)
    del places[WTE]
    index.write_text(json.dumps({"weight_map": places}))
    refused(exported, capsys, wanted="the index lacks it")
    for content in ("{}", '{"weight_map": []}', '{"weight_map": {}}', "no"):
        index.write_text(content)
        refused(exported, capsys, wanted="is damaged")


def test_a_pickle_is_refused_with_the_way_to_convert_it(exported, capsys):
    (exported / "model.safetensors").rename(exported / "pytorch_model.bin")
    wanted = ("pytorch_model.bin is a Python pickle", "python -c", "save_pretrained(")
    refused(exported, capsys, wanted=wanted)
    (exported / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    refused(exported, capsys, wanted=wanted)


def test_wrong_places_are_told_what_was_wanted(tmp_path, exported, capsys):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", capsys, wanted="no config.json and no model.safetensors")
    (exported / "model.safetensors").unlink()
    refused(exported, capsys, wanted="model.safetensors is missing")
    save(tmp_path / "own", random_model())
    refused(tmp_path / "own", capsys, wanted="a run of TinyGPT's own")
    refused(tmp_path / "gtp2", capsys, wanted=("There is no file or folder", "gpt2-xl"))
    refused(tmp_path / "猫", capsys, wanted="There is no file or folder")


def test_a_vocabulary_of_another_size_is_refused(exported, capsys):
    edit_config(exported, vocab_size=1281)
    grown = np.zeros((1281, 16), np.float32)
    rewrite(exported, lambda f: f.update({WTE: grown}))
    wanted = ("a vocabulary of 1,281", "one of 256", "--tokenizer none")
    refused(exported, capsys, "--tokenizer", "byte", wanted=wanted)
    out = str(exported.parent / "run")
    assert main(["import", "hf", str(exported), "--out", out, "--tokenizer", "none"]) == 0
    assert "no tokenizer" in capsys.readouterr().err
    (exported / "tokenizer.json").write_text("{}")
    refused(exported, capsys, wanted=("tokenizer.json", "--tokenizer none"))


# Whole or not at all ----------------------------------------------------------------------------


def test_a_folder_that_is_there_is_left_alone(tmp_path, exported, capsys):
    taken = tmp_path / "taken"
    taken.mkdir()
    assert main(["import", "hf", str(exported), "--out", str(taken)]) == 0  # it was empty
    held = (taken / "ckpt_0.safetensors").read_bytes()
    refused_twice = ["import", "hf", str(exported), "--out", str(taken)]
    assert main(refused_twice) == 2 and "is there already" in capsys.readouterr().err
    words = ["export", "hf", str(taken), "--tokenizer", "none", "--out", str(taken)]
    assert main(words) == 2 and "is there already" in capsys.readouterr().err
    assert (taken / "ckpt_0.safetensors").read_bytes() == held
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    assert main(["import", "hf", str(exported), "--out", str(link)]) == 2


class FullDisk:
    """Stands in for ``os`` where files are written: after so many bytes the disk is full."""

    def __init__(self, left):
        self.left = left

    def __getattr__(self, name):
        return self.limited if name == "write" else getattr(os, name)

    def limited(self, handle, data):
        self.left -= len(data)
        if self.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return os.write(handle, data)


@pytest.mark.parametrize("room", [0, 3000, 40_000])
def test_a_full_disk_leaves_nothing(tmp_path, exported, monkeypatch, room):
    found, model = pretrained.open_pretrained(exported), random_model()
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(atomic, "os", FullDisk(room))
    with pytest.raises(CheckpointError, match="No space left"):
        pretrained.import_run(found, tmp_path / "run", None)
    monkeypatch.setattr(atomic, "os", FullDisk(room))
    with pytest.raises(CheckpointError, match="No space left"):
        export(model, None, tmp_path / "out", checkpoint.Meta(0, SMALL))
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "distort",
    [lambda v: v * np.float32(1.01), lambda v: v.T if v.ndim == 2 and len(v) == v.shape[1] else v],
    ids=["scaled", "turned"],
)
def test_a_failed_comparison_leaves_nothing(tmp_path, monkeypatch, distort):
    monkeypatch.setitem(sys.modules, "transformers", None)
    fetch_from = hf_export.fetch_from
    monkeypatch.setattr(
        hf_export, "fetch_from", lambda model: lambda name: distort(fetch_from(model)(name))
    )
    with pytest.raises(InteropError, match="computes something else"):
        export(random_model(), None, tmp_path / "out", checkpoint.Meta(0, SMALL))
    assert list(tmp_path.iterdir()) == []


def test_what_transformers_cannot_read_is_not_handed_out(tmp_path, transformers, monkeypatch):
    def misname(model, path, dtype):
        write_weights(model, path, dtype)
        rewrite(path.parent, renamed("transformer.h.0.ln_1.bias", "transformer.h.0.ln_0.bias"))

    monkeypatch.setattr(hf_export, "write_weights", misname)
    with pytest.raises(InteropError, match="transformers cannot read what was written"):
        export(random_model(), None, tmp_path / "out", checkpoint.Meta(0, SMALL))
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_import_left_goes_with_the_next_one(tmp_path, exported):
    stale = tmp_path / f".run.tinygpt-{'0' * 12}.tmp"
    stale.mkdir()
    (stale / "ckpt_0.safetensors").write_text("half")
    other = tmp_path / f".another.tinygpt-{'0' * 12}.tmp"
    other.mkdir()
    pretrained.import_run(pretrained.open_pretrained(exported), tmp_path / "run", None)
    assert not stale.exists() and other.exists()


def test_a_read_only_place_is_said(tmp_path, exported, monkeypatch):
    def readonly(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", readonly)
    with pytest.raises(CheckpointError, match="only be read"):
        pretrained.import_run(pretrained.open_pretrained(exported), tmp_path / "run", None)


def test_our_names_and_shapes_are_the_models():
    for config in OURS:
        found = {n: tuple(p.shape) for n, p in Transformer(config).parameters().items()}
        assert {w.name: w.shape for w in weights(config)} == found


def test_a_config_goes_out_and_comes_back(tmp_path):
    for config in OURS:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(config_to_hf(config, None)))
        back = read_config(path).to_dict()
        assert back == config.to_dict() | {"bias": True}


def test_the_reader_is_told(tmp_path, exported):
    name, found = read_back(exported, SMALL, parity.fixed_prompt(SMALL))
    assert name.startswith(("transformers", "numpy")) and found.shape == (16, 256)


def test_a_run_without_a_checkpoint_is_no_export(tmp_path, capsys):
    words = ["export", "hf", str(tmp_path / "none"), "--out", str(tmp_path / "out")]
    assert main(words) == 1
    assert "no checkpoint" in capsys.readouterr().err
    with pytest.raises(UsageError):
        pretrained.open_pretrained(save(tmp_path / "run", random_model()).parent)
