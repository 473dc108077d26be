"""The commands of docs/interop.md, one after another, on a GPT-2 that is small and random."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import numpy as np
import pytest

from tests.test_docs import DOCS, commands
from tests.test_gguf import ask_llama, llama
from tinygpt import GPT, BPETokenizer, GPTConfig, load
from tinygpt.cli import main
from tinygpt.config import SampleConfig
from tinygpt.generation.generate import generate
from tinygpt.interop.hf.hf_export import export
from tinygpt.runs.checkpoint import Meta
from tinygpt.text.tokenizers import vocabulary

__all__ = ["llama"]

SMALLER = {
    "train": "--train.max-iters 4 --train.batch-size 2 --train.eval-iters 1",
    "generate": "--max-tokens 5",
}
SHAPE = GPTConfig(block_size=64, n_layer=2, n_head=2, n_embd=32)


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every command of the page was run, as it stands there but for its length.

    Where the hub's GPT-2 is asked for there is a folder in its place.
    """
    if vocabulary.offline_path("vocab.bpe") is None:
        pytest.skip("GPT-2's vocabulary comes with the extra 'offline'")
    pytest.importorskip("gguf", reason="the extra 'gguf' is not installed")
    folder = tmp_path_factory.mktemp("walk")
    before = Path.cwd()
    os.chdir(folder)
    try:
        for name in ("gpt2", "path/to/folder", "nanogpt-hf"):
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            export(GPT(SHAPE, seed=len(name)), BPETokenizer(), Path(name), Meta(0, SHAPE))
        Path("mytext.txt").write_text("It was a dark night, und die Sterne, 星星, shone. " * 60)
        lines = list(dict.fromkeys(commands(DOCS / "interop.md")))
        assert len(lines) >= 6
        for line in lines:
            _, verb, *words = shlex.split(line, comments=True)
            if verb == "train" and words[0] == "train.bin":
                continue  # named in passing: another tool's file
            if words[:2] == ["hf", "gpt2"]:
                words[1] = "./gpt2"
            assert main([verb, *words, *SMALLER.get(verb, "").split()]) == 0, line
    finally:
        os.chdir(before)
    return folder


def test_a_text_goes_from_import_through_fine_tuning_to_a_gguf(walked: Path) -> None:
    import gguf

    tuned, tokenizer = load(walked / "runs" / "mine")
    imported, _ = load(walked / "runs" / "gpt2")
    assert tokenizer == BPETokenizer()
    moved = [
        float(np.abs(p.numpy() - imported.parameters()[name].numpy()).max())
        for name, p in tuned.parameters().items()
    ]
    assert 0 < max(moved) < 0.01  # fine-tuned, not trained anew
    reader = gguf.GGUFReader(walked / "mine.gguf")
    found = {tensor.name: tensor for tensor in reader.tensors}
    stored = found["blk.1.ffn_up.weight"]
    values = gguf.dequantize(stored.data, stored.tensor_type)
    wanted = tuned.h[1].mlp.c_fc.weight.numpy()
    assert stored.tensor_type.name == "Q8_0"
    np.testing.assert_allclose(values, wanted, atol=np.abs(wanted).max() / 127)


def test_what_was_exported_for_transformers_is_the_tuned_model(walked: Path) -> None:
    model, tokenizer = load(walked / "runs" / "mine")
    again = GPT.from_pretrained(walked / "mine-hf")
    assert tokenizer is not None
    for name, parameter in model.parameters().items():
        assert np.array_equal(parameter.numpy(), again.parameters()[name].numpy()), name


@pytest.mark.slow
def test_llama_speaks_it(llama: Path, walked: Path, tmp_path: Path) -> None:
    model, tokenizer = load(walked / "runs" / "mine")
    assert tokenizer is not None
    gguf_file = tmp_path / "exact.gguf"  # of rounded weights the texts may part
    assert main(["export", "gguf", str(walked / "runs" / "mine"), "--out", str(gguf_file)]) == 0
    prompt = tokenizer.encode("It was")
    request = {"block_size": 64, "text": "It was 星星", "prompt": prompt, "count": 12}
    theirs = ask_llama(llama, gguf_file, request)
    ours = generate(model, [prompt], 12, SampleConfig(temperature=0)).numpy()[0].tolist()
    assert theirs["ids"] == tokenizer.encode("It was 星星")
    assert theirs["tokens"] == ours
