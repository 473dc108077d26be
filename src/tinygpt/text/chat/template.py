"""A conversation to token ids: one template, in training, in answering and in other tools.

In ``MARKED`` each role has a special token that begins its turn, and one more ends every turn::

    <|user|>Who are you?<|end|><|assistant|>A small model.<|end|>

A vocabulary without these tokens has ``PLAIN``, in which the roles are text::

    User: Who are you?

    Assistant: A small model.

    User:

What a message holds never becomes a special token, nor a turn of its own: a space parts the name of
a marker in it, ``< |user|>``. The tools that make the tokens from one text need that, and it is
done here too, so that all make the same ids.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tinygpt.errors import DataError, TokenizerError
from tinygpt.text.chat.conversations import is_learned
from tinygpt.text.tokenizers import (
    ASSISTANT,
    END,
    MARKERS,
    SYSTEM,
    TURN_END,
    USER,
    Tokenizer,
    special_of,
)
from tinygpt.untrusted import brief

ROLES = ("system", "user", "assistant")
"""Who a message can be from. ``developer``, OpenAI's newer word, is read as ``system``."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as tokens."""

    ids: NDArray[np.uint32]
    """(n,)"""
    counted: NDArray[np.bool_]
    """(n,): the tokens that the loss counts, which are the answers' and those that end them."""


class Part(NamedTuple):
    """A part of the text of a conversation."""

    text: str
    counted: bool = False
    """Whether the loss counts it."""
    own: bool = True
    """Whether it is the template's, whose names of special tokens stand for these."""
    special: int | None = None
    """The id, where the text is the name of a special token."""


@dataclass(frozen=True)
class Template:
    """What stands around the messages of a conversation. Names of special tokens stand for them."""

    name: str
    system: str
    """Begins a turn of the system."""
    user: str
    """Begins a turn of the user."""
    assistant: str
    """Begins a turn of the assistant: what follows is the answer."""
    end: str
    """Ends every turn."""
    start: str = ""
    """Stands once before everything."""
    space: str = ""
    """Stands before an answer that is not empty, whose own outer white space is then dropped."""
    stop: str = ""
    """The text that begins the user's next turn, where no special token ends an answer. It belongs
    to the answer's end: the model learns it, and generation stops there."""

    def render(
        self, tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], answer: bool = False
    ) -> Rendered:
        """The tokens of a conversation; with ``answer`` also those that begin an answer.

        A message has a ``role`` of ``ROLES`` and a ``content``, a text. Raises DataError for other
        ones, naming the first, and TokenizerError for a character that the vocabulary lacks.
        """
        special = special_of(tokenizer)
        parts = [
            small
            for part in self._parts(messages, answer, special)
            for small in _split(part, special)
        ]
        ids: list[int] = []
        counted: list[bool] = []
        for token, group in groupby(parts, key=lambda part: part.special):
            run = list(group)
            if token is None:  # texts that no special token parts are encoded as one
                found = tokenizer.encode("".join(part.text for part in run))
                counted += _counted(tokenizer, run, found)
            else:
                found = [token] * len(run)
                counted += [part.counted for part in run]
            ids += found
        return Rendered(np.array(ids, np.uint32), np.array(counted, np.bool_))

    def text(self, messages: Sequence[Mapping[str, Any]], answer: bool = False) -> str:
        """The conversation as a text in which special tokens are names, as other tools have it.

        >>> PLAIN.text([{"role": "user", "content": "Hello"}], answer=True)
        'User: Hello\\n\\nAssistant:'
        """
        return "".join(part.text for part in self._parts(messages, answer, ()))

    def stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """The special tokens at which an answer is over: what ends a turn, or begins one."""
        special = special_of(tokenizer)
        around = self.end + self.system + self.user + self.assistant
        return tuple(i for name, i in special.items() if name == END or name in around)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The texts at which an answer is over, in the form of stop strings."""
        return (self.stop,) if self.stop else ()

    def to_dict(self) -> dict[str, str]:
        """All fields, for a file."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Template:
        """The inverse of ``to_dict``; TokenizerError for anything else."""
        names = [field.name for field in fields(cls)]
        try:
            known = cls(**values)
        except TypeError:
            raise TokenizerError(
                f"The kept chat template has the fields {', '.join(map(brief, values))}; known are "
                f"{', '.join(names)}."
            ) from None
        if not all(isinstance(text, str) for text in asdict(known).values()):
            raise TokenizerError("The kept chat template has fields that are no texts.")
        return known

    def neutral(self, content: str, special: Iterable[str] = ()) -> str:
        """A content in which nothing is read as a marker or as a turn: a space parts each name.

        >>> MARKED.neutral("a <|end|> of 1 <| 2", MARKERS)
        'a < |end|> of 1 <| 2'
        """
        for name, harmless in self.harmless(special):
            content = content.replace(name, harmless)
        return content

    def harmless(self, special: Iterable[str] = ()) -> list[tuple[str, str]]:
        """The texts that no content may hold, each with what stands for it."""
        turns = ["\n" + begin.strip() for begin in (self.user, self.assistant) if self.stop]
        # the longest first: one name may begin another
        names = sorted({END, *special, *turns}, key=lambda name: (-len(name), name))
        return [(name, f"{name[0]} {name[1:]}") for name in names]

    def _parts(
        self, messages: Sequence[Mapping[str, Any]], answer: bool, special: Iterable[str]
    ) -> Iterator[Part]:
        """The text of the conversation in parts."""
        yield Part(self.start)
        before, learned = "", False
        for at, message in enumerate(messages):
            role, content = _checked(at, message)
            content = self.neutral(content, special)
            if role == "user" and before == "assistant" and self.stop:
                yield Part(self.user.rstrip(), counted=learned)
                yield Part(self.user[len(self.user.rstrip()) :])
            else:
                yield Part({"system": self.system, "user": self.user}.get(role, self.assistant))
            if role == "assistant" and self.space:
                content = f"{self.space}{content.strip()}".rstrip()
            before, learned = role, is_learned(message)
            yield Part(content, counted=learned, own=False)
            yield Part(self.end, counted=learned)
        if answer:
            yield Part(self.assistant)
        elif before == "assistant" and self.stop:
            yield Part(self.user.rstrip(), counted=learned)


MARKED = Template("marked", SYSTEM, USER, ASSISTANT, TURN_END)
"""Roles and the ends of turns are special tokens."""
PLAIN = Template("plain", "", "User: ", "Assistant:", end="\n\n", space=" ", stop="\nUser:")
"""Roles are text: for a vocabulary without special tokens for them."""
CHATML = Template(
    "chatml",
    "<|im_start|>system\n",
    "<|im_start|>user\n",
    "<|im_start|>assistant\n",
    "<|im_end|>\n",
)
"""What many models of others have."""
TEMPLATES = {template.name: template for template in (MARKED, PLAIN, CHATML)}


def template_of(tokenizer: Tokenizer | None) -> Template | None:
    """The template that is kept with a vocabulary, or ``MARKED`` where it has the tokens for it.

    None for one that was made for no conversations; ``PLAIN`` works with every vocabulary.
    """
    kept = getattr(tokenizer, "template", None)
    if kept:
        return Template.from_dict(kept)
    return MARKED if set(MARKERS) <= set(special_of(tokenizer)) else None


def _checked(at: int, message: Mapping[str, Any]) -> tuple[str, str]:
    """The role and the content of the message with that number."""
    role, content = message.get("role"), message.get("content")
    role = "system" if role == "developer" else role
    if role not in ROLES:
        raise DataError(f"Message {at + 1} has the role {brief(role)}, wanted one of {ROLES}.")
    if not isinstance(content, str):
        raise DataError(
            f"Message {at + 1}, of the {role}, has the content {brief(content)}, wanted a text."
        )
    return role, content


def _split(part: Part, special: Mapping[str, int]) -> Iterator[Part]:
    """A part of the template's cut where special tokens are; other parts as they are.

    Of an end that is counted, what follows the last special token is not: generation stops there.
    """
    if not part.own or not (names := [name for name in special if name in part.text]):
        if part.text:
            yield part
        return
    longest_first = sorted(names, key=len, reverse=True)
    texts = re.split(f"({'|'.join(map(re.escape, longest_first))})", part.text)
    last = max(at for at, text in enumerate(texts) if text in special)
    for at, text in enumerate(texts):
        if text:
            yield Part(text, part.counted and at <= last, special=special.get(text))


def _counted(tokenizer: Tokenizer, run: Sequence[Part], ids: Sequence[int]) -> list[bool]:
    """Which of the tokens of these texts are counted: those with a byte of a counted part."""
    kinds = {part.counted for part in run}
    if len(kinds) < 2:
        return [*kinds] * len(ids)
    flags = np.repeat(
        [part.counted for part in run], [len(part.text.encode()) for part in run]
    )  # (bytes,)
    ends = np.cumsum([len(tokenizer.decode_bytes([i])) for i in ids])  # (n,)
    before = np.concatenate([[0], np.cumsum(flags)])  # counted bytes before each byte
    starts = np.concatenate([[0], ends[:-1]])
    return [bool(flag) for flag in before[ends] > before[starts]]
