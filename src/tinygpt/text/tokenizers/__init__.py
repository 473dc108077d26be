"""Tokenizers: text to numbers and back, by characters, by bytes or by byte pairs."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tinygpt.errors import TokenizerError, nearest
from tinygpt.files.atomic import user_path
from tinygpt.text.names import exists, is_name
from tinygpt.text.tokenizers.base import (
    ASSISTANT,
    END,
    MARKERS,
    SYSTEM,
    TURN_END,
    USER,
    BaseTokenizer,
    TextStream,
    Tokenizer,
    document_end,
    encoded,
    ends_of,
    fingerprint,
    read_json,
    special_of,
)
from tinygpt.text.tokenizers.bpe import BPETokenizer
from tinygpt.text.tokenizers.chunks import chunks
from tinygpt.text.tokenizers.simple import ByteTokenizer, CharTokenizer
from tinygpt.untrusted import brief

__all__ = [
    "ASSISTANT",
    "END",
    "MARKERS",
    "SYSTEM",
    "TURN_END",
    "USER",
    "BPETokenizer",
    "BaseTokenizer",
    "ByteTokenizer",
    "CharTokenizer",
    "TextStream",
    "Tokenizer",
    "check_readable",
    "chunks",
    "document_end",
    "ends_of",
    "fingerprint",
    "load_tokenizer",
    "make_tokenizer",
    "special_of",
    "tokenizer_from_dict",
]

SMALL_TEXT = 16_000_000
"""Characters up to which a vocabulary trained on the text itself is the default."""

_KINDS: dict[str, type[BaseTokenizer]] = {
    kind.kind: kind for kind in (BPETokenizer, CharTokenizer, ByteTokenizer)
}


def tokenizer_from_dict(values: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer whose ``to_dict()`` this is; anything else is a TokenizerError."""
    kind = values.get("kind") if isinstance(values, Mapping) else None
    if not isinstance(kind, str) or kind not in _KINDS:
        known = ", ".join(_KINDS)
        raise TokenizerError(
            f"This is no saved tokenizer: its kind is {brief(kind)}, wanted one of {known}. "
            f"Files of other tools and of newer versions cannot be read."
        )
    return _KINDS[kind].from_dict(values)


def check_readable(tokenizer: Tokenizer) -> None:
    """TokenizerError if the tokenizer could not be made again from what a run keeps of it."""
    encoded(tokenizer)
    if type(tokenizer) not in _KINDS.values():
        try:
            tokenizer_from_dict(tokenizer.to_dict())
        except TokenizerError as error:
            raise TokenizerError(
                f"A run cannot keep {type(tokenizer).__name__}: load() could not make it again. "
                f"{error} Train without out_dir, or without the tokenizer."
            ) from error


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer that ``save`` wrote; ``path`` may also be a folder with tokenizer.json."""
    path = user_path(path)
    file = path / "tokenizer.json" if exists(path) and path.is_dir() else path
    try:
        return tokenizer_from_dict(read_json(file))
    except TokenizerError as error:
        message = str(error)
        raise TokenizerError(message if str(file) in message else f"{file}: {message}") from error


class _Names(Container[str]):
    """What ``make_tokenizer`` knows by name."""

    def __contains__(self, spec: object) -> bool:
        return spec in ("gpt2", "char", "byte") or _bpe_size(str(spec)) is not None


NAMES = _Names()


def _bpe_size(spec: str) -> int | None:
    """The size in ``bpe:1024``."""
    name, _, size = spec.partition(":")
    is_size = name == "bpe" and size.isdecimal() and len(size) < 20
    return int(size) if is_size else None


def make_tokenizer(
    spec: str | Path | None, text: Callable[[], Iterable[str]], specials: Sequence[str] = ()
) -> Tokenizer:
    """The tokenizer that ``spec`` asks for, trained on ``text()`` where it is one that learns.

    ``spec`` is ``gpt2``, ``bpe:N``, ``char``, ``byte``, or the path of a saved tokenizer or a run;
    a file that is called as one of the former is ``./gpt2``, see ``names``. None is ``bpe:1024``
    for a small text and ``gpt2`` for one of more than 16 million characters. A vocabulary that is
    made here gets the special tokens that are named; the N of ``bpe:N`` includes them.
    """
    if spec is None:
        spec = "bpe:1024" if _is_small(text()) else "gpt2"
    if is_name(spec, NAMES):
        if spec == "gpt2":
            return BPETokenizer("gpt2")
        if spec == "byte":
            return ByteTokenizer(specials)
        size = _bpe_size(str(spec))
        if size is None:
            return CharTokenizer.train(text()).with_specials(specials)
        return BPETokenizer.train(text(), size, specials)
    if str(spec) and exists(user_path(spec)):
        return load_tokenizer(spec)
    if str(spec).partition(":")[0] == "bpe":
        raise TokenizerError(
            f"{brief(str(spec))} lacks a size of the vocabulary that can be. Try bpe:1024."
        )
    raise TokenizerError(
        f"There is no tokenizer {brief(str(spec), 200)} and no file of that name."
        f"{nearest(str(spec)[:99], ['gpt2', 'bpe:1024', 'char', 'byte'])} "
        f"Wanted: gpt2, bpe:N, char, byte, or the path of a saved tokenizer."
    )


def _is_small(pieces: Iterable[str]) -> bool:
    length = 0
    for piece in pieces:
        length += len(piece)
        if length > SMALL_TEXT:
            return False
    return True
