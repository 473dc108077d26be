"""A conversation in a window of tokens: the oldest turns leave first.

The terminal's chat, the API and the page all get their prompts here, so that they ask a model the
same.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tinygpt.errors import DataError
from tinygpt.text.chat.template import PLAIN, Template, template_of
from tinygpt.text.tokenizers import Tokenizer, ends_of
from tinygpt.untrusted import brief

Messages = Sequence[Mapping[str, Any]]

ROOM = 4
"""An answer is left one in this many tokens of the window at most, and ``max_tokens`` if fewer."""


@dataclass(frozen=True)
class Asked:
    """What a model is asked, and where its answer ends."""

    ids: tuple[int, ...]
    """The prompt, which ends where the assistant is to speak."""
    left_out: int
    """Messages that found no place in the window: the oldest ones behind the system's."""
    too_long: bool
    """Whether the last turn alone is longer than the window: the model sees its end."""
    stop: tuple[str, ...]
    """Texts at which the answer is over."""
    stop_ids: tuple[int, ...]
    """Tokens at which the answer is over: all that end a text or a turn, or begin one."""

    @property
    def remark(self) -> str:
        """What a person should know of the prompt; empty where all was put in."""
        if self.too_long:
            return "This question is longer than the model's window: it sees only the end."
        if not self.left_out:
            return ""
        return f"The window is full: messages that have left it, the oldest first: {self.left_out}."


def chat_template(tokenizer: Tokenizer) -> Template:
    """The template of a vocabulary; ``PLAIN`` where it was made for no conversations."""
    return template_of(tokenizer) or PLAIN


def stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens at which an answer is over."""
    own = chat_template(tokenizer).stop_ids(tokenizer)
    return tuple(dict.fromkeys((*ends_of(tokenizer), *own)))


def ask(
    tokenizer: Tokenizer, messages: Messages, window: int, max_tokens: int, most: int | None = None
) -> Asked:
    """The prompt for the next answer to ``messages``, in a model of ``window`` tokens.

    Where they do not fit, whole turns leave, the oldest first: a question together with its answer.
    What the system says at the beginning stays, and so does the last turn. Of a prompt with more
    than ``most`` ids the last ones are taken. Raises DataError for what is no message, and
    TokenizerError for a character that the vocabulary lacks.
    """
    if not messages or isinstance(messages, str) or not all(map(_is_message, messages)):
        raise DataError(
            f"messages={brief(messages)} is no conversation. Wanted a list of messages, the last "
            f"of them the user's, such as [{{'role': 'user', 'content': 'Hello'}}]."
        )
    template = chat_template(tokenizer)
    system, turns = _turns(messages)
    room = window - min(max_tokens, window // ROOM)

    def ids(first: int) -> tuple[int, ...]:
        kept = [*system, *(message for turn in turns[first:] for message in turn)]
        return tuple(template.render(tokenizer, kept, answer=True).ids.tolist())

    last = max(len(turns) - 1, 0)
    prompt, first = ids(0), 0
    if len(prompt) > room:
        first = bisect_left(range(last), True, key=lambda n: len(ids(n)) <= room)
        prompt = ids(first)
    return Asked(
        prompt if most is None else prompt[-most:],
        sum(len(turn) for turn in turns[:first]),
        len(prompt) > window,
        template.stop_strings,
        stop_ids(tokenizer),
    )


def _is_message(message: object) -> bool:
    return isinstance(message, Mapping)


def _turns(messages: Messages) -> tuple[Messages, list[list[Mapping[str, Any]]]]:
    """The system's messages at the beginning, and the rest in turns that begin with the user's."""
    roles = [message.get("role") for message in messages]
    begin = next((i for i, role in enumerate(roles) if role not in ("system", "developer")), None)
    if begin is None:
        return messages, []
    turns: list[list[Mapping[str, Any]]] = []
    for role, message in zip(roles[begin:], messages[begin:], strict=True):
        if role == "user" or not turns:
            turns.append([])
        turns[-1].append(message)
    return messages[:begin], turns
