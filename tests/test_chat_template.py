"""The chat template in exports: transformers and other readers make our ids of a conversation."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.test_template import NASTY, TALK, made
from tinygpt.interop.chat_template import read_jinja, to_jinja
from tinygpt.interop.hf.hf_tokenizer import read_tokenizer, write_tokenizer
from tinygpt.text.chat.template import CHATML, MARKED, PLAIN, TEMPLATES, Template, template_of
from tinygpt.text.tokenizers import END, MARKERS, BaseTokenizer, special_of

KINDS = ["byte", "char", "bpe", "imported", "gpt2"]
NAMES = {"marked": (END, *MARKERS), "plain": (), "chatml": (END, "<|im_start|>", "<|im_end|>")}


def conversations(count: int, seed: int) -> list[list[dict[str, str]]]:
    """Of all lengths and roles, with names of markers, quotes, white space at the ends and none."""
    rng = random.Random(seed)
    words = ["it's", 'a "b"', "\\n", "\n", "\n\n", " ", "  ", "1 + 2 = 3", "{{ x }}", "{% if %}"]
    words += [*NASTY, "User:", "\nUser: hi", "\n\nAssistant:", "é", "plain words here", "<", "|>"]

    def content() -> str:
        return rng.choice(["", " "]).join(rng.choices(words, k=rng.randrange(6)))

    talks = []
    for _ in range(count):
        roles = ["system"] * rng.randrange(2) + ["user", "assistant"] * rng.randrange(1, 4)
        roles = roles[: -1 if rng.random() < 0.5 and len(roles) > 1 else None]
        talks.append([{"role": role, "content": content()} for role in roles])
    return talks


def dressed(kind: str, name: str) -> BaseTokenizer:
    """A vocabulary that is used with that template."""
    tokenizer = made(kind).with_specials(NAMES[name])
    return tokenizer if name == "marked" else tokenizer.with_template(TEMPLATES[name].to_dict())


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_makes_our_ids_of_200_conversations(kind: str, name: str, tmp_path: Path):
    hf = pytest.importorskip("transformers", reason="needs the extra 'oracle'")
    pytest.importorskip("jinja2", reason="transformers renders templates with it")
    tokenizer, template = dressed(kind, name), TEMPLATES[name]
    write_tokenizer(tokenizer, tmp_path, block_size=64)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    theirs = hf.AutoTokenizer.from_pretrained(tmp_path)
    special = set(tokenizer.special.values())
    for number, talk in enumerate(conversations(200, seed=len(kind + name))):
        asked = bool(number % 2)
        ids = template.render(tokenizer, talk, answer=asked).ids.tolist()
        made = theirs.apply_chat_template(talk, add_generation_prompt=asked, return_dict=False)
        assert made == ids, talk
        text = theirs.apply_chat_template(talk, add_generation_prompt=asked, tokenize=False)
        harmless = [
            m | {"content": template.neutral(m["content"], tokenizer.special)} for m in talk
        ]
        assert text == template.text(harmless, asked) == tokenizer.decode(ids)
        expected = template.render(tokenizer, [m | {"content": "x"} for m in talk], asked).ids
        assert [i for i in ids if i in special] == [i for i in expected if i in special]
    with pytest.raises(Exception, match="no role robot"):
        theirs.apply_chat_template([{"role": "robot", "content": "x"}])


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_vocabulary_and_its_template_come_back(kind: str, name: str, tmp_path: Path):
    tokenizer = dressed(kind, name)
    write_tokenizer(tokenizer, tmp_path, block_size=64)
    back = read_tokenizer(tmp_path)
    assert isinstance(back, BaseTokenizer) and special_of(back) == special_of(tokenizer)
    assert template_of(back) == TEMPLATES[name] and back.vocab_size == tokenizer.vocab_size
    if kind != "imported":
        assert back == tokenizer


def test_a_template_in_a_file_of_its_own_is_read(tmp_path: Path):
    tokenizer = dressed("byte", "marked")
    write_tokenizer(tokenizer, tmp_path, block_size=64)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "chat_template.jinja").write_text(to_jinja(PLAIN, tokenizer.special) + "\n")
    assert template_of(read_tokenizer(tmp_path)) == PLAIN
    settings["chat_template"] = "{{ 'another' }}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert template_of(read_tokenizer(tmp_path)) == PLAIN
    (tmp_path / "chat_template.jinja").unlink()
    assert template_of(read_tokenizer(tmp_path)) == MARKED  # what its tokens say


def test_a_template_that_nobody_here_knows_is_left_out_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    write_tokenizer(dressed("byte", "plain"), tmp_path, block_size=64)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert template_of(read_tokenizer(tmp_path)) is None
    assert "none that TinyGPT knows" in caplog.text


@pytest.mark.parametrize("template", [MARKED, PLAIN, CHATML])
def test_jinja_is_known_again_only_for_the_same_special_tokens(template: Template):
    jinja = to_jinja(template, MARKERS)
    assert read_jinja(jinja, MARKERS) == template
    assert read_jinja(jinja, ["<|other|>"]) is None  # it would let a marker through


OTHERS_CHATML = """{%- for message in messages %}
    {{- "<|im_start|>" + message.role + "\\n" + message.content + "<|im_end|>" + "\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\\n" }}
{%- endif %}
"""


def test_chatml_as_others_write_it_is_read_and_means_the_same(tmp_path: Path):
    names = (END, "<|im_start|>", "<|im_end|>")
    tokenizer = made("bpe").with_specials(names)
    write_tokenizer(tokenizer, tmp_path, block_size=64)
    (tmp_path / "chat_template.jinja").write_text(OTHERS_CHATML)
    assert template_of(read_tokenizer(tmp_path)) == CHATML
    assert read_jinja(OTHERS_CHATML, MARKERS) is None  # its tokens are not there
    hf = pytest.importorskip("transformers", reason="needs the extra 'oracle'")
    pytest.importorskip("jinja2", reason="transformers renders templates with it")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    theirs = hf.AutoTokenizer.from_pretrained(tmp_path)
    for asked in (False, True):
        ids = CHATML.render(tokenizer, TALK, answer=asked).ids.tolist()
        made_there = theirs.apply_chat_template(
            TALK, add_generation_prompt=asked, return_dict=False
        )
        assert made_there == ids


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_gguf_file_holds_template_and_ends(kind: str, name: str, tmp_path: Path):
    gguf = pytest.importorskip("gguf", reason="needs the extra 'gguf'")
    from tinygpt import GPT, GPTConfig
    from tinygpt.interop.gguf.gguf_file import export
    from tinygpt.interop.gguf.gguf_tokens import CONTROL

    if kind == "gpt2":
        pytest.skip("the same as of imported ones, and larger")
    tokenizer = dressed(kind, name)
    config = GPTConfig(block_size=8, vocab_size=272, n_layer=1, n_head=1, n_embd=4)
    path = export(GPT(config), tokenizer, tmp_path / "m.gguf").path
    fields: dict[str, Any] = {
        key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()
    }
    assert fields["tokenizer.chat_template"] == to_jinja(TEMPLATES[name], tokenizer.special)
    texts, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    for text, i in tokenizer.special.items():
        assert texts[i] == text and types[i] == CONTROL
    assert len(texts) == 272 and types.count(CONTROL) == len(
        set(tokenizer.specials) | ({END} if kind == "char" else set())
    )
    ends = [fields.get(f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot")]
    assert ends[1] == tokenizer.special_id("<|end|>")
    if END in tokenizer.special:
        assert ends[0] == tokenizer.special[END]


def test_an_exported_model_stops_where_ours_does(tmp_path: Path):
    tokenizer = dressed("byte", "marked")
    from tinygpt import GPT, GPTConfig
    from tinygpt.interop.hf.hf_export import export
    from tinygpt.interop.hf.pretrained import open_pretrained
    from tinygpt.runs.checkpoint import Meta

    config = GPTConfig(block_size=8, vocab_size=264, n_layer=1, n_head=1, n_embd=4)
    export(GPT(config), tokenizer, tmp_path / "hf", Meta(0, config))
    for file in ("config.json", "generation_config.json"):
        said = json.loads((tmp_path / "hf" / file).read_text())
        assert said["eos_token_id"] == [256, 260] and said["bos_token_id"] == 256
    back = open_pretrained(tmp_path / "hf").tokenizer
    assert back == tokenizer and template_of(back) == MARKED
    assert len(MARKED.render(back, TALK).ids) == len(MARKED.render(tokenizer, TALK).ids)
