"""The commands of ``tinygpt chat``: lines that begin with a slash."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tinygpt.cli.console import say
from tinygpt.errors import UsageError, nearest
from tinygpt.files.atomic import user_path
from tinygpt.untrusted import parse_json

if TYPE_CHECKING:
    from tinygpt.generation.dialogue import Answer, Dialogue

HELP = "Ctrl-C stops an answer, Ctrl-D ends; /help lists commands."
COMMANDS = {
    "/help": "list these commands",
    "/reset": "begin a new talk; what the system says stays",
    "/undo": "take back the last question and its answer",
    "/retry": "have the last question answered anew",
    "/system TEXT": "what the model is told before everything; without TEXT: show it; -: nothing",
    "/save FILE": "add the talk to a JSONL file as a line, which can be trained on",
    "/exit": "end",
    "//…": "a question that begins with a slash",
}


def obey(dialogue: Dialogue, line: str) -> Answer | None:
    """Do what a line asks for; -> the pieces of an answer, if there is one to write.

    Raises UsageError for a command that is unknown or cannot be done, and EOFError, as Ctrl-D
    does, for the one that ends the talk.
    """
    name, _, rest = line.strip().partition(" ")
    if name not in DOING:
        known = list(DOING)
        raise UsageError(
            f"There is no command {name!r}.{nearest(name, known)} Commands: {', '.join(known)}. "
            f"A question that begins with a slash is asked with two."
        )
    return DOING[name](dialogue, rest.strip())


def _help(dialogue: Dialogue, rest: str) -> None:
    width = max(map(len, COMMANDS))
    for name, meaning in COMMANDS.items():
        say(f"{name.ljust(width)}  {meaning}")


def _reset(dialogue: Dialogue, rest: str) -> None:
    dialogue.said.clear()
    say("A new talk.")


def _undo(dialogue: Dialogue, rest: str) -> None:
    question = dialogue.undo()
    if question is None:
        raise UsageError("There is nothing to take back: nothing was asked yet.")
    say(f"Taken back: {question}")


def _retry(dialogue: Dialogue, rest: str) -> Answer:
    pieces = dialogue.again()
    if pieces is None:
        raise UsageError("There is nothing to answer anew: nothing was asked yet.")
    return pieces


def _system(dialogue: Dialogue, rest: str) -> None:
    if rest:
        dialogue.system = "" if rest == "-" else rest
    say(f"The system says: {dialogue.system}" if dialogue.system else "The system says nothing.")


def _save(dialogue: Dialogue, rest: str) -> None:
    if not rest or not dialogue.said:
        raise UsageError("Give a file: /save talk.jsonl" if not rest else "There is no talk yet.")
    path = user_path(Path(rest))
    try:
        if path.exists() and not _has_talks(path):
            raise UsageError(f"{path} exists and is no file of talks. Give another name.")
        with path.open("ab") as file:
            file.write(dialogue.line().encode() + b"\n")
    except OSError as error:
        raise UsageError(f"{path} could not be written: {error.strerror}.") from error
    say(f"Saved to {path}.")


def _has_talks(path: Path) -> bool:
    """Whether a file is empty, or begins with a whole line that is a talk and ends with a line."""
    with path.open("rb") as file:
        first = file.readline(1 << 24)
        if not first:
            return True
        file.seek(-1, 2)
        whole = file.read(1) == b"\n"
    try:
        value = parse_json(first)
    except ValueError:
        return False
    return whole and isinstance(value, dict) and "messages" in value


def _exit(dialogue: Dialogue, rest: str) -> None:
    raise EOFError


DOING: dict[str, Callable[[Dialogue, str], Answer | None]] = {
    "/help": _help,
    "/reset": _reset,
    "/undo": _undo,
    "/retry": _retry,
    "/system": _system,
    "/save": _save,
    "/exit": _exit,
    "/quit": _exit,
}
