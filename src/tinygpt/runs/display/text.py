"""Small pictures in text, and model output made safe for a terminal."""

from __future__ import annotations

import itertools
import math
import unicodedata
from collections.abc import Mapping, Sequence

BARS = "▁▂▃▄▅▆▇█"
DIRECTION_MARKS = frozenset(
    "\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
)


def printable(text: str) -> str:
    """``text`` with everything made visible that a terminal would obey instead of print.

    Line ends and tabs stay; other control characters become their pictures, and marks that change
    the direction of text, lone surrogates and odd line separators become U+FFFD.

    >>> printable("red: \\x1b[31m")
    'red: ␛[31m'
    """
    return "".join(map(_printable_character, text))


def _printable_character(c: str) -> str:
    if c in "\n\t":
        return c
    if c < " ":
        return chr(0x2400 + ord(c))  # Unicode's control pictures
    if c == "\x7f":
        return "\u2421"
    odd = c in DIRECTION_MARKS or unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")
    return "\ufffd" if odd else c


def sparkline(values: Sequence[float | None], width: int) -> str:
    """A one-line curve of ``values``, each column the mean of its share of them.

    >>> sparkline([4.0, 3.0, 2.0, 1.0], width=4)
    '█▆▃▁'
    """
    numbers = [v for v in values if v is not None and math.isfinite(v)]
    if not numbers or width < 1:
        return ""
    columns = min(width, len(numbers))
    edges = [i * len(numbers) // columns for i in range(columns + 1)]
    means = [sum(numbers[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((mean - low) * scale)] for mean in means)


class Curve:
    """The training loss of a run of any length in at most ``2 * size`` numbers.

    When it is full, neighbours are averaged and from then on each number stands for twice as many
    steps.
    """

    def __init__(self, size: int = 256) -> None:
        self.size = size
        self.points: list[float] = []
        self._stride = 1
        self._pending: list[float] = []

    def add(self, value: float) -> None:
        """Take in the next value; one that is not finite is left out."""
        if not math.isfinite(value):
            return
        self._pending.append(value)
        if len(self._pending) == self._stride:
            self.points.append(sum(self._pending) / self._stride)
            self._pending.clear()
        if len(self.points) == 2 * self.size:
            pairs = zip(self.points[::2], self.points[1::2], strict=True)
            self.points = [(a + b) / 2 for a, b in pairs]
            self._stride *= 2


def duration(seconds: float) -> str:
    """``59s``, ``3m 20s``, ``2h 05m``, ``3d 4h``.

    >>> duration(200), duration(7500)
    ('3m 20s', '2h 05m')
    """
    total = max(int(seconds), 0)
    minutes, hours, days = total // 60, total // 3600, total // 86400
    if days:
        return f"{days}d {hours % 24}h"
    if hours:
        return f"{hours}h {minutes % 60:02d}m"
    return f"{minutes}m {total % 60:02d}s" if minutes else f"{total}s"


def shares(exact: Mapping[str, float]) -> str:
    """Shares of exact answers, all first.

    >>> shares({"add": 0.5, "copy": 1.0, "total": 0.75})
    '75% (add 50%, copy 100%)'
    """
    kinds = ", ".join(f"{kind} {share:.0%}" for kind, share in exact.items() if kind != "total")
    return f"{exact['total']:.0%} ({kinds})"
