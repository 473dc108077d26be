"""A plain mutator of bytes: what runs where atheris does not."""

from __future__ import annotations

import random
import re

WORDS = [
    b"", b"0", b"-1", b"1e999", b"NaN", b"null", b"true", b"[]", b"{}", b'""', b"9" * 30,
    b"18446744073709551615", b"9223372036854775808", b"4294967296", b"65536", b"\0", b"\xff",
    b"\xed\xa0\x80", b'"\\ud800"', b"[" * 200, b'{"a":' * 50, b"\n", b"..", b"/", b"**/", b"'",
]  # fmt: skip
"""What is put into a file: numbers at the edges of types, and what parsers stumble over."""
LONGEST = 1 << 16


def mutated(rng: random.Random, seeds: list[bytes]) -> bytes:
    """One of the seeds, half of the time the first, changed in one to four places."""
    data = seeds[0] if rng.random() < 0.5 else rng.choice(seeds)
    for _ in range(rng.randint(1, 4)):
        data = rng.choice(CHANGES)(rng, data, seeds)
    return data[:LONGEST]


def _place(rng: random.Random, data: bytes) -> tuple[int, int]:
    start = rng.randint(0, len(data))
    return start, min(len(data), start + rng.choice((0, 1, 2, 8, 64)))


def _flip(rng: random.Random, data: bytes, seeds: list[bytes]) -> bytes:
    if not data:
        return b"\0"
    place = rng.randrange(len(data))
    return data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :]


def _put(rng: random.Random, data: bytes, seeds: list[bytes]) -> bytes:
    start, end = _place(rng, data)
    return data[:start] + rng.choice(WORDS) + data[end:]


def _repeat(rng: random.Random, data: bytes, seeds: list[bytes]) -> bytes:
    start, end = _place(rng, data)
    return data[:start] + data[start:end] * rng.choice((2, 10, 100)) + data[end:]


def _splice(rng: random.Random, data: bytes, seeds: list[bytes]) -> bytes:
    other = rng.choice(seeds)
    return data[: rng.randint(0, len(data))] + other[rng.randint(0, len(other)) :]


def _number(rng: random.Random, data: bytes, seeds: list[bytes]) -> bytes:
    """Exchange a number, or the text after a colon: the places where the meaning lies."""
    found = list(re.finditer(rb"\d+|(?<=:)\s*\"[^\"]*\"", data[:LONGEST]))
    if not found:
        return _put(rng, data, seeds)
    chosen = rng.choice(found)
    return data[: chosen.start()] + rng.choice(WORDS) + data[chosen.end() :]


CHANGES = [_flip, _put, _repeat, _splice, _number, _number]
