"""Batches of tokens: a pure function of the tokens, the step and the seed."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from tinygpt.errors import DataError
from tinygpt.text.chat.packing import Conversations
from tinygpt.text.joined import Part
from tinygpt.text.mix import Mix
from tinygpt.text.tokens import Tokens

# Training and validation ------------------------------------------------------------------------


def split(tokens: Tokens, val_fraction: float, block_size: int) -> tuple[Tokens, Tokens | None]:
    """The beginning for training, the last ``val_fraction`` for validation; None if that is 0.

    Both are views. Each must hold a block and the target of its last token, ``block_size + 1``
    tokens; a DataError says what would fit. What a folder of shards holds out in files of its own
    takes the place of that share, unless the share is 0.
    """
    if isinstance(tokens, Mix):
        return _split_mix(tokens, val_fraction, block_size)
    if not 0 <= val_fraction < 1:
        raise DataError(f"val_fraction={val_fraction!r} is out of range: at least 0, less than 1.")
    if isinstance(tokens, Conversations):
        return _split_conversations(tokens, val_fraction, block_size)
    cut = _cut(len(tokens), val_fraction)
    if val_fraction == 0:
        check_length(tokens, block_size)
        return tokens, None
    if (held_out := getattr(tokens, "held_out", None)) is not None:
        for part in (tokens, held_out):
            check_length(part, block_size)
        return tokens, held_out
    if min(cut, len(tokens) - cut) <= block_size:
        raise DataError(_too_short(len(tokens), val_fraction, block_size))
    return tokens[:cut], tokens[cut:]


def _split_mix(mix: Mix, val_fraction: float, block_size: int) -> tuple[Mix, Mix | None]:
    """Each source is split, and both mixes have the same shares."""
    training, held_out = {}, {}
    for name, tokens in mix.sources.items():
        try:
            training[name], held_out[name] = split(tokens, val_fraction, block_size)
        except DataError as error:
            raise DataError(f"{name}: {error}") from error
    kept = None if val_fraction == 0 else Mix(held_out, mix.shares)
    return Mix(training, mix.shares), kept


def _split_conversations(
    tokens: Conversations, val_fraction: float, block_size: int
) -> tuple[Conversations, Conversations | None]:
    """The first conversations, and the last ones; none is divided."""
    if val_fraction == 0:
        check_length(tokens, block_size)
        return tokens, None
    parts = tokens.split(val_fraction)
    if not (parts[0].count and parts[1].count):
        raise DataError(
            f"There are too few conversations: of {tokens.count} none is left for "
            f"{'validation' if parts[0].count else 'training'} (val_fraction={val_fraction:g}). "
            f"What would do: more of them, or val_fraction=0 (no validation)."
        )
    for part in parts:
        check_length(part, block_size)
    return parts


def _cut(count: int, val_fraction: float) -> int:
    return int(count * (1 - val_fraction))


def _too_short(count: int, val_fraction: float, block_size: int) -> str:
    cut = _cut(count, val_fraction)
    fits = min(cut, count - cut) - 1
    fraction = math.ceil((block_size + 1) / count * 1000) / 1000 if count else 1.0
    ways = [f"block_size={fits} or less"] if fits > 0 else []
    cut_then = _cut(count, fraction)
    if min(cut_then, count - cut_then) > block_size:
        ways.append(f"val_fraction={fraction:g}")
    elif count > block_size:
        ways.append("val_fraction=0 (no validation)")
    return (
        f"The text is too short: of its {count} tokens {cut} are for training and {count - cut} "
        f"for validation (val_fraction={val_fraction:g}), and each part needs {block_size + 1} "
        f"(block_size={block_size}, and the target of the last token). "
        f"What would do: {', or '.join([*ways, 'a longer text'])}."
    )


def check_length(tokens: Part, block_size: int) -> None:
    """DataError unless the tokens, or each source of a mix, hold a block and its last target."""
    if isinstance(tokens, Mix):
        for part in tokens.parts:
            check_length(part, block_size)
        return
    if isinstance(tokens, Conversations):
        tokens.packed(block_size)
        return
    if len(tokens) <= block_size:
        way = f"block_size={len(tokens) - 1} or less, or " if len(tokens) > 1 else ""
        raise DataError(
            f"The text is too short: it has {len(tokens)} tokens, and a block needs "
            f"{block_size + 1} (block_size={block_size}, and the target of the last token). "
            f"What would do: {way}a longer text."
        )


# Batches ----------------------------------------------------------------------------------------

ORDER = 1
"""Number of this order of batches. Checkpoints hold it, so that the end of another order is said
when a run goes on: in order 0, which they do not name, blocks came from random places."""
ROUNDS = 6
"""Rounds of the Feistel network that shuffles the blocks of an epoch."""
MASK = (1 << 64) - 1

Hashes = NDArray[np.uint64]


def batch(
    tokens: Tokens, step: int, seed: int, batch_size: int, block_size: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Inputs and targets (B, T) of one step; in an epoch each token is a target once.

    An epoch cuts the text into blocks of T tokens, beginning at a place that is drawn anew for
    each epoch, and deals them out in random order. The text is a circle for that: the block that
    runs over its end goes on at its beginning, and what is left out of an epoch are the fewer than
    T tokens before the place where it began. The first token of the text is never a target.

    Of ``Conversations`` each row is a block of them, once in an epoch, and targets that the loss
    leaves out are -1.

    Of a ``Mix`` each row is from one of its sources, in their shares: see there; the epochs are
    those of each source.

    A pure function: nothing is remembered from step to step, so a resumed run needs only the number
    of the step. Place and order are hashes of (seed, epoch), in whole numbers, and thus the same on
    every machine. Time and memory do not depend on the length of the text.
    """
    first = int(step) * batch_size
    if not isinstance(tokens, Mix):
        return _rows(tokens, first, batch_size, int(seed), block_size)
    x, y = np.empty((2, batch_size, block_size), np.int32)
    for source, (part, (own, before)) in enumerate(
        zip(tokens.parts, tokens.rows(first, batch_size), strict=True)
    ):
        if len(own):
            x[own], y[own] = _rows(part, before, len(own), int(seed) ^ source << 40, block_size)
    return x, y


def _rows(
    tokens: Part, first: int, count: int, seed: int, block_size: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Inputs and targets (count, T) of the rows from number ``first`` on of one text."""
    check_length(tokens, block_size)
    packed = tokens.packed(block_size) if isinstance(tokens, Conversations) else None
    targets = len(tokens) - 1
    blocks = targets // block_size if packed is None else len(packed.ids)
    epoch, first = divmod(first, blocks)
    later, dealt = np.divmod(np.arange(first, first + count, dtype=np.uint64), np.uint64(blocks))
    epochs = later + np.uint64(epoch & MASK)  # (B,) a batch may reach into the next epochs
    keys = _hash(_hash(np.array([seed & MASK], np.uint64)) + epochs)
    if packed is not None:
        return packed.rows(_shuffle(dealt, blocks, keys).astype(np.int64))
    starts = keys % np.uint64(targets) + _shuffle(dealt, blocks, keys) * np.uint64(block_size)
    places = (starts.astype(np.int64)[:, None] + np.arange(block_size)) % targets  # (B, T)
    return _read(tokens, places), _read(tokens, places + 1)


def _read(tokens: Part, places: NDArray[np.int64]) -> NDArray[np.int32]:
    return np.asarray(tokens[places], np.int32)


def _shuffle(x: Hashes, size: int, keys: Hashes) -> Hashes:
    """Where the permutation of ``range(size)`` that belongs to a key sends x, for each x and key.

    A Feistel network over pairs of digits to the base ``side``, with addition in place of XOR, so
    that it permutes side² numbers, hardly more than ``size``; what falls outside goes through it
    again until it falls inside ("cycle walking"). Black and Rogaway 2002, "Ciphers with Arbitrary
    Finite Domains".
    """
    side = np.uint64(math.isqrt(size - 1) + 1)  # side² >= size > (side - 1)²
    left, right = np.divmod(x, side)
    for i in range(ROUNDS):
        added = _hash(keys + np.uint64(i << 32) + right)
        left, right = right, (left + added % side) % side
    x = left * side + right
    outside = x >= size
    if outside.any():
        x[outside] = _shuffle(x[outside], size, keys[outside])
    return x


def _hash(x: Hashes) -> Hashes:
    """The next output of SplitMix64 from state x (Steele, Lea and Flood 2014), modulo 2^64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)
