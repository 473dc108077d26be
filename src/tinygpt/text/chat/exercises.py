"""Conversations that show whether a small model learned to answer, made from a seed.

==========  ========================  =========
``add``     ``47+85=``                ``132``
``copy``    ``copy wotir``            ``wotir``
``reverse`` ``reverse wotir``         ``ritow``
``fact``    ``Where was Mira born?``  ``Lisbon``
``python``  ``__len__ takes?``        ``self``
==========  ========================  =========

Whether a question is held out follows from its own hash, so that no question is in both parts,
whatever the seed and the number. Two-digit sums are all 8100 pairs: learning the others must do for
those held out. A fact that was never told cannot be known: each is asked for in several wordings,
of which the first is always trained on, and what is held out is one of the others.

Some conversations have several turns, an exercise each. All exercises of a conversation belong to
the same part, and no two of them have the same answer, so that none can be read off another.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from tinygpt.text.documents import python_topics

HELD_OUT = 10
"""One question in so many is held out."""
HELD_OUT_WORDING = 3
"""One in so many of the further wordings in which a fact is asked for is held out."""
SEVERAL, TURNS = 0.2, (2, 4)
"""The share of conversations with several turns, and how many these have."""
SHARES = {"add": 6, "copy": 2, "reverse": 2, "fact": 2, "python": 2}
"""How often each kind is asked, in proportion."""
LETTERS = "abcdefghijklmnopqrstuvwxyz"
LONGEST = 6
"""Letters of a word that is copied or reversed."""
PEOPLE = 60
TOWNS = [
    "Lisbon",
    "Oslo",
    "Cairo",
    "Lima",
    "Quito",
    "Delhi",
    "Kyoto",
    "Perth",
    "Turin",
    "Lagos",
    "Bonn",
    "Minsk",
]
TRADES = [
    "baker",
    "pilot",
    "nurse",
    "farmer",
    "judge",
    "miner",
    "poet",
    "tailor",
    "cook",
    "diver",
    "clerk",
    "smith",
]


class Exercise(NamedTuple):
    """A question with the one right answer."""

    kind: str
    question: str
    answer: str

    def held_out(self, one_in: int = HELD_OUT) -> bool:
        """Whether it belongs to the part that is not trained on, to which one in so many does."""
        digest = hashlib.sha256(self.question.encode()).digest()
        return int.from_bytes(digest[:4], "big") % one_in == 0


def record(talk: Sequence[Exercise]) -> dict[str, object]:
    """A conversation in OpenAI's form, with its kind, or the kind of each of several answers.

    >>> record([Exercise("add", "1+1=", "2")])["kind"]
    'add'
    """
    messages = [
        {"role": role, "content": content}
        for exercise in talk
        for role, content in (("user", exercise.question), ("assistant", exercise.answer))
    ]
    kinds = [exercise.kind for exercise in talk]
    return {"messages": messages, "kind": kinds if len(kinds) > 1 else kinds[0]}


def conversations(made: Iterable[Exercise], seed: int) -> Iterator[list[Exercise]]:
    """The exercises in their order, one or several a conversation; the same for the same seed."""
    rng, talk, turns = random.Random(f"turns {seed}"), list[Exercise](), 0
    for exercise in made:
        if len(talk) == turns or exercise.answer in [told.answer for told in talk]:
            if talk:
                yield talk
            talk, turns = [], rng.randint(*TURNS) if rng.random() < SEVERAL else 1
        talk.append(exercise)
    if talk:
        yield talk


def exercises(seed: int, count: int, held_out: bool = False) -> Iterator[Exercise]:
    """``count`` exercises of all kinds, of one part; the same for the same seed.

    >>> [e.answer for e in exercises(0, 10_000) if e.question == "47+85="][:1]
    ['132']
    """
    rng, kinds = random.Random(f"{seed} {held_out}"), list(SHARES)
    known = _fixed(seed, held_out)
    made = 0
    while made < count:
        kind = rng.choices(kinds, list(SHARES.values()))[0]
        if kind in known:
            yield rng.choice(known[kind])
        else:
            exercise = MAKERS[kind](rng)
            if exercise.held_out() is not held_out:
                continue
            yield exercise
        made += 1


def _add(rng: random.Random) -> Exercise:
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    return Exercise("add", f"{a}+{b}=", str(a + b))


def _word(rng: random.Random) -> str:
    return "".join(rng.choices(LETTERS, k=rng.randint(2, LONGEST)))


def _copy(rng: random.Random) -> Exercise:
    word = _word(rng)
    return Exercise("copy", f"copy {word}", word)


def _reverse(rng: random.Random) -> Exercise:
    word = _word(rng)
    return Exercise("reverse", f"reverse {word}", word[::-1])


MAKERS: dict[str, Callable[[random.Random], Exercise]] = {
    "add": _add,
    "copy": _copy,
    "reverse": _reverse,
}


def _fixed(seed: int, held_out: bool) -> dict[str, list[Exercise]]:
    """The exercises of one part of the kinds whose answers must have been told."""
    found = dict[str, list[Exercise]]()
    for kind, facts in (("fact", _facts(seed)), ("python", _python())):
        found[kind] = [
            exercise
            for wordings, answer in facts
            for at, question in enumerate(wordings)
            for exercise in [Exercise(kind, question, answer)]
            if (at > 0 and exercise.held_out(HELD_OUT_WORDING)) is held_out
        ]
    return found


Fact = tuple[tuple[str, ...], str]
"""The wordings of a question, and the answer."""


def _facts(seed: int) -> Iterator[Fact]:
    """Facts of made-up people."""
    rng, names = random.Random(f"people {seed}"), set[str]()
    while len(names) < PEOPLE:
        name = "".join(rng.choice("bdklmnrstv") + rng.choice("aeiou") for _ in range(2)).title()
        if name in names:
            continue
        names.add(name)
        born = (f"Where was {name} born?", f"{name} was born in?", f"{name}'s birthplace?")
        yield born, rng.choice(TOWNS)
        job = (f"What is {name}'s job?", f"{name} works as?", f"What does {name} do?")
        yield job, rng.choice(TRADES)


def _python() -> Iterator[Fact]:
    """Headings of statements in Python's reference, and the parameters of its special methods."""
    methods = dict[str, str]()
    for text in python_topics():
        title = text.split("\n", 1)[0].strip().replace('"', "")
        word = re.search(r'The "(\w+)" statement', text[:200])
        if word and len(title) < 40:
            name = word[1]
            yield (f"Python: what is {name}?", f"{name} in Python?", f"What is {name}?"), title
        methods |= re.findall(r"^object\.(__\w+__)\(([^)\n]{1,24})\)", text, re.MULTILINE)
    for name, parameters in methods.items():
        wordings = (f"What does {name} take?", f"{name} takes?", f"Parameters of {name}?")
        yield wordings, parameters
