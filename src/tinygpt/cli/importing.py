"""``tinygpt import``: weights that others trained, as a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cyclopts import App

from tinygpt.cli.console import command, say, show_json
from tinygpt.cli.flags import Switch
from tinygpt.cli.loading import ready_tokenizer
from tinygpt.machine import device
from tinygpt.text.names import is_name

if TYPE_CHECKING:
    from tinygpt.interop.hf.pretrained import Pretrained
    from tinygpt.text.tokenizers import Tokenizer

app = App(name="import", help="Take in weights that others trained.")


@app.command(name="hf")
def import_hf(
    source: str,
    /,
    *,
    out: Path,
    revision: str | None = None,
    tokenizer: str | None = None,
    check: Switch = False,
    json: Switch = False,
) -> None:
    """Make a run of a GPT-2 from Hugging Face, to generate, evaluate, train and export.

    Parameters
    ----------
    source
        Folder with config.json and model.safetensors, or a .safetensors file in one; or a name of
        the hub: gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2, owner/name.
    out
        Folder of the run, which must not exist.
    revision
        Commit, tag or branch of a model on the hub. [default: what main is at]
    tokenizer
        gpt2, byte, a saved one, or none. [default: the one beside the weights]
    check
        Compare the model's logits with a plain forward pass first: takes memory and seconds.
    json
        Print a summary as JSON.
    """
    from tinygpt.files.atomic import check_free
    from tinygpt.interop.hf import pretrained

    check_free(out)
    found = pretrained.open_pretrained(source, progress=True, revision=revision)
    say(f"weights: {found.place}")
    vocabulary = _tokenizer(found, tokenizer)
    difference = None
    if check:
        device.require_device()
        difference = pretrained.check(found)
    path = pretrained.import_run(found, out, vocabulary)
    if difference is not None:
        say(f"largest logit difference to a plain forward pass: {difference:.2g}")
    say(f"wrote {path}: {found.config.num_params():,} parameters, from {found.dtypes}")
    if vocabulary is None:
        say("It has no tokenizer: name one where text is needed, such as --tokenizer gpt2.")
    else:
        say("Let it write:")
        say("  " + command("generate", out))
    if json:
        show_json(
            {
                "run": str(out),
                "checkpoint": str(path),
                "source": found.source,
                "commit": found.snapshot and found.snapshot.commit,
                "parameters": found.config.num_params(),
                "model": found.config.to_dict(),
                "tokenizer": None if vocabulary is None else vocabulary.kind,
                "types": found.dtypes,
                "parity": difference,
            }
        )


def _tokenizer(found: Pretrained, spec: str | None) -> Tokenizer | None:
    """The one that was named, or else the one beside the weights; it has to fit."""
    if spec is None:
        return found.tokenizer
    if is_name(spec, ("none",)):
        return None
    named = ready_tokenizer(spec)
    found.check_vocabulary(named)
    return named
