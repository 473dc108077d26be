"""A tokenizer as the page's JavaScript takes it."""

from __future__ import annotations

from typing import Any

from tinygpt.errors import UsageError
from tinygpt.text.chat.window import ROOM, chat_template, stop_ids
from tinygpt.text.tokenizers import BPETokenizer, Tokenizer, ends_of, special_of


def describe(tokenizer: Tokenizer) -> dict[str, Any]:
    """The kind, and the characters or the tokens in the order of their ids.

    A byte-pair token is given as its bytes, each as the character of that number (Latin-1); in the
    place of a special one, which text never becomes, stands nothing. ``ends`` are the ids that end
    a text. Raises UsageError for a vocabulary that splits text otherwise than GPT-2's.
    """
    values = tokenizer.to_dict()
    kind = values.get("kind")
    if kind == "byte":
        return {"kind": "byte", **_special(tokenizer)}
    if kind == "char":
        return {"kind": "char", "chars": values["chars"], **_special(tokenizer)}
    if kind == "bpe" and "gpt2" in (values.get("encoding"), values.get("pattern")):
        assert isinstance(tokenizer, BPETokenizer)
        tokens = [""] * tokenizer.vocab_size
        for token, i in tokenizer.ranks.items():
            tokens[i] = token.decode("latin-1")
        return {"kind": "bpe", "tokens": tokens, "special": {}, **_special(tokenizer)}
    name = values.get("encoding") or kind
    raise UsageError(
        f"A page cannot carry the tokenizer {name!r}: it splits text in a way that is not built "
        f"into the page. Wanted: gpt2, a BPE of our own, char or byte."
    )


def describe_chat(tokenizer: Tokenizer) -> dict[str, Any]:
    """The chat template, as the page's Conversation takes it."""
    template, special = chat_template(tokenizer), dict(special_of(tokenizer))
    return {
        "template": template.to_dict(),
        "harmless": template.harmless(special),
        "special": special,
        "stop": list(template.stop_strings),
        "stop_ids": list(stop_ids(tokenizer)),
        "room": ROOM,
    }


def _special(tokenizer: Tokenizer) -> dict[str, Any]:
    special, ends = dict(special_of(tokenizer)), list(ends_of(tokenizer))
    return ({"special": special} if special else {}) | ({"ends": ends} if ends else {})
