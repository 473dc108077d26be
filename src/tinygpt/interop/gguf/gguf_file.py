"""A model of ours as a GGUF file, which llama.cpp loads.

The file appears once it has been read back, by the reader of the ``gguf`` package and a forward
pass in numpy, and has given our logits. A linear layer without biases does not exist in llama.cpp's
GPT-2: the biases of such a model are written as zeros.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from tinygpt.config import GPTConfig, __version__
from tinygpt.config.weights import Weight
from tinygpt.errors import InteropError, UsageError, extras
from tinygpt.files.atomic import check_overwritable, replacing, user_path
from tinygpt.files.disk import check_space, writing
from tinygpt.interop import parity
from tinygpt.interop.chat_template import chat_template
from tinygpt.interop.gguf.gguf_tokens import Tokens, tokens_of
from tinygpt.interop.gguf.gguf_types import BLOCK, BLOCK_BYTES, Kind, store
from tinygpt.interop.hf import layout
from tinygpt.interop.parity import Floats
from tinygpt.machine.transfer import read, write
from tinygpt.model.transformer import Transformer
from tinygpt.text.tokenizers import Tokenizer
from tinygpt.untrusted import utf8_name

FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "bf16": 32}
"""What most weights are stored as, as llama.cpp counts it."""
PARITY, VERSION_KEY = "tinygpt.parity", "tinygpt.version"
"""How the keys begin under which a file says how it was proved."""


@dataclass(frozen=True)
class Exported:
    """What was written, and how it was proved."""

    path: Path
    size: int
    """Bytes of the file."""
    difference: float
    """Largest difference of a logit of the file to ours, of weights that are rounded alike."""
    rounding: float
    """The same to the model before its weights were rounded."""
    unrounded: list[str]
    """Weights that stayed float16, because their rows are no multiple of 32 long."""
    added: int
    """Tokens that the model did not have."""


@dataclass(frozen=True)
class Stored:
    """A weight on its way into the file."""

    weight: Weight
    name: str
    """Hugging Face's."""
    theirs: str
    """llama.cpp's."""
    shape: tuple[int, ...]
    kind: Kind

    @property
    def size(self) -> int:
        """Bytes in the file."""
        count = math.prod(self.shape)
        if self.kind in BLOCK_BYTES:
            return count // BLOCK * BLOCK_BYTES[self.kind]
        return count * (4 if self.kind == "f32" else 2)


def export(
    model: Transformer, tokenizer: Tokenizer, path: Path, kind: Kind = "f32", name: str = "TinyGPT"
) -> Exported:
    """Write ``path`` for llama.cpp, with the weights as ``kind``, and prove what was written.

    Raises InteropError, and leaves no file, if what is read back computes something else; for a
    vocabulary without such a form TokenizerError, for a place that cannot be written
    CheckpointError, and MissingExtraError without the gguf package.
    """
    gguf = extras.need("gguf", "Writing GGUF files", "gguf")
    path = user_path(path)
    if path.is_dir():
        raise UsageError(f"{path} is a folder. Give the file to write: {path / 'model.gguf'}")
    tokens = tokens_of(tokenizer, model.config.vocab_size)
    stored = list(_stored(gguf, model, tokens, kind))
    with writing(path):
        check_space(path.parent, sum(each.size for each in stored))
    with writing(path), replacing(path) as file:
        with closing(gguf.GGUFWriter(file.name, "gpt2")) as writer:
            template = chat_template(tokenizer)
            _describe(writer, model.config, tokens, template, kind, name)
            rounded = _write(gguf, writer, model, stored)
        difference, rounding = _prove(gguf, model, rounded, stored, tokens, file.name)
        size = Path(file.name).stat().st_size
    unrounded = [each.weight.name for each in stored if kind != each.kind == "f16"]
    return Exported(path, size, difference, rounding, unrounded, tokens.added)


def check_target(path: Path) -> None:
    """UsageError if something else than a GGUF file of ours is there: for a path of the user's."""
    check_overwritable(path, VERSION_KEY.encode(), "a GGUF file")


def _stored(gguf: Any, model: Transformer, tokens: Tokens, kind: Kind) -> Iterator[Stored]:
    """All that llama.cpp wants, in our order."""
    config = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config.n_layer)
    wanted = layout.all_weights(config)
    known = {weight.name for weight in wanted.values()}
    strange = [name for name in model.parameters() if name not in known]
    if strange:
        raise InteropError(f"llama.cpp's GPT-2 has no weight such as {strange[0]} of this model.")
    for name, weight in wanted.items():
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        rows = len(tokens.texts) if weight.kind in ("tokens", "output") else weight.shape[0]
        yield Stored(weight, name, theirs, (rows, *weight.shape[1:]), _kind(weight, kind))


def _kind(weight: Weight, kind: Kind) -> Kind:
    """What llama.cpp keeps a weight as: vectors and positions are added, and stay float32."""
    if weight.kind in ("positions", "norm", "bias"):
        return "f32"
    return "f16" if kind in BLOCK_BYTES and weight.shape[-1] % BLOCK else kind


def _describe(
    writer: Any, config: GPTConfig, tokens: Tokens, template: str | None, kind: Kind, name: str
) -> None:
    """Everything but the weights."""
    writer.add_string(VERSION_KEY, __version__)  # first, where ``check_target`` looks for it
    writer.add_name(utf8_name(name))
    writer.add_file_type(FILE_TYPES[kind])
    if kind in BLOCK_BYTES:
        writer.add_quantization_version(2)
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.n_inner)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens.texts)
    writer.add_token_types(tokens.types)
    writer.add_token_merges(tokens.merges)
    writer.add_bos_token_id(tokens.end)
    writer.add_eos_token_id(tokens.end)
    if tokens.turn_end is not None:
        writer.add_eot_token_id(tokens.turn_end)
    if template is not None:
        writer.add_chat_template(template)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    for key in ("max_difference", "tolerance", "rounding"):  # written over when they are known
        writer.add_float64(f"{PARITY}.{key}", math.nan)
    writer.add_uint32(f"{PARITY}.tokens", parity.fixed_prompt(config).size)


def _write(gguf: Any, writer: Any, model: Transformer, stored: list[Stored]) -> Transformer:
    """Write the weights one at a time; -> a model of what a reader gets from them"""
    for each in stored:
        kind = gguf.GGMLQuantizationType[each.kind.upper()]
        writer.add_tensor_info(
            each.theirs, each.shape, np.dtype(np.float32), each.size, raw_dtype=kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    exact = all(each.kind == "f32" for each in stored)
    rounded = model if exact else Transformer(model.config, seed=None)
    parameters, copies = model.parameters(), rounded.parameters()
    for each in stored:
        name, values = each.weight.name, np.zeros(each.shape, np.float32)
        if name in parameters:
            values = _with_rows(read(parameters[name]), each.shape[0])
        data, read_again = store(values, each.kind)
        writer.write_tensor_data(data)
        if name in copies and not exact:
            write(copies[name], read_again[: each.weight.shape[0]])
    return rounded


def _with_rows(values: Floats, rows: int) -> Floats:
    """With further rows that are the mean of all others: see ``gguf_tokens``."""
    if len(values) == rows:
        return values
    mean = values.mean(axis=0, keepdims=True)
    return np.concatenate([values, np.repeat(mean, rows - len(values), axis=0)])


def _prove(
    gguf: Any,
    model: Transformer,
    rounded: Transformer,
    stored: list[Stored],
    tokens: Tokens,
    place: str,
) -> tuple[float, float]:
    """Compare what the file gives with what we compute, and write that into it.

    -> the largest difference of two logits: to the model of the same rounded weights, which must be
    within the tolerance, and of that to the model itself
    """
    config, ids = model.config, parity.fixed_prompt(model.config)
    reader = gguf.GGUFReader(place, "r+")
    found = {tensor.name: tensor for tensor in reader.tensors}
    named = {each.name: each for each in stored}

    def fetch(name: str) -> Floats:
        tensor = found[named[name].theirs]
        values: Floats = gguf.dequantize(tensor.data, tensor.tensor_type)
        return layout.turned(named[name].weight, values)

    with np.errstate(all="ignore"):  # what is no number is refused by the comparison
        theirs = parity.plain_logits(fetch, config, ids)[:, : config.vocab_size]
        reads = f"The reader of gguf {version('gguf')}"
        fetch_rounded = layout.fetch_from(rounded)
        difference, allowed = parity.prove(rounded, fetch_rounded, theirs, reads)
    if reader.get_field("tokenizer.ggml.tokens").contents() != tokens.texts:
        raise InteropError(f"gguf {version('gguf')} reads another vocabulary than was written.")
    rounding = 0.0
    if rounded is not model:
        exact, ours = (parity.our_logits(each, ids) for each in (model, rounded))
        rounding = float(np.abs(exact - ours).max())
    proved = {"max_difference": difference, "tolerance": allowed, "rounding": rounding}
    for key, value in proved.items():
        reader.get_field(f"{PARITY}.{key}").parts[-1][0] = value
    reader.data.flush()
    return difference, rounding
