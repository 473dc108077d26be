"""Several texts decoded together, each at a position of its own.

A `Decoder` moves rows of one length in step. Here texts come and go: each has a place in a cache of
many, and a step, one jitted function, takes any of them one token further. Every number is computed
as for a text alone: the rows share kernels that read a weight once for all of them and treat each
row as if it were the only one. So on a CPU the logits are, bit for bit, those of a `Decoder`; where
tinygrad's own products are used, as on a GPU, they are the same to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
from tinygrad import Tensor

from tinygpt import kernels
from tinygpt.errors import TinyGPTError
from tinygpt.generation.decoder import Logits, padded_length
from tinygpt.machine.jit import jit
from tinygpt.model.cache import OnePlace, Places, Rows
from tinygpt.model.transformer import Transformer

ROWS = (1, 2, 4, 8, 16)
"""Sizes of a step; surplus rows are padding. With more rows linear layers would round otherwise."""
WINDOW_TOKENS = 128
"""Texts that slide, or are only read, go through the model together up to so many tokens."""
CHUNK = 64
"""Positions of which logits are made at once where all are wanted: a vocabulary is wide."""

States = npt.NDArray[np.float32]
Compute = Callable[[Sequence["Line"]], Logits]
"""Of some lines -> logits (n, V), of which the first rows are the lines'."""


class Line:
    """A text that is being decoded: its tokens so far, to which the caller appends."""

    __slots__ = ("cached", "ids", "place")

    def __init__(self, ids: Sequence[int], place: int) -> None:
        self.ids, self.place = list(ids), place
        self.cached = 0
        """How many of its positions are in the cache."""


class BatchDecoder:
    """The next-token logits of up to ``places`` texts at once.

    Weights may change in place, but may not be replaced by other Tensors.

    >>> decoder = BatchDecoder(model, places=2)
    >>> line = decoder.admit([1, 2, 3])
    >>> line.ids.append(int(decoder.next_logits([line])[0].argmax()))
    >>> decoder.release(line)
    """

    # Without a __dict__, tinygrad's get_parameters(model) never finds the caches in here.
    __slots__ = (
        "_cache",
        "_free",
        "_logits",
        "_looked",
        "_prefilled",
        "_slid",
        "_stepped",
        "model",
        "places",
    )

    def __init__(self, model: Transformer, places: int) -> None:
        self.model, self.places = model, places
        Tensor.realize(*model.parameters().values())
        self._cache = Places(model.config, places + 1)  # the last one is for padding
        self._free = list(reversed(range(places)))
        self._prefilled = jit(self._one_text, short=True)
        self._stepped = jit(self._one_token_each, short=True)
        self._slid = jit(self._whole_windows, short=True)
        self._looked = jit(self._whole_texts, short=True)
        self._logits = jit(self._logits_of, short=True)

    def admit(self, ids: Sequence[int]) -> Line:
        """Give a text a place. Raises TinyGPTError if all are taken."""
        if not self._free:
            raise TinyGPTError(f"All {self.places} places are taken. Release a line first.")
        return Line(ids, self._free.pop())

    def release(self, line: Line) -> None:
        """Take the place of a text back; the line must not be used any more."""
        self._free.append(line.place)

    def next_logits(self, lines: Sequence[Line]) -> Logits:
        """Logits (n, V) of the token that follows each line; between two calls one is appended.

        A new line is prefilled by itself. One that has outgrown block_size slides: it takes a
        forward pass of the last block_size tokens. All others take a step together.
        """
        parts = [
            (indices, compute([lines[i] for i in indices]))
            for compute, indices in self._groups(lines)
        ]
        if len(parts) == 1:  # they are in their order
            return parts[0][1][: len(lines)]
        out = np.empty((len(lines), self.model.config.vocab_size), np.float32)
        for indices, logits in parts:
            out[indices] = logits[: len(indices)]
        return out

    def together(self, ids: Sequence[int]) -> int:
        """How many texts of about this length ``states`` reads in one forward pass."""
        return max(1, WINDOW_TOKENS // padded_length(len(ids), self.model.config.block_size))

    def states(self, texts: Sequence[Sequence[int]]) -> tuple[list[States], Logits]:
        """The residual stream (n, C) behind the last block of each text, and logits (texts, V) of
        what follows; nothing is kept. The texts, none longer than block_size, are at most as many
        as ``together`` says of each.
        """
        if len(texts) > 1:
            return self._read(texts)
        line = Line(texts[0], self.places)
        logits, states = self._prefill_one(line)
        return [states[0, : len(line.ids)]], logits

    def _read(self, texts: Sequence[Sequence[int]]) -> tuple[list[States], Logits]:
        """``states`` of several texts; surplus rows are padding."""
        length = padded_length(len(texts[0]), self.model.config.block_size)
        n = self.together(texts[0])
        tokens = np.zeros((n, length), np.int32)
        for row, ids in zip(tokens, texts, strict=False):
            row[: len(ids)] = ids
        x = self._looked(tokens)
        states = [x[i, : len(ids)] for i, ids in enumerate(texts)]
        return states, self.unembed(np.stack([rows[-1] for rows in states]))

    def unembed(self, rows: States) -> Logits:
        """Logits (n, V) of up to `CHUNK` rows (n, C) of the residual stream."""
        n = ROWS[-1] if len(rows) <= ROWS[-1] else CHUNK
        padded = np.zeros((n, self.model.config.n_embd), np.float32)
        padded[: len(rows)] = rows
        return self._logits(padded)[: len(rows)]

    def _groups(self, lines: Sequence[Line]) -> Iterator[tuple[Compute, list[int]]]:
        """Which of the lines are computed together, and how."""
        stepping, sliding = list[int](), list[int]()
        for i, line in enumerate(lines):
            if not line.cached:
                yield self._prefill, [i]
            elif len(line.ids) <= self.model.config.block_size:
                stepping.append(i)
            else:
                sliding.append(i)
        most = ROWS[-1], self._windows()[-1]
        for compute, some, n in zip(
            (self._step, self._slide), (stepping, sliding), most, strict=True
        ):
            for start in range(0, len(some), n):
                yield compute, some[start : start + n]

    def preparations(self) -> Iterator[Callable[[], object]]:
        """Calls that make what is otherwise made, and compiled, when it is first needed."""
        block_size = self.model.config.block_size
        lengths = {padded_length(n + 1, block_size) for n in range(block_size)}
        spare = Line([0], self.places)
        for length in sorted(lengths):
            yield partial(self._prefill, [Line([0] * length, self.places)])
        for n in self._sizes():
            yield partial(self._step, [spare] * n)
        for n in self._windows():
            yield partial(self._slide, [spare] * n)
        for length in sorted(lengths):
            if 2 * length <= WINDOW_TOKENS:
                yield partial(self.states, [[0] * length] * 2)
        for n in (ROWS[-1], CHUNK):
            yield partial(self.unembed, np.zeros((n, self.model.config.n_embd), np.float32))

    def _prefill(self, lines: Sequence[Line]) -> Logits:
        """Put the last tokens of one line into the cache; -> logits (1, V) of what follows.

        The padding comes after them, where causal attention does not look, and leaves keys and
        values that are overwritten before they are read.
        """
        return self._prefill_one(lines[0])[0]

    def _prefill_one(self, line: Line) -> tuple[Logits, States]:
        """``_prefill``; -> logits (1, V), states (1, T, C)."""
        block_size = self.model.config.block_size
        ids = line.ids[-block_size:]
        padded = ids + [0] * (padded_length(len(ids), block_size) - len(ids))
        logits, states = self._prefilled([padded], [line.place], [[len(ids) - 1]])
        line.cached = len(ids)
        return logits, states

    def _step(self, lines: Sequence[Line]) -> Logits:
        """Append the last token of up to 16 lines; -> logits (n, V), surplus rows behind them."""
        n = _at_least(ROWS, len(lines))
        surplus = n - len(lines)
        logits = self._stepped(
            [[line.ids[-1] for line in lines] + [0] * surplus],
            [line.place for line in lines] + [self.places] * surplus,
            [len(line.ids) - 1 for line in lines] + [0] * surplus,
        )
        for line in lines:
            line.cached = len(line.ids)
        return logits

    def _slide(self, lines: Sequence[Line]) -> Logits:
        """Logits (n, V) of what follows the last block_size tokens of a few lines."""
        n, block_size = _at_least(self._windows(), len(lines)), self.model.config.block_size
        windows = np.zeros((n, block_size), np.int32)
        for row, line in zip(windows, lines, strict=False):
            row[-len(line.ids) :] = line.ids[-block_size:]
        return self._slid(windows)

    def _sizes(self) -> tuple[int, ...]:
        """Sizes of a step: enough for all places, or the largest."""
        return tuple(n for n in ROWS if n < 2 * self.places)

    def _windows(self) -> tuple[int, ...]:
        """Sizes of a forward pass of windows."""
        most = max(1, WINDOW_TOKENS // self.model.config.block_size)
        return tuple(n for n in self._sizes() if n <= most)

    def _one_text(self, tokens: Tensor, place: Tensor, last: Tensor) -> tuple[Tensor, ...]:
        cache = OnePlace(self._cache, place)
        x = self.model.hidden(tokens, cache)  # (1, T, C)
        logits = self.model.unembed(kernels.embedding(last, x.squeeze(0)))  # (1, 1, V)
        return logits.squeeze(1).float().realize(x, *cache.kept), x

    def _whole_texts(self, tokens: Tensor) -> Tensor:
        return self.model.hidden(tokens).float().realize()  # (n, T, C)

    def _logits_of(self, x: Tensor) -> Tensor:
        return self.model.unembed(x).float().realize()  # (n, C) -> (n, V)

    def _one_token_each(self, tokens: Tensor, places: Tensor, at: Tensor) -> Tensor:
        x = self.model.hidden(tokens, Rows(self._cache, places, at))  # (1, n, C)
        return self.model.unembed(x).squeeze(0).float().realize()

    def _whole_windows(self, tokens: Tensor) -> Tensor:
        x = self.model.hidden(tokens)  # (n, T, C)
        return self.model.unembed(x[:, -1:]).squeeze(1).float().realize()


def _at_least(sizes: tuple[int, ...], n: int) -> int:
    """The smallest size that holds n, or else the largest."""
    return next((size for size in sizes if size >= n), sizes[-1])
