"""A vocabulary as llama.cpp takes it: a token for every row of the embedding, and merges.

llama.cpp wants a token that ends a text, and takes number 11 where none is named, so one always is:

* Where the tokenizer knows one, as GPT-2's does, it is that one: the first, if there are several.
* Of bytes, with or without merges, it is the byte 0xFF, which no text in UTF-8 has.
* Characters all occur in texts. Without such a token they get one more, whose row in the embedding
  is the mean of all others: its logit is then the mean of all logits, so that it is never the
  likeliest.
"""

from __future__ import annotations

from dataclasses import dataclass

from tinygpt.errors import InteropError
from tinygpt.interop.byte_level import spell, vocabulary
from tinygpt.text.tokenizers import END, TURN_END, CharTokenizer, Tokenizer, document_end

NORMAL, CONTROL, UNUSED = 1, 3, 5
"""Types of tokens, as llama.cpp counts them."""
NEVER = b"\xff"
"""A byte that no text has."""


@dataclass(frozen=True)
class Tokens:
    """One entry for each row of the embedding, in letters that stand for bytes."""

    texts: list[str]
    types: list[int]
    merges: list[str]
    end: int
    """The token that ends a text."""
    turn_end: int | None
    """The token that ends a turn of a conversation, if there is one."""
    added: int
    """Rows that the model lacks: 1 where none was left for the end of a text."""


def tokens_of(tokenizer: Tokenizer, rows: int) -> Tokens:
    """The tokens of a model whose embedding has so many rows; what is left over is unused.

    Raises InteropError if the model has fewer rows than there are tokens, TokenizerError for a
    vocabulary that has no such form.
    """
    if tokenizer.vocab_size > rows:
        raise InteropError(
            f"The tokenizer has {tokenizer.vocab_size:,} tokens, and the model only {rows:,}. It "
            f"is not the one the model was trained with."
        )
    if isinstance(tokenizer, CharTokenizer):
        return _of_characters(tokenizer, rows)
    found = vocabulary(tokenizer)
    assert found is not None, "only characters have none"
    texts = list(found.spelled)
    types = [CONTROL if text in found.special else NORMAL for text in texts]
    end = document_end(tokenizer)
    # llama.cpp wants a merge: this one is of two bytes that no text has
    merges = found.spelled_merges or [f"{spell(NEVER)} {spell(NEVER)}"]
    return _filled(
        texts,
        types,
        merges,
        found.tokens[NEVER] if end is None else end,
        found.special.get(TURN_END),
        rows,
    )


def _of_characters(tokenizer: CharTokenizer, rows: int) -> Tokens:
    """Characters as the bytes they are made of, which merges put together again.

    No merge makes anything of two characters: one begins with the first byte of a character, which
    in UTF-8 is never a later one. What is made on the way to a character is no token, and llama.cpp
    drops it; so it does characters that are not in the vocabulary.
    """
    encoded = [character.encode() for character in tokenizer.chars]
    beginnings = ((one[:i], one[i : i + 1]) for one in encoded for i in range(1, len(one)))
    merges = dict.fromkeys(f"{spell(left)} {spell(right)}" for left, right in beginnings)
    special = tokenizer.specials if END in tokenizer.specials else (*tokenizer.specials, END)
    texts = [*map(spell, encoded), *special]
    types = [NORMAL] * len(encoded) + [CONTROL] * len(special)
    never = f"{spell(NEVER)} {spell(NEVER)}"
    turn_end = tokenizer.special_id(TURN_END)
    return _filled(texts, types, [*merges] or [never], texts.index(END), turn_end, rows)


def _filled(
    texts: list[str],
    types: list[int],
    merges: list[str],
    end: int,
    turn_end: int | None,
    rows: int,
) -> Tokens:
    """With a token for every row; the space in its name is no letter of any other."""
    unused = [f"[unused {i}]" for i in range(len(texts), rows)]
    types = [*types, *[UNUSED] * len(unused)]
    added = max(len(texts) - rows, 0)
    return Tokens([*texts, *unused], types, merges, end, turn_end, added)
