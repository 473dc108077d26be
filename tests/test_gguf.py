"""GGUF files: read back by others, the same logits and tokens, and no file that is not right."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest
from tinygrad import Tensor

from tests.mixed_text import mixed_text
from tests.numpy_gpt2 import GPT2
from tests.test_chat_template import conversations, dressed
from tinygpt.api import GPT, train
from tinygpt.cli import main
from tinygpt.config import GPTConfig, TrainConfig
from tinygpt.errors import CheckpointError, InteropError, TokenizerError, UsageError, extras
from tinygpt.interop import parity
from tinygpt.interop.gguf import gguf_file as exporting
from tinygpt.interop.gguf.gguf_file import export
from tinygpt.interop.gguf.gguf_tokens import CONTROL, NORMAL, UNUSED, tokens_of
from tinygpt.interop.gguf.gguf_types import store
from tinygpt.machine.transfer import read, write
from tinygpt.text.chat.template import TEMPLATES
from tinygpt.text.tokenizers import BPETokenizer, ByteTokenizer, CharTokenizer, vocabulary

gguf = pytest.importorskip("gguf", reason="the extra 'gguf' is not installed")

TEXT = mixed_text(300_000)
END = "<|endoftext|>"
PUBLISHED = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TIED = GPTConfig(block_size=24, vocab_size=256, n_layer=2, n_head=2, n_embd=32)
CASES = {
    "tied": TIED,
    "untied": GPTConfig(**TIED.to_dict() | {"tie_embeddings": False, "vocab_size": 260}),
    "bias-free": GPTConfig(**TIED.to_dict() | {"bias": False}),
    "narrow": GPTConfig(**TIED.to_dict() | {"n_embd": 16, "n_layer": 1, "block_size": 5}),
}
NAMES = {
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_f": "output_norm",
    "lm_head": "output",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def random_model(config, seed=1):
    """Every weight is random, also biases and norms, so that no mix-up goes unnoticed."""
    model = GPT(config, seed=None).eval()
    rng = np.random.default_rng(seed)
    for name, parameter in model.parameters().items():
        centre = 1.0 if ".ln_" in f".{name}" and name.endswith("weight") else 0.0
        write(parameter, rng.normal(centre, 0.2, parameter.shape).astype(np.float32))
    return model


@pytest.fixture(scope="module")
def trained():
    return BPETokenizer.train(TEXT, 600)


@pytest.fixture(params=CASES)
def model(request):
    return random_model(CASES[request.param])


def read_file(path):
    """-> the metadata and the tensors of a file, under our names"""
    reader = gguf.GGUFReader(path)
    ours = {theirs: name for name, theirs in NAMES.items()}
    tensors = {}
    for tensor in reader.tensors:
        block, inner, kind = re.fullmatch(r"(?:blk\.(\d+)\.)?(.+)\.(.+)", tensor.name).groups()
        name = f"{ours[inner]}.{kind}" if block is None else f"h.{block}.{ours[inner]}.{kind}"
        tensors[name] = tensor
    return {name: field.contents() for name, field in reader.fields.items()}, tensors


def values(tensors):
    return {name: gguf.dequantize(t.data, t.tensor_type) for name, t in tensors.items()}


# The weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0", "q4_0"])
def test_another_forward_pass_gives_our_logits_from_the_file(model, kind, tmp_path):
    config = model.config
    done = export(model, ByteTokenizer(), tmp_path / "model.gguf", kind)
    _, tensors = read_file(done.path)
    oracle = GPT2(values(tensors), config.n_layer, config.n_head)
    ids = parity.fixed_prompt(config)
    ours, theirs = parity.our_logits(model, ids), oracle.logits(ids)[0]
    difference = np.abs(ours - theirs).max()
    assert done.difference < 1e-4 and done.size == done.path.stat().st_size
    if kind == "f32":
        assert difference < 1e-4 and done.rounding == 0
    else:
        assert 1e-4 < difference < {"f16": 0.05, "bf16": 0.4, "q8_0": 0.5, "q4_0": 9}[kind]
        assert abs(done.rounding - difference) < 1e-4


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0", "q4_0"])
def test_every_weight_is_there_in_the_type_that_llama_keeps_it_in(model, kind, tmp_path):
    path = export(model, ByteTokenizer(), tmp_path / "model.gguf", kind).path
    _, tensors = read_file(path)
    parameters = model.parameters()
    for name, tensor in tensors.items():
        wanted = "f32" if len(tensor.shape) == 1 or name == "wpe.weight" else kind
        if wanted in ("q8_0", "q4_0") and tensor.shape[0] % 32:  # the first of theirs is our last
            wanted = "f16"
        assert tensor.tensor_type.name == wanted.upper(), name
        if name not in parameters:
            assert name.endswith("bias") and not tensor.data.any()
        else:
            expected = read(parameters[name])
            assert tuple(reversed(tensor.shape.tolist())) == expected.shape
            stored = gguf.quantize(expected, tensor.tensor_type)
            assert np.array_equal(tensor.data, stored), name
    assert set(parameters) <= set(tensors)
    assert len(tensors) == 4 + 12 * model.config.n_layer + (not model.config.tie_embeddings)


def test_rows_that_q8_0_cannot_hold_are_f16_and_named(tmp_path):
    done = export(random_model(CASES["narrow"]), ByteTokenizer(), tmp_path / "m.gguf", "q8_0")
    names = (
        "wte.weight",
        "h.0.attn.c_attn.weight",
        "h.0.attn.c_proj.weight",
        "h.0.mlp.c_fc.weight",
    )
    assert tuple(done.unrounded) == names  # the rows of c_proj are 64 long


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30])
def test_zeros_and_what_float16_cannot_hold_are_stored_without_a_warning(value):
    block = np.full((2, 32), value, np.float32)
    for kind in ("f16", "q8_0"):
        _, again = store(block, kind)
        assert again.shape == block.shape
        assert np.array_equal(again, block) if value == 0 else not np.array_equal(again, block)


def test_the_same_model_gives_the_same_bytes(tmp_path):
    model = random_model(TIED)
    for kind in ("f32", "q8_0"):
        one, two = (export(model, ByteTokenizer(), tmp_path / n, kind).path for n in "ab")
        assert one.read_bytes() == two.read_bytes()


def test_the_file_says_what_it_is_and_how_it_was_proved(tmp_path):
    model = random_model(TIED)
    done = export(model, ByteTokenizer(), tmp_path / "m.gguf", "f16", name="a n\udce9me")
    said, _ = read_file(done.path)
    expected = {
        "general.architecture": "gpt2",
        "general.name": r"a n\xe9me",  # a name that was not UTF-8
        "general.file_type": 1,
        "gpt2.context_length": 24,
        "gpt2.embedding_length": 32,
        "gpt2.block_count": 2,
        "gpt2.feed_forward_length": 128,
        "gpt2.attention.head_count": 2,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
        "tinygpt.parity.max_difference": done.difference,
        "tinygpt.parity.rounding": done.rounding,
        "tinygpt.parity.tolerance": 1e-4,
        "tinygpt.parity.tokens": 24,
    }
    assert {name: said[name] for name in expected} == expected
    assert done.rounding > 0 and said["gpt2.attention.layer_norm_epsilon"] == np.float32(1e-5)


def test_transformers_reads_the_weights(model, tmp_path):
    torch = pytest.importorskip("torch", reason="needs the extra 'oracle'")
    transformers = pytest.importorskip("transformers", reason="needs the extra 'oracle'")
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    path = export(model, ByteTokenizer(), tmp_path / "model.gguf").path
    config = transformers.AutoConfig.from_pretrained(tmp_path, gguf_file=path.name)
    config.n_positions = config.n_ctx  # it takes the 1024 of GPT-2 otherwise
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    found = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=theirs)
    missing, unexpected = theirs.load_state_dict(found["tensors"], strict=False)
    assert not unexpected and missing == (["lm_head.weight"] if config.tie_word_embeddings else [])
    ids = parity.fixed_prompt(model.config)
    with torch.no_grad():
        logits = theirs(torch.from_numpy(ids).long()).logits[0].numpy()
    assert np.abs(logits - parity.our_logits(model, ids)).max() < 1e-4


# The vocabulary ---------------------------------------------------------------------------------


def as_llama_does(tokens, text):
    """Token ids by the rules of llama.cpp: merges by their order; what is no token is dropped."""
    regex = pytest.importorskip("regex")
    letters = {byte: letter for letter, byte in _letters()}
    ranks = {tuple(merge.split(" ")): n for n, merge in enumerate(tokens.merges)}
    ids = {token: i for i, token in enumerate(tokens.texts)}
    for word in regex.findall(PUBLISHED, text):
        parts = [letters[byte] for byte in word.encode()]
        while found := [
            (ranks[pair], at) for at, pair in enumerate(itertools.pairwise(parts)) if pair in ranks
        ]:
            _, at = min(found)
            parts[at : at + 2] = ["".join(parts[at : at + 2])]
        yield from (ids[part] for part in parts if part in ids)


def _letters():
    """GPT-2's spelling of bytes: those that can be printed are themselves, the others follow."""
    printed = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), 256),
    ]
    hidden = [byte for byte in range(256) if byte not in printed]
    yield from ((chr(byte), byte) for byte in printed)
    yield from ((chr(256 + n), byte) for n, byte in enumerate(hidden))


def test_the_tokens_are_ours_by_the_rules_of_llama(trained):
    text = TEXT[:8000]
    for tokenizer in (trained, ByteTokenizer(), CharTokenizer(TEXT)):
        tokens = tokens_of(tokenizer, tokenizer.vocab_size)
        assert list(as_llama_does(tokens, text)) == tokenizer.encode(text)
        assert len(set(tokens.texts)) == len(tokens.texts) == len(tokens.types)


def test_unknown_characters_are_dropped_and_spoil_no_others():
    tokens = tokens_of(CharTokenizer("aé天"), 3)
    assert list(as_llama_does(tokens, "aèa夨a天aé")) == [
        0,
        0,
        0,
        2,
        0,
        1,
    ]  # è, 夨 begin as é, 天 do


def test_a_text_ends_with_what_no_text_has(trained):
    special = BPETokenizer.from_merges([b"ab"], special={"<s>": 0, END: 258})
    gpt2 = [BPETokenizer()] if vocabulary.offline_path("vocab.bpe") else []
    for tokenizer in (trained, ByteTokenizer(), special, *gpt2):
        tokens = tokens_of(tokenizer, tokenizer.vocab_size + 2)
        known = tokenizer.special if isinstance(tokenizer, BPETokenizer) else {}
        assert tokens.end == known.get(END, 255) and tokens.added == 0
        assert tokens.texts[tokens.end] == (END if known else "ÿ")
        assert [i for i, t in enumerate(tokens.types) if t == CONTROL] == sorted(known.values())
        assert tokens.types[-2:] == [UNUSED, UNUSED] and tokens.types.count(UNUSED) == 2
        assert tokens.end not in tokenizer.encode(TEXT)


def test_characters_get_an_end_that_is_never_the_likeliest(tmp_path):
    tokenizer = CharTokenizer("hello wörld")
    V = tokenizer.vocab_size
    model = random_model(GPTConfig(**TIED.to_dict() | {"vocab_size": V}))
    done = export(model, tokenizer, tmp_path / "m.gguf")
    said, tensors = read_file(done.path)
    assert done.added == 1 and said["tokenizer.ggml.tokens"][V] == END
    assert said["tokenizer.ggml.eos_token_id"] == said["tokenizer.ggml.bos_token_id"] == V
    logits = GPT2(values(tensors), 2, 2).logits([list(range(V))])[0]  # (T, V + 1)
    assert np.allclose(logits[:, V], logits[:, :V].mean(axis=1), atol=1e-5)

    spare = random_model(GPTConfig(**TIED.to_dict() | {"vocab_size": V + 3}))
    done = export(spare, tokenizer, tmp_path / "spare.gguf")
    said, tensors = read_file(done.path)
    assert done.added == 0 and said["tokenizer.ggml.eos_token_id"] == V
    assert said["tokenizer.ggml.token_type"] == [*[NORMAL] * V, CONTROL, UNUSED, UNUSED]
    assert np.array_equal(tensors["wte.weight"].data, read(spare.wte.weight))


# What goes wrong --------------------------------------------------------------------------------


def refused(error, message, path, model=None, tokenizer=None, **options):
    """The export fails with that message and leaves nothing behind."""
    before = sorted(path.parent.rglob("*"))
    with pytest.raises(error, match=message):
        export(model or random_model(TIED), tokenizer or ByteTokenizer(), path, **options)
    assert sorted(path.parent.rglob("*")) == before


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
def test_a_file_that_gives_other_logits_never_appears(kind, tmp_path, monkeypatch):
    def damaged(values, kind):
        stored, again = store(values, kind)
        stored = stored.copy()
        stored.reshape(-1)[0] += 1
        return stored, again

    (tmp_path / "m.gguf").write_text("what was there before")
    monkeypatch.setattr(exporting, "store", damaged)
    refused(InteropError, "computes something else", tmp_path / "m.gguf", kind=kind)
    assert (tmp_path / "m.gguf").read_text() == "what was there before"


def test_weights_that_are_no_numbers_or_beyond_float16_are_refused(tmp_path):
    model = random_model(CASES["untied"])
    large = read(model.wte.weight)
    large[0, 0] = 1e5
    write(model.wte.weight, large)
    assert export(model, ByteTokenizer(), tmp_path / "large.gguf").difference < 1e-4
    refused(InteropError, "not finite", tmp_path / "m.gguf", model, kind="f16")
    large[0, 0] = np.nan
    write(model.wte.weight, large)
    for kind in ("f32", "f16", "q8_0"):
        refused(InteropError, "not finite", tmp_path / "m.gguf", model, kind=kind)


def test_another_vocabulary_than_was_written_is_noticed(tmp_path, monkeypatch):
    describe = exporting._describe

    def damaged(writer, *rest):
        describe(writer, *rest)
        texts = writer.kv_data[0]["tokenizer.ggml.tokens"].value
        writer.kv_data[0]["tokenizer.ggml.tokens"].value = [*texts[1:], texts[0]]

    monkeypatch.setattr(exporting, "_describe", damaged)
    refused(InteropError, "reads another vocabulary", tmp_path / "m.gguf")


def test_vocabularies_that_do_not_fit_are_refused(tmp_path, trained):
    path = tmp_path / "m.gguf"
    refused(InteropError, "600 tokens, and the model only 256", path, tokenizer=trained)
    odd = BPETokenizer.from_merges([b"abc"])
    wide = random_model(CASES["untied"])
    refused(TokenizerError, "cannot be merged", path, wide, odd)


def test_a_weight_that_llama_does_not_know_is_named(tmp_path, monkeypatch):
    model = random_model(TIED)
    more = model.parameters() | {"h.0.attn.c_attn.lora_a": model.wpe.weight}
    monkeypatch.setattr(model, "parameters", lambda: more)
    refused(InteropError, r"no weight such as h\.0\.attn\.c_attn\.lora_a", tmp_path / "m", model)


def test_places_that_cannot_be_written_are_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    refused(CheckpointError, "file/m.gguf could not be written", tmp_path / "file" / "m.gguf")
    refused(UsageError, r"is a folder\. Give the file to write: .*model\.gguf", tmp_path)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for name in ("pipe", "link"):  # as /dev/null and /dev/stdout are, which root could replace
        refused(CheckpointError, "it is no ordinary file", tmp_path / name)
        assert (tmp_path / name).is_fifo()
    monkeypatch.setattr("tinygpt.files.disk.free_space", lambda _: 1000)
    refused(CheckpointError, r"0\.1 MB are needed, and 0\.0 MB are free", tmp_path / "m.gguf")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_disk_that_fills_up_leaves_nothing(tmp_path):
    """A file may grow to 100,000 bytes and no further, which is what a full disk looks like."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from tests.test_gguf import *\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: export(random_model(TIED), ByteTokenizer(), Path(sys.argv[1]) / 'm.gguf')\n"
        "except CheckpointError as error: print(error)\n"
    )
    target = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", code, target],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "m.gguf could not be written" in done.stdout, done.stderr
    assert list(target.iterdir()) == []


def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(ImportError, re.escape(extras.cure("gguf")), tmp_path / "m.gguf")


# The command ------------------------------------------------------------------------------------


@pytest.fixture
def run_cli(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/tinygpt"])

    def call(*arguments):
        code = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out, captured.err

    return call


@pytest.fixture
def run(tmp_path):
    model = random_model(CASES["bias-free"])
    return model.save_checkpoint(3, folder=tmp_path / "run", tokenizer=ByteTokenizer()).parent


def test_the_command_writes_a_file_and_says_how_it_was_proved(run, run_cli, tmp_path):
    out = tmp_path / "new" / "m.gguf"
    code, said, told = run_cli("export", "gguf", run, "--out", out, "--type", "q8_0", "--json")
    summary = json.loads(said)
    assert code == 0 and summary["path"] == str(out) and summary["size"] == out.stat().st_size
    assert summary["difference"] < 1e-4 < summary["rounding"]
    assert "no biases: they are written as zeros" in told and "rounding the weights" in told
    assert "breaks off behind token 24" in told and f"wrote {out}" in told
    assert read_file(out)[0]["general.name"] == "run"


def test_wrong_use_of_the_command_is_advice(run, run_cli, tmp_path):
    out = tmp_path / "m.gguf"
    code, _, told = run_cli("export", "gguf", run, "--out", out, "--type", "q2_k")
    assert code == 2 and '"q2_k"' in told and '"bf16", "q8_0", "q4_0"' in told
    code, _, told = run_cli("export", "gguf", run)
    assert code == 2 and "--out" in told
    code, _, told = run_cli("export", "gguf", tmp_path / "nothing", "--out", out)
    assert code != 0 and "nothing" in told
    bare = random_model(TIED).save_checkpoint(1, folder=tmp_path / "bare")
    code, _, told = run_cli("export", "gguf", bare, "--out", out)
    assert code == 2 and "holds no tokenizer" in told and "--tokenizer" in told
    assert not out.exists()
    code, _, _ = run_cli("export", "gguf", bare, "--out", out, "--tokenizer", "byte")
    assert code == 0 and out.exists()


# llama.cpp itself -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama():
    """A Python with llama-cpp-python: TINYGPT_LLAMA_PYTHON, or one that is built once and kept."""
    given = os.environ.get("TINYGPT_LLAMA_PYTHON")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    python = Path(given) if given else cache / "tinygpt-tests" / "llama" / "bin" / "python"
    said = ""
    if not given and not _has_llama(python):
        missing = [tool for tool in ("cmake", "c++") if not shutil.which(tool)]
        if missing:
            pytest.skip(f"llama.cpp cannot be built without {' and '.join(missing)}")
        said = _build(python.parents[1])
    if not _has_llama(python):
        pytest.skip(f"{python} has no llama-cpp-python, and it could not be built: {said}")
    return python


def _has_llama(python):
    if not python.exists():
        return False
    return subprocess.run([python, "-c", "import llama_cpp"], capture_output=True).returncode == 0


def _build(folder):
    """pip fetches the source, so the proxies that keep tests offline are left out.

    -> what it said at the end, which is why it failed if it did
    """
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    environment = {n: v for n, v in os.environ.items() if not n.lower().endswith("_proxy")}
    environment |= {"CMAKE_BUILD_PARALLEL_LEVEL": "2", "CMAKE_ARGS": "-DGGML_NATIVE=OFF"}
    source = ["--no-binary", "llama-cpp-python", "llama-cpp-python>=0.3.16,<0.4"]
    done = subprocess.run(
        [folder / "bin" / "python", "-m", "pip", "install", "-q", *source],
        env=environment,
        capture_output=True,
        text=True,
        timeout=3000,
    )
    return done.stderr.strip()[-300:]


STORY = "The cat sat on the mät. 猫坐在垫子上。 It was 12 o'clock!\n"


@pytest.fixture(scope="module", params=["byte", "bpe", "char", "gpt2"])
def taught(request, trained):
    """A tokenizer, and a model that knows a story too well to waver between two tokens."""
    tokenizer = {
        "byte": ByteTokenizer,
        "bpe": lambda: trained,
        "char": lambda: CharTokenizer(TEXT + STORY),
        "gpt2": BPETokenizer,
    }[request.param]()
    width = 32 if request.param == "gpt2" else 64
    sizes = {"block_size": 128, "n_layer": 2, "n_head": 4, "n_embd": width}
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, **sizes), seed=1)
    recipe = TrainConfig(
        max_iters=250, batch_size=2, learning_rate=4e-3, warmup_steps=10, eval_interval=1000
    )
    train(model, recipe, tokenizer.encode(STORY * 60), show=False)
    return tokenizer, model.eval()


def ask_llama(python, path, request):
    script = Path(__file__).with_name("llama_script.py")
    done = subprocess.run(
        [python, script, path], input=json.dumps(request), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
def test_llama_reads_the_file_and_writes_the_same_text(llama, taught, kind, tmp_path):
    tokenizer, model = taught
    path = export(model, tokenizer, tmp_path / "m.gguf", kind).path
    prompt = tokenizer.encode("The cat")
    request = {"text": TEXT.replace(END, ""), "prompt": prompt, "count": 64, "block_size": 128}
    theirs = ask_llama(llama, path, request)

    assert theirs["ids"] == tokenizer.encode(request["text"]) and theirs["same_text"]
    assert theirs["end"] == tokens_of(tokenizer, tokenizer.vocab_size).end
    logits = np.array(theirs["logits"])[:, : tokenizer.vocab_size]
    difference = np.abs(logits - parity.our_logits(model, np.array([prompt], np.int32))).max()
    # its GELU is a table in float16, and its q8_0 rounds the activations too
    assert difference < {"f32": 0.02, "f16": 0.05, "q8_0": 0.5}[kind]
    ours = model.generate(Tensor([prompt], dtype="int32"), 64, temperature=0).numpy()[0]
    likely = np.sort(parity.our_logits(model, ours[None, :-1]), axis=1)[len(prompt) - 1 :]
    assert (likely[:, -1] - likely[:, -2]).min() > 2 * difference, "the choices are too close"
    assert theirs["tokens"] == ours.tolist()
    assert tokenizer.decode(ours.tolist()).rstrip("\ufffd") in STORY * 20


@pytest.mark.slow
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", ["byte", "char", "bpe", "gpt2"])
def test_llama_makes_our_ids_of_200_conversations(llama, kind, name, tmp_path):
    tokenizer, template = dressed(kind, name), TEMPLATES[name]
    rows = tokenizer.vocab_size + 1
    model = GPT(GPTConfig(block_size=8, vocab_size=rows, n_layer=1, n_head=1, n_embd=4))
    path = export(model, tokenizer, tmp_path / "m.gguf").path
    ids = [template.render(tokenizer, talk).ids.tolist() for talk in conversations(200, seed=7)]
    texts = [tokenizer.decode(each) for each in ids]
    assert ask_llama(llama, path, {"chats": texts})["ids"] == ids
