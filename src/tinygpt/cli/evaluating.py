"""``tinygpt eval``: how well a trained model reads."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from tinygpt.cli.console import aligned, command, finite, show_json
from tinygpt.cli.models import load_model
from tinygpt.cli.options import DataConfig, Switch, file_tables
from tinygpt.errors import DataError, UsageError
from tinygpt.metrics import bits_per_byte, perplexity

if TYPE_CHECKING:
    from tinygpt.api import GPT
    from tinygpt.data import Tokens
    from tinygpt.tokenizers import Tokenizer

BATCH_SIZE = 16
"""Sequences evaluated at a time."""


def evaluate(
    run: Path,
    /,
    *,
    data: str | None = None,
    field: str = DataConfig.field,
    glob: str = DataConfig.glob,
    batch_size: int = BATCH_SIZE,
    tokenizer: str | None = None,
    json: Switch = False,
) -> None:
    """Measure a model on a whole text: loss, perplexity and bits per byte.

    Every token but the first is predicted once, in windows of block_size.

    Parameters
    ----------
    run
        Run folder, of which the best checkpoint is taken, or a checkpoint.
    data
        Text file, folder, JSONL or token file. [default: all of the run's own validation text]
    field
        Field of a JSONL file that holds the text.
    glob
        Files of a folder that are read.
    batch_size
        Sequences at a time.
    tokenizer
        gpt2, byte or a saved tokenizer, for a checkpoint that holds none.
    json
        Print the result as JSON.
    """
    from tinygpt.data import byte_count

    if batch_size < 1:
        raise UsageError(f"--batch-size {batch_size} is too small: it must be at least 1.")
    model, own = load_model(run, tokenizer)
    name, tokens = (
        _own_validation(run, model, own)
        if data is None
        else _tokens(DataConfig(source=data, field=field, glob=glob), model, own)
    )
    if len(tokens) < 2:
        raise DataError(f"{name} has {len(tokens)} tokens; at least 2 are needed to predict one.")
    loss = whole_loss(model, tokens, batch_size)
    result = {
        "data": name,
        "tokens": len(tokens) - 1,
        "loss": finite(loss),
        "perplexity": finite(perplexity(loss)),
        "bits_per_byte": finite(bits_per_byte(loss, len(tokens) - 1, byte_count(tokens[1:], own))),
    }
    if json:
        show_json(result)
    else:
        shown = {k: f"{v:.4f}" if isinstance(v, float) else v for k, v in result.items()}
        print(aligned([(k.replace("_", " "), v) for k, v in shown.items()]))


def _tokens(source: DataConfig, model: GPT, tokenizer: Tokenizer) -> tuple[str, Tokens]:
    from tinygpt import data
    from tinygpt.corpus import open_corpus

    name, vocab_size = str(source.source), model.config.vocab_size
    if Path(name).suffix in data.TOKEN_FILES:
        return name, data.load_tokens(name, vocab_size)
    corpus = open_corpus(name, field=source.field, glob=source.glob)
    return corpus.description, data.load_tokens(data.tokenize(corpus, tokenizer), vocab_size)


def _own_validation(run: Path, model: GPT, tokenizer: Tokenizer) -> tuple[str, Tokens]:
    from tinygpt import data

    folder = run if run.is_dir() else run.parent
    settings = folder / "config.toml"
    source = DataConfig.from_dict(
        file_tables(settings).get("data", {}) if settings.exists() else {}
    )
    if source.source is None:
        raise UsageError(f"Say on which text: {command('eval', run, '--data', 'TEXT.txt')}")
    name, tokens = _tokens(source, model, tokenizer)
    _, held_out = data.split(tokens, source.val_fraction, model.config.block_size)
    if held_out is None:
        raise UsageError(f"{run} kept no text for validation. Give another with --data.")
    return f"{name}, its last {source.val_fraction:.0%}", held_out


def whole_loss(model: GPT, tokens: Tokens, batch_size: int) -> float:
    """Mean loss in nats of every token but the first, each predicted once."""
    from rich.console import Console
    from rich.progress import track

    from tinygpt.data import sequential
    from tinygpt.train import make_evaluate

    block_size = model.config.block_size
    batches = math.ceil((len(tokens) - 1) / (batch_size * block_size))
    console = Console(stderr=True)
    evaluate_batch = make_evaluate(model, batch_size)
    losses = (
        evaluate_batch(x, y) * count
        for x, y, count in track(
            sequential(tokens, batch_size, block_size),
            description="reading",
            total=batches,
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
    )
    return math.fsum(losses) / (len(tokens) - 1)
