"""Tokenizers in the files that transformers loads; ``hf_reading`` is the way back.

``tokenizer.json`` says all; ``vocab.json`` and ``merges.txt`` are the older form of a byte-level
BPE, and the other two files are the settings of ``AutoTokenizer``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinygpt.files.atomic import replacing
from tinygpt.files.strict_json import to_json, write_json
from tinygpt.interop.byte_level import GPT2_SHA256, Vocabulary, vocabulary
from tinygpt.interop.chat_template import chat_template
from tinygpt.interop.hf.hf_reading import SPLIT, read_tokenizer
from tinygpt.text.tokenizers import END, CharTokenizer, Tokenizer, document_end, special_of

__all__ = ["read_tokenizer", "write_tokenizer"]

Part = dict[str, Any]
STYLE: Part = {"indent": 2, "unicode": True}
"""How transformers writes its JSON files."""


def write_tokenizer(tokenizer: Tokenizer, folder: Path, block_size: int) -> None:
    """Write the files from which ``AutoTokenizer`` makes the same ids of every text.

    GPT-2's vocabulary behaves as the published one, for which ``<|endoftext|>`` in a text is the
    special token; no other vocabulary has a special token that text could become. Raises
    TokenizerError for a vocabulary that has no such form, and OSError.
    """
    found = vocabulary(tokenizer)
    if found is None:
        write_json(folder / "tokenizer.json", _of_characters(tokenizer), **STYLE)
    else:
        write_json(folder / "tokenizer.json", _of_bytes(found), **STYLE)
        _write(folder / "vocab.json", to_json(found.spelled))
        _write(folder / "merges.txt", "\n".join(["#version: 0.2", *found.spelled_merges, ""]))
    special = _roles(tokenizer, found)
    template = chat_template(tokenizer)
    is_gpt2 = found is not None and found.digest == GPT2_SHA256
    config = {
        # with another class transformers adds an end-of-text token to a vocabulary without one
        "tokenizer_class": "GPT2Tokenizer" if is_gpt2 else "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        **special,
        **({} if template is None else {"chat_template": template}),
    }
    write_json(folder / "tokenizer_config.json", config, **STYLE)
    write_json(folder / "special_tokens_map.json", special, **STYLE)


def _roles(tokenizer: Tokenizer, found: Vocabulary | None) -> dict[str, str]:
    """The special tokens by what transformers calls them for."""
    known = special_of(tokenizer)
    # a character that is not in the vocabulary has no token: it is an error, as it is here
    roles = ("bos_token",) if found is None else ("bos_token", "unk_token")
    special = {role: END for role in roles if END in known}
    if (end := document_end(tokenizer)) is not None:
        names = {i: text for text, i in (found.spelled if found else known).items()}
        special["eos_token"] = names[end]
    return special


def _of_bytes(found: Vocabulary) -> dict[str, Any]:
    """tokenizer.json of a byte-level BPE."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    flags = {
        **dict.fromkeys(("dropout", "unk_token"), None),
        **dict.fromkeys(("continuing_subword_prefix", "end_of_word_suffix"), ""),
        **dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False),
    }
    model = {"type": "BPE", **flags, "vocab": found.spelled, "merges": found.spelled_merges}
    return _fast(model, level | {"use_regex": True}, level | {"use_regex": True}, found.special)


def _of_characters(tokenizer: Tokenizer) -> dict[str, Any]:
    """tokenizer.json of a character tokenizer: words of one character each.

    ``unk_token`` is one that cannot be in the vocabulary, so that an unknown character is an error
    there as it is here.
    """
    assert isinstance(tokenizer, CharTokenizer)
    model = {
        "type": "WordLevel",
        "vocab": {character: i for i, character in enumerate(tokenizer.chars)},
        "unk_token": "<unk>",
    }
    return _fast(model, SPLIT, {"type": "Fuse"}, tokenizer.special)


def _fast(model: Part, pre_tokenizer: Part, decoder: Part, special: Mapping[str, int]) -> Part:
    added = [_added(text, i) for text, i in sorted(special.items(), key=lambda item: item[1])]
    nothing = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor"), None)
    parts = {"pre_tokenizer": pre_tokenizer, "decoder": decoder, "model": model}
    return {"version": "1.0", "added_tokens": added, **nothing, **parts}


def _added(text: str, i: int) -> dict[str, Any]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": text, **plain, "special": True}


def _write(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode())
