"""What a run measures: perplexity, bits per byte, and curves without their noise."""

from __future__ import annotations

import math
from collections.abc import Iterable


def perplexity(loss: float) -> float:
    """``exp(loss)`` of a mean loss in nats per token; infinity where that overflows.

    >>> round(perplexity(math.log(65)))
    65
    """
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def bits_per_byte(loss: float | None, bytes_per_token: float | None) -> float | None:
    """Bits that the model needs per byte of text: comparable across tokenizers.

    ``loss`` is in nats per token, and a token stands for so many bytes of UTF-8 on average, see
    ``text.tokens.bytes_per_token``. None where either is missing.

    >>> bits_per_byte(math.log(2), bytes_per_token=4.0)
    0.25
    """
    if loss is None or not bytes_per_token:
        return None
    return loss / (math.log(2) * bytes_per_token)


def smooth(values: Iterable[float | None], weight: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for its start; a gap repeats the value before it.

    The correction is Adam's: without it the curve would begin at zero. ``weight`` is the share of
    the past, from 0 (no smoothing) up to 1. Values that are missing or not finite count as gaps.

    >>> smooth([4.0, None, 2.0], weight=0.5)
    [4.0, 4.0, 2.6666666666666665]
    """
    mean = total = 0.0
    out: list[float] = []
    for value in values:
        if value is not None and math.isfinite(value):
            mean = weight * mean + (1 - weight) * value
            total = weight * total + (1 - weight)
        out.append(mean / total if total else math.nan)
    return out


def short(value: float) -> float | None:
    """A number in four digits, for rows with many of them; None for what is not finite.

    >>> short(0.123456)
    0.1235
    """
    return float(f"{value:.4g}") if math.isfinite(value) else None
