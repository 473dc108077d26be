"""``tinygpt export web``: a model as one web page."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal

from tinygpt.cli import texts
from tinygpt.cli.console import say
from tinygpt.cli.flags import Switch
from tinygpt.cli.models import load_model
from tinygpt.cli.newest import run_or_newest
from tinygpt.files.disk import size


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
    model, own = load_model(run, tokenizer)

    from tinygpt.pages.run_card import run_card
    from tinygpt.runs.folder import choose_checkpoint

    told = run_card(choose_checkpoint(run))
    if beginnings:
        told["beginnings"] = texts.beginnings(run, model, own)
    if description is None:
        text = f" on {told['data']}" if "data" in told else ""
        description = f"A GPT of {told['parameters']:,} parameters, trained{text} with TinyGPT."
    name = run.name if run.is_dir() else run.absolute().parent.name
    made = web.export_web(
        model,
        own,
        out,
        kind=weights,
        title=title or name or "TinyGPT",
        description=description,
        card=told,
    )
    seconds = time.perf_counter() - began
    say(
        f"checked: logits within {made.difference:.1e} of the model's (weights as {weights}), and "
        f"the same text"
    )
    say(
        f"wrote {made.path}, {size(made.size)} ({size(made.weights)} of weights, "
        f"{size(made.module)} of code) in {seconds:.0f} s. Open it in a browser."
    )
