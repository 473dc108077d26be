"""From settings to a run: the text, its tokens, the model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tinygpt.cli.console import say
from tinygpt.cli.loading import ready_tokenizer
from tinygpt.cli.newest import RUNS
from tinygpt.cli.options import DataConfig, Settings
from tinygpt.errors import CheckpointError, DataError
from tinygpt.files.atomic import make_folder, sync_folder
from tinygpt.runs.display.text import duration
from tinygpt.text.names import lasting

if TYPE_CHECKING:
    from tinygpt.api import GPT
    from tinygpt.config import GPTConfig, TrainConfig
    from tinygpt.runs.run import TrainingRun
    from tinygpt.text.tokenizers import Tokenizer
    from tinygpt.text.tokens import Tokens

LARGEST_VOCAB = 1 << 20
"""More tokens than any vocabulary has: a file of tokens that needs so many may be made up."""


class Material(NamedTuple):
    """What a model learns from, and the shape that this gives it."""

    name: str
    training: Tokens
    held_out: Tokens | None
    tokenizer: Tokenizer | None
    shape: GPTConfig


def gather(settings: Settings, own: Tokenizer | None = None) -> Material:
    """Read the text and make its tokens, with the tokenizer that the run has already, if any."""
    from tinygpt.text import batches

    name, tokens, tokenizer = _read(settings, own)
    vocab_size = tokenizer.vocab_size if tokenizer else int(tokens.max()) + 1
    if tokenizer is None and "vocab_size" not in settings.model and vocab_size > LARGEST_VOCAB:
        raise DataError(
            f"{name} has a token of number {vocab_size - 1:,}, and the model would need a row for "
            f"each below it. If that is right, say so: --vocab-size {vocab_size}"
        )
    shape = settings.model_config(vocab_size)
    training, held_out = batches.split(tokens, settings.data.val_fraction, shape.block_size)
    return Material(name, training, held_out, tokenizer, shape)


def foresee(shape: GPTConfig, settings: Settings, allow_memory: bool) -> None:
    """Say what a run will need; UsageError if it cannot fit in memory, unless that is allowed."""
    from tinygpt.training import preflight

    train, given = settings.train, settings.data.init is not None
    estimate = preflight.check(shape, train, allow=allow_memory, given=given)
    say(f"memory: {estimate}")
    if not preflight.on_cpu():
        say("time: known when the first steps are done")
        return
    seconds = preflight.seconds_per_step(estimate, preflight.measured_rate())
    say(
        f"time: about {1000 * seconds:,.0f} ms a step, {estimate.tokens / seconds:,.0f} tokens/s, "
        f"{duration(seconds * train.max_iters)} for {train.max_iters:,} steps"
    )


def make_run(
    settings: Settings,
    material: Material,
    folder: Path,
    resume: bool | Path = False,
    allow_change: Sequence[str] = (),
) -> TrainingRun:
    """A run, ready to be iterated over; ``resume`` may be the checkpoint that it goes on from."""
    from tinygpt.api import GPT
    from tinygpt.runs.folder import list_checkpoints
    from tinygpt.runs.run import TrainingRun

    source, model = _lasting(settings.data, material.name), GPT(material.shape, settings.train.seed)
    goes_on = isinstance(resume, Path) or (resume and list_checkpoints(folder))
    origin = None
    if source.init is not None and not goes_on:
        source, origin = _begin(model, source)
    return TrainingRun(
        model,
        settings.train,
        material.training,
        material.held_out,
        tokenizer=material.tokenizer,
        folder=folder,
        resume=resume,
        source=source.to_dict(),
        allow_change=allow_change,
        init=origin,
    )


def _begin(model: GPT, source: DataConfig) -> tuple[DataConfig, dict[str, Any]]:
    """Give a model the weights that its run begins with; -> the same, their hash written down.

    -> also where they are from
    """
    from tinygpt.runs import checkpoint

    path, expected = str(source.init), source.init_sha256
    origin = checkpoint.start_from(path, model)
    found = origin["sha256"]
    if expected not in (None, found):
        raise CheckpointError(
            f"{path} no longer holds the weights that this run begins with: their hash was "
            f"{expected}, and is {found}."
        )
    say(f"weights: {path}")
    return replace(source, init_sha256=found), origin


def say_material(material: Material, train: TrainConfig) -> None:
    """Say what a run learns from, and what learns."""
    vocabulary, held_out, shape = material.tokenizer, material.held_out, material.shape
    kind = (
        f"{vocabulary.kind} of {vocabulary.vocab_size:,}"
        if vocabulary
        else f"{shape.vocab_size:,} ids"
    )
    held = f"{len(held_out):,} for validation" if held_out is not None else "no validation"
    say(f"tokens: {len(material.training):,} for training, {held} ({kind})")
    say(f"model: {shape.num_params():,} parameters, learning rate {train.learning_rate:g}")


def introduce(run: TrainingRun) -> None:
    """Say what there is to know of a run before it starts."""
    everything, learning = (
        sum(p.numel() for p in found.values())
        for found in (run.model.parameters(), run.model.trainable())
    )
    if learning != everything:
        say(f"learning: {everything:,} parameters, of which {learning:,} learn")
    say(f"run: {run.folder}" + (f", from step {run.iter_num:,}" if run.iter_num else ""))
    for message in run.take_notices():
        say(message)


def _read(settings: Settings, own: Tokenizer | None) -> tuple[str, Tokens, Tokenizer | None]:
    """-> a name for the text, its tokens, and their tokenizer if that is known."""
    from tinygpt.text.corpus import open_corpus
    from tinygpt.text.tokenizers import make_tokenizer
    from tinygpt.text.tokens import TOKEN_FILES, load_tokens, tokens_of

    source, spec, tokenizer = str(settings.data.source), settings.data.tokenizer, own
    if Path(source).suffix in TOKEN_FILES:
        if tokenizer is None and spec is not None:
            tokenizer = ready_tokenizer(spec)
        size = tokenizer.vocab_size if tokenizer else settings.model.get("vocab_size")
        return Path(source).stem, load_tokens(source, size), tokenizer
    corpus = open_corpus(source, field=settings.data.field, glob=settings.data.glob)
    say(f"text: {corpus.description}")
    tokenizer = tokenizer or make_tokenizer(spec, corpus.pieces)
    return corpus.name, tokens_of(corpus, tokenizer), tokenizer


def _lasting(data: DataConfig, chosen: str) -> DataConfig:
    """What was used, so that it is found again: ``auto`` is what it chose, paths are absolute."""
    from tinygpt.text import corpus, tokenizers

    values = data.to_dict()
    if values["source"] == "auto":
        values["source"] = chosen
    for name, known in (("source", corpus.NAMES), ("tokenizer", tokenizers.NAMES), ("init", ())):
        if values[name] is not None:
            values[name] = lasting(values[name], known)
    return DataConfig.from_dict(values)


def new_folder(name: str) -> Path:
    """Make the folder of a run; of several that begin in one second each gets its own."""
    from tinygpt.files.disk import writing

    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:40] or "text"
    folder = RUNS / f"{stem}-{datetime.now():%Y%m%d-%H%M%S}"
    with writing(RUNS):
        make_folder(RUNS)
        while True:
            try:
                folder.mkdir()
                break
            except FileExistsError:
                folder = folder.with_name(folder.name + "x")
        sync_folder(RUNS)
    return folder
