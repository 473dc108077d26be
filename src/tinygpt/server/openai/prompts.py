"""Prompts and chats to token ids.

A base model continues text and was not trained on roles. So a template makes a text of a chat, each
turn behind its speaker, which ends where the assistant is to speak::

    You are brief.

    User: Who are you?

    Assistant:

The continuation up to the user's next turn, ``\\nUser:``, is the answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from tinygpt.errors import TokenizerError
from tinygpt.server.http.refusal import Refusal
from tinygpt.server.openai.service import Service

Ids = tuple[int, ...]

SHORT = 1000
"""Characters, or ids, up to which encoding a prompt takes less time than a switch of threads."""

SPEAKERS = {"user": "User: ", "assistant": "Assistant: "}
"""Prefixes of turns; system and developer messages have none."""
ANSWER = "Assistant:"
TURN = "\n\n"
CHAT_STOP = "\nUser:"
"""Where an answer ends, besides the stop strings of the request."""


def chat_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """The text that a chat becomes.

    >>> chat_text([{"role": "user", "content": "Hello"}])
    'User: Hello\\n\\nAssistant:'
    """
    return TURN.join([*(_turn(i, message) for i, message in enumerate(messages)), ANSWER])


def _turn(index: int, message: Mapping[str, Any]) -> str:
    """A message in the template.

    Clients send answers back with the space behind ``Assistant:``, and maybe the line break before
    ``User:``. The template has both, so they are stripped.
    """
    role = message["role"]
    if role != "assistant" and "content" not in message:
        where = f"messages[{index}].content"
        raise Refusal(400, f"{where} is missing.", param=where, code="conflicting_fields")
    content = _content(message.get("content") or message.get("refusal") or "")
    if role == "assistant":
        return f"{SPEAKERS[role]}{content.strip()}".rstrip()
    return SPEAKERS.get(role, "") + content


def _content(content: str | Sequence[Mapping[str, str]]) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or part.get("refusal") or "" for part in content)


def prompts_of(value: Any) -> list[str | list[int]]:
    """The prompts of a completion, checked against its schema: one or several, text or ids."""
    if isinstance(value, str) or not isinstance(value[0], str | list):
        return [value]
    return list(value)


async def encode(
    service: Service, prompt: str | Sequence[int], param: str, *, most: int | None = None
) -> Ids:
    """The ids of a prompt, refused where the model has none or there are more than ``most``.

    A long one is encoded in a thread of its own, so that the event loop goes on.
    """
    most = service.limits.prompt_tokens if most is None else most
    if len(prompt) <= SHORT:
        return _encode(service, prompt, param, most)
    return await asyncio.to_thread(_encode, service, prompt, param, most)


def _encode(service: Service, prompt: str | Sequence[int], param: str, most: int) -> Ids:
    if isinstance(prompt, str):
        try:
            ids = tuple(service.tokenizer.encode(prompt))
        except TokenizerError as error:
            raise Refusal(400, strange(service, param), param=param, code="bad_text") from error
    else:
        ids = tuple(map(int, prompt))
    if len(ids) > most:
        message = f"{param} has {len(ids)} tokens, and {most} are the most that are taken."
        raise Refusal(400, message, param=param, code="context_length_exceeded")
    return ids


def strange(service: Service, param: str) -> str:
    """Why a text cannot be encoded."""
    if service.tokenizer.kind != "char":
        return f"{param} holds half a character (a lone surrogate), which is no text."
    template = " The chat template itself needs the letters of 'User' and 'Assistant' and a colon."
    return (
        f"{param} holds a character that this model's vocabulary of {service.vocab_size} "
        f"characters lacks.{template if param == 'messages' else ''}"
    )
