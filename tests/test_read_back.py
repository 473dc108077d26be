"""What is written down in small files is what our own readers find there, whatever it is."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinygpt.config import GPTConfig
from tinygpt.errors import TokenizerError
from tinygpt.files.strict_json import finite
from tinygpt.interop.gguf import gguf_file as ours
from tinygpt.interop.gguf.gguf_tokens import tokens_of
from tinygpt.interop.web import page
from tinygpt.interop.web.finished import check_finished
from tinygpt.interop.web.payload import Chunk
from tinygpt.runs.folder import best_checkpoint, checkpoint_path, mark_best, mark_run, run_of
from tinygpt.text.tokenizers import BPETokenizer, ByteTokenizer, CharTokenizer, Tokenizer
from tinygpt.untrusted import utf8_name

FEW = settings(max_examples=25)
NAMES = st.text(max_size=40) | st.text("<>/!-\\\"'&{}\x00\udc80\ud800\n\r\u2028", max_size=40)
"""Names of folders and runs: also half characters, zero bytes and what HTML is made of."""
NUMBERS = st.integers(-(2**70), 2**70) | st.floats()
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("written")


@FEW
@given(run=st.integers(0, 2**64 - 1).map("{:016x}".format), val_loss=st.floats())
def test_the_marks_of_a_run_are_read_back(folder: Path, run: str, val_loss: float) -> None:
    mark_run(folder, run)
    assert run_of(folder) == run
    path = checkpoint_path(folder, 3)
    path.touch()
    mark_best(path, val_loss)
    assert best_checkpoint(folder) == path
    json.loads((folder / "best.json").read_text("utf-8"), parse_constant=pytest.fail)


PAGE: dict[str, Any] = {"module": b"\0asm", "chunks": [Chunk("float32", 0, 0, b"1234")]}


@FEW
@given(title=NAMES, description=NAMES, card=st.dictionaries(NAMES, VALUES, max_size=4))
def test_what_a_page_says_is_read_back(
    folder: Path, title: str, description: str, card: dict[str, Any]
) -> None:
    """Names come to ``render`` with escapes for what is no UTF-8; all else is JSON."""
    about = {"title": title, "card": card, "chunks": len(PAGE["chunks"])}
    path, names = folder / "page.html", {"title": title, "description": description}
    path.write_bytes(
        b"".join(page.render(**{k: utf8_name(v) for k, v in names.items()}, about=about, **PAGE))
    )
    check_finished(path, PAGE["module"], len(PAGE["chunks"]), node=False)
    found = re.search(r'id="about">(.*?)</script>', path.read_bytes().decode(), re.DOTALL)
    assert found is not None and json.loads(found[1]) == finite(about)


SPECIAL = st.dictionaries(st.text(min_size=1, max_size=12), st.none(), max_size=3).map(list)
CHARACTERS = st.sets(st.characters(codec="utf-8"), min_size=1, max_size=20)


def bpe(special: list[str]) -> Tokenizer:
    ids = {text: 258 + i for i, text in enumerate(special)}
    return BPETokenizer.from_merges([b"ab", b"abc"], special=ids)


TOKENIZERS = (
    st.just(ByteTokenizer())
    | CHARACTERS.map(lambda found: CharTokenizer("".join(sorted(found))))
    | SPECIAL.map(bpe)
)


@settings(max_examples=12)
@given(name=NAMES, tokenizer=TOKENIZERS, unused=st.integers(0, 3))
def test_what_a_gguf_file_says_is_read_back(
    folder: Path, name: str, tokenizer: Tokenizer, unused: int
) -> None:
    gguf = pytest.importorskip("gguf", reason="needs the extra 'gguf'")
    rows = tokenizer.vocab_size + unused
    try:
        tokens = tokens_of(tokenizer, rows)
    except TokenizerError:
        return  # a special token that could stand in a text, or that another one is spelled like
    path, config = folder / "model.gguf", GPTConfig(8, rows, n_layer=1, n_head=1, n_embd=8)
    path.unlink(missing_ok=True)
    writer = gguf.GGUFWriter(path, "gpt2")
    ours._describe(writer, config, tokens, None, "f32", name)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    found = {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}
    assert found.get("general.name", "") == utf8_name(name)
    assert found["tokenizer.ggml.tokens"] == tokens.texts
    assert found["tokenizer.ggml.merges"] == tokens.merges
    assert found["tokenizer.ggml.token_type"] == tokens.types
    assert len(set(tokens.texts)) == len(tokens.texts) >= rows
