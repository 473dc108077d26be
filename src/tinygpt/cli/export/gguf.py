"""``tinygpt export gguf``: a file that llama.cpp loads."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from tinygpt.cli.console import say, show_json
from tinygpt.cli.flags import Switch
from tinygpt.cli.models import load_model
from tinygpt.cli.newest import run_or_newest
from tinygpt.files.disk import size


def export_gguf(
    run: Path | None = None,
    /,
    *,
    out: Path,
    type: Literal["f32", "f16", "q8_0"] = "f32",
    tokenizer: str | None = None,
    json: Switch = False,
) -> None:
    """Write a model as a GGUF file, which llama.cpp loads, and prove that it computes the same.

    The file is read back and its logits are compared with ours. It appears whole or not at all.

    Parameters
    ----------
    run
        Run folder, of which the best checkpoint is taken, or a checkpoint. [default: the newest
        run in runs/]
    out
        File to write, such as model.gguf.
    type
        How the weights are stored: f32 exactly, f16 in half the size, q8_0 in about a quarter.
    tokenizer
        gpt2, byte or a saved tokenizer, for a checkpoint that holds none.
    json
        Print a summary as JSON.
    """
    run = run_or_newest(run)
    from tinygpt.interop.gguf.gguf_file import check_target, export

    check_target(out)
    model, own = load_model(run, tokenizer)

    from dataclasses import asdict

    from tinygpt.runs.folder import choose_checkpoint

    chosen = choose_checkpoint(run)
    done = export(model, own, out, type, name=chosen.absolute().parent.name or "TinyGPT")
    if not model.config.bias:
        say("the model has no biases: they are written as zeros")
    if done.added:
        say("llama.cpp wants a token that ends a text: one was added, which is never the likeliest")
    if done.unrounded:
        say(f"{len(done.unrounded)} weights are stored as f16: q8_0 wants rows of 32, 64, 96 …")
    say(f"largest logit difference to what is read from the file: {done.difference:.2g}")
    if type != "f32":
        say(f"rounding the weights changes logits by up to {done.rounding:.2g}")
    say(f"wrote {out}: {model.num_params():,} parameters, {size(done.size)}")
    if model.config.block_size % 256:
        # llama.cpp rounds the context up, and there are no positions behind the last one
        say(f"llama.cpp breaks off behind token {model.config.block_size}: limit it with -n")
    if json:
        show_json({"checkpoint": str(chosen), "type": type, **asdict(done)})
