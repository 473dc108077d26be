"""The sources of a mix and their shares, as they are written: ``wiki=0.7,code=0.3``.

Apart from ``mix``, so that commands which only show a run need no numpy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path

from tinygpt.errors import UsageError
from tinygpt.text.names import exists
from tinygpt.untrusted import brief

LONGEST = 100_000
"""Largest common denominator of the shares: five decimals."""
WANTED = "Wanted: sources and their shares, such as wiki=0.7,code=0.3"


def is_mix(source: str | Path) -> bool:
    """Whether a source is meant as a mix: ``a=0.7,b=0.3``, and no file of that name."""
    if not isinstance(source, str) or "=" not in source or exists(Path(source)):
        return False
    return all(_number(part.rpartition("=")[2]) is not None for part in source.split(","))


def parse_mix(text: str) -> dict[str, Fraction]:
    """The sources in ``a=0.7,b=0.3`` and their shares, exactly. Raises UsageError.

    >>> parse_mix("wiki=0.7,code=0.3")
    {'wiki': Fraction(7, 10), 'code': Fraction(3, 10)}
    """
    shares: dict[str, Fraction] = {}
    for part in text.split(","):
        source, equals, number = part.strip().rpartition("=")
        share = _number(number)
        if not (source and equals) or share is None:
            raise UsageError(f"--mix: {brief(part)} is no source with its share. {WANTED}.")
        if source in shares:
            raise UsageError(f"--mix names {brief(source)} twice. Give each source once.")
        shares[source] = share
    check_shares(shares)
    return shares


def write_mix(shares: Mapping[str, Fraction]) -> str:
    """What ``parse_mix`` reads: decimals, and fractions where there is no such decimal."""
    short = {share: f"{float(share):g}" for share in shares.values()}
    return ",".join(
        f"{source}={short[share] if Fraction(short[share]) == share else share}"
        for source, share in shares.items()
    )


def check_shares(shares: Mapping[str, Fraction]) -> None:
    """UsageError unless all are above 0 and they sum to 1."""
    for source, share in shares.items():
        if share <= 0:
            raise UsageError(
                f"--mix gives {source} the share {float(share):g}. Shares are above 0: leave the "
                f"source out, or give it more."
            )
    total = sum(shares.values())
    if total != 1:
        right = [round(float(share / total), 4) for share in shares.values()]
        right[0] = round(1 - sum(right[1:]), 4)
        listed = ",".join(f"{s}={r:g}" for s, r in zip(shares, right, strict=True))
        raise UsageError(
            f"--mix: the shares sum to {float(total):g}, and not to 1. In the same proportions: "
            f"--mix {listed}"
        )
    if period_of(shares.values()) > LONGEST:
        raise UsageError("--mix: the shares have too many decimals; five are enough.")


def _number(text: str) -> Fraction | None:
    """A decimal or a fraction such as 1/3, exactly."""
    if not 0 < len(text.strip()) < 20 or "e" in text.lower():
        return None
    try:
        return Fraction(text.strip())
    except (ValueError, ZeroDivisionError):
        return None


def period_of(shares: Iterable[Fraction]) -> int:
    """The least number of rows of which each share is a whole number."""
    return math.lcm(*(share.denominator for share in shares))
