"""``tinygpt train --minutes``: settings from a text, this machine's pace and the time there is."""

from __future__ import annotations

import itertools
import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from tinygpt.cli.console import say
from tinygpt.cli.options import Settings, Tables, Values, preset_tables, resolve
from tinygpt.cli.running import (
    Beginning,
    Material,
    Source,
    begin,
    foresee,
    gather,
    open_text,
    read_source,
    say_material,
)
from tinygpt.config import PRESETS, GPTConfig, TrainConfig
from tinygpt.errors import UsageError, nearest
from tinygpt.machine import resources
from tinygpt.runs.display.text import duration

if TYPE_CHECKING:
    from tinygpt.text.chat.conversations import Messages
    from tinygpt.text.corpus import Corpus
    from tinygpt.text.tokenizers import Tokenizer
    from tinygpt.training.budget import Pace, Text, Vocabulary

USUAL = "5"
"""Minutes of a run that nothing else is said of."""
UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}
LONGEST = 100 * 24 * UNITS["h"]
NUMBER = r"(\d+(?:\.\d*)?|\.\d+)"
SAMPLE = 1 << 20
"""Characters of a text, at its beginning, that vocabularies are compared on."""
MERGES = (512, 1024, 2048, 4096, 8192)
"""Sizes of the BPE vocabularies to choose from."""
ENTRY = 300
"""Bytes that a text must have for each byte pair: others mean nothing in texts that are new."""
LOOKED_AT = 10_000
"""Conversations, at the beginning, that settings are chosen by."""
WORD = 24
"""Characters of an answer that is short, on the average."""
LONGEST_BLOCK = 512
"""The longest block that is chosen for conversations."""
TOKENIZING, TIMING, STEPPING = 0.1, 0.03, 0.75
"""Shares of the time: for making tokens, at most; for timing; for steps at a product's pace."""
SLOWER = 1.7
"""A plan whose steps take so many times as long as expected is made again."""
STARTING = 20.0
"""A process that is so many seconds older has done something else before."""
WATCHED = 0.5
"""Seconds for which the pace of a product is watched."""
OPENING = 3.0
"""Seconds, about, until the first step is compiled."""


# What was asked for -----------------------------------------------------------------------------


def seconds_of(text: str) -> float:
    """The seconds in ``10``, which are minutes, ``30s``, ``2h`` or ``1h30m``; else a UsageError.

    >>> seconds_of("10"), seconds_of("1h30m")
    (600.0, 5400.0)
    """
    words = re.sub(r"\s+", "", text.lower())
    words = re.sub(r"(?<=[\d.])(hours?|hrs?|minutes?|mins?|seconds?|secs?)", _letter, words)
    if re.fullmatch(NUMBER, words):
        words += "m"
    parts = re.findall(f"{NUMBER}([hms])", words)
    if not parts or "".join(itertools.chain(*parts)) != words:
        raise UsageError(f"--minutes {text!r} is {_wrong(words)}. {WANTED}")
    total = sum(float(number) * UNITS[unit] for number, unit in parts)
    if total <= 0:
        raise UsageError(f"--minutes {text!r} is no time at all. {WANTED}")
    if total > LONGEST:
        raise UsageError(f"--minutes {text!r} is more than 100 days, the most that can be planned.")
    return total


WANTED = "Give minutes, such as 10, or 30s, 2h, 1h30m."


def _letter(match: re.Match[str]) -> str:
    return match[1][0]


def _wrong(words: str) -> str:
    if words.startswith("-"):
        return "less than nothing"
    if not re.search(r"\d", words):
        return "without a number"
    return "not a number and a unit (s, m or h)"


def asked(
    minutes: str | None, size: str | None, settled: Sequence[str], steps: Any, resume: bool
) -> Budget | None:
    """What --minutes and --size say; None where something else decides how long a run lasts.

    ``settled`` are the flags that say what to train, ``steps`` is what --max-iters says.
    """
    if resume and (minutes or size):
        raise UsageError(
            f"{'--minutes' if minutes else '--size'} is for a run that begins: the shape and the "
            f"steps of one that goes on are fixed. For more steps give --max-iters N "
            f"--allow-change max_iters."
        )
    if size and settled:
        raise UsageError(f"--size and {settled[0]} both say how large the model is. Give one.")
    if steps is not None and (minutes or size):
        raise UsageError(
            f"--max-iters {steps} and {f'--minutes {minutes}' if minutes else f'--size {size}'} "
            f"contradict each other: the steps are chosen for the time there is. Give one."
        )
    shape = None if size is None else _shape(size)
    if minutes is None and (resume or settled or steps is not None):
        return None
    seconds = seconds_of(USUAL if minutes is None else minutes)
    began = time.monotonic() - min(resources.process_age(), STARTING)
    return Budget(seconds, minutes, shape, not settled, began)


class Budget(NamedTuple):
    """The time there is."""

    seconds: float
    """From the start of the process to its end."""
    given: str | None
    """How it was given; None for the default."""
    size: int | dict[str, Any] | None
    """Parameters, or a preset's shape, if the model's size was given."""
    whole: bool
    """Whether everything is to be chosen; else a preset, a file or weights say what to train."""
    began: float
    """When its time began, by ``time.monotonic``."""

    @property
    def left(self) -> float:
        """Seconds from now on."""
        return self.seconds - (time.monotonic() - self.began)


def _shape(size: str) -> int | dict[str, Any]:
    """``800k``, ``3M``, ``1.5B``, ``800000`` as a number; the name of a preset as its shape."""
    if size in PRESETS:
        return preset_tables(size)["model"]
    if match := re.fullmatch(rf"{NUMBER}([kmb]?)", size.lower()):
        count = float(match[1]) * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9}[match[2]]
        if count >= 1000:
            return int(count)
        raise UsageError(f"--size {size} is a model of {count:g} parameters. Try 800k or 3M.")
    raise UsageError(
        f"--size {size!r} is no number of parameters and no preset.{nearest(size, list(PRESETS))} "
        f"Give one such as 800k or 3M, or the shape of {', '.join(PRESETS)}."
    )


# What the text is -------------------------------------------------------------------------------


def figures(
    settings: Settings, corpus: Corpus | Source, own: Tokenizer | None, seconds: float
) -> Text:
    """What the rule must know of a text, or of tokens that were read.

    Vocabularies with which making the tokens would take too much of ``seconds`` are left out.
    """
    from tinygpt.text.sources import specials_for
    from tinygpt.text.tokenizers import ByteTokenizer, make_tokenizer
    from tinygpt.training.budget import Text

    data = settings.data
    if isinstance(corpus, Source):
        found = {data.tokenizer: _of_tokens(settings, corpus)}
        total = int(len(corpus.tokens) * found[data.tokenizer].bytes_per_token)
    else:
        sample, total = _beginning_of(corpus)
        share, specials = len(sample.encode()) / total, specials_for([corpus])
        short = corpus.conversations is not None and _are_short(corpus.conversations())
        if own is not None or data.tokenizer is not None:
            known = own or make_tokenizer(data.tokenizer, lambda: [sample], specials)
            found = {data.tokenizer: _seen(known, sample)}
        elif short:  # what is copied or computed is so sign by sign
            found = {"byte": _seen(ByteTokenizer(specials), sample)}
        else:
            found = _measured(sample, total, TOKENIZING * seconds * share, specials)
    held_out = int(total * data.val_fraction)
    return Text(total - held_out, held_out, found)


def _of_tokens(settings: Settings, source: Source) -> Vocabulary:
    """The vocabulary of tokens; where their bytes are not known, they grow with its size."""
    from tinygpt.text.tokens import bytes_per_token
    from tinygpt.training.budget import Vocabulary

    size = max(source.vocab_size, settings.model.get("vocab_size", 0))
    known = bytes_per_token(source.tokens, source.tokenizer) if source.tokenizer else None
    return Vocabulary(size, known or max(1.0, math.log2(size) / 4))


def _are_short(conversations: Iterator[Messages]) -> bool:
    """Whether the answers are mostly a word or a number."""
    first = itertools.islice(conversations, LOOKED_AT)
    sizes = [len(m["content"]) for c in first for m in c if m["role"] == "assistant"]
    return sum(sizes) <= WORD * len(sizes)


def _block_for(corpus: Corpus | Source, text: Text) -> int | None:
    """The block that 98 of 100 conversations fit in, a power of two; None for other texts."""
    if isinstance(corpus, Source) or corpus.conversations is None:
        return None
    per_token = min(vocabulary.bytes_per_token for vocabulary in text.vocabularies.values())
    first = itertools.islice(corpus.conversations(), LOOKED_AT)
    sizes = sorted(sum(len(m["content"].encode()) / per_token + 2 for m in c) for c in first)
    longest = sizes[min(len(sizes) - 1, int(0.98 * len(sizes)))]
    return int(min(max(64, 2 ** math.ceil(math.log2(longest))), LONGEST_BLOCK))


def _beginning_of(corpus: Corpus) -> tuple[str, int]:
    """The first characters of a text, and how many bytes the whole of it has."""
    parts, length, total = list[str](), 0, 0
    for piece in corpus.pieces():
        if length < SAMPLE:
            parts.append(piece[: SAMPLE - length])
            length += len(parts[-1])
        elif corpus.size is not None:  # the files tell: no need to read on
            return "".join(parts), corpus.size
        total += len(piece.encode())
    return "".join(parts), total


def _seen(tokenizer: Tokenizer, sample: str) -> Vocabulary:
    """What the rule must know of a vocabulary, on a part of the text."""
    from tinygpt.training.budget import Vocabulary

    return Vocabulary(tokenizer.vocab_size, len(sample.encode()) / len(tokenizer.encode(sample)))


def _measured(
    sample: str, total: int, most: float, specials: Sequence[str]
) -> dict[str | None, Vocabulary]:
    """The vocabularies to choose from for a text of ``total`` bytes: bytes, and byte pairs.

    Byte pairs are left out if it takes more than ``most`` seconds to learn and apply them.
    """
    from tinygpt.text.tokenizers import BPETokenizer, ByteTokenizer

    found: dict[str | None, Vocabulary] = {"byte": _seen(ByteTokenizer(specials), sample)}
    sizes = [size for size in MERGES if size * ENTRY <= total]
    if sizes:
        began = time.perf_counter()
        largest = BPETokenizer.train(sample, sizes[-1], specials)
        found[f"bpe:{sizes[-1]}"] = _seen(largest, sample)
        if time.perf_counter() - began > most:
            return {"byte": found["byte"]}
        merges = list(largest.ranks)[256:]
        for size in sizes[:-1]:
            smaller = BPETokenizer.from_merges(merges[: size - 256 - len(specials)])
            found[f"bpe:{size}"] = _seen(smaller.with_specials(specials), sample)
    return found


# The plan ---------------------------------------------------------------------------------------


class Planned(NamedTuple):
    """A run whose steps are fixed, and what it is made of."""

    settings: Settings
    material: Material
    beginning: Beginning


def plan(
    budget: Budget, settings: Settings, own: Tokenizer | None, flags: Tables, allow_memory: bool
) -> Planned:
    """Choose what ``flags`` leave open, measure the pace of that, and fix the steps.

    A machine on which steps take far longer than expected, since it has other work or is unlike
    those that the rule was fitted on, gets a second plan, with what was measured.
    """
    from tinygpt.training.budget import fix_steps
    from tinygpt.training.preflight import measured_rate

    corpus = open_text(settings.data) or read_source(settings, own)
    if not budget.whole:
        ready = _try(budget, settings, own, corpus, allow_memory)
    else:
        rate = measured_rate(WATCHED)
        chosen, expected = _chosen(budget, settings, corpus, own, flags["train"], rate)
        ready = _try(budget, chosen, own, corpus, allow_memory)
        if (slower := ready.pace.step / expected) > SLOWER:
            known, own = replace(settings, data=chosen.data), ready.material.tokenizer
            again, _ = _chosen(budget, known, corpus, own, flags["train"], rate / slower)
            if again != chosen:
                say(f"steps take {slower:.1f} times as long as expected: planned again")
                ready = _try(budget, again, own, corpus, allow_memory)
    settings, material, beginning, pace = ready
    fixed = fix_steps(
        material.shape,
        settings.train,
        pace,
        budget.seconds,
        budget.seconds - budget.left,
        len(material.training),
        flags["train"].get("eval_interval"),
    )
    if not budget.whole:  # the warm-up of a preset, a file or fine-tuning, in proportion
        share = settings.train.warmup_steps / settings.train.max_iters
        fixed["warmup_steps"] = round(share * fixed["max_iters"])
    train = TrainConfig.from_dict({**settings.train.to_dict(), **fixed, **flags["train"]})
    lines = list(_reasons(budget, material, train, pace, flags))
    for line in lines:
        say(line)
    data = replace(settings.data, plan="; ".join(lines))
    return Planned(Settings(settings.model, train, data), material, beginning)


class _Ready(NamedTuple):
    """What could run, and its pace."""

    settings: Settings
    material: Material
    beginning: Beginning
    pace: Pace


def _try(
    budget: Budget,
    settings: Settings,
    own: Tokenizer | None,
    corpus: Corpus | Source,
    allow_memory: bool,
) -> _Ready:
    """Make the tokens and the model that the settings say, and time its steps."""
    from tinygpt.runs.trial import Trial

    material = gather(settings, own, corpus)
    foresee(material.shape, settings, allow_memory, timed=False)
    say_material(material)
    beginning = begin(settings, material)
    trial = Trial(beginning.model, settings.train)
    pace = trial.pace(material.training, TIMING * budget.seconds)
    return _Ready(settings, material, beginning._replace(trial=trial), pace)


def _chosen(
    budget: Budget,
    settings: Settings,
    corpus: Corpus | Source,
    own: Tokenizer | None,
    flags: Values,
    rate: float,
) -> tuple[Settings, float]:
    """The settings with the best vocabulary, shape and recipe, and the seconds of their steps.

    What was given is kept; ``rate`` is as for `budget.choose`.
    """
    from tinygpt.training.budget import choose, ladder, sized

    text = figures(settings, corpus, own, budget.seconds)
    shapes: list[Values] = list(ladder(settings.model))
    if isinstance(budget.size, dict):
        shapes = [budget.size]
    elif budget.size is not None:
        shapes = [sized(budget.size, shapes)]
    if "block_size" not in settings.model and (block := _block_for(corpus, text)):
        settings = replace(settings, model={**settings.model, "block_size": block})
        shapes = [{**shape, "block_size": block} for shape in shapes]
    seconds = max(1.0, STEPPING * budget.left - OPENING)
    best = choose(text, rate, seconds, settings.model, flags, shapes)
    data = settings.data
    if data.tokenizer is None and own is None:
        data = replace(data, tokenizer=best.tokenizer)
    tables = {"model": best.model, "train": {**best.train, "max_iters": 10**9}}
    given = {"model": dict(settings.model), "train": dict(flags), "data": data.to_dict()}
    return resolve(tables, given), best.step


def _reasons(
    budget: Budget, material: Material, train: TrainConfig, pace: Pace, given: Tables
) -> Iterator[str]:
    """What was chosen, and why: at most five lines. What was ``given`` needs no reason."""
    from tinygpt.training.budget import MAX_EPOCHS

    shape = material.shape
    rows = train.batch_size * train.grad_accum_steps
    epochs = train.max_iters * rows * shape.block_size / len(material.training)
    usual = "" if budget.given else " (--minutes gives another)"
    yield (
        f"plan: {duration(budget.seconds)}{usual}, of which {budget.seconds - budget.left:.0f} s "
        f"are gone; {rows * shape.block_size / pace.step:,.0f} tokens/s measured, "
        f"{1000 * pace.step:,.0f} ms a step"
    )
    if budget.whole:
        yield _vocabulary_reason(material, "tokenizer" in given["data"])
        fixed = budget.size is not None or {"n_layer", "n_embd"} & given["model"].keys()
        yield _model_reason(shape, "" if fixed else "learn" if epochs > 4 else "read")
    end = " and ends early: it would only learn it by heart" if epochs > MAX_EPOCHS - 1 else ""
    yield (
        f"steps: {train.max_iters:,} of {rows} x {shape.block_size} tokens, which reads the text "
        f"{epochs:.3g} times{end}; evaluated every {train.eval_interval:,}"
    )
    muon = f"{train.muon_learning_rate:g} (Muon) and " if train.optimizer == "muon" else ""
    yield (
        f"rates: {muon}{train.learning_rate:g} (Adam), warm-up over {train.warmup_steps} steps; "
        f"dropout {shape.dropout:g} for a text that is read {epochs:.3g} times"
    )


def _vocabulary_reason(material: Material, given: bool) -> str:
    from tinygpt.text.chat.packing import Conversations

    kind = material.tokenizer.kind if material.tokenizer else "ids"
    given = given or material.tokenizer is None
    why = "rarer words mean nothing in a text that is new"
    if given:
        why = "as given"
    elif kind == "byte" and isinstance(material.training, Conversations):
        why = "answers are short, and what is copied or computed is so sign by sign"
    return f"vocabulary: {kind} of {material.shape.vocab_size:,}, {why}"


def _model_reason(shape: GPTConfig, limit: str) -> str:
    """``limit``: what keeps the model from being larger, if it was chosen."""
    more = {
        "learn": ": a larger one would learn this text by heart",
        "read": ": a larger one would read too little in this time, a smaller one learn too little",
        "": ", as given",
    }
    return (
        f"model: {shape.n_layer} layers, {shape.n_embd} wide, {shape.n_head} heads, block "
        f"{shape.block_size}, {shape.num_params():,} parameters{more[limit]}"
    )
