"""From what was sent to token ids: plain prompts, and chats by way of a template.

A base model knows no roles; it continues text. So a chat becomes a text that looks like one, each
turn with its speaker before it, and ends where the assistant is about to speak::

    You are brief.

    User: Who are you?

    Assistant:

The model's continuation is the answer, up to where it would let the user speak: ``\\nUser:``.
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
"""Characters or ids up to which to encode a prompt takes less time than to hand it over."""

SPEAKERS = {"user": "User: ", "assistant": "Assistant: "}
"""What stands before a turn; system and developer messages stand for themselves."""
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
    """A message in the template. What the model wrote comes back with the space that it put behind
    ``Assistant:``, and maybe with the line break before ``User:``; there is one of each already.
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

    A long one is encoded in a thread of its own, so that nobody has to wait for it.
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
