"""Conversations in files: the forms in which they are handed around, recognised by themselves.

======================  ========================================================================
OpenAI's fine-tuning    ``{"messages": [{"role": "user", "content": "…"}, …]}``
ShareGPT's              ``{"conversations": [{"from": "human", "value": "…"}, …]}``
Alpaca's                ``{"instruction": "…", "input": "…", "output": "…"}``
pairs                   ``{"prompt": "…", "completion": "…"}``
======================  ========================================================================

A file is JSONL, one conversation a line, and all of one form. Each conversation has at most one
message of the system, which stands first; then user and assistant take turns, and the assistant has
the last word. Everything else is refused, with the line.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tinygpt.errors import DataError
from tinygpt.text.documents import jsonl_lines, kind_of
from tinygpt.untrusted import brief, clip

Message = dict[str, str]
"""``role`` and ``content``."""
Messages = list[Message]

SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant"}
"""ShareGPT's names of roles, besides the usual ones."""


class Form(NamedTuple):
    """A way to write conversations down."""

    name: str
    fields: tuple[str, ...]
    """The fields that a record of this form has."""
    messages: Callable[[Mapping[str, Any]], list[tuple[object, object]]]
    """-> role and content of each message of a record, unchecked."""


def _openai(record: Mapping[str, Any]) -> list[tuple[object, object]]:
    return [(_of(m, "role"), _of(m, "content")) for m in _list(record["messages"])]


def _sharegpt(record: Mapping[str, Any]) -> list[tuple[object, object]]:
    messages = [
        (_of(m, "from", "role"), _of(m, "value", "content")) for m in _list(record["conversations"])
    ]
    return [(SPEAKERS.get(str(role), role), content) for role, content in messages]


def _alpaca(record: Mapping[str, Any]) -> list[tuple[object, object]]:
    asked, given = record["instruction"], record.get("input") or ""
    if isinstance(asked, str) and isinstance(given, str) and given:
        asked = f"{asked}\n\n{given}"
    system = [("system", record["system"])] if record.get("system") else []
    return [*system, ("user", asked), ("assistant", record["output"])]


def _pair(record: Mapping[str, Any]) -> list[tuple[object, object]]:
    return [("user", record["prompt"]), ("assistant", record["completion"])]


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
    """The form of the conversations in a file, by its first line; None for other files.

    A file whose records have ``field`` holds documents, as ever.
    """
    if kind_of(path) != "jsonl":
        return None
    first = next((line for line in jsonl_lines(path) if line.strip()), "")
    try:
        record = json.loads(first)
    except (ValueError, RecursionError):
        return None  # the reader of documents says what is wrong
    return None if isinstance(record, dict) and field in record else form_of(record)


def read_conversations(path: Path) -> Iterator[Messages]:
    """The conversations of a file. Raises DataError that names the first line that is wrong."""
    for _, messages in read_records(path):
        yield messages


def read_records(path: Path) -> Iterator[tuple[dict[str, Any], Messages]]:
    """Each record of a file, whole, and its conversation. Raises DataError as above."""
    form: Form | None = None
    for number, line in enumerate(jsonl_lines(path), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{where} is not JSON: {clip(error)}. Wanted one conversation a line."
            ) from error
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


WANTED = (
    "Wanted: messages (OpenAI's form), conversations (ShareGPT's), instruction and output "
    "(Alpaca's), or prompt and completion."
)


def checked(messages: list[tuple[object, object]]) -> Messages:
    """Messages in their order, or a DataError that says which one is wrong.

    >>> checked([("user", "Hello"), ("assistant", "Hi.")])[0]
    {'role': 'user', 'content': 'Hello'}
    """
    if not messages:
        raise DataError("the conversation is empty. Leave the line out.")
    found = Messages()
    wanted: tuple[str, ...] = ("system", "user")
    for at, (role, content) in enumerate(messages, 1):
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
        if role not in wanted:
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
        found.append({"role": str(role), "content": content})
        wanted = ("assistant",) if role == "user" else ("user",)
    if found[-1]["role"] != "assistant":
        raise DataError(
            f"the last message is of the {found[-1]['role']}: there is no answer to learn from."
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
