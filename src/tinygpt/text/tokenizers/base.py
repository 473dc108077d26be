"""What every tokenizer can do, and what the three kinds share."""

from __future__ import annotations

import codecs
import hashlib
import operator
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from tinygpt.errors import TokenizerError
from tinygpt.files.atomic import check_overwritable, replacing, user_path
from tinygpt.files.strict_json import to_json
from tinygpt.untrusted import brief, parse_json, read_bounded
from tinygpt.untrusted.foreign import HEAD, no_text

MAX_FILE_BYTES = 64 << 20
"""A larger file is no saved tokenizer and is not read."""


@runtime_checkable
class Tokenizer(Protocol):
    """Text to token ids and back: ``decode(encode(text)) == text`` for all text it can hold.

    Ids run from 0 up to, not including, ``vocab_size``. Errors are TokenizerErrors.
    """

    @property
    def kind(self) -> str:
        """``bpe``, ``char`` or ``byte``."""

    @property
    def vocab_size(self) -> int:
        """Number of different tokens."""

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``. What looks like a special token is plain text."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; bytes that are not UTF-8 become U+FFFD."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """UTF-8 bytes of the ids. A part of a text may begin or end within a character."""

    def to_dict(self) -> dict[str, Any]:
        """Everything needed to make it again, as JSON values."""

    def save(self, path: str | Path) -> Path:
        """Write it as JSON and return the path."""


END = "<|endoftext|>"
"""What GPT-2, and most vocabularies made since, put between texts."""
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
"""Special tokens that begin a turn of a conversation."""
TURN_END = "<|end|>"
"""The special token that ends a turn of a conversation."""
MARKERS = (SYSTEM, USER, ASSISTANT, TURN_END)
"""The special tokens of a conversation, besides ``END``."""
MAX_SPECIAL = 4096
"""Special tokens that a vocabulary may have."""
MAX_NAME = 256
"""Characters that the name of a special token may have, where we add it."""


class BaseTokenizer:
    """The shared part; a kind adds the four methods that raise NotImplementedError here."""

    kind: str
    vocab_size: int
    """Number of tokens, the special ones included."""
    specials: tuple[str, ...] = ()
    """Names of the special tokens, in the order of their ids. Text never becomes one of them."""
    template: Mapping[str, Any] | None = None
    """The chat template that is kept with the vocabulary, see ``text.chat.template``."""

    @property
    def special(self) -> Mapping[str, int]:
        """The special tokens and their ids: the last ones of the vocabulary."""
        first = self.vocab_size - len(self.specials)
        return {name: first + n for n, name in enumerate(self.specials)}

    def special_id(self, name: str) -> int | None:
        """The id of the special token of that name; None where the vocabulary has none."""
        return self.special.get(name)

    @property
    def ends(self) -> tuple[int, ...]:
        """The ids that end a text, or a turn: generation stops there."""
        found = (self.special_id(name) for name in (END, TURN_END))
        return tuple(i for i in found if i is not None)

    def with_specials(self, names: Iterable[str]) -> Self:
        """The same vocabulary with these special tokens behind all others.

        Names that it has already are left as they are. TokenizerError for what is no name.
        """
        added = [name for name in dict.fromkeys(names) if name not in self.special]
        specials = [*self.specials, *checked_names(added)]
        return self.from_dict({**self.to_dict(), "specials": specials}) if added else self

    def with_template(self, template: Mapping[str, Any] | None) -> Self:
        """The same vocabulary with another chat template to be kept with it, or with none."""
        values = {k: v for k, v in self.to_dict().items() if k != "template"}
        return self.from_dict(values | ({} if template is None else {"template": dict(template)}))

    def encode_array(self, text: str) -> NDArray[np.uint32]:
        """Token ids of ``text`` as an array (n,): the quick way for long texts."""
        raise NotImplementedError

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """UTF-8 bytes of the ids. A part of a text may begin or end within a character."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Everything needed to make it again, as JSON values."""
        raise NotImplementedError

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of ``to_dict``; values that cannot be right are a TokenizerError."""
        raise NotImplementedError

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``. What looks like a special token is plain text."""
        ids: list[int] = self.encode_array(text).tolist()
        return ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """Text of the ids (a list, array or Tensor); bytes that are not UTF-8 become U+FFFD.

        Special tokens are shown as their names, or left out with ``skip_special_tokens``.
        """
        if skip_special_tokens:
            special = set(self.special.values())
            ids = [i for i in checked_ids(ids, self.vocab_size) if i not in special]
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def _kept(self) -> dict[str, Any]:
        """What ``to_dict`` has of the special tokens and the template, where there are any."""
        specials = {"specials": list(self.specials)} if self.specials else {}
        return specials | ({"template": dict(self.template)} if self.template else {})

    def save(self, path: str | Path) -> Path:
        """Write it as JSON, whole or not at all, and return the path.

        Raises UsageError if a file is there that is no saved tokenizer.
        """
        path, text = user_path(path), encoded(self)
        check_overwritable(path, MARK, "a tokenizer")
        try:
            with replacing(path) as file:
                file.write(text)
        except OSError as error:
            raise TokenizerError(f"{path} could not be written: {error.strerror}.") from error
        return path

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what ``save`` wrote. Another kind of tokenizer is a TokenizerError."""
        values = read_json(path)
        if values.get("kind") != cls.kind:
            raise TokenizerError(
                f"{path} holds a tokenizer of kind {brief(values.get('kind'))}, not {cls.kind!r}. "
                f"load_tokenizer(path) reads every kind."
            )
        return cls.from_dict(values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BaseTokenizer) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(fingerprint(self))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(vocab_size={self.vocab_size})"


def ends_of(tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """The ids that end a text; none for a tokenizer of the user's own that does not say."""
    return tuple(getattr(tokenizer, "ends", ()))


def special_of(tokenizer: Tokenizer | None) -> Mapping[str, int]:
    """The special tokens and their ids; none for a tokenizer of the user's own without them."""
    return dict(getattr(tokenizer, "special", {}))


def document_end(tokenizer: Tokenizer | None) -> int | None:
    """The id that parts documents; None where the vocabulary has none.

    Of several ids that end a text, such as one for documents and one for turns, it is the first.
    """
    return next(iter(ends_of(tokenizer)), None)


def fingerprint(tokenizer: Tokenizer | BaseTokenizer) -> str:
    """SHA-256 of the content: the same for tokenizers that tokenize alike."""
    values = {k: v for k, v in tokenizer.to_dict().items() if k != "template"}
    text = to_json(values, sort=True, compact=True)
    return hashlib.sha256(text.encode()).hexdigest()


MARK = b'{\n "kind": "'
"""What the file of a saved tokenizer begins with."""


def encoded(tokenizer: Tokenizer | BaseTokenizer) -> bytes:
    """The file of a saved tokenizer. Raises TokenizerError for one that could not be read again."""
    try:
        text = to_json(tokenizer.to_dict(), indent=1, unicode=True).encode() + b"\n"
    except TypeError as error:
        raise TokenizerError(f"{tokenizer!r} cannot be written as JSON: {error}.") from error
    if len(text) > MAX_FILE_BYTES:
        raise TokenizerError(
            f"{tokenizer!r} would take {len(text):,} bytes in a file, and {MAX_FILE_BYTES:,} are "
            f"the most that are read: its tokens are too long. Choose a smaller vocabulary, or "
            f"break up very long words of the text."
        )
    return text


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file, or a TokenizerError that says what the file is instead."""
    path = user_path(path)
    try:
        content = read_bounded(path, MAX_FILE_BYTES)
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:  # a name that no file can have
        raise TokenizerError(f"{brief(str(path))} cannot be read: {error}.") from error
    try:
        values = parse_json(content)
    except ValueError as error:
        known = no_text(path, content[:HEAD])
        raise TokenizerError(known or f"{path} is no saved tokenizer: it is not JSON.") from error
    if not isinstance(values, dict):
        raise TokenizerError(f"{path} is not a saved tokenizer: it holds no JSON object.")
    return values


def utf8(text: str) -> bytes:
    """The text's bytes; a lone surrogate, which no encoding of Unicode can hold, is an error."""
    if not isinstance(text, str):
        raise TokenizerError(f"Only text (str) can be encoded, not {type(text).__name__}.")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        refuse_surrogate(text, error)


def refuse_surrogate(text: str, error: UnicodeEncodeError) -> NoReturn:
    """Explain a failed ``str.encode``: half of a UTF-16 pair stands where a character should."""
    raise TokenizerError(
        f"The text has a lone surrogate (U+{ord(text[error.start]):04X}) at position "
        f"{error.start}: half a character, left by reading bytes that are not UTF-8. Read the text "
        f"with the right encoding, or drop it: text.encode(errors='ignore').decode()."
    ) from error


def checked_names(names: object) -> tuple[str, ...]:
    """Names of special tokens, from a file one cannot trust."""
    if not isinstance(names, list) or len(names) > MAX_SPECIAL:
        raise TokenizerError(
            f"The special tokens are {brief(names)}, wanted a list of up to {MAX_SPECIAL} names."
        )
    for name in names:
        if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or names.count(name) > 1:
            raise TokenizerError(
                f"The special token {brief(name)} cannot be: wanted different names of 1 to "
                f"{MAX_NAME} characters, such as <|user|>."
            )
        utf8(name)
    return tuple(names)


def checked_template(values: object) -> dict[str, Any] | None:
    """The fields of a kept chat template, from a file one cannot trust."""
    if values is None:
        return None
    if not isinstance(values, dict) or not all(isinstance(v, str) for v in values.values()):
        raise TokenizerError(f"The kept chat template is {brief(values)}, wanted named texts.")
    return values


def checked_ids(ids: Iterable[int], vocab_size: int) -> list[int]:
    """Ids as a plain list, each within the vocabulary."""
    values = ids.tolist() if hasattr(ids, "tolist") else ids
    try:
        listed = [operator.index(i) for i in values]
    except TypeError as error:
        raise TokenizerError(
            f"Token ids are whole numbers in one flat sequence, such as [5, 17]; given were "
            f"{type(ids).__name__} values that are not. Of a batch (B, T), decode each row."
        ) from error
    if listed and (min(listed) < 0 or max(listed) >= vocab_size):
        at, bad = next((n, i) for n, i in enumerate(listed) if not 0 <= i < vocab_size)
        raise TokenizerError(
            f"Token id {bad} at position {at} is outside this vocabulary of {vocab_size} tokens "
            f"(0 to {vocab_size - 1}). It comes from another tokenizer, or from a model with a "
            f"larger vocab_size."
        )
    return listed


class TextStream:
    """Ids one at a time to text as it becomes complete: a character's bytes may take many tokens.

    >>> from tinygpt.text.tokenizers import ByteTokenizer
    >>> stream = TextStream(ByteTokenizer())
    >>> [stream.push(byte) for byte in "né".encode()]
    ['n', '', 'é']
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """Text that this id completes; it may be empty."""
        return self._decoder.decode(self._tokenizer.decode_bytes([token]))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that stayed incomplete, else nothing."""
        return self._decoder.decode(b"", final=True)
