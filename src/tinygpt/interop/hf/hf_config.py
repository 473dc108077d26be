"""A Hugging Face config.json and ours: one shape in two spellings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinygpt.config import GPTConfig, Precision
from tinygpt.errors import ConfigError, InteropError
from tinygpt.text.tokenizers import END, BPETokenizer, Tokenizer, ends_of, special_of
from tinygpt.untrusted import brief, is_number, parse_json, read_bounded

MAX_CONFIG_BYTES = 1 << 20
"""A larger config.json is none and is not read."""
SIZES = {
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "vocab_size": "vocab_size",
    "block_size": "n_positions",
}
"""Our names, and theirs."""
COMPUTED = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
}
"""Settings that change what is computed, and the values that give what our model computes. The
first is what a file means that does not say; both GELUs are the same formula."""


def read_config(path: Path) -> GPTConfig:
    """The shape that a config.json of GPT-2 describes.

    Raises InteropError for another architecture, or a setting that our model does not compute; both
    are named.
    """
    values = read_object(path)
    kind = values.get("model_type")
    if kind != "gpt2":
        said = f"is of model_type {brief(kind)}" if kind is not None else "names no model_type"
        raise InteropError(f"{path} {said}, and only GPT-2 (model_type 'gpt2') can be imported.")
    if "quantization_config" in values:
        raise InteropError(f"{path} is of quantized weights. Import the model they were made from.")
    for name, (usual, *others) in COMPUTED.items():
        if (found := values.get(name, usual)) not in (usual, *others):
            raise InteropError(
                f"{path}: {name}={brief(found)} is not what TinyGPT computes: {name}={usual!r}."
            )
    return _shape(path, values)


def _shape(path: Path, values: Mapping[str, Any]) -> GPTConfig:
    values = {"n_positions": values.get("n_ctx"), **values}
    missing = [theirs for theirs in SIZES.values() if values.get(theirs) is None]
    if missing:
        raise InteropError(f"{path} lacks {', '.join(missing)}.")
    dropout = values.get("resid_pdrop", 0.1)
    if not is_number(dropout, 0, 1):
        raise InteropError(f"{path}: resid_pdrop={brief(dropout)} is no probability.")
    try:
        config = GPTConfig(
            **{ours: values[theirs] for ours, theirs in SIZES.items()},
            dropout=float(dropout),
            tie_embeddings=values.get("tie_word_embeddings", True),
        )
    except ConfigError as error:
        raise InteropError(f"{path} describes a model that cannot be: {error}") from error
    inner = values.get("n_inner")
    if inner not in (None, config.n_inner):
        raise InteropError(
            f"{path}: n_inner={brief(inner)}, and TinyGPT has only 4 * n_embd: {config.n_inner}."
        )
    return config


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a small file of a stranger's; InteropError for anything else."""
    try:
        values = parse_json(read_bounded(path, MAX_CONFIG_BYTES))
    except OSError as error:
        raise InteropError(f"{path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise InteropError(f"{path} is damaged: it is not JSON.") from error
    if not isinstance(values, dict):
        raise InteropError(f"{path} is damaged: it holds no JSON object.")
    return values


def config_to_hf(
    config: GPTConfig, tokenizer: Tokenizer | None, dtype: Precision = "float32"
) -> dict[str, Any]:
    """What config.json says of a model of ours, whose weights are stored as ``dtype``."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **{theirs: getattr(config, ours) for ours, theirs in SIZES.items()},
        "n_ctx": config.block_size,
        "n_inner": None,
        **{name: usual for name, (usual, *_) in COMPUTED.items()},
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout),
        "initializer_range": 0.02,
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": True,
        "torch_dtype": dtype,
        **end_of_text(tokenizer),
    }


def end_of_text(tokenizer: Tokenizer | None) -> dict[str, int | list[int] | None]:
    """The ids that a text begins and ends with; a vocabulary without special tokens has none."""
    ends = ends_of(tokenizer)
    return {
        "bos_token_id": special_of(tokenizer).get(END),
        "eos_token_id": list(ends) if len(ends) > 1 else ends[0] if ends else None,
    }


def read_end_name(folder: Path, tokenizer: BPETokenizer) -> list[int]:
    """The id of the special token that tokenizer_config.json says ends a text, if it does."""
    path = folder / "tokenizer_config.json"
    token = read_object(path).get("eos_token") if path.exists() else None
    text = token.get("content") if isinstance(token, dict) else token
    return [tokenizer.special[text]] if isinstance(text, str) and text in tokenizer.special else []


def read_ends(folder: Path) -> tuple[int, ...]:
    """The ids that end a text by the first file of transformers' that names any.

    Settings for generation come first, as there. Raises InteropError for a damaged file.
    """
    for name in ("generation_config.json", "config.json"):
        if (folder / name).exists():
            found = read_object(folder / name).get("eos_token_id")
            ids = found if isinstance(found, list) else [found]
            if ids and all(type(i) is int and i >= 0 for i in ids):
                return tuple(ids)
    return ()
