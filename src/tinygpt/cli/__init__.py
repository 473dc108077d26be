"""The command line: one verb per command, and every error a line of advice."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinygpt.cli.console import (
    BROKEN_PIPE,
    FAILURE,
    INTERRUPTED,
    PROGRAMS,
    WRONG_USE,
    program_name,
)
from tinygpt.cli.streams import standard_streams
from tinygpt.config import __version__
from tinygpt.errors import TinyGPTError, UsageError
from tinygpt.files.atomic import user_path
from tinygpt.runs.display.text import printable

if TYPE_CHECKING:
    from cyclopts import App, CycloptsError

DEBUG = "TINYGPT_DEBUG"
"""Set to 1, this environment variable does what --debug does: errors come with their traceback."""

STRICT = "TINYGPT_STRICT"
"""Set to 1, this environment variable does what --strict does: see ``kernels.dispatch``."""

VERBS = {
    "train": ("training:train", "Train a GPT on a text and keep the run in a folder."),
    "generate": ("generating:generate", "Let a model continue a text, streamed as it is written."),
    "eval": (
        "evaluating:evaluate",
        "Measure a model on a whole text: loss, perplexity, bits per byte.",
    ),
    "compare": ("comparing:compare", "Show two runs side by side: settings, figures, samples."),
    "memorization": (
        "memorizing:memorization",
        "Look for passages of the training text in what a model writes.",
    ),
    "import": ("importing:app", "Take in weights that others trained."),
    "export": ("export:app", "Hand a model on: to Hugging Face, to llama.cpp, as a web page."),
    "serve": ("serving:serve", "Serve a model: a page to play with, and an API like OpenAI's."),
    "dashboard": ("serving:dashboard", "Watch runs in the browser while they train."),
    "plot": ("inspection:plot", "Draw the loss curves of runs."),
    "tokenizer": ("tokenizer:app", "Train a vocabulary, or turn text into tokens and back."),
    "gradcheck": ("inspection:gradcheck", "Check the gradients against numeric ones."),
    "check": ("checking:check", "Check the fast kernels against plain ones on this machine."),
    "info": ("inspection:info", "Show what a checkpoint or a run holds."),
    "verify": ("verifying:verify", "Check every byte of checkpoints and runs against its hash."),
    "verify-resume": (
        "proving:verify_resume",
        "Prove on this machine that a stopped run goes on bit for bit.",
    ),
    "doctor": ("inspection:doctor", "Look at this machine, and say how to mend what is missing."),
}
"""Where each verb is, and what it does in one line."""

EPILOGUE = (
    "Help of one command: {program} train --help. Every command takes --threads N (default: all "
    "cores), --strict (an error, not a notice, where a fast kernel cannot run) and --debug (errors "
    "come with their traceback)."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program on ``arguments``, by default those it was started with; -> the exit code.

    0 success, 1 failure, 2 wrong use, 129 a closed terminal, 130 Ctrl-C, 141 a closed pipe,
    143 SIGTERM. With --debug an exception is raised instead of told.
    """
    if arguments is None:
        _wait_for_children()
    with standard_streams():
        return _main(arguments)


def _main(arguments: Sequence[str] | None) -> int:
    given, debug = _take_debug(list(sys.argv[1:] if arguments is None else arguments))
    given, strict = _take(given, "--strict")
    program = program_name()
    try:
        given = _take_threads(given)
        if strict:
            os.environ[STRICT] = "1"
        code = _run(program, given)
        sys.stdout.flush()  # a pipe that broke is found here, not when the interpreter ends
        return code
    except BrokenPipeError:
        return BROKEN_PIPE
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if debug:
            raise
        message, code = _explain(program, error)
        print(f"{program}: error: {printable(message)}", file=sys.stderr)
        return code


def make_app(program: str = PROGRAMS[0], verb: str | None = None) -> App:
    """The command line. Only the module of ``verb`` will be imported; help needs none of them."""
    from cyclopts import App

    app = App(
        name=program,
        help="Train a GPT on your own text, watch it learn, and let it write.",
        help_epilogue=None if verb else EPILOGUE.format(program=program),
        help_format="plaintext",
        version=f"{program} {__version__}",
        version_format="plaintext",
        suppress_keyboard_interrupt=False,
    )
    for order, (name, (place, summary)) in enumerate(VERBS.items()):
        own_help = None if name == verb else summary  # the verb's docstring says more
        app.command(f"{__name__}.{place}", name=name, sort_key=order, help=own_help)
    return app


def _run(program: str, arguments: Sequence[str]) -> int:
    """Parse the arguments and run the verb; whatever goes wrong is an exception."""
    verb = next((word for word in arguments if not word.startswith("-")), None)
    command, given, _ = make_app(program, verb).parse_args(
        arguments, exit_on_error=False, print_error=False, verbose=False
    )
    words, options = map(_at_home, given.args), given.kwargs.items()
    result = command(*words, **{name: _at_home(value) for name, value in options})
    return result if isinstance(result, int) else 0


def _at_home(value: Any) -> Any:
    """A path with ~ for the home folder, which no shell replaces in ``--out=~/x``, in full."""
    return user_path(value) if isinstance(value, Path) else value


def _explain(program: str, error: Exception) -> tuple[str, int]:
    """The message and the exit code of any exception."""
    from cyclopts import CycloptsError

    if isinstance(error, CycloptsError):
        return _wrong_use(program, error), WRONG_USE
    if isinstance(error, TinyGPTError):
        return str(error), error.exit_code
    if isinstance(error, MemoryError):
        return (
            "There is not enough memory. Make the model or its batches smaller: "
            "--train.batch-size, --model.block-size, --model.n-embd, --model.n-layer."
        ), FAILURE
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{error.strerror}.", FAILURE
    return (
        f"{type(error).__name__}: {error}\n"
        f"This should not happen. Run it again with --debug, or {DEBUG}=1, for the traceback."
    ), FAILURE


def _wrong_use(program: str, error: CycloptsError) -> str:
    """What was wrong with the arguments, and where the right ones are listed."""
    from cyclopts import MissingArgumentError, UnusedCliTokensError

    message = str(error)
    if isinstance(error, UnusedCliTokensError) and error.unused_tokens:
        message = f"Unexpected argument {error.unused_tokens[0]!r}."
    elif isinstance(error, MissingArgumentError) and error.argument is not None:
        keyword = error.keyword or next((t.keyword for t in error.argument.tokens if t.keyword), "")
        wanted = f"{keyword} needs a value" if keyword else f"{error.argument.name} is missing"
        _, suggestion, rest = message.partition(" Did you mean ")
        message = f"{wanted}.{suggestion}{rest}"
    command = " ".join([program, *(error.command_chain or ())])
    return f"{message}\nTry: {command} --help"


def _take_debug(arguments: list[str]) -> tuple[list[str], bool]:
    """-> the arguments without --debug, and whether it, or the environment, asks for tracebacks."""
    kept, given = _take(arguments, "--debug")
    return kept, given or os.environ.get(DEBUG, "") not in ("", "0")


def _take(arguments: list[str], switch: str) -> tuple[list[str], bool]:
    """-> the arguments without a switch that every command takes, and whether it was there."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    kept = [a for a in arguments[:end] if a != switch] + arguments[end:]
    return kept, len(kept) != len(arguments)


def _take_threads(arguments: list[str]) -> list[str]:
    """The arguments without --threads N, which is handed to whatever runs kernels."""
    for i, word in enumerate(arguments):
        name, equals, value = word.partition("=")
        if word == "--":
            break
        if name == "--threads":
            rest = arguments[i + 1 :] if equals else arguments[i + 2 :]
            value = value if equals else "".join(arguments[i + 1 : i + 2])
            if not value.isdecimal():
                raise UsageError(f"--threads {value or '(nothing)'}: wanted a number of cores.")
            os.environ["TINYGPT_THREADS"] = value
            return arguments[:i] + rest
    return arguments


def _wait_for_children() -> None:
    """Undo an ignored SIGCHLD, which some launchers leave: no exit code would arrive."""
    if sys.platform != "win32" and signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
