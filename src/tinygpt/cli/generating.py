"""``tinygpt generate``: what a trained model writes."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from tinygpt.cli.console import emit, program_name, read_stdin, say, show_json
from tinygpt.cli.flags import Count, Switch
from tinygpt.cli.loading import LoadingFlags, load_model
from tinygpt.cli.newest import run_or_newest
from tinygpt.cli.options import flags
from tinygpt.config import MAX_TOKENS, SampleConfig
from tinygpt.errors import StreamError, TinyGPTError, UsageError
from tinygpt.files.atomic import user_path
from tinygpt.runs.folder import named_checkpoint
from tinygpt.text.names import exists

if TYPE_CHECKING:
    SampleFlags = dict[str, Any]
else:
    SampleFlags = flags(SampleConfig, "Sampling")

Pieces = Callable[[str, int], Iterator[str]]
"""The pieces of a prompt's continuation, by the prompt and the number of the text."""


def generate(
    run: str | None = None,
    text: str | None = None,
    /,
    *,
    prompt: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    max_tokens: int = MAX_TOKENS,
    sample: Annotated[SampleFlags | None, Parameter(name="*")] = None,
    seed: int | None = None,
    stop: Annotated[list[str] | None, Parameter(negative=(), allow_leading_hyphen=True)] = None,
    ignore_eos: Switch = False,
    count: Annotated[Count, Parameter(name=["--count", "-n"])] = 1,
    interactive: Annotated[Switch, Parameter(name=["--interactive", "-i"])] = False,
    echo: bool = True,
    loading: Annotated[LoadingFlags | None, Parameter(name="*")] = None,
    json: Switch = False,
) -> None:
    """Let a model continue a text, streamed as it is written.

    Parameters
    ----------
    run
        Run folder, of which the best checkpoint is taken, or a checkpoint. A single word is the run
        if there is such a path, or if it has a slash and no blank; any other is the text to
        continue. [default: the newest run in runs/]
    text
        Text to continue; - reads it from stdin. [default: a line break, if the vocabulary has one]
    prompt
        The same as a flag: with it a single word is the run.
    max_tokens
        Most tokens to add.
    seed
        The same seed gives the same text. [default: another one each time]
    stop
        End before this string; may be given several times.
    ignore_eos
        Go on behind the token that ends a text, which the tokenizer or --tokenizer knows.
    count
        How many texts.
    interactive
        Ask for one prompt after another.
    echo
        Print the prompt before its continuation.
    json
        Print the texts as JSON when they are all there.
    """
    if interactive and (prompt is not None or json):
        raise UsageError("-i asks for the prompts itself: leave --prompt and --json out.")
    bare = text is None and prompt is None and not interactive
    if bare and run is not None and not _is_path(run):
        run, text = None, run
    if text is not None and (prompt is not None or interactive):
        raise UsageError(f"There are two prompts, or none is wanted: leave {text!r} out.")
    config = SampleConfig.from_dict(dict(sample or {}))
    text = _prompt_text(text if prompt is None else prompt)
    folder = run_or_newest(None if run is None else user_path(run))
    model, own = load_model(folder, **(loading or {}))
    from tinygpt.generation.stream import first_prompt, generate_text

    def pieces(prompt: str, number: int) -> Iterator[str]:
        """One continuation; each of several has a seed of its own."""
        own_seed = None if seed is None else seed + number
        return generate_text(
            model.decoder, own, prompt, max_tokens, config, own_seed, stop or [],
            ignore_eos=ignore_eos,
        )  # fmt: skip

    if interactive:
        _converse(pieces, echo, count)
        return
    if text is None:
        text = first_prompt(own)
    if json:
        texts = ["".join(pieces(text, number)) for number in range(count)]
        show_json({"prompt": text, "seed": seed, "texts": texts})
    else:
        _stream(pieces, text, echo, count)


def _is_path(word: str) -> bool:
    """Whether a single word names a run; a mistyped path must not become a prompt."""
    return exists(named_checkpoint(user_path(word))) or ("/" in word and not re.search(r"\s", word))


def _prompt_text(prompt: str | None) -> str | None:
    if prompt is None:
        return None
    if prompt == "-":
        prompt = read_stdin()
    if not prompt:
        raise UsageError("The prompt is empty. Leave --prompt out to start from a line break.")
    return prompt


def _stream(pieces: Pieces, prompt: str, echo: bool, count: int) -> None:
    for number in range(count):
        if number:
            emit(f"\n{'-' * 20}\n")
        continuation = pieces(prompt, number)
        if echo:
            emit(prompt)
        for piece in continuation:
            emit(piece)
        emit("\n")


def _converse(pieces: Pieces, echo: bool, count: int) -> None:
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
                _stream(pieces, prompt, echo, count)
            except KeyboardInterrupt:
                emit("\n")
            except StreamError:  # nobody hears the next text either
                raise
            except TinyGPTError as error:
                say(f"{program_name()}: error: {error}")
