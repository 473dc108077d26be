"""Tokenizers: text to numbers and back, by characters, by bytes or by byte pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from tinygpt.errors import TokenizerError, nearest
from tinygpt.tokenizers.base import (
    BaseTokenizer,
    TextStream,
    Tokenizer,
    encoded,
    fingerprint,
    read_json,
)
from tinygpt.tokenizers.bpe import BPETokenizer
from tinygpt.tokenizers.chunks import chunks
from tinygpt.tokenizers.simple import ByteTokenizer, CharTokenizer
from tinygpt.untrusted import brief

__all__ = [
    "BPETokenizer",
    "ByteTokenizer",
    "CharTokenizer",
    "TextStream",
    "Tokenizer",
    "check_readable",
    "chunks",
    "fingerprint",
    "load_tokenizer",
    "make_tokenizer",
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
    path = Path(path)
    file = path / "tokenizer.json" if _exists(path) and path.is_dir() else path
    try:
        return tokenizer_from_dict(read_json(file))
    except TokenizerError as error:
        message = str(error)
        raise TokenizerError(message if str(file) in message else f"{file}: {message}") from error


def make_tokenizer(spec: str | Path | None, text: Callable[[], Iterable[str]]) -> Tokenizer:
    """The tokenizer that ``spec`` asks for, trained on ``text()`` where it is one that learns.

    ``spec`` is ``gpt2``, ``bpe:N``, ``char``, ``byte``, or the path of a saved tokenizer or a run.
    None is ``bpe:1024`` for a small text and ``gpt2`` for one of more than 16 million characters.
    """
    if spec is None:
        spec = "bpe:1024" if _is_small(text()) else "gpt2"
    name, _, size = str(spec).partition(":")
    if spec == "gpt2":
        return BPETokenizer("gpt2")
    if spec == "byte":
        return ByteTokenizer()
    if spec == "char":
        return CharTokenizer.train(text())
    if name == "bpe" and size.isdecimal() and len(size) < 20:
        return BPETokenizer.train(text(), int(size))
    if str(spec) and _exists(Path(spec)):
        return load_tokenizer(spec)
    if name == "bpe":
        raise TokenizerError(
            f"{brief(str(spec))} lacks a size of the vocabulary that can be. Try bpe:1024."
        )
    raise TokenizerError(
        f"There is no tokenizer {brief(str(spec), 200)} and no file of that name."
        f"{nearest(str(spec)[:99], ['gpt2', 'bpe:1024', 'char', 'byte'])} "
        f"Wanted: gpt2, bpe:N, char, byte, or the path of a saved tokenizer."
    )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long, or a link to itself
        return False


def _is_small(pieces: Iterable[str]) -> bool:
    length = 0
    for piece in pieces:
        length += len(piece)
        if length > SMALL_TEXT:
            return False
    return True
