"""Byte-pair encoding: GPT-2's own vocabulary, or one trained on your text."""

from __future__ import annotations

import base64
import binascii
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from tinygpt.errors import TokenizerError
from tinygpt.files.atomic import user_path
from tinygpt.text.tokenizers.base import (
    END,
    MAX_SPECIAL,
    TURN_END,
    BaseTokenizer,
    checked_ids,
    checked_names,
    checked_template,
    utf8,
)
from tinygpt.text.tokenizers.chunks import chunks, split_space
from tinygpt.text.tokenizers.vocabulary import load_encoding
from tinygpt.untrusted import brief

if TYPE_CHECKING:
    import tiktoken

PATTERNS = {
    # GPT-2's, written with possessive quantifiers so that long runs need no backtracking.
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
}
"""How text is split into words before the merges, by the name under which a vocabulary says so."""

MAX_VOCAB = 1 << 20
"""More tokens than this is a typing error or a hostile file."""
BYTES = bytes(range(256))
"""The single bytes in the order of our ids. Other tools begin with those that can be printed."""

log = logging.getLogger("tinygpt")


class BPETokenizer(BaseTokenizer):
    """Tokens are frequent byte sequences; every text can be held, and comes back exactly.

    ``encoding_name`` is any encoding that tiktoken knows. GPT-2's, of 50257 tokens, needs no
    network where the ``offline`` extra is installed. ``folder`` holds the vocabulary files if they
    lie somewhere of your own. A missing vocabulary is a TokenizerError with every way to get it.

    >>> BPETokenizer().encode("Hello, world!")
    [15496, 11, 995, 0]
    >>> BPETokenizer().encode("<|endoftext|>")  # text is never a special token
    [27, 91, 437, 1659, 5239, 91, 29]
    """

    kind = "bpe"

    def __init__(self, encoding_name: str = "gpt2", *, folder: str | Path | None = None) -> None:
        encoding = load_encoding(encoding_name, user_path(folder) if folder is not None else None)
        self._set(encoding, {"kind": self.kind, "encoding": encoding_name})

    def _set(self, encoding: tiktoken.Encoding, content: dict[str, Any]) -> None:
        self._encoding, self._content = encoding, content
        self.vocab_size = encoding.max_token_value + 1
        self.specials = tuple(sorted(self.special, key=self.special.__getitem__))
        self.template = checked_template(content.get("template"))
        self._ends = _checked_ends(content.get("ends", self._usual_ends), self.vocab_size)

    @property
    def ends(self) -> tuple[int, ...]:
        return self._ends

    @property
    def _usual_ends(self) -> list[int]:
        """``<|endoftext|>``, and what ends a turn, where the vocabulary has them."""
        return [self.special[name] for name in (END, TURN_END) if name in self.special]

    def with_specials(self, names: Iterable[str]) -> Self:
        added = [name for name in dict.fromkeys(names) if name not in self.special]
        if not added:
            return self
        ids = {name: self.vocab_size + n for n, name in enumerate(checked_names(added))}
        return self._with(ids)

    def _with(self, ids: Mapping[str, int]) -> Self:
        """The same vocabulary with more special tokens, whose ids follow all others."""
        import tiktoken

        content, encoding = dict(self._content), self._encoding
        if "merges" in content:
            content["special"] = {**self.special, **ids}
        else:
            content["specials"] = [*content.get("specials", []), *ids]
        if "ends" in content and TURN_END in ids:
            content["ends"] = [*content["ends"], ids[TURN_END]]
        more = tiktoken.Encoding(
            encoding.name,
            pat_str=encoding._pat_str,
            mergeable_ranks=encoding._mergeable_ranks,
            special_tokens={**self.special, **ids},
        )
        return self._like(more, content)

    def _like(self, encoding: tiktoken.Encoding, content: dict[str, Any]) -> Self:
        made = type(self).__new__(type(self))
        made._set(encoding, content)
        return made

    def with_template(self, template: Mapping[str, Any] | None) -> Self:
        content = {k: v for k, v in self._content.items() if k != "template"}
        kept = {} if template is None else {"template": dict(template)}
        return self._like(self._encoding, content | kept)

    def with_ends(self, ends: list[int]) -> Self:
        """The same vocabulary with other tokens that end a text; TokenizerError for no ids."""
        content = {k: v for k, v in self._content.items() if k != "ends"}
        kept = {} if ends == self._usual_ends else {"ends": ends}
        return self._like(self._encoding, content | kept)

    @property
    def ranks(self) -> Mapping[bytes, int]:
        """The id of each token that text can become; of two possible merges the lower id wins."""
        return self._encoding._mergeable_ranks

    @property
    def special(self) -> Mapping[str, int]:
        """The ids that no text becomes, and what they are called."""
        return self._encoding._special_tokens

    @property
    def pattern(self) -> str | None:
        """The name of the pattern that splits text into words; None for one without a name."""
        return next((k for k, v in PATTERNS.items() if v == self._encoding._pat_str), None)

    @classmethod
    def train(
        cls, text: str | Iterable[str], vocab_size: int, specials: Iterable[str] = ()
    ) -> Self:
        """Learn the ``vocab_size - 256 - len(specials)`` most useful merges from ``text``.

        ``text`` is a string, or an iterable of pieces of one text, which is read once and in
        bounded memory. Where it has too few words the vocabulary is smaller; a log line says so.
        """
        if not isinstance(vocab_size, int) or not 257 <= vocab_size <= MAX_VOCAB:
            raise TokenizerError(
                f"vocab_size={vocab_size!r} is out of range: a BPE has its 256 bytes and at least "
                f"one merge, so from 257 to {MAX_VOCAB}. A common size for a small text is 1024."
            )
        names = checked_names(list(specials))
        size = max(257, vocab_size - len(names))  # of bytes and merges
        import rustbpe  # type: ignore[import-untyped]

        trainer = rustbpe.Tokenizer()
        # The trainer gathers buffer_size strings at a time; ours are large, so few of them.
        trainer.train_from_iterator(
            _training_pieces(text), size, buffer_size=16, pattern=PATTERNS["gpt2"]
        )
        tokens = [token for token, _ in trainer.get_mergeable_ranks()]
        if len(tokens) < size:
            log.warning(
                "The text is too small for a vocabulary of %d tokens; it has %d.",
                vocab_size,
                len(tokens) + len(names),
            )
        return cls.from_merges(tokens[256:]).with_specials(names)

    @classmethod
    def from_merges(
        cls,
        merges: list[bytes],
        pattern: str = "gpt2",
        *,
        alphabet: bytes = BYTES,
        special: Mapping[str, int] | None = None,
    ) -> Self:
        """The tokenizer of these tokens, in the order in which they are merged.

        ``special`` names ids that no text becomes. The others go, in order, to the 256 bytes as
        ``alphabet`` has them, and to ``merges``. TokenizerError if there are none.
        """
        import tiktoken

        if not merges:
            raise TokenizerError(
                "There is nothing to merge: no word of the text has two bytes. Use the tokenizer "
                "that has no merges, byte, or give a longer text."
            )
        special = dict(special or {})
        taken = set(special.values())
        free = (i for i in range(256 + len(merges) + len(special)) if i not in taken)
        ranks = dict(zip([*(bytes([byte]) for byte in alphabet), *merges], free, strict=True))
        self = cls.__new__(cls)
        encoding = tiktoken.Encoding(
            "tinygpt", pat_str=PATTERNS[pattern], mergeable_ranks=ranks, special_tokens=special
        )
        encoded = [base64.b64encode(token).decode() for token in merges]
        content: dict[str, Any] = {"kind": cls.kind, "pattern": pattern, "merges": encoded}
        if alphabet != BYTES:
            content["alphabet"] = base64.b64encode(alphabet).decode()
        if special:
            content["special"] = special
        self._set(encoding, content)
        return self

    def encode_array(self, text: str) -> NDArray[np.uint32]:
        utf8(text)  # the encoder would put U+FFFD for what is no text
        parts = [self._encode(part) for part in split_space(text)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _encode(self, text: str) -> NDArray[np.uint32]:
        return self._encoding.encode_to_numpy(text, disallowed_special=())

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        listed = checked_ids(ids, self.vocab_size)
        try:
            return self._encoding.decode_bytes(listed)
        except KeyError as error:  # some encodings leave ids between their special tokens unused
            raise TokenizerError(f"The ids hold {error}, which means nothing here.") from error

    def to_dict(self) -> dict[str, Any]:
        return dict(self._content)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        if "encoding" in values:
            encoding = values["encoding"]
            if not isinstance(encoding, str) or len(encoding) > 99:
                raise _damaged(f"its encoding is {brief(encoding)}, wanted a name such as 'gpt2'")
            named = cls(encoding).with_specials(checked_names(values.get("specials", [])))
            return named._kept_as(values)
        pattern = values.get("pattern")
        if not isinstance(pattern, str) or pattern not in PATTERNS:  # a name, never a pattern
            known = list(PATTERNS)
            raise TokenizerError(
                f"The saved vocabulary splits text by {brief(pattern)}, which this version does "
                f"not know. Known: {', '.join(known)}."
            )
        merges = _checked_merges(values.get("merges"))
        special = _checked_special(values.get("special", {}), 256 + len(merges))
        alphabet = _checked_alphabet(values["alphabet"]) if "alphabet" in values else BYTES
        made = cls.from_merges(merges, pattern, alphabet=alphabet, special=special)
        return made._kept_as(values)

    def _kept_as(self, values: Mapping[str, Any]) -> Self:
        ending = self.with_ends(values["ends"]) if "ends" in values else self
        template = checked_template(values.get("template"))
        return ending.with_template(template) if template else ending


def _training_pieces(text: str | Iterable[str]) -> Iterator[str]:
    """Pieces that end where words do, so that the trainer sees the words of the whole text."""
    for chunk in chunks([text] if isinstance(text, str) else text):
        utf8(chunk)
        yield from split_space(chunk)


def _damaged(what: str) -> TokenizerError:
    return TokenizerError(f"The saved vocabulary is damaged: {what}.")


def _bytes(text: object) -> bytes:
    """What base64 stands for; nothing for what is none."""
    try:
        return base64.b64decode(text, validate=True) if isinstance(text, str) else b""
    except (binascii.Error, ValueError):
        return b""


def _checked_merges(merges: object) -> list[bytes]:
    """The tokens after the 256 bytes, in the order of their ranks, from a file one cannot trust."""
    if not isinstance(merges, list) or not 1 <= len(merges) <= MAX_VOCAB - 256:
        raise _damaged(f"'merges' must be a list of 1 to {MAX_VOCAB - 256} tokens in base64")
    tokens: dict[bytes, None] = {}
    for at, text in enumerate(merges):
        token = _bytes(text)
        if len(token) < 2 or token in tokens:
            raise _damaged(
                f"merge {at} is {brief(text)}, wanted base64 of two or more bytes that no other "
                f"merge has"
            )
        tokens[token] = None
    return list(tokens)


def _checked_alphabet(text: object) -> bytes:
    """The 256 bytes in any order, from a file one cannot trust."""
    alphabet = _bytes(text)
    if sorted(alphabet) != list(BYTES):
        raise _damaged(f"its alphabet is {brief(text)}, wanted the 256 bytes in base64")
    return alphabet


def _checked_ends(ends: object, vocab_size: int) -> tuple[int, ...]:
    """The ids that end a text, from a file one cannot trust."""
    if not isinstance(ends, list) or len(ends) > MAX_SPECIAL:
        raise _damaged(f"'ends' is {brief(ends)}, wanted ids")
    for i in ends:
        if type(i) is not int or not 0 <= i < vocab_size:
            raise _damaged(f"a text ends with {brief(i)}, wanted an id from 0 to {vocab_size - 1}")
    return tuple(ends)


def _checked_special(special: object, others: int) -> dict[str, int]:
    """Special tokens of a vocabulary that has ``others`` besides; the ids must leave no gap."""
    if not isinstance(special, dict) or len(special) > MAX_SPECIAL:
        raise _damaged(f"'special' must name up to {MAX_SPECIAL} tokens")
    count = others + len(special)
    for text, i in special.items():
        utf8(text)
        if not text or type(i) is not int or not 0 <= i < count:
            raise _damaged(
                f"the special token {brief(text)} has the id {brief(i)}, wanted one from 0 to "
                f"{count - 1}"
            )
    if len(set(special.values())) != len(special):
        raise _damaged("special tokens share an id")
    return special
