"""Tokenizers from the files of transformers, which anybody may have written.

``tokenizer.json`` says all; ``vocab.json`` and ``merges.txt`` are the older form of a byte-level
BPE. What would tokenize otherwise here than there is refused, and the message says why.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tinygpt.errors import TokenizerError
from tinygpt.interop.byte_level import GPT2_SHA256, Merge, Vocabulary, merges_of, unspell
from tinygpt.interop.chat_template import with_jinja
from tinygpt.interop.hf.hf_pipeline import (
    NAMING,
    SETTINGS,
    SPECIAL,
    TAKEN,
    check_added,
    check_class,
    check_pipeline,
    check_settings,
    special_roles,
)
from tinygpt.text.tokenizers import END, BPETokenizer, ByteTokenizer, CharTokenizer, Tokenizer
from tinygpt.text.tokenizers.base import MAX_FILE_BYTES, MAX_SPECIAL, read_json, utf8
from tinygpt.text.tokenizers.bpe import BYTES, MAX_VOCAB
from tinygpt.untrusted import brief, read_bounded

TEMPLATE = "chat_template.jinja"
"""The chat template, where it is not among the settings."""
log = logging.getLogger("tinygpt")

SPLIT = {
    "type": "Split",
    "pattern": {"Regex": r"[\s\S]"},  # a dot would leave out the end of a line
    "behavior": "Isolated",
    "invert": False,
}
"""Makes a word of each character."""
OTHERS = {
    "tokenizer.model": "SentencePiece",
    "spiece.model": "SentencePiece",
    "vocab.txt": "WordPiece",
}
"""Files of tokenizers that are not read, and what kind these are."""


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a folder of transformers, None if it has none.

    Byte-level BPEs that split text as GPT-2 does are read, and characters and bytes as
    ``write_tokenizer`` writes them. Text never becomes one of the special tokens. Raises
    TokenizerError for a damaged file and for other kinds, and names what is in the way.
    """
    fast, vocab, merges = (folder / n for n in ("tokenizer.json", "vocab.json", "merges.txt"))
    if fast.exists():
        roles = _settings(folder)
        with _about(fast):
            return _templated(_from_fast(read_json(fast), roles), folder)
    if vocab.exists() and merges.exists():
        roles = _settings(folder)
        with _about(folder):
            added = _ids(extra) if (extra := _read(folder / "added_tokens.json")) else {}
            found = _of_bytes(_ids(read_json(vocab)), _read_merges(merges), added)
            check_added([{"content": text} for text in added], roles)
            return _templated(found, folder)
    for here, lost in ((vocab, merges), (merges, vocab)):
        if here.exists():
            raise TokenizerError(
                f"{here} is there, but {lost.name} is not, and neither means anything alone. Put "
                f"it beside it, or a tokenizer.json."
            )
    for name, kind in OTHERS.items():
        if (folder / name).exists():
            raise TokenizerError(f"{folder / name}: {_refused(f'a {kind} tokenizer')}")
    return None


def _templated(tokenizer: Tokenizer, folder: Path) -> Tokenizer:
    """The vocabulary with the chat template that its folder has, if it is one that we know."""
    path, jinja = folder / TEMPLATE, _read(folder / SETTINGS).get("chat_template")
    if path.exists():
        jinja = read_bounded(path, MAX_FILE_BYTES).decode("utf-8", errors="replace")
    if not isinstance(jinja, str):
        return tokenizer
    found, is_known = with_jinja(tokenizer, jinja)
    if not is_known:
        log.warning(
            "The chat template of %s is none that TinyGPT knows. It is left out, and the roles of "
            "a conversation are written as plain text.",
            folder,
        )
    return found


@contextmanager
def _about(path: Path) -> Iterator[None]:
    """Errors of the block begin with the file that they are about."""
    try:
        yield
    except TokenizerError as error:
        message = str(error)
        raise TokenizerError(message if str(path) in message else f"{path}: {message}") from error


def _settings(folder: Path) -> set[str]:
    """The special tokens that a folder names beside its vocabulary, once its settings are known."""
    settings = _read(folder / SETTINGS)
    roles = special_roles(settings) | special_roles(_read(folder / SPECIAL))
    with _about(folder / SETTINGS):
        check_settings(settings, roles)
    for name in NAMING:
        with _about(folder / name):
            if check_class(_read(folder / name)):
                break
    return roles


def _read(path: Path) -> dict[str, Any]:
    """The object in a file; an empty one if there is no such file."""
    if not path.exists():
        return {}
    with _about(path):
        return read_json(path)


def _refused(kind: str) -> str:
    return f"This is {kind}. {TAKEN}"


def _from_fast(values: Mapping[str, Any], roles: Set[str]) -> Tokenizer:
    """The tokenizer that a tokenizer.json describes."""
    model = values.get("model")
    if not isinstance(model, dict):
        raise TokenizerError("This is no tokenizer of transformers: it names no model.")
    kind = model.get("type", "BPE" if "merges" in model else None)
    before, normalizer = values.get("pre_tokenizer"), values.get("normalizer")
    of_characters = kind == "WordLevel" and before == SPLIT
    if not of_characters and (kind != "BPE" or _kind(before) != "ByteLevel"):
        raise TokenizerError(_refused(f"a tokenizer of type {brief(kind)} behind {_kind(before)}"))
    if normalizer is not None:
        raise TokenizerError(_refused(f"one that changes the text first, by {_kind(normalizer)}"))
    added = _objects(values, "added_tokens")
    special = _special(added)
    check_pipeline(values)
    vocab = _ids(model.get("vocab"))
    if of_characters:
        found: Tokenizer = _of_characters(vocab, special)
    else:
        merges = [_merge(merge) for merge in _objects(model, "merges", str | list)]
        _check_flags(model, before or {}, splits=bool(merges))
        found = _of_bytes(vocab, merges, special)
    check_added(added, roles, around=of_characters)
    return found


def _kind(part: Any) -> str:
    """The type of a part of a tokenizer, for a message."""
    if part is None:
        return "nothing"
    kind = part.get("type") if isinstance(part, dict) else None
    return brief(kind).strip("'") if isinstance(kind, str) else f"something damaged, {brief(part)}"


def _objects(values: Mapping[str, Any], name: str, kind: Any = dict) -> list[Any]:
    """A list of objects, which may be missing."""
    found = values.get(name) or []
    if not isinstance(found, list) or not all(isinstance(item, kind) for item in found):
        raise TokenizerError(f"The file is damaged: {name} is {brief(found)}.")
    return found


def _check_flags(model: Mapping[str, Any], level: Mapping[str, Any], splits: bool) -> None:
    """Refuse switches that make other tokens of a text."""
    switches = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    on = [n for n in (*switches, "byte_fallback", "ignore_merges") if model.get(n)]
    if level.get("add_prefix_space", True):
        on.append("add_prefix_space")
    if splits and not level.get("use_regex", True):
        on.append("use_regex=false")
    if on:
        raise TokenizerError(_refused(f"a BPE with {', '.join(on)}"))


def _ids(vocab: Any) -> dict[str, int]:
    """Token texts and their ids, from a file one cannot trust."""
    if not isinstance(vocab, dict) or not 1 <= len(vocab) <= MAX_VOCAB:
        raise TokenizerError(
            f"The file is damaged: its vocabulary is {brief(vocab)}, wanted 1 to {MAX_VOCAB:,} "
            f"tokens with their ids."
        )
    for text, i in vocab.items():
        utf8(text)
        if type(i) is not int or not 0 <= i < MAX_VOCAB:
            raise TokenizerError(f"The file is damaged: token {brief(text)} has the id {brief(i)}.")
    return vocab


def _special(added: list[dict[str, Any]]) -> dict[str, int]:
    """The added tokens of a tokenizer.json, and their ids."""
    if not all(isinstance(token.get("content"), str) for token in added):
        raise TokenizerError("The file is damaged: an added token has no content.")
    found = {token["content"]: token.get("id") for token in added}
    return _ids(found) if found else {}


def _read_merges(path: Path) -> list[Merge]:
    """The merges of a merges.txt: two tokens a line, below a line with a version."""
    try:
        lines = read_bounded(path, MAX_FILE_BYTES).decode("utf-8-sig").replace("\r", "").split("\n")
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path} is damaged: it is not UTF-8.") from error
    first = 1 if lines[0].startswith("#version") else 0
    return [_merge(line) for line in lines[first:] if line]


def _merge(merge: Any) -> Merge:
    """The two tokens of a merge, which is a text with a space between them or a list."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    found = [unspell(part) if isinstance(part, str) else None for part in parts]
    if len(found) != 2 or not found[0] or not found[1]:
        raise TokenizerError(f"The file is damaged: {brief(merge)} is no merge of two tokens.")
    return found[0], found[1]


def _of_characters(vocab: Mapping[str, int], added: Mapping[str, int]) -> CharTokenizer:
    """Characters in the order of their code points, and special tokens behind them."""
    special = sorted((t for t in added if len(t) != 1), key=added.__getitem__)
    ids = {**vocab, **added}
    chars = sorted(text for text in ids if text not in special)
    if any(len(c) != 1 for c in chars) or not _count_up(ids, [*chars, *special]):
        raise TokenizerError(
            "This vocabulary is not of single characters in the order of their code points."
        )
    return CharTokenizer.from_dict({"chars": "".join(chars), "specials": special})


def _count_up(ids: Mapping[Any, int], tokens: list[Any]) -> bool:
    """Whether the tokens have the ids 0, 1, 2, …"""
    return [ids[token] for token in tokens] == [*range(len(tokens))]


def _of_bytes(vocab: Mapping[str, int], merges: list[Merge], added: Mapping[str, int]) -> Tokenizer:
    """The tokenizer of a byte-level vocabulary, if ours makes the same tokens of every text."""
    made = [left + right for left, right in merges]
    wanted = [*(bytes([byte]) for byte in BYTES), *made]
    spelled = {unspell(text): i for text, i in vocab.items() if text not in added}
    tokens = {token: spelled[token] for token in wanted if token in spelled}
    rest = {t: i for t, i in vocab.items() if t in added or unspell(t) not in tokens}
    special = {**added, **rest}
    _check_special(special, added)
    _check_complete(tokens, wanted, special)
    in_order = sorted(tokens, key=tokens.__getitem__)
    if in_order[256:] != made:
        raise TokenizerError(
            "The ids of this vocabulary are not in the order of its merges, by which TinyGPT goes."
        )
    if list(merges_of(tokens)) != merges:
        raise TokenizerError(
            "This vocabulary merges some tokens from others than the order of its merges leads to."
        )
    alphabet = b"".join(in_order[:256])
    behind = sorted(special, key=special.__getitem__)
    is_behind = _count_up({**tokens, **special}, [*in_order, *behind])
    if not merges:
        if alphabet == BYTES and is_behind:
            return ByteTokenizer(behind)
        if special:
            raise TokenizerError("This vocabulary has special tokens and no merges.")
    published = {text: i for text, i in special.items() if text == END}
    if Vocabulary(tokens, merges, published).digest == GPT2_SHA256 and is_behind:
        with suppress(TokenizerError):  # without its files the same, but not under its name
            return BPETokenizer("gpt2").with_specials(behind)
    return BPETokenizer.from_merges(made, alphabet=alphabet, special=special)


def _check_complete(
    tokens: Mapping[bytes, int], wanted: list[bytes], special: Mapping[str, int]
) -> None:
    """Every byte and every merge has its token, and no id is missing or there twice."""
    missing = next((token for token in wanted if token not in tokens), None)
    ids = sorted([*tokens.values(), *special.values()])
    gap = next((i for i, found in enumerate(ids) if i != found), None)
    faults = {
        f"has no token for {brief(missing)}": missing is not None,
        "merges the same token twice": len(wanted) != len(tokens),
        f"has ids that do not count up: {gap} is left out or there twice": gap is not None,
    }
    if fault := next((fault for fault, found in faults.items() if found), None):
        raise TokenizerError(f"This vocabulary {fault}.")


def _check_special(special: Mapping[str, int], added: Mapping[str, int]) -> None:
    """What no merge makes must be a special token, also where the file does not say so."""
    if len(special) > MAX_SPECIAL:
        raise TokenizerError(f"No merge makes {len(special):,} tokens of this vocabulary.")
    for text, i in special.items():
        if added.get(text, i) != i:
            raise TokenizerError(f"The token {brief(text)} has two ids, {added[text]} and {i}.")
        if text not in added and not text.isascii():
            raise TokenizerError(f"No merge makes the token {brief(text)}, number {i}.")
