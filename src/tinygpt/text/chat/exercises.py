"""Conversations that show whether a small model learned to answer, made from a seed.

==========  ========================  =========
``add``     ``47+85=``                ``132``
``copy``    ``copy wotir``            ``wotir``
``reverse`` ``reverse wotir``         ``ritow``
``fact``    ``Where was Mira born?``  ``Lisbon``
``python``  ``title of with``         ``The with statement``
==========  ========================  =========

Whether a question is held out follows from its own hash, so that no question is in both parts,
whatever the seed and the number. Two-digit sums are all 8100 pairs: learning the others must do for
those held out. Facts are of people whom the seed makes up, and what is held out of these is another
way to ask: a fact that was never told cannot be known.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from tinygpt.text.documents import python_topics

HELD_OUT = 10
"""One question in so many is held out."""
SHARES = {"add": 6, "copy": 2, "reverse": 2, "fact": 1, "python": 1}
"""How often each kind is asked, in proportion."""
LETTERS = "abcdefghijklmnopqrstuvwxyz"
LONGEST = 6
"""Letters of a word that is copied or reversed."""
PEOPLE = 40
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

    @property
    def held_out(self) -> bool:
        """Whether it belongs to the part that is not trained on."""
        digest = hashlib.sha256(self.question.encode()).digest()
        return int.from_bytes(digest[:4], "big") % HELD_OUT == 0

    def record(self) -> dict[str, object]:
        """It in OpenAI's form, with its kind."""
        return {
            "messages": [
                {"role": "user", "content": self.question},
                {"role": "assistant", "content": self.answer},
            ],
            "kind": self.kind,
        }


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
            if exercise.held_out is not held_out:
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
    """The kinds whose answers must have been told: everything is told in one way of asking, and
    what is held out is the other way of asking, of one in ten."""
    facts = list(_asked_twice("fact", _facts(seed)))
    python = list(_asked_twice("python", _python()))
    return {
        "fact": [e for e, other in facts if other is held_out],
        "python": [e for e, other in python if other is held_out],
    }


def _asked_twice(
    kind: str, asked: Iterator[tuple[str, str, str]]
) -> Iterator[tuple[Exercise, bool]]:
    """Each exercise, and whether it is held out, which only the second way of asking can be."""
    for first, second, answer in asked:
        again = Exercise(kind, second, answer)
        yield Exercise(kind, first, answer), False
        yield again, again.held_out


def _facts(seed: int) -> Iterator[tuple[str, str, str]]:
    """Two ways of asking for a fact of a made-up person, and the fact."""
    rng, names = random.Random(f"people {seed}"), set[str]()
    while len(names) < PEOPLE:
        name = "".join(rng.choice("bdklmnrstv") + rng.choice("aeiou") for _ in range(2)).title()
        if name in names:
            continue
        names.add(name)
        yield f"Where was {name} born?", f"{name} was born in?", rng.choice(TOWNS)
        yield f"What is {name}'s job?", f"{name} works as?", rng.choice(TRADES)


def _python() -> Iterator[tuple[str, str, str]]:
    """Two ways of asking for the heading of a topic of Python's reference, and the heading."""
    for text in python_topics():
        title = text.split("\n", 1)[0].strip().replace('"', "")
        word = re.search(r'The "(\w+)" statement', text[:200])
        if word and len(title) < 40:
            yield f"Python: what is {word[1]}?", f"{word[1]} in Python?", title
