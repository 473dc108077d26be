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
from tinygpt.errors import CheckpointError, DataError, UsageError
from tinygpt.files.atomic import make_folder, sync_folder, user_path
from tinygpt.runs.display.text import duration
from tinygpt.text.names import lasting

if TYPE_CHECKING:
    from tinygpt.api import GPT
    from tinygpt.config import GPTConfig, TrainConfig
    from tinygpt.generation.grading import Exam
    from tinygpt.machine.ranks.alone import Alone
    from tinygpt.runs.run import TrainingRun
    from tinygpt.runs.trial import Trial
    from tinygpt.text.corpus import Corpus
    from tinygpt.text.tokenizers import Tokenizer
    from tinygpt.text.tokens import Tokens

LARGEST_VOCAB = 1 << 20
"""More tokens than any vocabulary has: a file of tokens that needs so many may be made up."""
LONG = 60.0
"""Seconds of a run from which on it pays to time the parts of a step: that takes one or two."""


class Source(NamedTuple):
    """What was read."""

    name: str
    """Short, for the names of runs."""
    tokens: Tokens
    tokenizer: Tokenizer | None
    vocab_size: int


class Material(NamedTuple):
    """What a model learns from, and the shape that this gives it."""

    name: str
    training: Tokens
    held_out: Tokens | None
    tokenizer: Tokenizer | None
    shape: GPTConfig


class Beginning(NamedTuple):
    """The model of a run before its first step."""

    model: GPT
    origin: dict[str, Any] | None = None
    """Where its weights are from, if they are not random: see ``checkpoint.start_from``."""
    trial: Trial | None = None
    """What it trains with, if its pace was measured."""


def check_devices(train: TrainConfig) -> None:
    """DeviceError if one of the devices of a run is not there."""
    if train.devices is not None:
        from tinygpt.machine.several import open_devices

        open_devices(train.devices)


def open_text(data: DataConfig) -> Corpus | None:
    """The text that is to be read, and a line on it; None for tokens, and for a mix."""
    from tinygpt.text.mix_shares import is_mix
    from tinygpt.text.shards import is_tokens
    from tinygpt.text.sources import corpus_of

    if is_mix(str(data.source)) or is_tokens(str(data.source), data.glob):
        return None
    corpus = corpus_of(str(data.source), data.field, data.glob, data.separator)
    say(f"text: {corpus.description}")
    return corpus


def gather(
    settings: Settings, own: Tokenizer | None = None, given: Corpus | Source | None = None
) -> Material:
    """Make tokens of the text, with the tokenizer that the run has already, if any.

    ``given`` is the text if it is open already, or its tokens if they were read.
    """
    from tinygpt.text import batches

    if not isinstance(given, Source):
        given = read_source(settings, own, given or open_text(settings.data))
    source = given
    shape = settings.model_config(source.vocab_size)
    training, held_out = batches.split(source.tokens, settings.data.val_fraction, shape.block_size)
    return Material(source.name, training, held_out, source.tokenizer, shape)


def _vocabulary(settings: Settings, name: str, tokens: Tokens, tokenizer: Tokenizer | None) -> int:
    """The size of the vocabulary; DataError if only one strange token makes it large."""
    from tinygpt.text.tokens import largest

    size = tokenizer.vocab_size if tokenizer else largest(tokens) + 1
    if tokenizer is None and "vocab_size" not in settings.model and size > LARGEST_VOCAB:
        raise DataError(
            f"{name} has a token of number {size - 1:,}, and the model would need a row for "
            f"each below it. If that is right, say so: --vocab-size {size}"
        )
    return size


def foresee(shape: GPTConfig, settings: Settings, allow_memory: bool, timed: bool = True) -> None:
    """Say what a run will need; UsageError if it cannot fit in memory, unless that is allowed.

    The time is guessed from the pace of a product, if ``timed``; where that makes a long run, it
    follows from the time of the step's parts, for which they are compiled.
    """
    from tinygpt.training import preflight, probe

    train, given = settings.train, settings.data.init is not None
    estimate = preflight.check(shape, train, allow=allow_memory, given=given)
    say(f"memory: {estimate}")
    if not timed:
        return
    if not preflight.on_cpu():
        say("time: known when the first steps are done")
        return
    seconds = preflight.seconds_per_step(estimate, preflight.measured_rate())
    if seconds * train.max_iters > LONG:
        seconds = probe.seconds_per_step(shape, train)
    say(
        f"time: about {1000 * seconds:,.0f} ms a step, {estimate.tokens / seconds:,.0f} tokens/s, "
        f"{duration(seconds * train.max_iters)} for {train.max_iters:,} steps"
    )


def fit_batch(shape: GPTConfig, settings: Settings) -> Settings:
    """The settings with the largest micro-batch that fits in memory; UsageError if none does."""
    from tinygpt.files.disk import size
    from tinygpt.training.fitting import fit

    found = fit(shape, settings.train, given=settings.data.init is not None)
    say(
        f"batch: {found.train.batch_size:,} sequences at a time, {found.train.grad_accum_steps:,} "
        f"times a step: {size(found.taken)} at the peak when it was tried, {size(found.free)} free"
    )
    return replace(settings, train=found.train)


def make_run(
    settings: Settings,
    material: Material,
    folder: Path,
    resume: bool | Path = False,
    allow_change: Sequence[str] = (),
    beginning: Beginning | None = None,
    ranks: Alone | None = None,
) -> TrainingRun:
    """A run, ready to be iterated over; ``resume`` may be the checkpoint that it goes on from."""
    from tinygpt.runs.folder import list_checkpoints
    from tinygpt.runs.run import TrainingRun

    source = _lasting(settings.data, material.name)
    goes_on = isinstance(resume, Path) or bool(resume and list_checkpoints(folder))
    model, origin, trial = beginning or begin(settings, material, goes_on)
    if origin is not None:
        source = replace(source, init_sha256=origin["sha256"])
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
        trial=trial,
        ranks=ranks,
        exam=_exam(settings.data, material.tokenizer, goes_on),
    )


def _exam(data: DataConfig, tokenizer: Tokenizer | None, goes_on: bool) -> Exam | None:
    """The questions of --eval-chats; a run that goes on does without a file that is gone."""
    from tinygpt.cli.examining import read_tasks
    from tinygpt.generation.grading import Exam

    if data.eval_chats is None:
        return None
    path = user_path(data.eval_chats)
    if goes_on and not path.is_file():
        say(f"questions: {path} is no longer there, and none are asked")
        return None
    if tokenizer is None:
        raise UsageError("--eval-chats needs a vocabulary: give --tokenizer too.")
    exam = Exam(read_tasks(path), tokenizer)
    say(f"questions: {len(exam.tasks)} of {path}, asked at evaluations")
    return exam


def begin(settings: Settings, material: Material, goes_on: bool = False) -> Beginning:
    """The model of a run, with the weights of --init unless it ``goes_on`` from a checkpoint."""
    from tinygpt.api import GPT
    from tinygpt.runs import checkpoint

    source, seed = settings.data, settings.train.seed
    if source.init is None or goes_on:
        return Beginning(GPT(material.shape, seed))
    path, expected = _lasting(source, material.name).init, source.init_sha256
    assert path is not None
    rows = _new_rows(Path(path), material.tokenizer)
    model = GPT(material.shape, seed if rows else None)  # new rows begin with random values
    origin = checkpoint.start_from(path, model, rows)
    found = origin["sha256"]
    if expected not in (None, found):
        raise CheckpointError(
            f"{path} no longer holds the weights that this run begins with: their hash was "
            f"{expected}, and is {found}."
        )
    say(f"weights: {path}")
    return Beginning(model, origin)


def _new_rows(path: Path, tokenizer: Tokenizer | None) -> dict[int, Sequence[int]]:
    """The rows of tokens that the vocabulary of the weights in a checkpoint did not have."""
    from tinygpt.runs.checkpoint import read_meta
    from tinygpt.text.chat.markers import new_rows
    from tinygpt.text.tokenizers import tokenizer_from_dict

    described = read_meta(path).tokenizer
    return new_rows(None if described is None else tokenizer_from_dict(described), tokenizer)


def say_material(material: Material) -> None:
    """Say what a run learns from."""
    from tinygpt.text.chat.packing import Conversations, report
    from tinygpt.text.mix import Mix

    vocabulary, held_out, shape = material.tokenizer, material.held_out, material.shape
    kind = (
        f"{vocabulary.kind} of {vocabulary.vocab_size:,}"
        if vocabulary
        else f"{shape.vocab_size:,} ids"
    )
    held = f"{len(held_out):,} for validation" if held_out is not None else "no validation"
    say(f"tokens: {len(material.training):,} for training, {held} ({kind})")
    parts = material.training.parts if isinstance(material.training, Mix) else [material.training]
    for part in parts:
        if isinstance(part, Conversations):
            for line in report(part, shape.block_size):
                say(line)


def say_mix(material: Material, train: TrainConfig) -> None:
    """Say how often a run reads each source of a mix."""
    from tinygpt.text.mix import Mix

    mix = material.training
    if not isinstance(mix, Mix):
        return
    rows = train.max_iters * train.batch_size * train.grad_accum_steps
    epochs = mix.epochs(rows, material.shape.block_size)
    for name, share in mix.shares.items():
        again = (
            "; it begins anew, in another order, each time it runs out" if epochs[name] > 1 else ""
        )
        say(
            f"mix: {float(share):.4g} of {name}, {len(mix.sources[name]):,} tokens, which are read "
            f"{epochs[name]:.3g} times{again}"
        )


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


def read_source(
    settings: Settings, own: Tokenizer | None = None, corpus: Corpus | None = None
) -> Source:
    """The tokens of a source, with the tokenizer that the run has already, if any.

    The source is the ``corpus`` if it is open already.
    """
    from tinygpt.text import sources
    from tinygpt.text.chat.markers import marked
    from tinygpt.text.tokenizers import END, MARKERS, make_tokenizer

    data, tokenizer = settings.data, own
    source, spec = str(data.source), data.tokenizer
    found: dict[str, Corpus | None] = {source: corpus}
    if corpus is None:
        found = sources.opened(source, data.field, data.glob, data.separator)
    if tokenizer is None and spec is None:
        tokenizer = sources.tokenizer_in(found)
    if tokenizer is None and not any(found.values()):
        tokenizer = None if spec is None else ready_tokenizer(spec)
    elif tokenizer is None:
        merges = spec is None or spec.startswith("bpe")  # not of words that are only held out
        share = 1 - data.val_fraction if merges else 1.0
        specials = sources.specials_for(found.values())
        if data.markers:
            specials = (END, *MARKERS)
        tokenizer = make_tokenizer(spec, sources.text_to_learn(found, share), specials)
        tokenizer = marked(tokenizer) if data.markers else tokenizer
    tokenizer = sources.with_template_for(tokenizer, found.values())
    size = tokenizer.vocab_size if tokenizer else settings.model.get("vocab_size")
    tokens = sources.read_tokens(source, found, tokenizer, size, data.glob)
    name = sources.name_of(source, found)
    return Source(name, tokens, tokenizer, _vocabulary(settings, name, tokens, tokenizer))


def _lasting(data: DataConfig, chosen: str) -> DataConfig:
    """What was used, so that it is found again: ``auto`` is what it chose, paths are absolute."""
    from tinygpt.text import corpus, sources, tokenizers
    from tinygpt.text.mix_shares import is_mix

    values = data.to_dict()
    if values["source"] == "auto":
        values["source"] = chosen
    if is_mix(str(values["source"])):
        mix = sources.lasting_mix(values["source"], lambda name: lasting(name, corpus.NAMES))
        values["source"] = mix
    for name, known in (
        ("source", corpus.NAMES),
        ("tokenizer", tokenizers.NAMES),
        ("init", ()),
        ("eval_chats", ()),
    ):
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
