"""``tinygpt generate`` and ``tinygpt eval``: what a trained model writes, and how well it reads."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from tinygpt import runtime
from tinygpt.cli.console import aligned, command, finite, say, show_json
from tinygpt.cli.options import DataConfig, SampleFlags, file_tables
from tinygpt.config import SampleConfig
from tinygpt.display.text import printable
from tinygpt.errors import DataError, UsageError
from tinygpt.metrics import bits_per_byte, perplexity

if TYPE_CHECKING:
    from tinygpt.api import GPT
    from tinygpt.data import Tokens
    from tinygpt.tokenizers import Tokenizer

BATCH_SIZE = 16
"""Sequences evaluated at a time."""


def generate(
    run: Path,
    /,
    *,
    prompt: str | None = None,
    max_tokens: int = 200,
    sample: Annotated[SampleFlags | None, Parameter(name="*")] = None,
    seed: int | None = None,
    stop: Annotated[list[str] | None, Parameter(negative=())] = None,
    count: Annotated[int, Parameter(name=["--count", "-n"])] = 1,
    interactive: Annotated[bool, Parameter(name=["--interactive", "-i"], negative=())] = False,
    echo: bool = True,
    tokenizer: str | None = None,
    json: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Let a model continue a text, streamed as it is written.

    Parameters
    ----------
    run
        Run folder, of which the best checkpoint is taken, or a checkpoint.
    prompt
        Text to continue; - reads it from stdin. [default: a line break]
    max_tokens
        Most tokens to add.
    seed
        The same seed gives the same text. [default: another one each time]
    stop
        End before this string; may be given several times.
    count
        How many texts.
    interactive
        Ask for one prompt after another.
    echo
        Print the prompt before its continuation.
    tokenizer
        gpt2, byte or a saved tokenizer, for a checkpoint that holds none.
    json
        Print the texts as JSON when they are all there.
    """
    if count < 1:
        raise UsageError(f"--count {count} texts cannot be written: it must be at least 1.")
    if interactive and (prompt is not None or json):
        raise UsageError("-i asks for the prompts itself: leave --prompt and --json out.")
    config = SampleConfig.from_dict(dict(sample or {}))
    text = _prompt_text(prompt)
    writer = _Writer(run, tokenizer, config, max_tokens, seed, stop or [])
    if interactive:
        _converse(writer, echo, count)
    elif json:
        show_json(writer.collect(text, count))
    else:
        _stream(writer, text, echo, count)


def _prompt_text(prompt: str | None) -> str:
    if prompt is None:
        return "\n"
    if prompt == "-":
        try:
            prompt = sys.stdin.buffer.read().decode()
        except UnicodeDecodeError as error:
            raise DataError(f"The prompt on stdin is not UTF-8: {error}.") from error
    if not prompt:
        raise UsageError(
            "The prompt is empty, and a model needs something to continue. Leave --prompt out to "
            "start from a line break."
        )
    return prompt


class _Writer:
    """A loaded model with everything that is the same for all its texts."""

    def __init__(
        self,
        run: Path,
        tokenizer: str | None,
        config: SampleConfig,
        max_tokens: int,
        seed: int | None,
        stop: list[str],
    ) -> None:
        self.model, self.tokenizer = _load(run, tokenizer)
        self.config, self.max_tokens, self.seed, self.stop = config, max_tokens, seed, stop

    def pieces(self, prompt: str, number: int) -> Iterator[str]:
        """The pieces of one continuation; with a seed the number-th has a seed of its own."""
        from tinygpt.generate import generate_text

        return generate_text(
            self.model.decoder,
            self.tokenizer,
            prompt,
            self.max_tokens,
            self.config,
            None if self.seed is None else self.seed + number,
            self.stop,
        )

    def collect(self, prompt: str, count: int) -> dict[str, Any]:
        texts = ["".join(self.pieces(prompt, number)) for number in range(count)]
        return {"prompt": prompt, "seed": self.seed, "texts": texts}


def _load(run: Path, tokenizer: str | None) -> tuple[GPT, Tokenizer]:
    from tinygpt.api import load
    from tinygpt.tokenizers import make_tokenizer

    runtime.require_device()
    model, own = load(run)
    if tokenizer is not None:
        return model, make_tokenizer(tokenizer, lambda: _no_text(tokenizer))
    if own is None:
        raise UsageError(
            f"{run} holds no tokenizer. Name the one its tokens were made with: --tokenizer gpt2, "
            f"byte, or the path of a saved one."
        )
    return model, own


def _no_text(spec: str) -> list[str]:
    raise UsageError(
        f"--tokenizer {spec} would have to be trained. Give gpt2, byte or a saved one."
    )


def _stream(writer: _Writer, prompt: str, echo: bool, count: int) -> None:
    for number in range(count):
        if number:
            _emit(f"\n{'-' * 20}\n")
        pieces = writer.pieces(prompt, number)
        if echo:
            _emit(prompt)
        for piece in pieces:
            _emit(piece)
        _emit("\n")


def _emit(text: str) -> None:
    """Text on stdout at once; a terminal gets it without what it would obey."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def _converse(writer: _Writer, echo: bool, count: int) -> None:
    """One prompt after another until the end of the input; Ctrl-C ends a text, then the talk."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # arrow keys and history in input()
    asking = sys.stdin.isatty()
    if asking:
        say("Write a prompt and press Enter; Ctrl-D ends.")
    while True:
        try:
            prompt = input("> " if asking else "")
        except EOFError:
            return
        if prompt:
            try:
                _stream(writer, prompt, echo, count)
            except KeyboardInterrupt:
                _emit("\n")


def evaluate(
    run: Path,
    /,
    *,
    data: str | None = None,
    field: str = DataConfig.field,
    glob: str = DataConfig.glob,
    batch_size: int = BATCH_SIZE,
    tokenizer: str | None = None,
    json: Annotated[bool, Parameter(negative=())] = False,
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
    model, own = _load(run, tokenizer)
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
    evaluate_batch = make_evaluate(model)
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
