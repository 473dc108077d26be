"""A model of ours as a Hugging Face folder, which appears once it has been read back."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tinygpt.config import GPTConfig, Precision, __version__
from tinygpt.errors import InteropError
from tinygpt.files.atomic import building, replacing, user_path
from tinygpt.files.disk import writing
from tinygpt.files.strict_json import write_json
from tinygpt.files.tensor_file import STORED, as_floats, stored
from tinygpt.interop import parity
from tinygpt.interop.card import Parity, model_card
from tinygpt.interop.hf.hf_config import config_to_hf, end_of_text
from tinygpt.interop.hf.hf_tokenizer import write_tokenizer
from tinygpt.interop.hf.layout import all_weights, fetch_from, stored_shape
from tinygpt.interop.hf.pretrained import WEIGHTS_FILE
from tinygpt.interop.hf.weight_files import read_file, write_file
from tinygpt.interop.parity import Floats, Ids
from tinygpt.runs import checkpoint
from tinygpt.text.tokenizers import Tokenizer
from tinygpt.untrusted import clip, utf8_name

if TYPE_CHECKING:
    from tinygpt.model.transformer import Transformer


def export(
    model: Transformer,
    tokenizer: Tokenizer | None,
    folder: Path,
    meta: checkpoint.Meta,
    source: str | None = None,
    dtype: Precision = "float32",
) -> Parity:
    """Write ``folder`` for ``AutoModelForCausalLM`` and ``AutoTokenizer``; -> how it was proved.

    ``meta`` and ``source``, the name of the text, are what the model card says of the run; the
    weights are rounded to ``dtype``. What was written is read back by another program, and its
    logits are compared with those of a model of the same weights; InteropError, and no folder, if
    they differ.
    """
    config = model.config
    model = rounded_copy(model, dtype)
    with writing(folder := user_path(folder)), building(folder) as staging:
        write_json(staging / "config.json", config_to_hf(config, tokenizer, dtype), indent=2)
        generation = {k: v for k, v in end_of_text(tokenizer).items() if v is not None}
        write_json(staging / "generation_config.json", generation, indent=2)
        write_weights(model, staging / WEIGHTS_FILE, dtype)
        if tokenizer is not None:
            write_tokenizer(tokenizer, staging, config.block_size)
        proved = prove(model, staging)
        record = {"tinygpt": __version__, "parity": asdict(proved), **_described(meta)}
        write_json(staging / "tinygpt.json", record, indent=2)
        with replacing(staging / "README.md") as file:
            name, with_tokenizer = utf8_name(folder.resolve().name), tokenizer is not None
            file.write(model_card(name, meta, proved, source, with_tokenizer).encode())
    return proved


def _described(meta: checkpoint.Meta) -> dict[str, Any]:
    """What the checkpoint says of its run, without the vocabulary, which has files of its own."""
    values = replace(meta, tokenizer=None).to_dict()
    return {name: values[name] for name in ("iter_num", "model", "train", "data", "progress")}


def write_weights(model: Transformer, path: Path, dtype: Precision = "float32") -> None:
    """model.safetensors, a tensor at a time. Raises OSError."""
    shapes = {name: stored_shape(weight) for name, weight in all_weights(model.config).items()}
    write_file(path, shapes, fetch_from(model), STORED[dtype])


def rounded_copy(model: Transformer, dtype: Precision) -> Transformer:
    """A float32 model of the weights that a reader of a file of this type gets; or the same one."""
    from tinygpt.machine.transfer import read, write
    from tinygpt.model.transformer import Transformer

    kind = STORED[dtype]
    if kind == "F32":
        return model
    copy = Transformer(model.config, seed=None).eval()
    given = model.parameters()
    for name, parameter in copy.parameters().items():
        write(parameter, as_floats(stored(read(given[name]), kind), kind))
    return copy


# Reading back -----------------------------------------------------------------------------------


def prove(model: Transformer, folder: Path) -> Parity:
    """Compare our logits with those that another program computes from the files in a folder."""
    ids = parity.fixed_prompt(model.config)
    reader, theirs = read_back(folder, model.config, ids)
    found = parity.prove(model, fetch_from(model), theirs, reader)
    return Parity(found.difference, found.allowed, reader, ids.shape[1])


def read_back(folder: Path, config: GPTConfig, ids: Ids) -> tuple[str, Floats]:
    """-> who read the folder, and his logits (T, V): transformers if it is installed, else numpy"""
    try:
        transformers, torch = import_module("transformers"), import_module("torch")
    except ImportError:
        return f"numpy {np.__version__}", _by_numpy(folder, config, ids)
    reader = f"transformers {transformers.__version__}"
    return reader, _by_transformers(torch, transformers, folder, ids)


def _by_numpy(folder: Path, config: GPTConfig, ids: Ids) -> Floats:
    entries = read_file(folder / WEIGHTS_FILE)

    def fetch(name: str) -> Floats:
        entries[name].release()  # of the one before
        return entries[name].floats()

    return parity.plain_logits(fetch, config, ids)


def _by_transformers(torch: Any, transformers: Any, folder: Path, ids: Ids) -> Floats:
    """Its logits, if it finds every weight where it looks for it and none besides."""
    try:
        with _in_silence(transformers):
            load = transformers.AutoModelForCausalLM.from_pretrained
            model, said = load(folder, output_loading_info=True, local_files_only=True)
            if any(said.values()):
                raise InteropError(f"it reports {clip(said)}")
            with torch.no_grad():
                answer = model.float().eval()(torch.from_numpy(ids).long())
            logits: Floats = answer.logits[0].numpy()
    except Exception as error:
        raise InteropError(
            f"transformers cannot read what was written: {clip(error)}. Nothing is left of it."
        ) from error
    return logits


@contextmanager
def _in_silence(transformers: Any) -> Iterator[None]:
    """Without its progress bars and warnings: what is wrong is found by the comparison."""
    log = transformers.utils.logging
    level, shown = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.set_verbosity(level)
        if shown:
            log.enable_progress_bar()
