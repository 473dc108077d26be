"""The byte-level vocabularies of other tools: tokens spelled in letters, and merges of two tokens.

GPT-2's authors wrote each byte as a character that can be seen, a space as ``Ġ``, and every tool
since does so. Our vocabularies are bytes, and say by their order alone what is merged first; the
others list which two tokens each one is merged from.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from tinygpt.errors import TokenizerError
from tinygpt.files.strict_json import to_json
from tinygpt.text.tokenizers import BPETokenizer, ByteTokenizer, Tokenizer, special_of
from tinygpt.untrusted import brief

VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
"""Bytes that stand for themselves as characters of Latin-1."""
LETTERS = {byte: chr(byte) for byte in VISIBLE}
LETTERS |= {
    byte: chr(0x100 + n)
    for n, byte in enumerate(byte for byte in range(256) if byte not in LETTERS)
}
BYTES = {letter: byte for byte, letter in LETTERS.items()}

GPT2_SHA256 = "ef6d92fbf064c3a26b222b7a7e529111b1b04ea4ce73eabe695a0a49372f4eab"
"""Digest of the vocabulary that GPT-2 was published with."""
MOST_WORK = 50_000_000
"""Sum of the squared lengths of the tokens up to which merges are sought: GPT-2's have 2 million,
and what takes minutes was made to."""

Merge = tuple[bytes, bytes]


@dataclass(frozen=True)
class Vocabulary:
    """What other tools know of a tokenizer that works on bytes."""

    tokens: Mapping[bytes, int]
    """The tokens that text can become, and their ids."""
    merges: list[Merge]
    """The two tokens that each longer one is made from, in the order of their ids."""
    special: Mapping[str, int]

    @property
    def spelled(self) -> dict[str, int]:
        """All tokens in letters, and their ids, in the order of the ids."""
        ids = {spell(token): i for token, i in self.tokens.items()} | dict(self.special)
        return dict(sorted(ids.items(), key=lambda item: item[1]))

    @property
    def spelled_merges(self) -> list[str]:
        return [f"{spell(left)} {spell(right)}" for left, right in self.merges]

    @property
    def digest(self) -> str:
        """SHA-256 of the content, whatever file it came from."""
        parts = [self.spelled, self.spelled_merges, sorted(self.special)]
        return hashlib.sha256(to_json(parts).encode()).hexdigest()


def vocabulary(tokenizer: Tokenizer) -> Vocabulary | None:
    """The byte-level vocabulary that tokenizes as ``tokenizer`` does; None for one of characters.

    Raises TokenizerError for a vocabulary that has no such form.
    """
    if isinstance(tokenizer, ByteTokenizer):
        _check_names(tokenizer.special)
        return Vocabulary({bytes([byte]): byte for byte in range(256)}, [], tokenizer.special)
    if not isinstance(tokenizer, BPETokenizer):
        _check_names(special_of(tokenizer))
        return None
    if tokenizer.pattern != "gpt2":
        raise TokenizerError(
            f"This vocabulary, {brief(tokenizer.to_dict().get('encoding'))}, splits text into "
            f"words in a way of its own. Only those that split as GPT-2 does can be handed on."
        )
    ranks = tokenizer.ranks
    doubtful = next((s for s in tokenizer.special if unspell(s) in ranks), None)
    if doubtful is not None:
        raise TokenizerError(
            f"The special token {brief(doubtful)} is spelled like an ordinary one."
        )
    _check_names(tokenizer.special)
    return Vocabulary(ranks, list(merges_of(ranks)), tokenizer.special)


def _check_names(special: Iterable[str]) -> None:
    """TokenizerError if a special token's name may stand in any text."""
    ordinary = next((s for s in special if not is_bracketed(s)), None)
    if ordinary is not None:
        raise TokenizerError(
            f"The special token {brief(ordinary)} may stand in any text, and other tools would "
            f"make the token of it. Call it {brief(f'<{ordinary}>')}, for example."
        )


def is_bracketed(text: str) -> bool:
    """Whether a special token is spelled so that no ordinary text holds it: other tools make the
    token of a text with its name in it.

    >>> [is_bracketed(text) for text in ("<s>", "[PAD]", "<|endoftext|>", "###", " the")]
    [True, True, True, False, False]
    """
    return len(text) > 2 and text[0] in "<[{" and text[-1] in ">]}"


def merges_of(ranks: Mapping[bytes, int]) -> Iterator[Merge]:
    """The two tokens that each token of several bytes is merged from, in the order of the ids.

    A token is made where all merges of lower ids have been, and these depend on nothing outside
    of it, or it would not have become one token. So its own bytes tell which two are left then.
    """
    check_work(ranks)
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) < 2:
            continue
        parts = merged(token, ranks, below=rank)
        if len(parts) != 2:
            raise TokenizerError(
                f"Token {rank} of this vocabulary, {brief(token)}, cannot be merged from two lower "
                f"ones, so other tools have no way to tell it."
            )
        yield parts[0], parts[1]


def merged(token: bytes, ranks: Mapping[bytes, int], below: int) -> list[bytes]:
    """What a token's bytes become by the merges of lower ids than ``below``."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 1:
        pairs = [ranks.get(a + b, below) for a, b in itertools.pairwise(parts)]
        lowest = min(pairs)
        if lowest >= below:
            break
        at = pairs.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def check_work(tokens: Mapping[bytes, int]) -> None:
    """TokenizerError if the tokens are so long that nobody would wait for their merges."""
    if sum(len(token) ** 2 for token in tokens) > MOST_WORK:
        longest = max(map(len, tokens))
        raise TokenizerError(
            f"A vocabulary with tokens of {longest:,} bytes is none of a language."
        )


def spell(token: bytes) -> str:
    """A token's bytes in letters.

    >>> spell(" né".encode())
    'ĠnÃ©'
    """
    return "".join([LETTERS[byte] for byte in token])


def unspell(text: str) -> bytes | None:
    """The bytes that letters stand for; None if a character stands for none.

    >>> unspell("ĠnÃ©").decode()
    ' né'
    """
    found = [BYTES.get(letter) for letter in text]
    return None if None in found else bytes(byte for byte in found if byte is not None)
