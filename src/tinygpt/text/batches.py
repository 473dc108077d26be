"""Batches of tokens: a pure function of the tokens, the step and the seed."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from tinygpt.errors import DataError
from tinygpt.text.tokens import Tokens

# Training and validation ------------------------------------------------------------------------


def split(tokens: Tokens, val_fraction: float, block_size: int) -> tuple[Tokens, Tokens | None]:
    """The beginning for training, the last ``val_fraction`` for validation; None if that is 0.

    Both are views. Each must hold a block and the target of its last token, ``block_size + 1``
    tokens; a DataError says what would fit.
    """
    if not 0 <= val_fraction < 1:
        raise DataError(f"val_fraction={val_fraction!r} is out of range: at least 0, less than 1.")
    cut = _cut(len(tokens), val_fraction)
    if val_fraction == 0:
        check_length(tokens, block_size)
        return tokens, None
    if min(cut, len(tokens) - cut) <= block_size:
        raise DataError(_too_short(len(tokens), val_fraction, block_size))
    return tokens[:cut], tokens[cut:]


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


def check_length(tokens: Tokens, block_size: int) -> None:
    """DataError unless the tokens hold one block and the target of its last token."""
    if len(tokens) <= block_size:
        way = f"block_size={len(tokens) - 1} or less, or " if len(tokens) > 1 else ""
        raise DataError(
            f"The text is too short: it has {len(tokens)} tokens, and a block needs "
            f"{block_size + 1} (block_size={block_size}, and the target of the last token). "
            f"What would do: {way}a longer text."
        )


# Batches ----------------------------------------------------------------------------------------


def batch(
    tokens: Tokens, step: int, seed: int, batch_size: int, block_size: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Inputs and targets (B, T) of one step: blocks from random places, and the same one further.

    A pure function: nothing is remembered from step to step, so a resumed run needs only the number
    of the step. The places are raw output of Philox (Salmon et al. 2011), a cipher of (seed, step),
    and thus the same on every machine and with every version of numpy.
    """
    check_length(tokens, block_size)
    mask = (1 << 64) - 1
    philox = np.random.Philox(key=np.array([int(seed) & mask, int(step) & mask], np.uint64))
    places = philox.random_raw(batch_size) % np.uint64(len(tokens) - block_size)  # (B,)
    return _blocks_at(tokens, places.astype(np.int64), block_size)


def _blocks_at(
    tokens: Tokens, places: NDArray[np.int64], block_size: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    blocks = tokens[places[:, None] + np.arange(block_size + 1)].astype(np.int32)  # (B, T + 1)
    return blocks[:, :-1].copy(), blocks[:, 1:].copy()
