"""A tokenizer as the page's JavaScript takes it."""

from __future__ import annotations

from typing import Any

from tinygpt.errors import UsageError
from tinygpt.tokenizers import Tokenizer


def describe(tokenizer: Tokenizer) -> dict[str, Any]:
    """The kind, and the characters or the tokens in the order of their ids.

    A byte-pair token is given as its bytes, each as the character of that number (Latin-1). Raises
    UsageError for a vocabulary that splits text otherwise than GPT-2's.
    """
    values = tokenizer.to_dict()
    kind = values.get("kind")
    if kind == "byte":
        return {"kind": "byte"}
    if kind == "char":
        return {"kind": "char", "chars": values["chars"]}
    if kind == "bpe" and "gpt2" in (values.get("encoding"), values.get("pattern")):
        special = {"<|endoftext|>": 50256} if values.get("encoding") == "gpt2" else {}
        count = tokenizer.vocab_size - len(special)
        tokens = [tokenizer.decode_bytes([i]).decode("latin-1") for i in range(count)]
        return {"kind": "bpe", "tokens": tokens, "special": special}
    name = values.get("encoding") or kind
    raise UsageError(
        f"A page cannot carry the tokenizer {name!r}: it splits text in a way that is not built "
        f"into the page. Wanted: gpt2, a BPE of our own, char or byte."
    )
