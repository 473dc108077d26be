"""Prompts and chats to token ids.

The template of the model's vocabulary makes tokens of a chat. One without a template has the plain
text of ``text.chat.template.PLAIN``, in which the roles are words.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from tinygpt.errors import TokenizerError
from tinygpt.server.http.refusal import Refusal
from tinygpt.server.openai.service import Service
from tinygpt.text.chat.window import Asked, ask

Ids = tuple[int, ...]

SHORT = 1000
"""Characters, or ids, up to which encoding a prompt takes less time than a switch of threads."""


def messages_of(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Checked messages with their roles and contents alone, each content as one text.

    >>> messages_of([{"role": "user", "content": [{"type": "text", "text": "Hello"}]}])
    [{'role': 'user', 'content': 'Hello'}]
    """
    return [{"role": each["role"], "content": _said(i, each)} for i, each in enumerate(messages)]


def _said(index: int, message: Mapping[str, Any]) -> str:
    if message["role"] != "assistant" and "content" not in message:
        where = f"messages[{index}].content"
        raise Refusal(400, f"{where} is missing.", param=where, code="conflicting_fields")
    return _content(message.get("content") or message.get("refusal") or "")


def _content(content: str | Sequence[Mapping[str, str]]) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or part.get("refusal") or "" for part in content)


def prompts_of(value: Any) -> list[str | list[int]]:
    """The prompts of a completion, checked against its schema: one or several, text or ids."""
    if isinstance(value, str) or not isinstance(value[0], str | list):
        return [value]
    return list(value)


async def encode_chat(service: Service, messages: Sequence[Mapping[str, Any]], room: int) -> Asked:
    """The prompt for the next answer, which ``room`` tokens are wanted for.

    The oldest turns are left out where the window is full. Refused where the last one alone has
    more tokens than a prompt may have.
    """
    said = messages_of(messages)
    if sum(len(each["content"]) for each in said) <= SHORT:
        return _encode_chat(service, said, room)
    return await asyncio.to_thread(_encode_chat, service, said, room)


def _encode_chat(service: Service, messages: Sequence[Mapping[str, str]], room: int) -> Asked:
    try:
        asked = ask(service.tokenizer, messages, service.model.config.block_size, room)
    except TokenizerError as error:
        message = strange(service, "messages")
        raise Refusal(400, message, param="messages", code="bad_text") from error
    _check_length(len(asked.ids), service.limits.prompt_tokens, "messages")
    return asked


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
    _check_length(len(ids), most, param)
    return ids


def _check_length(length: int, most: int, param: str) -> None:
    if length > most:
        message = f"{param} has {length} tokens, and {most} are the most that are taken."
        raise Refusal(400, message, param=param, code="context_length_exceeded")


def strange(service: Service, param: str) -> str:
    """Why a text cannot be encoded."""
    if service.tokenizer.kind != "char":
        return f"{param} holds half a character (a lone surrogate), which is no text."
    template = " The chat template itself needs the letters of 'User' and 'Assistant' and a colon."
    return (
        f"{param} holds a character that this model's vocabulary of {service.vocab_size} "
        f"characters lacks.{template if param == 'messages' else ''}"
    )
