"""Role markers for a vocabulary that was made without them, and rows of the embedding for these."""

from __future__ import annotations

from collections.abc import Sequence

from tinygpt.errors import TokenizerError, UsageError
from tinygpt.text.tokenizers import (
    ASSISTANT,
    END,
    MARKERS,
    SYSTEM,
    TURN_END,
    USER,
    BaseTokenizer,
    Tokenizer,
    special_of,
)

MEANINGS = {
    END: "\n\n",
    SYSTEM: "System:",
    USER: "User:",
    ASSISTANT: "Assistant:",
    TURN_END: "\n\n",
}
"""The text that a special token stands for, of whose rows the mean is a good beginning."""


def marked(tokenizer: Tokenizer) -> BaseTokenizer:
    """The same vocabulary with the tokens of a conversation behind all others."""
    if not isinstance(tokenizer, BaseTokenizer):
        raise UsageError(
            f"{type(tokenizer).__name__} is a tokenizer of your own, to which no markers can be "
            f"added. Leave --markers out: roles are then written as plain text."
        )
    return tokenizer.with_specials((END, *MARKERS))


def new_rows(old: Tokenizer | None, new: Tokenizer | None) -> dict[int, Sequence[int]]:
    """For each special token that only ``new`` has, the ids whose rows it begins as the mean of.

    ``old`` made the tokens that the weights have learned; if it is not known, these had no markers.
    """
    known = special_of(old)
    added = {name: i for name, i in special_of(new).items() if name not in known}
    if old is None or new is None:
        added = {name: i for name, i in added.items() if name in MARKERS}
    return {i: _ids(name, new) for name, i in added.items() if new is not None}


def _ids(name: str, tokenizer: Tokenizer) -> Sequence[int]:
    """The ids of what a special token stands for; all, in a vocabulary that cannot write that."""
    special = special_of(tokenizer)
    if name == TURN_END and END in special and special[END] < special[TURN_END]:
        return [special[END]]
    try:
        return tokenizer.encode(MEANINGS.get(name, name))
    except TokenizerError:  # of characters
        return range(tokenizer.vocab_size - len(special))
