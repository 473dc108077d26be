"""What a run measures: perplexity, bits per byte, and curves without their noise."""

from __future__ import annotations

import math
from collections.abc import Iterable

from tinygpt.errors import DataError


def perplexity(loss: float) -> float:
    """``exp(loss)`` of a mean loss in nats per token; infinity where that overflows.

    >>> round(perplexity(math.log(65)))
    65
    """
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def bits_per_byte(loss: float, tokens: int, n_bytes: int) -> float:
    """Bits that the model needs per byte of text: comparable across tokenizers.

    ``loss`` is the mean in nats per token over ``tokens`` predictions, which spell ``n_bytes``
    bytes of UTF-8. Raises DataError if ``n_bytes`` is not positive.

    >>> bits_per_byte(math.log(2), tokens=10, n_bytes=10)
    1.0
    """
    if n_bytes <= 0:
        raise DataError(f"Bits per byte need some text, but n_bytes={n_bytes}.")
    return loss * tokens / (math.log(2) * n_bytes)


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
