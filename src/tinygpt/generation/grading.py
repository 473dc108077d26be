"""A model's answers to questions, and how many of them are right.

Answers are greedy. Questions of one length are asked together, a batch at a time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tinygpt.config import SampleConfig
from tinygpt.generation.decoder import Decoder
from tinygpt.generation.generate import FINISHED, generate_tokens
from tinygpt.text.chat.template import is_learned
from tinygpt.text.chat.window import Asked, ask
from tinygpt.text.tokenizers import USER, Tokenizer, special_of

Messages = Sequence[Mapping[str, Any]]
BATCH = 32


class Task(NamedTuple):
    """A conversation up to an answer, and the answer that is wanted."""

    kind: str
    messages: Messages
    wanted: str

    @property
    def later(self) -> bool:
        """Whether the conversation has an answer before this one."""
        return any(message["role"] == "assistant" for message in self.messages)


@dataclass(frozen=True)
class Answer:
    """What a model said."""

    text: str
    ended: bool
    """Whether it ended by itself."""
    for_user: bool
    """Whether it went on to speak for the user."""


@dataclass
class Score:
    """How often answers were right."""

    asked: int = 0
    right: int = 0
    ended: int = 0
    for_user: int = 0

    def add(self, answer: Answer, wanted: str) -> None:
        self.asked += 1
        self.right += answer.text.strip() == wanted.strip()
        self.ended += answer.ended
        self.for_user += answer.for_user

    def to_dict(self) -> dict[str, float | int]:
        """The number of questions, and shares of them."""
        n = max(1, self.asked)
        return {
            "questions": self.asked,
            "exact": self.right / n,
            "ended": self.ended / n,
            "spoke_for_user": self.for_user / n,
        }


def tasks_of(kind: object, messages: Messages) -> Iterator[Task]:
    """A task for each answer of a conversation, of its kind, or of one each where these are listed.

    >>> talk = [{"role": role, "content": "Hi"} for role in ("user", "assistant")]
    >>> [task.kind for task in tasks_of(["a", "b"], talk * 2)]
    ['a', 'b']
    """
    places = [at for at, message in enumerate(messages) if is_learned(message)]
    kinds = [kind] * len(places)
    if isinstance(kind, list) and len(kind) == len(places):
        kinds = kind
    for at, own in zip(places, kinds, strict=True):
        yield Task(str(own), messages[:at], str(messages[at]["content"]))


def scores(
    decoder: Decoder, tokenizer: Tokenizer, tasks: Sequence[Task], max_tokens: int
) -> Iterator[tuple[Task, Answer]]:
    """Ask all questions; -> each with its answer, in the order in which they are answered."""
    window = decoder.model.config.block_size
    by_length: dict[int, list[tuple[Task, Asked]]] = defaultdict(list)
    for task in tasks:
        asked = ask(tokenizer, task.messages, window, max_tokens, most=window)
        by_length[len(asked.ids)].append((task, asked))
    for _, group in sorted(by_length.items()):
        for some in _batches(group):
            answers = _answers(decoder, tokenizer, [asked for _, asked in some], max_tokens)
            yield from zip((task for task, _ in some), answers, strict=True)


def _batches(group: list[tuple[Task, Asked]]) -> Iterator[list[tuple[Task, Asked]]]:
    return (group[at : at + BATCH] for at in range(0, len(group), BATCH))


def _answers(
    decoder: Decoder, tokenizer: Tokenizer, asked: Sequence[Asked], max_tokens: int
) -> list[Answer]:
    """The answers to prompts of one length, at most ``BATCH`` of them."""
    stops = asked[0].stop_ids
    full = [*asked, *[asked[-1]] * (BATCH - len(asked))]  # one shape serves all batches
    steps = generate_tokens(
        decoder,
        [prompt.ids for prompt in full],
        max_tokens,
        SampleConfig(temperature=0),
        limit=tokenizer.vocab_size,
        ends=stops,
    )
    said = list(zip(*(step.tolist() for step in steps), strict=True))
    return [
        _answer(tokenizer, [i for i in ids if i != FINISHED], prompt)
        for prompt, ids in zip(asked, said, strict=False)
    ]


def _answer(tokenizer: Tokenizer, ids: list[int], asked: Asked) -> Answer:
    """What these tokens say. An answer that ends in the user's marker speaks for the user, as does
    one in plain text behind whose stop something follows."""
    last = ids[-1] if ids else None
    ended = last in asked.stop_ids
    for_user = ended and last == special_of(tokenizer).get(USER)
    text = tokenizer.decode(ids[:-1] if ended else ids)
    for stop in asked.stop:
        before, found, _ = text.partition(stop)
        if found:
            text, ended = before, True
    return Answer(text, ended and not for_user, for_user)
