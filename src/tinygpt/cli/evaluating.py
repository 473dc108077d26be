"""``tinygpt eval``: how well a trained model reads."""

from __future__ import annotations

import math
from pathlib import Path

from tinygpt.cli.console import aligned, command, show_json
from tinygpt.cli.flags import Count, Switch
from tinygpt.cli.loading import load_model, own_validation, read_tokens
from tinygpt.cli.newest import run_or_newest
from tinygpt.cli.options import DataConfig
from tinygpt.config import Precision
from tinygpt.config.devices import device_names
from tinygpt.machine import device

BATCH_SIZE = 16
"""Windows evaluated at a time."""


def evaluate(
    run: Path | None = None,
    /,
    *,
    data: str | None = None,
    field: str = DataConfig.field,
    glob: str = DataConfig.glob,
    stride: int | None = None,
    batch_size: Count = BATCH_SIZE,
    devices: str | None = None,
    tokenizer: str | None = None,
    dtype: Precision = "float32",
    json: Switch = False,
) -> None:
    """Measure a model on a whole text: loss, perplexity and bits per byte.

    Every token but the first is predicted once, in windows of block_size.

    Parameters
    ----------
    run
        Run folder, of which the best checkpoint is taken, or a checkpoint. [default: the newest
        run in runs/]
    data
        Text file, folder, JSONL or token file. [default: all of the run's own validation text]
    field
        Field of a JSONL file that holds the text.
    glob
        Files of a folder that are read.
    stride
        Tokens from one window to the next; the smaller, the more each prediction sees of the text
        before it, and the longer it takes. [default: block_size]
    batch_size
        Windows at a time.
    devices
        Devices that share them: a number, or a list like CL:0,CL:1. [default: one]
    tokenizer
        gpt2, byte or a saved tokenizer, for a checkpoint that holds none.
    dtype
        Type that weights are rounded to, and that products are computed in.
    json
        Print the result as JSON.
    """
    run = run_or_newest(run)
    device.prefer(devices)
    from rich.console import Console
    from rich.progress import track

    from tinygpt.training import evaluation

    model, own = load_model(run, tokenizer=tokenizer, dtype=dtype)
    name, tokens = (
        own_validation(run, model, own, f"Give one: {command('eval', run, '--data', 'TEXT.txt')}")
        if data is None
        else read_tokens(DataConfig(source=data, field=field, glob=glob), model, own)
    )
    block_size, console = model.config.block_size, Console(stderr=True)
    evaluation.check(block_size, tokens, batch_size, stride, len(device_names(devices)))
    sums = track(
        evaluation.batch_losses(model, tokens, batch_size, stride, devices),
        description="reading",
        total=evaluation.batches(block_size, tokens, batch_size, stride),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    found = evaluation.summary(tokens, own, math.fsum(sums), block_size).to_dict()
    result = {"data": name, "stride": stride or block_size, **found}
    if json:
        show_json(result)
    else:
        shown = {k: f"{v:.4f}" if isinstance(v, float) else v for k, v in result.items()}
        print(aligned([(k.replace("_", " "), v) for k, v in shown.items()]))
