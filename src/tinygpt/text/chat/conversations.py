"""Conversations in files: the forms in which they are handed around, recognised by themselves.

======================  ========================================================================
OpenAI's fine-tuning    ``{"messages": [{"role": "user", "content": "…"}, …]}``
ShareGPT's              ``{"conversations": [{"from": "human", "value": "…"}, …]}``
Alpaca's                ``{"instruction": "…", "input": "…", "output": "…"}``
pairs                   ``{"prompt": "…", "completion": "…"}``
======================  ========================================================================

A file is JSONL, one conversation a line, or one JSON list of them, and all of one form. Each
conversation has at most one message of the system, which stands first; then user and assistant take
turns, and the assistant has the last word. Everything else is refused, with the line.

An answer with OpenAI's ``weight`` of 0 is context, from which nothing is learned. So is what the
assistant says before the first question, as in many of ShareGPT's conversations.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tinygpt.errors import DataError
from tinygpt.text.documents import MAX_LINE, jsonl_lines, kind_of, read_text
from tinygpt.untrusted import brief, clip

Message = dict[str, Any]
"""``role`` and ``content``, and a ``weight`` of 0 where nothing is learned from an answer."""
Spoken = tuple[object, object, object]
"""Role, content and weight, unchecked."""
Messages = list[Message]

SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant"}
"""ShareGPT's names of roles, besides the usual ones."""


def is_learned(message: Mapping[str, Any]) -> bool:
    """Whether the loss counts a message: an answer, unless its ``weight``, as OpenAI's, is 0."""
    return message.get("role") == "assistant" and message.get("weight", 1) != 0


class Form(NamedTuple):
    """A way to write conversations down."""

    name: str
    fields: tuple[str, ...]
    """The fields that a record of this form has."""
    messages: Callable[[Mapping[str, Any]], list[Spoken]]
    """-> the messages of a record."""


def _openai(record: Mapping[str, Any]) -> list[Spoken]:
    messages = _list(record["messages"])
    return [(_of(m, "role"), _of(m, "content"), _of(m, "weight")) for m in messages]


def _sharegpt(record: Mapping[str, Any]) -> list[Spoken]:
    messages = [
        (_of(m, "from", "role"), _of(m, "value", "content")) for m in _list(record["conversations"])
    ]
    said = [(SPEAKERS.get(r, r) if isinstance(r, str) else r, content) for r, content in messages]
    asked = next((at for at, (role, _) in enumerate(said) if role == "user"), len(said))
    return [
        (role, content, 0 if at < asked and role == "assistant" else 1)
        for at, (role, content) in enumerate(said)
    ]


def _alpaca(record: Mapping[str, Any]) -> list[Spoken]:
    asked, given = record["instruction"], record.get("input") or ""
    if isinstance(asked, str) and isinstance(given, str) and given:
        asked = f"{asked}\n\n{given}"
    system: list[Spoken] = [("system", record["system"], 1)] if record.get("system") else []
    return [*system, ("user", asked, 1), ("assistant", record["output"], 1)]


def _pair(record: Mapping[str, Any]) -> list[Spoken]:
    return [("user", record["prompt"], 1), ("assistant", record["completion"], 1)]


FORMS = (
    Form("OpenAI's", ("messages",), _openai),
    Form("ShareGPT's", ("conversations",), _sharegpt),
    Form("Alpaca's", ("instruction", "output"), _alpaca),
    Form("prompt and completion", ("prompt", "completion"), _pair),
)


def form_of(record: object) -> Form | None:
    """The form of a record; None for one that is no conversation.

    >>> form_of({"prompt": "1+1?", "completion": "2"}).name
    'prompt and completion'
    """
    if not isinstance(record, dict):
        return None
    return next((form for form in FORMS if record.keys() >= set(form.fields)), None)


def form_in(path: Path, field: str = "text") -> Form | None:
    """The form of the conversations in a file, by its first one; None for other files.

    A file whose records have ``field`` holds documents, as ever.
    """
    if kind_of(path) != "jsonl" and path.suffix.lower() != ".json":
        return None
    try:
        _, record = next(_values(path), ("", None))
    except DataError:
        return None  # the reader of documents says what is wrong
    return None if isinstance(record, dict) and field in record else form_of(record)


def read_conversations(path: Path) -> Iterator[Messages]:
    """The conversations of a file. Raises DataError that names the first line that is wrong."""
    for _, messages in read_records(path):
        yield messages


def read_records(path: Path) -> Iterator[tuple[dict[str, Any], Messages]]:
    """Each record of a file, whole, and its conversation. Raises DataError as above."""
    form: Form | None = None
    for where, record in _values(path):
        found = form_of(record)
        if found is None:
            held = ", ".join(map(brief, list(record)[:8])) if isinstance(record, dict) else "no"
            raise DataError(f"{where} is no conversation: it has {held or 'no'} fields. {WANTED}")
        form = form or found
        if found is not form:
            raise DataError(
                f"{where} is of the form {found.name}, and those before it are {form.name}. Put "
                f"them in a file each, and train on both with --mix."
            )
        try:
            yield record, checked(found.messages(record))
        except DataError as error:
            raise DataError(f"{where}: {error}") from None


def _values(path: Path) -> Iterator[tuple[str, Any]]:
    """Where each record of a file stands, and the record: JSON lines, or one list."""
    first = next((piece for piece in read_text(path) if piece.strip()), "")
    if first.lstrip().startswith("["):
        yield from _items(path)
        return
    for number, line in enumerate(jsonl_lines(path), 1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise _no_json(where, error, "one conversation a line") from error


def _items(path: Path) -> Iterator[tuple[str, Any]]:
    """The values of one JSON list, of which only a few are in memory at a time."""
    rest, number, before = _Rest(read_text(path)), 0, "["
    while rest.next() == before:
        rest.skip()
        if not number and rest.next() == "]":
            return
        number, before = number + 1, ","
        where = f"{path}, item {number}"
        yield where, rest.value(where)
    if (found := rest.next()) != "]":
        error = f"{brief(found)} stands where a comma or a bracket should"
        raise _no_json(f"{path}, behind item {number},", error, LIST)


LIST = "a list of conversations"
SPACE = re.compile(r"[ \t\r\n]*")
"""JSON's white space."""


class _Rest:
    """What is still to be read of a JSON text."""

    def __init__(self, pieces: Iterator[str]) -> None:
        self._pieces, self._text, self._at = pieces, "", 0

    def next(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            space = SPACE.match(self._text, self._at)
            self._at = space.end() if space else self._at
            if self._at < len(self._text) or not self._read():
                return self._text[self._at : self._at + 1]

    def skip(self) -> None:
        """Leave that character behind."""
        self._at += 1

    def value(self, where: str) -> Any:
        """The JSON value that comes next; DataError for what is none."""
        self.next()
        while True:
            try:
                value, self._at = DECODER.raw_decode(self._text, self._at)
            except ValueError as error:  # it is wrong, or not all of it is here
                held = len(self._text) - self._at
                while held <= MAX_LINE and len(self._text) - self._at < 2 * held and self._read():
                    pass
                if len(self._text) - self._at <= held:
                    raise _no_json(where, error, LIST) from error
            except RecursionError as error:
                raise _no_json(where, error, LIST) from error
            else:
                return value

    def _read(self) -> bool:
        piece = next(self._pieces, None)
        self._text, self._at = self._text[self._at :] + (piece or ""), 0
        return piece is not None


DECODER = json.JSONDecoder()


def _no_json(where: str, error: object, wanted: str) -> DataError:
    return DataError(f"{where} is not JSON: {clip(error)}. Wanted {wanted}.")


WANTED = (
    "Wanted: messages (OpenAI's form), conversations (ShareGPT's), instruction and output "
    "(Alpaca's), or prompt and completion."
)


def checked(messages: list[Spoken]) -> Messages:
    """Messages in their order, or a DataError that says which one is wrong.

    >>> checked([("user", "Hello", 1), ("assistant", "Hi.", 1)])[0]
    {'role': 'user', 'content': 'Hello'}
    """
    if not messages:
        raise DataError("the conversation is empty. Leave the line out.")
    found = Messages()
    wanted: tuple[str, ...] = ("system", "user")
    for at, (role, content, weight) in enumerate(messages, 1):
        role = "system" if role == "developer" else role
        content = _joined(content)
        if role not in ("system", "user", "assistant"):
            raise DataError(
                f"message {at} has the role {brief(role)}, wanted system, user or assistant. Tools "
                f"are not learned: leave such conversations out."
            )
        if not isinstance(content, str):
            raise DataError(
                f"message {at}, of the {role}, is {type(content).__name__}, wanted a text."
            )
        if weight not in (None, 0, 1):
            raise DataError(f"message {at} has the weight {brief(weight)}, wanted 0 or 1.")
        is_context = role == "assistant" and weight == 0
        may_open = is_context and all(message["role"] == "system" for message in found)
        if role not in wanted and not may_open:
            raise DataError(
                f"message {at} is of the {role}, wanted one of the {' or '.join(wanted)}: user and "
                f"assistant take turns, and the system may only begin."
            )
        if role == "assistant" and not content.strip():
            raise DataError(f"message {at}, of the assistant, is empty: nothing can be learned.")
        try:
            content.encode()
        except UnicodeEncodeError:
            raise DataError(f"message {at} has half a character (a lone surrogate).") from None
        found.append({"role": role, "content": content} | ({"weight": 0} if is_context else {}))
        wanted = ("assistant",) if role == "user" else ("user",)
    if found[-1]["role"] != "assistant":
        raise DataError(
            f"the last message is of the {found[-1]['role']}: there is no answer to learn from."
        )
    if not any(map(is_learned, found)):
        raise DataError(
            "there is no answer to learn from: each has the weight 0, or stands before the first "
            "question."
        )
    return found


def _joined(content: object) -> object:
    """The text of OpenAI's list of parts; anything else as it is."""
    if not isinstance(content, list):
        return content
    texts = [_of(part, "text") for part in content]
    return "".join(map(str, texts)) if all(isinstance(text, str) for text in texts) else content


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise DataError(f"the messages are {type(value).__name__}, wanted a list.")
    return value


def _of(message: object, *names: str) -> object:
    """The first of these fields that a message has."""
    if not isinstance(message, dict):
        raise DataError(f"a message is {type(message).__name__}, wanted an object.")
    return next((message[name] for name in names if name in message), None)
