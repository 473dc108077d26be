"""``tinygpt export``: a model in the form that other tools read."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cyclopts import App

from tinygpt.cli.console import say, show_json
from tinygpt.cli.flags import Switch
from tinygpt.cli.loading import beginnings as first_lines
from tinygpt.cli.loading import load_model
from tinygpt.cli.newest import run_or_newest
from tinygpt.config import Precision
from tinygpt.files.atomic import check_free
from tinygpt.files.disk import size
from tinygpt.machine import device
from tinygpt.runs.folder import choose_checkpoint, text_of
from tinygpt.text.names import is_name

if TYPE_CHECKING:
    from tinygpt.model.transformer import Transformer

app = App(name="export", help="Hand a model on: to Hugging Face, llama.cpp, as a web page.")


@app.command(name="hf")
def export_hf(
    run: Path | None = None,
    /,
    *,
    out: Path,
    dtype: Precision = "float32",
    tokenizer: str | None = None,
    json: Switch = False,
) -> None:
    """Write a model as a folder that transformers loads, and prove that it computes the same.

    The folder is read back, by transformers where it is installed, and its logits are compared with
    ours. It appears whole or not at all.

    Parameters
    ----------
    run
        Run folder, of which the best checkpoint is taken, or a checkpoint. [default: the newest
        run in runs/]
    out
        Folder to write, which must not exist.
    dtype
        Type of the weights in the file: float32 exactly, bfloat16 or float16 in half the size.
    tokenizer
        gpt2, byte or a saved tokenizer, for a checkpoint that holds none; none writes none.
    json
        Print a summary as JSON.
    """
    run = run_or_newest(run)
    from tinygpt.api import load
    from tinygpt.interop.hf.hf_export import export
    from tinygpt.runs.checkpoint import read_meta

    check_free(out)
    chosen = choose_checkpoint(run)
    device.require_device()
    bare = tokenizer is not None and is_name(tokenizer, ("none",))
    model, vocabulary = (load(chosen)[0], None) if bare else load_model(chosen, tokenizer=tokenizer)
    proved = export(model, vocabulary, out, read_meta(chosen), text_of(chosen), dtype)
    _say_of_biases(model)
    say(f"{proved} (of {proved.tokens} tokens)")
    kind = "" if dtype == "float32" else f" as {dtype}"
    say(f"wrote {out}: {model.num_params():,} parameters{kind}")
    if json:
        found = {"folder": str(out), "checkpoint": str(chosen), "parameters": model.num_params()}
        found["dtype"] = dtype
        show_json(found | {"parity": asdict(proved)})


@app.command(name="gguf")
def export_gguf(
    run: Path | None = None,
    /,
    *,
    out: Path,
    type: Literal["f32", "f16", "bf16", "q8_0", "q4_0"] = "f32",
    tokenizer: str | None = None,
    json: Switch = False,
) -> None:
    """Write a model as a GGUF file, which llama.cpp loads, and prove that it computes the same.

    The file is read back and its logits are compared with ours. It appears whole or not at all.
    A Modelfile for ollama is written beside it, such as model.Modelfile, with the chat template.

    Parameters
    ----------
    run
        Run folder, of which the best checkpoint is taken, or a checkpoint. [default: the newest
        run in runs/]
    out
        File to write, such as model.gguf.
    type
        How the weights are stored: f32 exactly, f16 or bf16 in half the size, q8_0 in about a
        quarter, q4_0 in about an eighth.
    tokenizer
        gpt2, byte or a saved tokenizer, for a checkpoint that holds none.
    json
        Print a summary as JSON.
    """
    run = run_or_newest(run)
    from tinygpt.interop.gguf import modelfile
    from tinygpt.interop.gguf.gguf_file import check_target, export

    check_target(out)
    modelfile.check_target(out)
    model, own = load_model(run, tokenizer=tokenizer)
    chosen = choose_checkpoint(run)
    done = export(model, own, out, type, name=chosen.absolute().parent.name or "TinyGPT")
    _say_of_biases(model)
    if done.added:
        say("llama.cpp wants a token that ends a text: one was added, which is never the likeliest")
    if done.unrounded:
        say(f"{len(done.unrounded)} weights are stored as f16: {type} wants rows of 32, 64, 96 …")
    say(f"largest logit difference to what is read from the file: {done.difference:.2g}")
    if type != "f32":
        say(f"rounding the weights changes logits by up to {done.rounding:.2g}")
    say(f"wrote {out}: {model.num_params():,} parameters, {size(done.size)}")
    beside = modelfile.write_modelfile(out, own, model.config.block_size)
    say(f"wrote {beside}, for ollama")
    if model.config.block_size % 256:
        # llama.cpp rounds the context up, and there are no positions behind the last one
        say(f"llama.cpp breaks off behind token {model.config.block_size}: limit it with -n")
    if json:
        show_json({"checkpoint": str(chosen), "type": type, **asdict(done)})


@app.command(name="web")
def export_web(
    run: Path | None = None,
    /,
    *,
    out: Path,
    weights: Literal["float16", "float32", "int8"] = "float16",
    title: str | None = None,
    description: str | None = None,
    tokenizer: str | None = None,
    beginnings: Switch = False,
) -> None:
    """Write one web page that runs the model in the visitor's browser.

    It opens from disk or any host of files, needs no server and makes no request.

    Parameters
    ----------
    run
        Run folder, of which the best checkpoint is taken, or a checkpoint. [default: the newest
        run in runs/]
    out
        File to write, such as page.html.
    weights
        How the weights are carried: float16 in half the size, int8 in a quarter, or float32.
    title
        Title of the page. [default: the name of the run]
    description
        A sentence or two below the title. [default: what it was trained on]
    tokenizer
        gpt2, byte or a saved tokenizer, for a checkpoint that holds none.
    beginnings
        Offer lines of the run's validation text on an empty page; they stand in the file.
    """
    run = run_or_newest(run)
    from tinygpt.interop import web

    web.check_target(out)
    began = time.perf_counter()
    model, own = load_model(run, tokenizer=tokenizer)

    from tinygpt.pages.run_card import run_card

    card = run_card(choose_checkpoint(run))
    if beginnings:
        card["beginnings"] = first_lines(run, model, own)
    if description is None:
        text = f" on {card['data']}" if "data" in card else ""
        description = f"A GPT of {card['parameters']:,} parameters, trained{text} with TinyGPT."
    name = run.name if run.is_dir() else run.absolute().parent.name
    made = web.export_web(
        model,
        own,
        out,
        kind=weights,
        title=title or name or "TinyGPT",
        description=description,
        card=card,
    )
    seconds = time.perf_counter() - began
    say(f"checked: logits within {made.difference:.1e} ({weights}), and the same text")
    say(
        f"wrote {made.path}, {size(made.size)} ({size(made.weights)} of weights, "
        f"{size(made.module)} of code) in {seconds:.0f} s. Open it in a browser."
    )


def _say_of_biases(model: Transformer) -> None:
    if not model.config.bias:
        say("the model has no biases: they are written as zeros")
