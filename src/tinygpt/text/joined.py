"""Several arrays of tokens read as one, without a copy: what a folder of shards and a mix share."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tinygpt.errors import DataError
from tinygpt.text.token_files import Array


class Part(Protocol):
    """What can be joined: an array of tokens (n,), or what reads like one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Any: ...


class Joined:
    """Parts one behind another as one sequence (n,): a slice is a view, other indices are read.

    ``limit`` bounds the ids: where files were not read before, what a batch reads is checked.
    """

    ndim = 1

    def __init__(
        self,
        parts: Sequence[Part],
        dtype: np.dtype[Any],
        limit: int | None = None,
        bounds: tuple[int, int] | None = None,
    ) -> None:
        self.parts, self.dtype, self.limit = parts, dtype, limit
        self.ends = np.cumsum([len(part) for part in parts], dtype=np.int64)  # (parts,)
        self.first, self.last = bounds or (0, int(self.ends[-1]) if len(parts) else 0)

    def __len__(self) -> int:
        return self.last - self.first

    @property
    def shape(self) -> tuple[int]:
        return (len(self),)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                return np.asarray(self)[index]
            return self._view(self.first + start, self.first + max(start, stop))
        places = np.asarray(index)
        if places.size and not (-len(self) <= places.min() and places.max() < len(self)):
            raise IndexError(f"{index} is beyond the {len(self)} tokens")
        read = self._read(np.where(places < 0, places + len(self), places).ravel() + self.first)
        return read.reshape(places.shape)[()]  # a number for a number

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        pieces = [np.asarray(part[a:b]) for part, a, b in self.pieces()]
        joined = self._checked(np.concatenate(pieces) if pieces else np.zeros(0, self.dtype))
        return joined.astype(self.dtype if dtype is None else dtype, copy=False)

    def __iter__(self) -> Iterator[int]:
        for part, a, b in self.pieces():
            yield from np.asarray(part[a:b]).tolist()

    def pieces(self) -> Iterator[tuple[Part, int, int]]:
        """The parts that this view runs over, each with its first token and the end there."""
        number = int(np.searchsorted(self.ends, self.first, side="right"))
        while number < len(self.parts):
            part = self.parts[number]
            begin = int(self.ends[number]) - len(part)
            if begin >= self.last:
                return
            yield part, max(self.first - begin, 0), min(self.last - begin, len(part))
            number += 1

    def _view(self, first: int, last: int) -> Joined:
        view = type(self).__new__(type(self))
        view.__dict__ |= self.__dict__ | {"first": first, "last": last}
        return view

    def _read(self, places: NDArray[np.int64]) -> Array:
        """The tokens at ``places`` (n,), counted from the first part's first token.

        The rows of a batch are runs of places, most of them within one part.
        """
        found = np.empty(len(places), self.dtype)
        which = np.searchsorted(self.ends, places, side="right")  # (n,) the part of each place
        runs = [0, *(np.flatnonzero(np.diff(which)) + 1).tolist(), len(places)]
        for a, b in itertools.pairwise(runs):
            if a < b:
                part = int(which[a])
                begin = int(self.ends[part]) - len(self.parts[part])
                found[a:b] = self.parts[part][places[a:b] - begin]
        return self._checked(found)

    def _checked(self, found: Array) -> Array:
        if self.limit is not None and len(found) and int(found.max()) >= self.limit:
            raise DataError(
                f"Token id {found.max()} was read, and with vocab_size={self.limit} ids run from 0 "
                f"to {self.limit - 1}: a file of tokens is damaged, or was changed."
            )
        return found
