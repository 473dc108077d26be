"""How likely a prompt is: the log probability of each of its tokens, given those before it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tinygrad import Tensor

from tinygpt.errors import TinyGPTError
from tinygpt.model import Transformer
from tinygpt.train import mode

Scores = list[tuple[float | None, tuple[tuple[int, float], ...]]]
"""Of each token its log probability, and (id, log probability) of the likeliest ones."""

SMALLEST_LENGTH = 16
ROWS = 64
"""Positions of which logits are held at once: a vocabulary is wide."""


def score(model: Transformer, ids: Sequence[int], vocab_size: int, count: int) -> Scores:
    """Scores of ids, at most block_size of them; ids from vocab_size on are out of the question.

    The first has None, as nothing comes before it. It runs the model, so it is for the thread that
    owns it.
    """
    scores: Scores = [(None, ())]
    for start, logits in _logits(model, ids, vocab_size):
        for i, row in enumerate(logits, start):
            if i + 1 < len(ids):
                scores.append(_score(row, ids[i + 1], count))
    return scores


def _logits(
    model: Transformer, ids: Sequence[int], vocab_size: int
) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    """(first position, logits (rows, V)) of the whole text, some rows at a time.

    Padding to powers of two comes behind the text, where it is not seen: few shapes are compiled.
    """
    length = min(model.config.block_size, max(SMALLEST_LENGTH, 1 << (len(ids) - 1).bit_length()))
    with mode(model, training=False):
        tokens = Tensor([_padded(ids, length)], dtype="int32")
        hidden = model.hidden(tokens)[0]  # (T, C)
        x = hidden.float().numpy()
        for start in range(0, len(ids), ROWS):
            rows = Tensor(_padded(x[start : start + ROWS], min(ROWS, length))).cast(hidden.dtype)
            yield start, model.unembed(rows).float().numpy()[:, :vocab_size].astype(np.float64)


def _padded(rows: npt.ArrayLike, length: int) -> npt.NDArray[Any]:
    """``rows`` (n, …) with zeros behind them, up to ``length`` rows."""
    array = np.asarray(rows)
    return np.pad(array, [(0, length - len(array)), *[(0, 0)] * (array.ndim - 1)])


def _score(
    logits: npt.NDArray[np.float64], token: int, count: int
) -> tuple[float, tuple[tuple[int, float], ...]]:
    largest = logits.max()
    if not math.isfinite(largest):
        raise TinyGPTError("The model's training diverged: what it computes are no numbers.")
    logprobs = logits - (largest + math.log(np.exp(logits - largest).sum()))
    best = np.argpartition(-logprobs, min(count, logits.size - 1))[:count]
    best = best[np.argsort(-logprobs[best], kind="stable")]
    return float(logprobs[token]), tuple((int(i), float(logprobs[i])) for i in best)
