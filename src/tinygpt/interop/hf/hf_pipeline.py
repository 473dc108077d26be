"""What a tokenizer of transformers does besides its vocabulary, where that would change the ids.

Tokens before and after a text, a space before it, a text that is cut or filled up, added tokens
that are taken out of a text before it is split: TinyGPT does none of these, so a tokenizer that
does is refused, and the message names what is in the way. What changes nothing is passed over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

from tinygpt.errors import TokenizerError
from tinygpt.interop.byte_level import is_bracketed
from tinygpt.untrusted import brief

SETTINGS, SPECIAL = "tokenizer_config.json", "special_tokens_map.json"
NAMING = (SETTINGS, "config.json")
"""Files that may name the tokenizer's class; the first one that does counts, as in transformers."""
TAKEN = (
    "TinyGPT takes over byte-level BPEs that split text as GPT-2's does, and what it wrote itself."
)
CLASSES = (
    *("GPT2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast", "PreTrainedTokenizer"),
    *("TokenizersBackend", "PythonBackend"),
)
"""Classes of transformers that add nothing to what the files say."""
SWITCHES = {
    "add_prefix_space": "puts a space before each text",
    "add_bos_token": "puts a token before each text",
    "add_eos_token": "puts a token behind each text",
}
PARTS = {"truncation": "cuts texts to a length", "padding": "fills texts up to a length"}
AROUND = ("lstrip", "rstrip", "single_word")
"""What an added token takes along of the text beside it, or wants there."""


def check_pipeline(values: Mapping[str, Any]) -> None:
    """TokenizerError if a tokenizer.json says that ids are added or left out behind the model."""
    for name, effect in PARTS.items():
        part = values.get(name)
        if part is not None and not _only_in_batches(name, part):
            raise TokenizerError(
                f"This tokenizer {effect} ({name}). If that was meant for training alone, set "
                f"{name} to null in the file. {TAKEN}"
            )
    if (what := _adding(values.get("post_processor"))) is not None:
        raise TokenizerError(f"This tokenizer puts tokens around each text, by {what}. {TAKEN}")


def _only_in_batches(name: str, part: Any) -> bool:
    """Whether texts are only filled up to the longest one of those that are encoded together."""
    is_padding = name == "padding" and isinstance(part, dict)
    return (
        is_padding and part.get("strategy") == "BatchLongest" and not part.get("pad_to_multiple_of")
    )


def _adding(part: Any) -> str | None:
    """The post-processor that adds something; None if none does."""
    kind = part.get("type") if isinstance(part, dict) else None
    if part is None or kind == "ByteLevel":  # which knows where tokens are, not which they are
        return None
    if kind == "Sequence" and isinstance(inner := part.get("processors"), list):
        return next(filter(None, map(_adding, inner)), None)
    if kind == "TemplateProcessing" and isinstance(single := part.get("single"), list):
        pieces = [piece if isinstance(piece, dict) else {} for piece in single]
        if [isinstance(piece.get("Sequence"), dict) for piece in pieces] == [True]:
            return None
        tokens = [token for p in pieces if isinstance(token := p.get("SpecialToken"), dict)]
        names = ", ".join(brief(token.get("id", "a token")) for token in tokens)
        return f"TemplateProcessing with {names or 'a text more than once'}"
    return f"a post_processor of type {brief(kind)}"


def check_settings(values: Mapping[str, Any], roles: Set[str]) -> None:
    """The same for a tokenizer_config.json; ``roles`` are the special tokens that are named."""
    on = [name for name in SWITCHES if values.get(name)]
    if on:
        effects = " and ".join(f"{SWITCHES[name]} ({name})" for name in on)
        raise TokenizerError(f"This tokenizer {effects}. {TAKEN}")
    decoder = values.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        check_added([token for token in decoder.values() if isinstance(token, dict)], roles)


def check_class(values: Mapping[str, Any]) -> bool:
    """Whether a file names a class, or code; TokenizerError if that may make other ids."""
    code = values.get("auto_map")
    if isinstance(code, list) or (isinstance(code, dict) and code.get("AutoTokenizer")):
        raise TokenizerError(f"This tokenizer has code of its own (auto_map). {TAKEN}")
    kind = values.get("tokenizer_class")
    if kind and kind not in CLASSES:
        raise TokenizerError(f"This is a tokenizer of the class {brief(kind)}. {TAKEN}")
    return bool(kind)


def check_added(tokens: Sequence[Mapping[str, Any]], roles: Set[str], around: bool = False) -> None:
    """TokenizerError if an ordinary text could become one of these added tokens.

    Text never becomes a special token here, and there only where a text spells its name, such as
    ``<|endoftext|>``. With ``around`` they may not take along what stands beside them, either.
    """
    for token in tokens:
        text = token.get("content")
        if not isinstance(text, str):
            raise TokenizerError("The file is damaged: an added token has no content.")
        if token.get("special") is not True and text not in roles:
            raise TokenizerError(
                f"The added token {brief(text)} is taken out of each text. If no text should "
                f"become it, mark it as special in the file. {TAKEN}"
            )
        if not around and not is_bracketed(text):
            raise TokenizerError(f"The special token {brief(text)} may stand in any text. {TAKEN}")
        if around and any(token.get(name) for name in AROUND):
            raise TokenizerError(f"The added token {brief(text)} takes more than its own text.")


def special_roles(values: Mapping[str, Any]) -> set[str]:
    """The special tokens that a file names by their role, such as ``eos_token``, or in a list."""
    return set(_texts([v for name, v in values.items() if name.endswith(("_token", "_tokens"))]))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict) and isinstance(value.get("content"), str):
        yield value["content"]
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each)
