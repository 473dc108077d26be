"""``tinygpt chat``: a conversation with a model, in a terminal or line by line through a pipe."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from tinygpt.cli.console import command, emit, program_name, say
from tinygpt.cli.flags import Count
from tinygpt.cli.loading import LoadingFlags, load_model
from tinygpt.cli.newest import run_or_newest
from tinygpt.cli.options import flags
from tinygpt.cli.slash import HELP, obey
from tinygpt.config import MAX_CHAT_TOKENS, SampleConfig
from tinygpt.errors import DataError, StreamError, TinyGPTError
from tinygpt.runs.interrupts import interrupt, receiving

if TYPE_CHECKING:
    from tinygpt.generation.dialogue import Answer, Dialogue
    from tinygpt.text.tokenizers import Tokenizer

    SampleFlags = dict[str, Any]
else:
    SampleFlags = flags(SampleConfig, "Sampling")

PROMPT = "> "
BOLD = "\x01\x1b[1m\x02{}\x01\x1b[0m\x02"
"""Readline does not count what stands between \\x01 and \\x02 as columns."""


def chat(
    run: Path | None = None,
    /,
    *,
    system: Annotated[str, Parameter(allow_leading_hyphen=True)] = "",
    max_tokens: Count = MAX_CHAT_TOKENS,
    sample: Annotated[SampleFlags | None, Parameter(name="*")] = None,
    seed: int | None = None,
    stop: Annotated[list[str] | None, Parameter(negative=(), allow_leading_hyphen=True)] = None,
    loading: Annotated[LoadingFlags | None, Parameter(name="*")] = None,
) -> int:
    """Talk with a model: a question a line, and its answer as it is written.

    The model is given the talk so far, as much as its window holds: the oldest turns leave first.
    Ctrl-C stops an answer, Ctrl-D ends the talk, and /help lists commands such as /undo and /retry.
    Where stdin is a file or a pipe, each of its lines is a question.

    Parameters
    ----------
    run
        Run folder, of which the best checkpoint is taken, or a checkpoint. [default: the newest
        run in runs/]
    system
        What the model is told before the first question.
    max_tokens
        Most tokens of an answer.
    seed
        The same seed gives the same answers to the same questions. [default: another one each time]
    stop
        End an answer before this string; may be given several times.
    """
    config = SampleConfig.from_dict(dict(sample or {}))
    folder = run_or_newest(run)
    model, own = load_model(folder, **(loading or {}))
    _say_of_template(own)
    from tinygpt.generation.dialogue import Dialogue

    dialogue = Dialogue(model.decoder, own, config, max_tokens, seed, stop or [], system)
    if sys.stdin.isatty():
        say(f"Ask, and press Enter. {HELP}")
        return _talk(dialogue)
    return _answer_lines(dialogue)


def _say_of_template(tokenizer: Tokenizer) -> None:
    from tinygpt.text.chat.template import template_of

    if template_of(tokenizer) is None:
        say(
            "This model has no chat template: it was not made for conversations. It is given them "
            "as plain text, User: and Assistant:, and may go on with anything. To make one that "
            f"answers, train on conversations: {command('train', 'CHATS.jsonl')}"
        )


# ---- in a terminal ----


def _talk(dialogue: Dialogue) -> int:
    """One question after another, until Ctrl-D."""
    prompt = _prompt()
    while True:
        try:
            line = _asked(prompt)
        except KeyboardInterrupt:
            say("\nCtrl-D or /exit ends the talk.")
        except EOFError:
            say("")
            return 0
        else:
            try:
                _one(dialogue, line)
            except EOFError:
                return 0


def _prompt() -> str:
    """Loads readline, where Python has it, for arrow keys and earlier lines; -> the prompt."""
    with contextlib.suppress(ImportError):
        import readline

        plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") in (None, "", "dumb")
        if sys.stdout.isatty() and not plain and "libedit" not in (readline.__doc__ or ""):
            return BOLD.format(PROMPT)
    return PROMPT


def _asked(prompt: str) -> str:
    """The next line. Where stdout goes elsewhere, the prompt does not belong there."""
    if sys.stdout.isatty():
        return input(prompt)
    print(PROMPT, end="", file=sys.stderr, flush=True)
    return input()


# ---- through a pipe ----


def _answer_lines(dialogue: Dialogue) -> int:
    """A question from each line of stdin; -> 1 if one of them could not be answered."""
    failed = False
    while True:
        try:
            failed |= not _one(dialogue, input())
        except EOFError:
            return int(failed)
        except UnicodeDecodeError as error:
            raise DataError(f"The questions on stdin are not UTF-8: {error}.") from error


# ---- both ----


def _one(dialogue: Dialogue, line: str) -> bool:
    """Answer a question or obey a command; -> whether that went well. An empty line is none."""
    line = line.rstrip("\r")
    try:
        if line.strip():
            command_of = line.startswith("/") and not line.startswith("//")
            pieces = obey(dialogue, line) if command_of else dialogue.say(line.removeprefix("/"))
            if pieces is not None:
                _write(dialogue, pieces)
    except StreamError:  # nobody hears the next answer either
        raise
    except TinyGPTError as error:
        say(f"{program_name()}: error: {error}")
        return False
    return True


def _write(dialogue: Dialogue, pieces: Answer) -> None:
    """Show an answer as it comes; Ctrl-C stops it, and once more ends the program."""
    if dialogue.remark:
        say(dialogue.remark)
    before, last = len(dialogue.said), "\n"
    with _interruptible() as received, contextlib.closing(pieces):
        for last in pieces:
            emit(last)
            if received:
                break
    if not last.endswith("\n") or len(dialogue.said) > before:
        emit("\n")
    if received:
        say("stopped; what was written stays in the talk")
    if len(dialogue.said) == before:
        say("The answer is empty, so the question is not kept in the talk.")


@contextlib.contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Yields a list for the Ctrl-C that arrives, which no step of the model is broken off by."""
    received: list[int] = []

    def receive(number: int) -> None:
        if received:
            interrupt(number)
        received.append(number)

    is_ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    with receiving([] if is_ignored else [signal.SIGINT], receive):
        yield received
