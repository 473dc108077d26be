"""What of a text stands in another word for word: the longest passages that both have.

A model may write what it has learned, or what it has learned by heart. To tell one from the other
its samples are looked up in the training text. For every place in a sample we want the longest
passage that begins there and stands somewhere in the training text. All suffixes of both are
sorted together: then the one of the training text that agrees the longest with a given one of a
sample is the nearest before it or the nearest after it.

Suffixes are sorted by their first h characters, then by their first 2h, which are two groups of h
characters that have their places already, and so on (Manber and Myers, 1990); those that have
found a place of their own take no part any more (Larsson and Sadakane, 2007). The training text
is taken in parts that overlap, so that memory does not grow with it. Characters are Unicode's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.uint32]
"""Text as Unicode code points."""
Numbers = NDArray[np.int64]

PART = 1 << 21
"""Characters of the training text that are sorted at a time, in about 200 MB."""
END_OF_TEXT, END_OF_SAMPLE = 0x110000, 0x110001
"""Behind a text and behind a sample: no characters, and not alike, so no passage spans them."""
STEP = 32
"""Characters that are compared at a time."""


@dataclass(frozen=True)
class Passage:
    """A stretch of a sample that stands in the training text."""

    sample: int
    start: int
    """Where it begins in its sample, in characters."""
    length: int
    place: int
    """Where it stands in the training text, in characters: the first part of it that has it."""
    text: str


@dataclass(frozen=True)
class Overlap:
    """How much of some samples stands in the training text."""

    samples: int
    characters: int
    longest: int
    """The longest passage, in characters."""
    mean_longest: float
    """Each sample's longest passage, on average."""
    covered: float
    """Share of the characters that belong to a passage of at least ``min_length``."""
    passages: list[Passage]
    """The longest of those passages, at most so many as were asked for; none overlap."""

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "passages": [vars(passage) for passage in self.passages]}


def overlap(
    samples: Sequence[str], pieces: Iterable[str], min_length: int = 50, most: int = 5
) -> Overlap:
    """How much of the samples stands in a text that comes in pieces; see `Overlap`.

    >>> overlap(["a cat sat here"], ["the cat sat down"], min_length=5).passages[0].text
    ' cat sat '
    """
    return overlaps([samples], pieces, min_length, most)[0]


def overlaps(
    groups: Sequence[Sequence[str]], pieces: Iterable[str], min_length: int = 50, most: int = 5
) -> list[Overlap]:
    """`overlap` for several groups of samples, for which the text is sorted only once."""
    samples = [as_codes(sample) for group in groups for sample in group]
    lengths, places = matches(samples, pieces)
    found, first = [], 0
    for group in groups:
        last = first + len(group)
        found.append(_judge(group, lengths[first:last], places[first:last], min_length, most))
        first = last
    return found


def as_codes(text: str) -> Codes:
    """The code points of a text (n,); lone surrogates, which a model may write, stay."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def matches(samples: Sequence[Codes], pieces: Iterable[str]) -> tuple[list[Numbers], list[Numbers]]:
    """For each place in each sample the length of the longest passage that begins there, and where
    that stands in the text (-1 where it is 0).
    """
    lengths = [np.zeros(len(sample), np.int64) for sample in samples]
    places = [np.full(len(sample), -1) for sample in samples]
    longest = max(map(len, samples), default=0)
    for begin, part in parts(pieces, overlapping=longest):
        found = _matches_in(part, samples)
        for i, (length, place) in enumerate(found):
            better = length > lengths[i]
            lengths[i][better], places[i][better] = length[better], begin + place[better]
    return lengths, places


def parts(pieces: Iterable[str], overlapping: int) -> Iterator[tuple[int, Codes]]:
    """(where it begins, the part) of a text: each repeats the last characters of the one before."""
    step = max(PART, 2 * overlapping)
    begin, count, part = 0, 0, np.empty(step, np.uint32)
    for piece in pieces:
        codes = as_codes(piece)
        while len(codes):
            if count == step:
                yield begin, part
                begin, count = begin + step - overlapping, overlapping
                part, before = np.empty(step, np.uint32), part
                part[:overlapping] = before[step - overlapping :]
            taken, codes = codes[: step - count], codes[step - count :]
            part[count : count + len(taken)] = taken
            count += len(taken)
    if count:
        yield begin, part[:count]


def _matches_in(part: Codes, samples: Sequence[Codes]) -> Iterator[tuple[Numbers, Numbers]]:
    """(lengths, places) for each sample, of one part of the text."""
    joined = [part, np.array([END_OF_TEXT], np.uint32)]
    for sample in samples:
        joined += [sample, np.array([END_OF_SAMPLE], np.uint32)]
    codes = np.concatenate(joined)
    order = suffix_order(codes, max(map(len, samples), default=0))
    at = np.flatnonzero(order > len(part))  # where samples' suffixes are in the order
    in_text = np.where(order < len(part), np.arange(len(order)), -1)
    before = np.maximum.accumulate(in_text)[at]
    in_text[in_text < 0] = len(order)
    after = np.minimum.accumulate(in_text[::-1])[::-1][at]
    length = np.zeros(len(codes), np.int64)
    place = np.full(len(codes), -1)
    for neighbour in (before, after):
        there = (neighbour >= 0) & (neighbour < len(order))
        mine, theirs = order[at[there]], order[neighbour[there]]
        common = common_length(codes, mine, theirs)
        better = common > length[mine]
        length[mine[better]], place[mine[better]] = common[better], theirs[better]
    start = len(part) + 1
    for sample in samples:
        end = start + len(sample)
        yield length[start:end], place[start:end]
        start = end + 1


def suffix_order(codes: Codes, far: int) -> Numbers:
    """Where the suffixes of ``codes`` begin, sorted by their first ``far`` characters at least."""
    (keys, h), n = _first_ranks(codes), len(codes)
    order, ranks, tied = np.arange(n), np.empty(n, np.int64), np.arange(n)
    while True:
        # suffixes with equal ranks stand side by side, at the places ``tied``: sort them by key
        by_key = np.argsort(keys, kind="stable")
        order[tied], keys = order[tied][by_key], keys[by_key]
        first = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]])
        sizes = np.diff(np.r_[first, len(keys)])
        ranks[order[tied]] = np.repeat(tied[first], sizes)
        tied = tied[np.repeat(sizes > 1, sizes)]
        if not len(tied) or h >= far:
            return order
        # what has equal first h characters is sorted by the rank of what follows them
        suffixes = order[tied]
        ahead = suffixes + h
        follows = np.where(ahead < n, ranks[np.minimum(ahead, n - 1)] + 1, 0)
        keys = ranks[suffixes] * (n + 1) + follows
        h *= 2


def _first_ranks(codes: Codes) -> tuple[Numbers, int]:
    """A number for each suffix that grows with its first h characters, and h."""
    known = np.zeros(END_OF_SAMPLE + 1, bool)
    known[codes] = True
    digits = np.cumsum(known)[codes]  # 1, 2, ... for the characters that occur; 0 is the end
    base = int(known.sum()) + 1
    h = max(1, int(62 // np.log2(base)))
    padded = np.r_[digits, np.zeros(h, digits.dtype)]
    ranks = np.zeros(len(codes), np.int64)
    for i in range(h):
        ranks = ranks * base + padded[i : i + len(codes)]
    return ranks, h


def common_length(codes: Codes, a: Numbers, b: Numbers) -> Numbers:
    """How many characters the suffixes at a and at b (n,) have in common before they differ.

    Two pairs of suffixes that are equally far apart compare the same characters from the second of
    them on. So each pair is compared up to the next such pair only, and takes over what that found:
    a sample that stands in the text as a whole takes time in proportion to its length.
    """
    order = np.lexsort((a, a - b))
    a, b = a[order], b[order]
    until = np.full(len(a), len(codes))  # characters to the next pair that is as far apart
    follows = np.flatnonzero(np.diff(a - b) == 0)
    until[follows] = np.diff(a)[follows]
    lengths = np.minimum(_compared(codes, a, b, until), until)
    ends = np.where(lengths < until, np.arange(len(a)), len(a))  # pairs that met a difference
    ends = np.minimum.accumulate(ends[::-1])[::-1]
    common = np.zeros(len(a), np.int64)
    common[order] = a[ends] + lengths[ends] - a
    return common


def _compared(codes: Codes, a: Numbers, b: Numbers, until: Numbers) -> Numbers:
    """The same (n,), but for those that have ``until`` characters in common, or more."""
    padded = np.r_[codes, np.arange(STEP, dtype=np.uint32) + END_OF_SAMPLE + 1]
    lengths = np.zeros(len(a), np.int64)
    going, ahead = np.flatnonzero(until > 0), np.arange(STEP)
    while len(going):
        start = lengths[going, None] + ahead
        same = padded[a[going, None] + start] == padded[b[going, None] + start]  # (n, STEP)
        whole = same.all(1)
        lengths[going] += np.where(whole, STEP, same.argmin(1))
        going = going[whole & (lengths[going] < until[going])]
    return lengths


def _judge(
    samples: Sequence[str],
    lengths: Sequence[Numbers],
    places: Sequence[Numbers],
    min_length: int,
    most: int,
) -> Overlap:
    characters = sum(map(len, lengths))
    longest = [int(length.max(initial=0)) for length in lengths]
    covered = sum(int(_covered(length, min_length).sum()) for length in lengths)
    passages = [
        Passage(i, start, length, int(places[i][start]), samples[i][start : start + length])
        for i in range(len(samples))
        for start, length in _apart(lengths[i], min_length)
    ]
    passages.sort(key=lambda passage: -passage.length)
    return Overlap(
        samples=len(samples),
        characters=characters,
        longest=max(longest, default=0),
        mean_longest=sum(longest) / len(longest) if longest else 0.0,
        covered=covered / characters if characters else 0.0,
        passages=passages[:most],
    )


def _covered(lengths: Numbers, min_length: int) -> NDArray[np.bool_]:
    """Which characters of a sample belong to a passage that is long enough."""
    reach = np.where(lengths >= min_length, np.arange(len(lengths)) + lengths, 0)
    return np.maximum.accumulate(reach) > np.arange(len(lengths))


def _apart(lengths: Numbers, min_length: int) -> Iterator[tuple[int, int]]:
    """(start, length) of passages that are long enough, the longest first, none overlapping."""
    free = np.ones(len(lengths), bool)
    for start in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[start])
        if length < max(1, min_length):
            return
        # A passage taken before is no shorter, so one that overlaps holds either end of this one.
        if free[start] and free[start + length - 1]:
            free[start : start + length] = False
            yield start, length
