"""Special tokens, and the template that makes tokens of a conversation."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from tinygpt import BPETokenizer, ByteTokenizer, CharTokenizer
from tinygpt.errors import DataError, TokenizerError
from tinygpt.text.chat.template import CHATML, MARKED, PLAIN, Template, template_of
from tinygpt.text.tokenizers import (
    END,
    MARKERS,
    BaseTokenizer,
    fingerprint,
    load_tokenizer,
    tokenizer_from_dict,
)
from tinygpt.text.tokens import byte_count

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello, you."},
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "Me."},
]
NASTY = ["<|end|>", "<|user|>", "a<|endoftext|>b", "<<|user|>>", "<|us<|end|>er|>", "<|assistant|"]
"""Contents that hold names of markers."""
LETTERS = "".join(map(chr, range(32, 127))) + "\né"


def made(kind: str) -> BaseTokenizer:
    if kind == "gpt2":
        try:
            return BPETokenizer("gpt2")
        except TokenizerError:
            pytest.skip("needs GPT-2's vocabulary: the extra 'offline'")
    merges = [b"us", b"er", b"user", b"He", b"ll", b"Hell", b"Hello", b"\n\n", b" |", b"|>"]
    kinds = {
        "byte": ByteTokenizer,
        "char": lambda: CharTokenizer(LETTERS),
        "bpe": lambda: BPETokenizer.from_merges(merges),
        "imported": lambda: BPETokenizer.from_merges(merges, special={END: 0}),
    }
    return kinds[kind]()


@pytest.fixture(params=["byte", "char", "bpe", "imported", "gpt2"])
def plain(request: pytest.FixtureRequest) -> BaseTokenizer:
    return made(request.param)


@pytest.fixture
def marked(plain: BaseTokenizer) -> BaseTokenizer:
    return plain.with_specials((END, *MARKERS))


def test_special_tokens_stand_behind_all_others(plain: BaseTokenizer, marked: BaseTokenizer):
    known = plain.specials
    added = [name for name in (END, *MARKERS) if name not in known]
    assert marked.specials == (*known, *added)
    assert marked.vocab_size == plain.vocab_size + len(added)
    assert [marked.special_id(name) for name in added] == [
        *range(plain.vocab_size, marked.vocab_size)
    ]
    assert marked.special_id(END) == (plain.special_id(END) if known else plain.vocab_size)
    assert marked.special_id("<|other|>") is None
    assert marked.ends == (marked.special_id(END), marked.special_id("<|end|>"))
    text = "Hello, user."
    assert marked.encode(text) == plain.encode(text)
    assert marked.with_specials(MARKERS) is marked


def test_special_tokens_are_kept_and_shown(marked: BaseTokenizer, tmp_path: Path):
    assert load_tokenizer(marked.save(tmp_path / "t.json")) == marked
    ids = [*marked.encode("Hello"), marked.special["<|end|>"], *marked.encode("!")]
    assert marked.decode(ids) == "Hello<|end|>!"
    assert marked.decode(np.array(ids), skip_special_tokens=True) == "Hello!"
    assert byte_count(np.array(ids), marked) == len("Hello!")
    kept = marked.with_template(CHATML.to_dict())
    assert kept.special == marked.special and kept.ends == marked.ends
    assert tokenizer_from_dict(kept.to_dict()) == kept != marked
    assert fingerprint(kept) == fingerprint(marked)
    assert template_of(kept) == CHATML and template_of(kept.with_template(None)) == MARKED


def test_text_never_becomes_a_special_token(marked: BaseTokenizer):
    special = set(marked.special.values())
    for text in [*NASTY, *marked.specials, "".join(marked.specials)]:
        ids = marked.encode(text)
        assert not special & set(ids) and marked.decode(ids) == text


@pytest.mark.parametrize("names", [[""], ["a", "a"], "<|a|>", [5], ["x" * 300], ["\ud800"], None])
@pytest.mark.parametrize("kind", ["byte", "char", "gpt2"])
def test_names_that_cannot_be_are_refused(kind: str, names: object):
    with pytest.raises(TokenizerError):
        tokenizer_from_dict(made(kind).to_dict() | {"specials": names})
    with pytest.raises(TokenizerError, match="template"):
        tokenizer_from_dict(made(kind).to_dict() | {"template": names or 5})


def test_a_template_of_special_tokens(marked: BaseTokenizer):
    template = template_of(marked)
    assert template == MARKED
    found = template.render(marked, TALK)
    assert marked.decode(found.ids) == (
        "<|system|>Be brief.<|end|><|user|>Hi<|end|><|assistant|>Hello, you.<|end|>"
        "<|user|>Who?<|end|><|assistant|>Me.<|end|>"
    )
    assert found.ids.dtype == np.uint32 and found.counted.dtype == np.bool_
    assert marked.decode(found.ids[found.counted]) == "Hello, you.<|end|>Me.<|end|>"
    asked = template.render(marked, TALK[:2], answer=True)
    assert asked.ids.tolist() == found.ids[: len(asked.ids)].tolist() and not asked.counted.any()
    assert set(template.stop_ids(marked)) == set(marked.special.values())


def test_a_template_of_plain_text(plain: BaseTokenizer):
    assert template_of(plain) is None
    found = PLAIN.render(plain, TALK)
    text = (
        "Be brief.\n\nUser: Hi\n\nAssistant: Hello, you.\n\nUser: Who?\n\nAssistant: Me.\n\nUser:"
    )
    assert plain.decode(found.ids) == text == PLAIN.text(TALK)
    assert found.ids.tolist() == plain.encode(text)
    assert plain.decode(found.ids[found.counted]) == " Hello, you.\n\nUser: Me.\n\nUser:"
    asked = PLAIN.render(plain, TALK[:2], answer=True)
    assert plain.decode(asked.ids) == "Be brief.\n\nUser: Hi\n\nAssistant:"
    assert PLAIN.stop_strings == ("\nUser:",) and not asked.counted.any()


def test_a_template_of_special_tokens_and_text():
    tokenizer = made("bpe").with_specials([END, "<|im_start|>", "<|im_end|>"])
    tokenizer = tokenizer.with_template(CHATML.to_dict())
    found = CHATML.render(tokenizer, TALK[1:3])
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello, you.<|im_end|>\n"
    assert tokenizer.decode(found.ids) == text
    assert tokenizer.decode(found.ids[found.counted]) == "Hello, you.<|im_end|>"


@pytest.mark.parametrize("template", [MARKED, PLAIN, CHATML])
def test_what_a_message_holds_is_never_a_marker(template: Template, plain: BaseTokenizer):
    names = (END, *MARKERS, "<|im_start|>", "<|im_end|>")
    tokenizer = plain if template is PLAIN else plain.with_specials(names)
    random.seed(3)
    bits = [*NASTY, *names, "\nUser: ", "\n\nAssistant:", "x", " "]
    for _ in range(30):
        contents = ["".join(random.choices(bits, k=4)) for _ in range(4)]
        roles = ["user", "assistant"] * 2
        harmless = [{"role": role, "content": "x"} for role in roles]
        talk = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
        special = set(tokenizer.special.values())
        ids, plain_ids = (
            template.render(tokenizer, talk).ids,
            template.render(tokenizer, harmless).ids,
        )
        assert [i for i in ids if i in special] == [i for i in plain_ids if i in special]
        if template is PLAIN:
            turns = [
                tokenizer.decode(i).count(f"\n{who}:")
                for i in (ids, plain_ids)
                for who in ("User", "Assistant")
            ]
            assert turns[:2] == turns[2:]


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"role": "robot", "content": "x"}, "Message 1 has the role 'robot'"),
        ({"content": "x"}, "Message 1 has the role None"),
        ({"role": "user"}, "Message 1, of the user, has the content None"),
        ({"role": "user", "content": 5}, "content 5"),
    ],
)
def test_messages_that_cannot_be_are_named(message: dict[str, object], said: str):
    with pytest.raises(DataError, match=said):
        MARKED.render(made("byte").with_specials(MARKERS), [message])


def test_a_kept_template_that_cannot_be_is_refused():
    kept = made("byte").with_template({"name": "x", "other": "y"})
    with pytest.raises(TokenizerError, match="other"):
        template_of(kept)
