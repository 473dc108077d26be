"""The command line: one verb per command, and every error a line of advice."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tinygpt import __version__
from tinygpt.errors import TinyGPTError

if TYPE_CHECKING:
    from cyclopts import App, CycloptsError

PROGRAMS = ("tinygpt", "minimiggy")
DEBUG = "TINYGPT_DEBUG"
"""Set to 1, this environment variable does what --debug does: errors come with their traceback."""

WRONG_USE, FAILURE, INTERRUPTED, BROKEN_PIPE = 2, 1, 130, 141


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code: 0, 1 failure, 2 wrong use, 130 interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    given, debug = _take_debug(given)
    debug = debug or os.environ.get(DEBUG, "") not in ("", "0")
    program = program_name()
    try:
        code = run(program, given)
        sys.stdout.flush()  # a pipe that broke is found here, not at interpreter exit
        return code
    except BrokenPipeError:
        _silence_stdout()
        return BROKEN_PIPE
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if debug:
            raise
        return report(program, error)


def run(program: str, arguments: Sequence[str]) -> int:
    """Parse the arguments and run the verb; every error is an exception."""
    result = make_app(program)(
        arguments,
        exit_on_error=False,
        print_error=False,
        verbose=False,
        result_action="return_value",
    )
    return result if isinstance(result, int) else 0


def make_app(program: str = PROGRAMS[0]) -> App:
    """The verbs, each a function of its own with its flags in its signature."""
    from cyclopts import App

    from tinygpt.cli import inspection, text, tokenizer, training

    app = App(
        name=program,
        help="Train a GPT on your own text, watch it learn, and let it write.",
        help_epilogue="--debug shows the traceback of an error. Help of one command: "
        f"{program} train --help",
        version=f"{program} {__version__}",
        help_format="plaintext",
        suppress_keyboard_interrupt=False,
    )
    verbs = [
        training.train,
        text.generate,
        text.evaluate,
        inspection.plot,
        inspection.gradcheck,
        inspection.info,
        inspection.doctor,
    ]
    for order, verb in enumerate(verbs):
        name = "eval" if verb is text.evaluate else verb.__name__
        app.command(verb, name=name, sort_key=order)
    app.command(tokenizer.make_app(), sort_key=len(verbs))
    return app


def program_name() -> str:
    """The name the program was called by: ``tinygpt`` or ``minimiggy``."""
    name = Path(sys.argv[0]).stem if sys.argv else ""
    return name if name in PROGRAMS else PROGRAMS[0]


def report(program: str, error: Exception) -> int:
    """Print one error as one message on stderr and return its exit code."""
    message, code = explain(program, error)
    print(f"{program}: error: {message}", file=sys.stderr)
    return code


def explain(program: str, error: Exception) -> tuple[str, int]:
    """The message and the exit code of any exception."""
    from cyclopts import CycloptsError

    if isinstance(error, CycloptsError):
        return wrong_use(program, error), WRONG_USE
    if isinstance(error, TinyGPTError):
        return str(error), error.exit_code
    if isinstance(error, MemoryError):
        return (
            f"Out of memory. {error} Lower --train.batch-size, --model.block-size, "
            f"--model.n-layer or --model.n-embd."
        ).replace("  ", " "), FAILURE
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{error.strerror}.", FAILURE
    name = type(error).__name__
    advice = f"This should not happen. Run it with --debug, or {DEBUG}=1, for the traceback."
    return f"{name}: {error}\n{advice}", FAILURE


def wrong_use(program: str, error: CycloptsError) -> str:
    """What was wrong with the arguments, and where the right ones are listed."""
    from cyclopts import MissingArgumentError, UnusedCliTokensError

    chain = [program, *(error.command_chain or ())]
    message = str(error)
    if isinstance(error, MissingArgumentError) and error.argument is not None:
        message = message.split('" parameter ', 1)[-1].capitalize_first() if False else message
    if isinstance(error, UnusedCliTokensError) and error.unused_tokens:
        message = f"Unexpected argument {error.unused_tokens[0]!r}."
    return f"{message}\nSee {' '.join(chain)} --help"


def _take_debug(arguments: list[str]) -> tuple[list[str], bool]:
    """Take --debug out, wherever it stands before a ``--``."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    kept = [a for a in arguments[:end] if a != "--debug"] + arguments[end:]
    return kept, len(kept) != len(arguments)


def _silence_stdout() -> None:
    """Nobody reads any more: what is still buffered must not raise again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
