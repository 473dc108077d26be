"""``tinygpt memorization``: how much of what a model writes it has by heart."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from tinygpt.cli.console import aligned, command, say, show_json
from tinygpt.cli.flags import Count, Switch
from tinygpt.cli.loading import load_model, own_source, read_tokens, unlike_training
from tinygpt.cli.newest import run_or_newest
from tinygpt.cli.options import DataConfig
from tinygpt.config import MAX_TOKENS, SampleConfig
from tinygpt.errors import DataError, TokenizerError, UsageError
from tinygpt.runs.display.text import printable
from tinygpt.untrusted import clip

if TYPE_CHECKING:
    from tinygpt.text.overlap import Overlap
    from tinygpt.text.tokenizers import Tokenizer
    from tinygpt.text.tokens import Tokens

TEMPERATURES = (0.0, 0.5, 0.8, 1.0)
SPAN = 1 << 16
"""Tokens that become text at a time."""
SHOWN = 100
"""Characters of a passage that are printed."""


def memorization(
    run: Path | None = None,
    /,
    *,
    data: str | None = None,
    field: str | None = None,
    glob: str | None = None,
    val_fraction: float | None = None,
    temperature: Annotated[
        list[float] | None, Parameter(negative=(), consume_multiple=True)
    ] = None,
    samples: Count = 10,
    max_tokens: Count = MAX_TOKENS,
    prompt: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    seed: int = 1,
    ignore_eos: Switch = False,
    min_length: Count = 50,
    show: int = 3,
    tokenizer: str | None = None,
    json: Switch = False,
) -> None:
    """Look for passages of the training text in what a model writes.

    Every sample is searched for passages that stand in the training text word for word. As any text
    shares some with another of its kind, the text that was held out from training is searched in
    the same way: a model that shares much more than that writes by heart.

    Parameters
    ----------
    run
        Run folder, of which the best checkpoint is taken, or a checkpoint. [default: the newest
        run in runs/]
    data
        The text it was trained on, with its validation part at the end: a text file, folder, JSONL
        or token file. [default: the run's own]
    field
        Field of a JSONL file that holds the text.
    glob
        Files of a folder that are read.
    val_fraction
        Share of the text, at its end, that was held out; 0 if none was. [default: the run's own]
    temperature
        Temperatures to write at. [default: 0 0.5 0.8 1]
    samples
        Texts for each temperature; one at temperature 0, where all would be the same.
    max_tokens
        Tokens of each text.
    prompt
        What every text begins with; it does not count. [default: a line break, if there is one]
    seed
        The same seed gives the same texts.
    ignore_eos
        Go on behind the token that ends a text, which the tokenizer or --tokenizer knows.
    min_length
        Characters from which on a passage counts as by heart.
    show
        Passages to print for each temperature.
    tokenizer
        gpt2, byte or a saved tokenizer, for a checkpoint that holds none.
    json
        Print the result as JSON.
    """
    run = run_or_newest(run)
    import numpy as np

    from tinygpt.generation.generate import FINISHED, generate_tokens
    from tinygpt.generation.stream import first_prompt
    from tinygpt.text.batches import split
    from tinygpt.text.overlap import overlaps
    from tinygpt.text.tokenizers import ends_of

    temperatures = list(TEMPERATURES if temperature is None else temperature)
    configs = [SampleConfig(temperature=t) for t in temperatures]
    model, own = load_model(run, tokenizer=tokenizer)
    source = _source(run, data, field, glob, val_fraction)
    name, tokens = read_tokens(source, model, own)
    training, held_out = split(tokens, source.val_fraction, model.config.block_size)
    name += unlike_training(run, "train", training) if data is None else ""
    say(f"writing {samples} texts at each temperature")
    prompt = first_prompt(own) if prompt is None else prompt
    ends = () if ignore_eos else ends_of(own)
    ids = _encoded(own, prompt)

    def write(config: SampleConfig) -> list[str]:
        """The continuations of the prompt, without it and without the ids that end a text."""
        count = samples if config.temperature else 1  # at 0 all would be the same
        limit, decoder = own.vocab_size, model.decoder
        steps = generate_tokens(
            decoder, [ids] * count, max_tokens, config, seed, limit=limit, ends=ends
        )
        rows = np.stack(list(steps), axis=1)  # (samples, tokens)
        kept = ([i for i in row.tolist() if i != FINISHED and i not in ends] for row in rows)
        return [own.decode(row) for row in kept]

    groups = [write(config) for config in configs]
    length = max((len(text) for group in groups for text in group), default=0)
    if held_out is not None:
        groups.append(_spread("".join(texts(held_out, own)), samples, length))
    say(f"searching {name}")
    found = overlaps(groups, texts(training, own), min_length, show)
    baseline = found.pop() if held_out is not None else None
    if json:
        show_json(
            {
                "data": name,
                "training_tokens": len(training),
                "prompt": prompt,
                "seed": seed,
                "max_tokens": max_tokens,
                "ignore_eos": ignore_eos,
                "min_length": min_length,
                "temperatures": [
                    {"temperature": t, **each.to_dict()}
                    for t, each in zip(temperatures, found, strict=True)
                ],
                "held_out": None if baseline is None else baseline.to_dict(),
            }
        )
    else:
        _report(temperatures, found, baseline, min_length)


def _source(
    run: Path, data: str | None, field: str | None, glob: str | None, fraction: float | None
) -> DataConfig:
    """The text a run was trained on, and how much of it was held out."""
    values = own_source(run).to_dict()
    given = {"source": data, "field": field, "glob": glob, "val_fraction": fraction}
    values |= {name: value for name, value in given.items() if value is not None}
    if values["source"] is None:
        raise UsageError(
            f"{run} does not say what it was trained on. Give the text: "
            f"{command('memorization', run, '--data', 'TEXT.txt')}"
        )
    return DataConfig.from_dict(values)


def texts(tokens: Tokens, tokenizer: Tokenizer) -> Iterator[str]:
    """The text that tokens spell, in pieces."""
    import numpy as np

    from tinygpt.text.tokenizers import special_of

    special = set(special_of(tokenizer).values())
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for start in range(0, len(tokens), SPAN):
        span = np.asarray(tokens[start : start + SPAN]).tolist()
        yield decoder.decode(tokenizer.decode_bytes([i for i in span if i not in special]))
    yield decoder.decode(b"", final=True)


def _encoded(tokenizer: Tokenizer, prompt: str) -> list[int]:
    try:
        ids = tokenizer.encode(prompt)
    except TokenizerError as error:
        raise UsageError(f"{error} Give another --prompt.") from error
    if not ids:
        raise UsageError("The prompt is empty, and a model needs something to continue.")
    return ids


def _spread(text: str, count: int, length: int) -> list[str]:
    """So many stretches of a text, evenly spread."""
    if not text:
        raise DataError("The held-out part of the text spells nothing.")
    room = max(0, len(text) - length)
    starts = sorted({room * i // max(1, count - 1) for i in range(count)})
    return [text[start : start + length] for start in starts]


def _report(
    temperatures: Sequence[float], found: Sequence[Overlap], baseline: Overlap | None, length: int
) -> None:
    heads = ("", "texts", "characters", "longest", "mean longest", f"in passages of {length}+")
    rows: list[Sequence[object]] = [heads]
    named = [(f"temperature {t:g}", each) for t, each in zip(temperatures, found, strict=True)]
    rows += [(name, *_row(each)) for name, each in named]
    rows.append(("held-out text", *(_row(baseline) if baseline else ("none",))))
    width = len(heads)
    print(aligned([(*row, *[""] * (width - len(row))) for row in rows], right=range(1, width)))
    for name, each in named:
        for passage in each.passages:
            print(
                f"\n{name}, text {passage.sample + 1}: {passage.length:,} characters, which stand "
                f"in the training text from character {passage.place:,} on:\n"
                f"  {printable(clip(passage.text, SHOWN))}"
            )
    if not any(each.passages for each in found):
        print(f"\nNo passage of {length} characters or more stands in the training text.")


def _row(found: Overlap) -> tuple[Any, ...]:
    return (
        found.samples,
        f"{found.characters:,}",
        f"{found.longest:,}",
        f"{found.mean_longest:.1f}",
        f"{found.covered:.1%}",
    )
