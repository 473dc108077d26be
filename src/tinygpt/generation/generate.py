"""Token ids in, token ids out."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tinygrad import Tensor

from tinygpt.config import SampleConfig
from tinygpt.errors import UsageError
from tinygpt.generation import decoder
from tinygpt.generation.decoder import Decoder
from tinygpt.generation.sample import make_sampler
from tinygpt.model.transformer import Transformer

Ids = npt.NDArray[np.int32]
Prompt = Tensor | npt.NDArray[np.integer] | Sequence[Sequence[int]]
Stop = int | Sequence[int] | Sequence[Sequence[int]]

FINISHED = -1
"""What ``generate_tokens`` yields for a row of a batch that has already met its stop."""


def generate_tokens(
    model: Transformer | Decoder,
    idx: Prompt,
    max_tokens: int,
    config: SampleConfig | None = None,
    seed: int | None = None,
    stop: Stop | None = None,
    *,
    limit: int | None = None,
    ends: Sequence[int] = (),
) -> Iterator[Ids]:
    """Continue each row of idx (B, T), yielding the next ids (B,) up to ``max_tokens`` times.

    A row is finished when its new tokens end in a ``stop``: an id, a list of ids each of which
    stops, or a list of sequences of ids. The stop itself is yielded; after it the row yields
    ``FINISHED`` (-1), and when all rows are finished the generator ends. The same seed gives the
    same ids, whatever else is in the batch. Wrong arguments raise UsageError at once, not at the
    first token. ``limit`` excludes ids from there on, such as those that only pad a vocabulary;
    ``ends`` are the ids that end a text, which finish a row as a stop does.

    >>> for ids in generate_tokens(model, [[1, 2, 3]], max_tokens=5):
    ...     print(ids)
    """
    decode = model if isinstance(model, Decoder) else Decoder(model)
    vocab_size = min(decode.model.config.vocab_size, limit or sys.maxsize)
    prompts = check_prompt(idx, vocab_size)
    check_max_tokens(max_tokens)
    stops = check_stop(stop, vocab_size) + [[i] for i in ends]
    pick = make_sampler(config or SampleConfig(), seed)

    def steps() -> Iterator[Ids]:
        sequences = [decoder.Sequence(ids) for ids in prompts.tolist()]
        finished = np.zeros(len(sequences), bool)
        for new in range(1, max_tokens + 1):
            logits = decode.next_logits(sequences)[:, :vocab_size]
            picked = pick(logits, [sequence.ids for sequence in sequences])  # (B,)
            for sequence, token in zip(sequences, picked.tolist(), strict=True):
                sequence.ids.append(token)
            yield np.where(finished, FINISHED, picked).astype(np.int32)
            finished |= [_ends_in(sequence.ids[-new:], stops) for sequence in sequences]
            if finished.all():
                return

    return steps()


def generate(
    model: Transformer | Decoder,
    idx: Prompt,
    max_tokens: int,
    config: SampleConfig | None = None,
    seed: int | None = None,
    stop: Stop | None = None,
    *,
    limit: int | None = None,
    ends: Sequence[int] = (),
) -> Tensor:
    """The prompt and its continuation, int32 (B, T + n) with n at most ``max_tokens``.

    Arguments as for ``generate_tokens``. Rows that finish before others are filled up with the last
    token of their stop.
    """
    steps = generate_tokens(model, idx, max_tokens, config, seed, stop, limit=limit, ends=ends)
    columns = list(as_array(idx).astype(np.int32).T)
    for ids in steps:
        columns.append(np.where(ids == FINISHED, columns[-1], ids))
    return Tensor(np.stack(columns, axis=1).astype(np.int32))


def as_array(idx: Prompt) -> npt.NDArray[Any]:
    """Token ids as numpy, unchecked but for rows of different lengths."""
    if isinstance(idx, Tensor):
        return np.asarray(idx.numpy())
    try:
        return np.asarray(idx)
    except ValueError:
        raise UsageError(
            "The prompts of a batch have different lengths. Give prompts of the same length, or "
            "generate from one after the other."
        ) from None


def check_prompt(idx: Prompt, vocab_size: int) -> Ids:
    """Token ids (B, T) as int32, or UsageError."""
    ids = as_array(idx)
    if ids.size == 0:
        raise UsageError(
            f"The prompt is empty (shape {ids.shape}). Give at least one token per row to continue."
        )
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise UsageError(
            f"The prompt has shape {ids.shape} and dtype {ids.dtype}; wanted integers of shape "
            f"(batch, time), for example [tokenizer.encode(text)]."
        )
    wrong = np.argwhere((ids < 0) | (ids >= vocab_size))
    if len(wrong):
        row, position = wrong[0]
        raise UsageError(
            f"Token {ids[row, position]} at position {position} of row {row} is outside the "
            f"vocabulary, 0 to {vocab_size - 1}. Was the text encoded with the model's tokenizer?"
        )
    return ids.astype(np.int32)


def check_max_tokens(max_tokens: int) -> None:
    """Raise UsageError unless this is a number of tokens."""
    whole = isinstance(max_tokens, int | np.integer) and not isinstance(max_tokens, bool)
    if not whole or max_tokens < 0:
        raise UsageError(f"max_tokens={max_tokens!r} is not a whole number from 0 up.")


def check_stop(stop: Stop | None, vocab_size: int) -> list[list[int]]:
    """The sequences of ids that ``stop`` stands for, or UsageError."""
    if stop is None:
        return []
    several = [stop] if isinstance(stop, int | np.integer) else stop
    advice = "wanted a token id, a list of ids, or a list of non-empty sequences of ids"
    if isinstance(stop, str) or not isinstance(several, Sequence | np.ndarray):
        raise UsageError(f"stop={stop!r}: {advice}. For text: stop=[tokenizer.encode(text)].")
    sequences = [[s] if isinstance(s, int | np.integer) else s for s in several]
    for sequence in sequences:
        ids = np.asarray(sequence)
        if ids.size == 0 or ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise UsageError(f"stop={stop!r}: {advice}.")
        if ids.min() < 0 or ids.max() >= vocab_size:
            raise UsageError(
                f"stop={stop!r} holds a token outside the vocabulary, 0 to {vocab_size - 1}."
            )
    return [[int(i) for i in sequence] for sequence in sequences]


def _ends_in(ids: list[int], sequences: list[list[int]]) -> bool:
    return any(ids[-len(s) :] == s for s in sequences)
