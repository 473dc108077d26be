"""A trained model as one web page that needs no server and makes no request.

``page_forward`` captures the kernels, ``capture`` makes C of them, which ``wasm`` compiles;
``shaders`` does the same for graphics cards. ``payload`` rounds and cuts the weights,
``page_vocabulary`` describes the tokenizer, and ``page`` writes all of it into one file, with the
scripts from ``pages``. ``page_parity`` checks that the module computes what the model does, and
``finished`` that the file starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinygpt.config import MAX_TOKENS, GPTConfig, SampleConfig
from tinygpt.errors import InteropError, UsageError
from tinygpt.files.atomic import check_overwritable, replacing, user_path
from tinygpt.interop.web import page, page_vocabulary, payload
from tinygpt.interop.web.capture import Source, capture
from tinygpt.interop.web.payload import KINDS, Kind
from tinygpt.interop.web.shaders import WORTH_IT, shaders
from tinygpt.interop.web.wasm import compile_wasm
from tinygpt.text.tokenizers import Tokenizer
from tinygpt.untrusted import utf8_name

if TYPE_CHECKING:
    from tinygpt.model.transformer import Transformer

__all__ = ["KINDS", "Exported", "Kind", "check_target", "export_web"]

MARK = b'<meta name="generator" content="TinyGPT">'
"""Marks the head of every exported page, so that only such a file is overwritten."""
LARGEST = 1 << 29
"""Bytes of a page: what browsers still open. GPT-2 124M takes 333 MB as float16."""


@dataclass(frozen=True)
class Exported:
    """The result of an export."""

    path: Path
    size: int
    """Bytes of the file."""
    weights: int
    """Bytes of the weights in it, before base64."""
    module: int
    difference: float
    """The largest difference of a logit from the model's, with the weights rounded alike."""


def export_web(
    model: Transformer,
    tokenizer: Tokenizer,
    path: Path,
    *,
    kind: Kind = "float16",
    title: str = "TinyGPT",
    description: str = "",
    card: Mapping[str, Any] | None = None,
    webgpu: bool | None = None,
) -> Exported:
    """Write a page that runs ``model``; the same model and texts give the same bytes.

    ``card`` holds what the page tells about the model, as JSON values. ``webgpu`` puts shaders in,
    which None leaves out of pages too small to gain from them. The model's weights are rounded to
    ``kind`` in place, as the page has them.

    Raises UsageError if the page would be too large, or a weight or the tokenizer does not fit in;
    InteropError if what was compiled does not compute what the model does, or if the finished file
    does not start. No file is left then.
    """
    from tinygpt.interop.web.finished import check_finished
    from tinygpt.interop.web.page_parity import check
    from tinygpt.machine.transfer import read, write

    path = user_path(path)
    check_target(path)
    title, description = utf8_name(title), utf8_name(description)
    described = page_vocabulary.describe(tokenizer)
    _check_size(model, kind)
    parameters = model.parameters()
    arrays = {name: read(p) for name, p in parameters.items()}
    payload.check(arrays, kind)
    source = capture(model.config)
    module = compile_wasm(source.text)
    places = {name: at for name, at, _ in source.weights}
    chunks = list(payload.chunks(arrays, places, kind))
    for name, values in arrays.items():
        write(parameters[name], payload.rounded(values, kind))
    difference = check(model, module, chunks)
    about: dict[str, Any] = {
        "title": title,
        "description": description,
        "config": model.config.to_dict(),
        "weights": kind,
        "chunks": len(chunks),
        "tokenizer": described,
        "chat": page_vocabulary.describe_chat(tokenizer),
        "card": dict(card or {}),
        "sampling": {**SampleConfig().to_dict(), "max_tokens": MAX_TOKENS},
        "parity": float(f"{difference:.3g}"),
    }
    if model.num_params() >= WORTH_IT if webgpu is None else webgpu:
        about["shaders"] = _shaders(model.config, source)
    try:
        with replacing(path) as file:
            for piece in page.render(
                title=title, description=description, about=about, module=module, chunks=chunks
            ):
                file.write(piece)
            file.flush()
            check_finished(Path(file.name), module, len(chunks))
    except OSError as error:
        raise InteropError(
            f"{path} could not be written: {error.strerror}. Nothing was left there."
        ) from error
    carried = sum(len(chunk.data) for chunk in chunks)
    return Exported(path, path.stat().st_size, carried, len(module), difference)


def check_target(path: Path) -> None:
    """UsageError if something else than such a page is there."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder. Give the file to write: {path / 'page.html'}")
    check_overwritable(path, MARK, "a page")


def _shaders(config: GPTConfig, source: Source) -> dict[str, Any]:
    """The shaders, with the place in the module's memory from which each weight is copied."""
    made = shaders(config)
    weights = [[made["weights"][name], at, size] for name, at, size in source.weights]
    return {**made, "weights": weights}


def _check_size(model: Transformer, kind: Kind) -> None:
    if kind not in KINDS:
        raise UsageError(f"kind={kind!r} is not known. Wanted: {', '.join(KINDS)}.")
    width = {"float32": 4, "float16": 2, "int8": 1}[kind]
    size = model.num_params() * width * 4 // 3
    if size > LARGEST:
        smaller = [k for k, w in (("float16", 2), ("int8", 1)) if w < width]
        advice = f" Try --weights {smaller[-1]}." if smaller else " Export it to another format."
        raise UsageError(
            f"As {kind} this model's page would have {size / 1e6:,.0f} MB, and browsers open "
            f"{LARGEST / 1e6:,.0f} MB at most.{advice}"
        )
