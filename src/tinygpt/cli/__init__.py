"""The command line: one module a verb, and every error is a line of advice."""

from __future__ import annotations

import itertools
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Group, Parameter, validators

from tinygpt.cli.console import BROKEN_PIPE, INTERRUPTED, PROGRAMS, program_name
from tinygpt.cli.flags import Switch, dash_as_prompt, proof_first, undotted
from tinygpt.cli.mistakes import DEBUG, explain
from tinygpt.cli.streams import standard_streams
from tinygpt.files.atomic import user_path
from tinygpt.machine import start
from tinygpt.runs.display.text import printable

STRICT = "TINYGPT_STRICT"
"""Set to 1, this environment variable does what --strict does: see ``kernels.dispatch``."""

GROUPS = {
    "Everyday": {
        "train": ("training:train", "Train a GPT on a text and keep the run in a folder."),
        "generate": ("generating:generate", "Let a model continue a text, word by word."),
        "chat": ("chatting:chat", "Talk with a model that has learned from conversations."),
        "serve": ("serving:serve", "Serve a model: a page to play with, and an API like OpenAI's."),
        "dashboard": ("serving:dashboard", "Watch runs in the browser while they train."),
    },
    "Runs": {
        "runs": ("listing:runs", "List the runs of a folder, with their losses."),
        "info": ("showing:info", "Show what a checkpoint or a run holds."),
        "compare": ("comparing:compare", "Show runs side by side: settings, figures, samples."),
        "plot": ("plotting:plot", "Draw the loss curves of runs."),
        "eval": ("evaluating:evaluate", "Measure a model on a whole text: loss, perplexity, …"),
        "eval-chat": ("examining:eval_chat", "Ask a model questions, and count right answers."),
        "verify": ("verifying:verify", "Check every byte of checkpoints and runs."),
    },
    "Exchange": {
        "import": ("importing:app", "Take in weights that others trained."),
        "export": (
            "exporting:app",
            "Hand a model on: to Hugging Face, llama.cpp, as a web page.",
        ),
        "make-chats": ("examining:make_chats", "Write questions that a small model can learn."),
        "tokenize": ("sharding:tokenize", "Make token files of texts of any size, on all cores."),
        "tokenizer": ("tokenizer:app", "Train a vocabulary, or turn text into tokens and back."),
    },
    "Proofs": {
        "doctor": ("doctoring:app", "Look at this machine, and say how to mend what is missing."),
        "memorization": (
            "memorizing:memorization",
            "Look for passages of the training text in what a model writes.",
        ),
    },
    "Shell": {
        "completion": ("completing:completion", "Complete commands and flags in a shell."),
    },
}
"""The verbs under their headings in the help: where each one is, and what it does in one line."""

OTHER_NAMES = {
    "check": ("doctoring:check", "doctor --kernels"),
    "gradcheck": ("doctoring:gradcheck", "doctor --gradients"),
    "verify-resume": ("proving:verify_resume", "doctor --resume"),
}
"""Verbs that were called so before; the help leaves them out."""

EVERYWHERE = Parameter(group=Group("Every command", sort_key=1000))
AT_LEAST_0 = Parameter(validator=validators.Number(gte=0))

VERBS = [name for verbs in (*GROUPS.values(), OTHER_NAMES) for name in verbs]


def _version() -> str:
    from tinygpt.config import __version__

    return f"{program_name()} {__version__}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program on ``arguments``, by default those it was started with; -> the exit code.

    0 success, 1 failure, 2 wrong use, 129 a closed terminal, 130 Ctrl-C, 141 a closed pipe,
    143 SIGTERM. With --debug an exception is raised instead of explained.
    """
    if arguments is None:
        _restore_sigchld()
    with standard_streams():
        return _main(list(sys.argv[1:] if arguments is None else arguments))


def _main(arguments: list[str]) -> int:
    program, debug = program_name(), os.environ.get(DEBUG, "") not in ("", "0")
    verb = next((word for word in arguments if word in VERBS), None)
    try:
        command, given, _ = _parse(make_app(program, verb).meta, arguments)
        debug = debug or given.kwargs.get("debug", False)
        code = command(*given.args, **given.kwargs)
        sys.stdout.flush()  # a broken pipe is found here, not when the interpreter ends
        return code if isinstance(code, int) else 0
    except BrokenPipeError:
        return BROKEN_PIPE
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if debug:
            raise
        message, code = explain(program, error)
        print(f"{program}: error: {printable(message)}", file=sys.stderr)
        return code


def make_app(program: str = PROGRAMS[0], verb: str | None = None) -> App:
    """The command line; its ``meta`` takes the options of every command too.

    Only the module of ``verb`` will be imported; help needs none of them.
    """
    app = App(
        name=program,
        help="Train a GPT on your own text, watch it learn, and let it write.",
        help_epilogue=None if verb else f"Help of one command: {program} train --help.",
        help_format="plaintext",
        version=_version,
        version_format="plaintext",
        suppress_keyboard_interrupt=False,
    )
    order = itertools.count()
    for group, verbs in GROUPS.items():
        heading = Group(group, sort_key=next(order))
        for name, (place, summary) in verbs.items():
            own = None if name == verb else summary  # the verb's docstring says more
            app.command(f"{__name__}.{place}", name, help=own, group=heading, sort_key=next(order))
    for name, (place, other) in OTHER_NAMES.items():
        own = None if name == verb else f"Another name of {other}."
        app.command(f"{__name__}.{place}", name, help=own, show=False)

    def launch(
        *words: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
        threads: Annotated[int | None, EVERYWHERE, AT_LEAST_0] = None,
        strict: Annotated[Switch, EVERYWHERE] = False,
        debug: Annotated[Switch, EVERYWHERE] = False,
    ) -> Any:
        """Run a verb.

        Parameters
        ----------
        threads
            Number of cores to use. [default: all]
        strict
            Make an error of the notice that a fast kernel cannot run here.
        debug
            Show the traceback of an error.
        """
        if threads is not None:
            os.environ["TINYGPT_THREADS"] = str(threads)
        if strict:
            os.environ[STRICT] = "1"
        start()
        command, given, _ = _parse(app, proof_first(undotted(dash_as_prompt(words))))
        options = {name: _at_home(value) for name, value in given.kwargs.items()}
        return command(*map(_at_home, given.args), **options)

    app.meta.default(launch)
    return app


def _parse(app: App, words: Sequence[str]) -> Any:
    return app.parse_args(words, exit_on_error=False, print_error=False, verbose=False)


def _at_home(value: Any) -> Any:
    """A path with ~ in full: no shell replaces it in ``--out=~/x``."""
    return user_path(value) if isinstance(value, Path) else value


def _restore_sigchld() -> None:
    """Undo an ignored SIGCHLD, which some launchers leave: no exit code would arrive."""
    if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
