"""Token sequences -> logits of the token that follows each, with a cache.

A prompt is prefilled in one forward pass; then a step takes any number of sequences, each at its
own position, one token further, and each position is computed once. generate(), the server and the
rest share this decoder: one sequence is a batch of one.

Every number is computed as for a sequence alone: rows share kernels that read a weight once for all
of them and treat each row as if it were the only one. So on a CPU the logits do not depend on the
rest of the batch, bit for bit; where tinygrad's own products are used, as on a GPU, they are the
same to rounding.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from operator import is_
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tinygrad import Tensor, UOp, dtypes

from tinygpt import kernels
from tinygpt.kernels.dispatch import way
from tinygpt.machine.jit import jit
from tinygpt.machine.pool.recorded import Kept
from tinygpt.model.cache import KVCache, Prefill, Step
from tinygpt.model.transformer import Transformer, description

Logits = npt.NDArray[np.float32]
States = npt.NDArray[np.float32]

ROWS = (1, 2, 4, 8, 16)
"""Sizes of a step, each captured once. With more rows linear layers would round otherwise."""
SMALLEST_BUCKET = 16
"""Prompts are padded to a power of two, so that few lengths are captured; to no less than this."""
WINDOW_TOKENS = 128
"""Windows, and texts that are only read, share a forward pass of up to so many tokens."""
CHUNK = 64
"""Positions of which logits are made at once where all are wanted: a vocabulary is wide."""


class Sequence:
    """Token ids that are being continued; the caller appends each new token to ``ids``."""

    def __init__(self, ids: Iterable[int]) -> None:
        self.ids = list(ids)


class Passes(NamedTuple):
    """The jitted forward passes, from numpy to numpy; see ``_passes``."""

    prefill: Callable[..., Logits]
    step: Callable[..., Logits]
    window: Callable[..., Logits]
    states: Callable[..., States]
    logits: Callable[..., Logits]


class Decoder:
    """The next-token logits of any number of sequences.

    The cache has at least ``slots`` slots, and as many as there are sequences in a call. Where none
    is free, a sequence takes the slot of the one that was decoded longest ago, which is prefilled
    again in its next call. Weights may change, in place or by replacement.

    >>> decoder, sequence = Decoder(model), Sequence([1, 2, 3])
    >>> sequence.ids.append(int(decoder.next_logits([sequence])[0].argmax()))
    """

    # Without a __dict__, tinygrad's get_parameters(model) never finds the cache in here.
    __slots__ = ("_cached", "_passes", "_weights", "model", "slots")

    def __init__(self, model: Transformer, slots: int = 1) -> None:
        self.model, self.slots = model, slots
        self._cached: dict[Sequence, tuple[int, int]] = {}
        """Slot and number of cached positions of the sequences, the longest unused first."""
        self._weights: list[UOp] = []
        self._passes: Passes

    def __reduce__(self) -> tuple[Any, ...]:
        return Decoder, (self.model, self.slots)  # a copy of a model starts with an empty cache

    def next_logits(self, sequences: abc.Sequence[Sequence]) -> Logits:
        """Logits (n, V) of the token that follows each of n sequences of at least one token.

        Sequences that have grown by one token since the last call take a step together; others are
        prefilled one by one. Beyond block_size only the last block_size tokens count. As they then
        move under their learned positions with every token, nothing that is cached holds any
        longer: each token costs a forward pass of the whole window.
        """
        if not all(map(self._can_step, sequences)):
            self._adapt(len(sequences))
        step, prefill, window = list[int](), list[int](), list[int]()
        for i, sequence in enumerate(sequences):
            if self._can_step(sequence):
                step.append(i)
            else:
                long = len(sequence.ids) > self.model.config.block_size
                (window if long else prefill).append(i)
        out = np.empty((len(sequences), self.model.config.vocab_size), np.float32)
        # Steps come first: a prefill takes no slot of a sequence that was just decoded.
        for compute, rows, most in (
            (self._step, step, ROWS[-1]),
            (self._prefill, prefill, 1),
            (self._window, window, self._window_sizes()[-1]),
        ):
            for start in range(0, len(rows), most):
                some = rows[start : start + most]
                out[some] = compute([sequences[i] for i in some])
        return out

    def release(self, sequence: Sequence) -> None:
        """Free the slot of a sequence that is finished."""
        self._cached.pop(sequence, None)

    def together(self, ids: abc.Sequence[int]) -> int:
        """How many texts of about this length ``states`` reads in one forward pass."""
        return max(1, WINDOW_TOKENS // padded_length(len(ids), self.model.config.block_size))

    def states(self, texts: abc.Sequence[abc.Sequence[int]]) -> tuple[list[States], Logits]:
        """The residual stream (T, C) behind the last block for each text, and logits (n, V) of the
        token that follows it. No slot is used.

        The n texts have at most block_size tokens, and are at most as many as ``together`` says of
        each.
        """
        self._adapt(1)
        n = 1 if len(texts) == 1 else self.together(texts[0])
        tokens = np.zeros((n, padded_length(len(texts[0]), self.model.config.block_size)), np.int32)
        for row, ids in zip(tokens, texts, strict=False):
            row[: len(ids)] = ids
        x = self._passes.states(tokens)  # (n, T, C)
        states = [rows[: len(ids)] for rows, ids in zip(x, texts, strict=False)]
        return states, self.unembed(np.stack([rows[-1] for rows in states]))

    def unembed(self, states: States) -> Logits:
        """Logits (n, V) of up to `CHUNK` rows (n, C) of the residual stream."""
        self._adapt(1)
        n = ROWS[-1] if len(states) <= ROWS[-1] else CHUNK
        padded = np.zeros((n, self.model.config.n_embd), np.float32)
        padded[: len(states)] = states
        return self._passes.logits(padded)[: len(states)]

    def preparations(self) -> Iterator[Callable[[], object]]:
        """Calls that compile what is otherwise compiled when it is first needed."""
        block_size = self.model.config.block_size
        lengths = sorted({padded_length(n + 1, block_size) for n in range(block_size)})
        one, long = Sequence([0]), Sequence([0] * (block_size + 1))

        def step(n: int) -> None:
            self.next_logits([one])  # it has a slot then
            self._step([one] * n)

        for length in lengths:
            yield partial(self.next_logits, [Sequence([0] * length)])
        for n in self._step_sizes():
            yield partial(step, n)
        for n in self._window_sizes():
            yield partial(self._window, [long] * n)
        for length in lengths:
            for n in sorted({1, max(1, WINDOW_TOKENS // length)}):
                yield partial(self.states, [[0] * length] * n)
        for n in (ROWS[-1], CHUNK):
            yield partial(self.unembed, np.zeros((n, self.model.config.n_embd), np.float32))

    def _can_step(self, sequence: Sequence) -> bool:
        """Whether all of its tokens but the last are cached, and that one has a position."""
        n, (_, cached) = len(sequence.ids), self._cached.get(sequence, (0, 0))
        return cached > 0 and n - 1 <= cached and n <= self.model.config.block_size

    def _adapt(self, slots: int) -> None:
        """Start anew where weights were replaced, which a capture does not notice, or with a larger
        cache where ``slots`` are needed and there are fewer."""
        weights = list(self.model.parameters().values())
        Tensor.realize(*weights)
        buffers = [w.uop.base for w in weights]
        same = len(buffers) == len(self._weights) and all(map(is_, buffers, self._weights))
        if not same or slots > self.slots:
            self.slots, self._weights = max(slots, self.slots), buffers
            self._cached, self._passes = {}, _passes(self.model, self.slots)

    def _step(self, sequences: abc.Sequence[Sequence]) -> Logits:
        """Cache the last token of up to 16 sequences; -> logits (n, V) of what follows."""
        rows = []
        for sequence in sequences:
            (slot, _), n = self._cached.pop(sequence), len(sequence.ids)
            self._cached[sequence] = slot, n  # the last in line
            rows.append((sequence.ids[-1], slot, n - 1))
        rows += rows[-1:] * (_at_least(ROWS, len(rows)) - len(rows))  # alike rows do no harm
        tokens, slots, positions = zip(*rows, strict=True)
        return self._passes.step([tokens], slots, positions)[: len(sequences)]

    def _prefill(self, sequences: abc.Sequence[Sequence]) -> Logits:
        """Cache one sequence; -> logits (1, V) of what follows.

        The padding comes after the tokens, where causal attention does not look, and leaves keys
        and values that are overwritten before they are read.
        """
        [sequence] = sequences
        n = len(sequence.ids)
        padding = padded_length(n, self.model.config.block_size) - n
        slot = self._free_slot(sequence)
        logits = self._passes.prefill([[*sequence.ids, *[0] * padding]], [slot], [[n - 1]])
        self._cached[sequence] = slot, n
        return logits

    def _free_slot(self, sequence: Sequence) -> int:
        """A slot that no sequence has, or that of the one which was decoded longest ago."""
        self._cached.pop(sequence, None)
        free = set(range(self.slots)) - {slot for slot, _ in self._cached.values()}
        return min(free) if free else self._cached.pop(next(iter(self._cached)))[0]

    def _window(self, sequences: abc.Sequence[Sequence]) -> Logits:
        """Logits (n, V) of what follows the last block_size tokens of a few sequences."""
        n, size = len(sequences), _at_least(self._window_sizes(), len(sequences))
        rows = [s.ids[-self.model.config.block_size :] for s in sequences]
        return self._passes.window(rows + rows[-1:] * (size - n))[:n]

    def _step_sizes(self) -> tuple[int, ...]:
        """Sizes of a step: enough for all slots, or the largest."""
        return tuple(n for n in ROWS if n < 2 * self.slots)

    def _window_sizes(self) -> tuple[int, ...]:
        most = max(1, WINDOW_TOKENS // self.model.config.block_size)
        return tuple(n for n in self._step_sizes() if n <= most)


def _passes(model: Transformer, slots: int) -> Passes:
    """The forward passes of a model, with a new cache, jitted."""
    cache = KVCache(model.config, slots, model.cache_type or model.half or dtypes.float32)

    def prefill(tokens: Tensor, slot: Tensor, last: Tensor) -> Tensor:
        """Cache tokens (1, T) in slot (1,); -> logits (1, V) behind the position last (1, 1)."""
        view = Prefill(cache, slot)
        x = model.hidden(tokens, view)  # (1, T, C)
        x = kernels.embedding(last, x.squeeze(0))  # picks a row: (T, C) -> (1, 1, C)
        return model.unembed(x).squeeze(1).float().realize(*view.written)

    def step(tokens: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
        """Cache tokens (1, n) at positions (n,) of slots (n,); -> logits (n, V)."""
        x = model.hidden(tokens, Step(cache, slots, positions))  # (1, n, C)
        return model.unembed(x).squeeze(0).float()

    def window(tokens: Tensor) -> Tensor:
        """Tokens (n, T) -> logits (n, V) behind their last position, without the cache."""
        return model.unembed(model.hidden(tokens)[:, -1:]).squeeze(1).float()

    def states(tokens: Tensor) -> Tensor:
        """Tokens (n, T) -> the residual stream (n, T, C)."""
        return model.hidden(tokens).float()

    def logits(x: Tensor) -> Tensor:
        """The residual stream (n, C) -> logits (n, V)."""
        return model.unembed(x).float()

    def about() -> str | None:
        return description(model, slots, way())

    def state() -> list[Tensor]:
        return [*model.parameters().values(), *(t for layer in cache.layers for t in layer)]

    functions = (prefill, step, window, states, logits)
    return Passes(*(jit(f, short=True, kept=Kept(about, state)) for f in functions))


def padded_length(n: int, block_size: int) -> int:
    """The length that a prompt of n <= block_size tokens is padded to: one of a few."""
    return min(block_size, max(SMALLEST_BUCKET, 1 << (n - 1).bit_length()))


def _at_least(sizes: tuple[int, ...], n: int) -> int:
    """The smallest size that holds n, or else the largest."""
    return next((size for size in sizes if size >= n), sizes[-1])
