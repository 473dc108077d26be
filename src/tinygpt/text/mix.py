"""Several sources mixed by weight: which source each row of a batch is from, and which of its rows.

A row is a block of tokens with its targets. The shares are fractions with a common denominator P,
and of every P rows each source has exactly its share, evenly spread, so that of any number of rows
it has its share to within a row or two. The order is the same for all seeds and all steps: row g of
a run belongs to the source that stands at g mod P, and its number there follows from g alone. So a
batch stays a pure function of the tokens, the step and the seed.

A source that is smaller than its share of the run begins anew, in another order, each time all of
its rows have been dealt out; the others are not affected.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinygpt.errors import UsageError
from tinygpt.text.chat.packing import Conversations
from tinygpt.text.joined import Joined
from tinygpt.text.mix_shares import check_shares, period_of


class Mix(Joined):
    """Sources of tokens with their shares. As a sequence it is all of them, one behind another.

    ``shares`` are numbers above 0 that sum to 1, and are taken as the decimals they are written as.
    Raises UsageError.

    >>> mix = Mix({"wiki": wiki_tokens, "code": code_tokens}, {"wiki": 0.7, "code": 0.3})
    """

    def __init__(
        self, sources: Mapping[str, Any], shares: Mapping[str, float | str | Fraction]
    ) -> None:
        if sources.keys() != shares.keys() or not sources:
            raise UsageError(
                f"A mix needs a share for each source. It has the sources {', '.join(sources)} and "
                f"shares of {', '.join(shares)}."
            )
        self.sources = dict(sources)
        self.shares = {name: Fraction(str(shares[name])) for name in sources}
        check_shares(self.shares)
        parts = list(self.sources.values())
        super().__init__(parts, np.result_type(*(part.dtype for part in parts)))
        self.period = period_of(self.shares.values())
        self._order, self._number = _spread(
            [int(share * self.period) for share in self.shares.values()]
        )

    def _view(self, first: int, last: int) -> Joined:
        """A part of a mix is no mix, but a part of the sequence."""
        return Joined(self.parts, self.dtype, bounds=(first, last))

    def rows(self, first: int, count: int) -> list[tuple[NDArray[np.int64], int]]:
        """For each source: which of ``count`` rows from row ``first`` on are its own, and the
        number, among its own, of the first of them. The others follow it."""
        places = np.array([(first + i) % self.period for i in range(count)])
        found = []
        for source, share in enumerate(self.shares.values()):
            own = np.flatnonzero(self._order[places] == source)
            before = 0
            if len(own):
                period = (first + int(own[0])) // self.period
                before = period * int(share * self.period) + int(self._number[places[own[0]]])
            found.append((own, before))
        return found

    def fingerprint_of(self, fingerprints: Sequence[str]) -> str:
        """SHA-256 of the sources, by their fingerprints, and of their shares."""
        told = [
            f"{share}:{print_}"
            for share, print_ in zip(self.shares.values(), fingerprints, strict=True)
        ]
        return hashlib.sha256(" ".join(told).encode()).hexdigest()

    def epochs(self, rows: int, block_size: int) -> dict[str, float]:
        """How often ``rows`` rows of a run read each source."""
        return {
            name: float(self.shares[name]) * rows / blocks_of(tokens, block_size)
            for name, tokens in self.sources.items()
        }


def blocks_of(tokens: Any, block_size: int) -> int:
    """The blocks of one epoch of a source."""
    if isinstance(tokens, Conversations):
        return len(tokens.packed(block_size).ids)
    return max(1, (len(tokens) - 1) // block_size)


def _spread(counts: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The source at each place of a period, and its how many-th it is there.

    The i-th of n rows of a source stands at (i + 1/2) / n of the period; ties go by the sources.
    """
    source = np.repeat(np.arange(len(counts)), counts)
    number = np.concatenate([np.arange(count) for count in counts])
    place = (number + 0.5) / np.repeat(counts, counts)
    order = np.lexsort((source, place))
    return source[order], number[order]
