"""``tinygpt export hf``: a folder that transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tinygpt.cli.console import say, show_json
from tinygpt.cli.flags import Switch
from tinygpt.cli.models import load_model
from tinygpt.cli.newest import run_or_newest
from tinygpt.text.names import is_name

if TYPE_CHECKING:
    from tinygpt.api import GPT
    from tinygpt.text.tokenizers import Tokenizer


def export_hf(
    run: Path | None = None,
    /,
    *,
    out: Path,
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
    tokenizer
        gpt2, byte or a saved tokenizer, for a checkpoint that holds none; none writes none.
    json
        Print a summary as JSON.
    """
    run = run_or_newest(run)
    from dataclasses import asdict

    from tinygpt.interop.destination import check_free
    from tinygpt.interop.hf.hf_export import export
    from tinygpt.runs.checkpoint import read_meta
    from tinygpt.runs.folder import choose_checkpoint, text_of

    check_free(out)
    chosen = choose_checkpoint(run)
    model, vocabulary = _load(chosen, tokenizer)
    proved = export(model, vocabulary, out, read_meta(chosen), text_of(chosen))
    if not model.config.bias:
        say("the model has no biases: they are written as zeros")
    say(f"{proved} (of {proved.tokens} tokens)")
    say(f"wrote {out}: {model.num_params():,} parameters")
    if json:
        found = {"folder": str(out), "checkpoint": str(chosen), "parameters": model.num_params()}
        show_json(found | {"parity": asdict(proved)})


def _load(path: Path, tokenizer: str | None) -> tuple[GPT, Tokenizer | None]:
    if tokenizer is None or not is_name(tokenizer, ("none",)):
        return load_model(path, tokenizer)
    from tinygpt.api import load
    from tinygpt.machine import device

    device.require_device()
    return load(path)[0], None
