"""Tokenizers that need no merges: one token per character, and one token per byte."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from tinygpt.errors import TokenizerError
from tinygpt.text.tokenizers.base import (
    BaseTokenizer,
    checked_ids,
    checked_names,
    checked_template,
    refuse_surrogate,
    utf8,
)


class CharTokenizer(BaseTokenizer):
    """One token for each different character of a text, in the order of their code points.

    >>> CharTokenizer("hello").encode("hole")
    [1, 3, 2, 0]
    >>> CharTokenizer("hello").encode("help")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    tinygpt.errors.TokenizerError: The character 'p' (U+0070) at position 3 is not ...
    """

    kind = "char"

    def __init__(self, chars: Iterable[str], specials: Iterable[str] = ()) -> None:
        self.chars = "".join(sorted(set(chars)))
        if not self.chars:
            raise TokenizerError("A character tokenizer needs at least one character; none given.")
        points = _code_points(self.chars)  # (V,)
        self.specials = checked_names(list(specials))
        self.vocab_size = len(points) + len(self.specials)
        self._texts = (*self.chars, *self.specials)  # by id
        # Code point -> id; the entry after the last is for all beyond it. -1 means unknown.
        self._ids = np.full(int(points[-1]) + 2, -1, np.int32)
        self._ids[points] = np.arange(len(points), dtype=np.int32)

    @classmethod
    def train(cls, text: str | Iterable[str]) -> Self:
        """The tokenizer of all characters in ``text``, a string or an iterable of them."""
        seen: set[str] = set()
        for piece in [text] if isinstance(text, str) else text:
            seen.update(piece)
        return cls(seen)

    def encode_array(self, text: str) -> NDArray[np.uint32]:
        points = _code_points(text)  # (n,)
        ids = self._ids[np.minimum(points, len(self._ids) - 1)]
        if len(ids) and ids.min() < 0:
            self._refuse(text, int(np.argmin(ids)))
        return ids.view(np.uint32)

    def _refuse(self, text: str, at: int) -> None:
        raise TokenizerError(
            f"The character {text[at]!r} (U+{ord(text[at]):04X}) at position {at} is not among "
            f"the {len(self.chars)} characters of this vocabulary. Leave it out, or use a "
            f"tokenizer that holds every text: bpe:1024, byte or gpt2."
        )

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return "".join([self._texts[i] for i in checked_ids(ids, self.vocab_size)]).encode()

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "chars": self.chars, **self._kept()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        chars = values.get("chars")
        if (
            not isinstance(chars, str)
            or not 0 < len(chars) <= sys.maxunicode + 1
            or list(chars) != sorted(set(chars))
        ):
            raise TokenizerError(
                "The saved character vocabulary is damaged: 'chars' must be a text of different "
                "characters in the order of their code points."
            )
        made = cls(chars, checked_names(values.get("specials", [])))
        made.template = checked_template(values.get("template"))
        return made


def _code_points(text: str) -> NDArray[np.uint32]:
    if not isinstance(text, str):
        raise TokenizerError(f"Only text (str) can be encoded, not {type(text).__name__}.")
    try:
        return np.frombuffer(text.encode("utf-32-le"), np.dtype("<u4"))
    except UnicodeEncodeError as error:
        refuse_surrogate(text, error)


class ByteTokenizer(BaseTokenizer):
    """One token per byte of UTF-8: 256 tokens that hold every text, in no vocabulary at all."""

    kind = "byte"
    vocab_size = 256

    def __init__(self, specials: Iterable[str] = ()) -> None:
        self.specials = checked_names(list(specials))
        self.vocab_size = 256 + len(self.specials)

    def encode_array(self, text: str) -> NDArray[np.uint32]:
        return np.frombuffer(utf8(text), np.uint8).astype(np.uint32)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        listed = checked_ids(ids, self.vocab_size)
        if not self.specials:
            return bytes(listed)
        names = [name.encode() for name in self.specials]
        return b"".join([bytes([i]) if i < 256 else names[i - 256] for i in listed])

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, **self._kept()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        made = cls(checked_names(values.get("specials", [])))
        made.template = checked_template(values.get("template"))
        return made
