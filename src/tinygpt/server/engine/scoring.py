"""How likely a prompt is: the log probability of each of its tokens, given those before it."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tinygpt.errors import TinyGPTError
from tinygpt.generation.decoder import CHUNK, Decoder, Logits
from tinygpt.generation.sample import likeliest, log_probabilities

Score = tuple[float | None, tuple[tuple[int, float], ...]]
"""A token's log probability, and (id, log probability) of the likeliest ones in its place."""
Asked = tuple[Sequence[int], int]
"""Token ids, at most block_size, and how many of the likeliest tokens to report."""


@dataclass(frozen=True)
class Scored:
    """What is known of a text."""

    tokens: list[Score]
    """One for each token; the first has None, as nothing comes before it."""
    following: Logits
    """Logits (V,) of the token behind the text."""


def score_texts(
    decoder: Decoder, asked: Sequence[Asked], vocab_size: int
) -> Generator[None, None, list[Scored]]:
    """Scores of texts that fit into one forward pass; ids from vocab_size on are out.

    It yields between two pieces of work. A vocabulary is wide, so logits are made of a few
    positions at a time. Raises TinyGPTError where they are no numbers.
    """
    states, following = decoder.states([ids for ids, _ in asked])  # each (n, C); (texts, V)
    yield
    # Rows of all texts behind one another: what predicts each token but a text's first.
    rows = np.concatenate([x[:-1] for x in states])
    targets = np.concatenate([np.asarray(ids[1:], np.int64) for ids, _ in asked])
    counts = [count for ids, count in asked for _ in ids[1:]]
    scores: list[Score] = []
    for start in range(0, len(rows), CHUNK):
        some = slice(start, start + CHUNK)
        logits = decoder.unembed(rows[some])[:, :vocab_size]
        scores += _score(logits, targets[some], counts[some])
        yield
    found, start = [], 0
    for (ids, _), last in zip(asked, following[:, :vocab_size], strict=True):
        end = start + len(ids) - 1
        found.append(Scored([(None, ()), *scores[start:end]], last))
        start = end
    return found


def _score(logits: Logits, targets: npt.NDArray[np.int64], counts: Sequence[int]) -> list[Score]:
    """Scores of targets (n,), given logits (n, V)."""
    logs = log_probabilities(logits)
    if not np.isfinite(logs.max()):
        raise TinyGPTError("The model's training diverged: what it computes are no numbers.")
    own = logs[np.arange(len(logs)), targets].tolist()
    tops = [
        tuple((i, float(row[i])) for i in likeliest(row, count))
        for row, count in zip(logs, counts, strict=True)
    ]
    return list(zip(own, tops, strict=True))
