"""A model's answers to questions, and how many of them are right.

Answers are greedy, and several questions are asked at a time.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, NamedTuple

from tinygrad import dtypes

from tinygpt.config import GPTConfig
from tinygpt.errors import DataError
from tinygpt.generation import decoder as decoding
from tinygpt.generation.decoder import ROWS, Decoder
from tinygpt.model.cache import cache_bytes
from tinygpt.text.chat.conversations import is_learned
from tinygpt.text.chat.window import Asked, ask
from tinygpt.text.tokenizers import USER, Tokenizer, special_of

Messages = Sequence[Mapping[str, Any]]
CACHE = 1 << 27
"""Bytes of keys and values at most, for questions that are asked together."""
SHORT = 32
"""Tokens of the longest answer that is asked for while a model trains."""
QUESTIONS = 64
"""Questions that are asked at an evaluation, at most."""
SHARE = 0.02
"""Share of a run's time that these questions may take, besides the first and the last ones."""


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
    """Ask all questions; -> each with its answer, the shortest questions first."""
    window = decoder.model.config.block_size
    prompts = [
        (task, ask(tokenizer, task.messages, window, max_tokens, most=window)) for task in tasks
    ]
    prompts.sort(key=lambda pair: len(pair[1].ids))
    size = together(decoder.model.config)
    for at in range(0, len(prompts), size):
        some = prompts[at : at + size]
        said = _greedy(decoder, [asked for _, asked in some], max_tokens, tokenizer.vocab_size)
        for (task, asked), ids in zip(some, said, strict=True):
            yield task, _answer(tokenizer, ids, asked)


def together(config: GPTConfig) -> int:
    """How many questions are asked at a time."""
    return max(1, min(ROWS[-1], CACHE // cache_bytes(config, dtypes.float32)))


def _greedy(
    decoder: Decoder, prompts: Sequence[Asked], max_tokens: int, limit: int
) -> list[list[int]]:
    """The likeliest tokens below ``limit`` that follow each prompt, up to one that ends it."""
    sequences = [decoding.Sequence(asked.ids) for asked in prompts]
    live = list(range(len(prompts)))
    for _ in range(max_tokens):
        logits = decoder.next_logits([sequences[i] for i in live])[:, :limit]  # (live, V)
        for i, token in zip(live, logits.argmax(-1).tolist(), strict=True):
            sequences[i].ids.append(token)
        live = [i for i in live if sequences[i].ids[-1] not in prompts[i].stop_ids]
        if not live:
            break
    for sequence in sequences:
        decoder.release(sequence)
    return [s.ids[len(asked.ids) :] for s, asked in zip(sequences, prompts, strict=True)]


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


class Exam:
    """Questions that a model is asked while it trains.

    It changes nothing in training: answers are greedy, and no random number is drawn.
    """

    def __init__(self, tasks: Sequence[Task], tokenizer: Tokenizer) -> None:
        """At most ``QUESTIONS`` of the tasks with short answers, as many of each kind as can be.

        Raises DataError if none has a short answer, and TokenizerError for a character of these
        that the vocabulary lacks.
        """
        self.tokenizer = tokenizer
        short = [task for task in tasks if len(task.wanted) <= 8 * SHORT]
        lengths = [len(tokenizer.encode(task.wanted)) for task in short]
        self.tasks = _mixed([t for t, n in zip(short, lengths, strict=True) if n <= SHORT])
        if not self.tasks:
            raise DataError(
                f"None of the {len(tasks):,} answers has at most {SHORT} tokens: no other ones are "
                f"asked for while a model trains."
            )
        self._spent = 0.0

    def due(self, elapsed: float) -> bool:
        """Whether there is time for it, so many seconds after the run began."""
        return self._spent <= SHARE * elapsed

    def take(self, decoder: Decoder) -> dict[str, float]:
        """The share of exact answers by kind, and of all of them, ``total``."""
        began = time.perf_counter()
        by_kind: dict[str, Score] = defaultdict(Score)
        for task, answer in scores(decoder, self.tokenizer, self.tasks, SHORT + 1):
            for kind in (task.kind, "total"):
                by_kind[kind].add(answer, task.wanted)
        self._spent += time.perf_counter() - began
        total = by_kind.pop("total")
        shares = {kind: score.right / score.asked for kind, score in sorted(by_kind.items())}
        return {**shares, "total": total.right / total.asked}


def _mixed(tasks: Sequence[Task]) -> list[Task]:
    """The first ``QUESTIONS`` tasks, taken from each kind in turn."""
    by_kind: dict[str, list[Task]] = defaultdict(list)
    for task in tasks:
        by_kind[task.kind].append(task)
    turns = zip_longest(*by_kind.values())
    return [task for turn in turns for task in turn if task is not None][:QUESTIONS]
