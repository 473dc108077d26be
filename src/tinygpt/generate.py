"""Text out: the decoder that feeds a model one token at a time, and the loops around it.

``generate_tokens`` and ``generate_text`` are generators: streaming, saving and stopping early are up
to whoever iterates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tinygrad import Tensor, TinyJit, Variable
from tinygrad.uop.ops import UOp

from tinygpt.cache import KVCache
from tinygpt.config import SampleConfig
from tinygpt.errors import UsageError
from tinygpt.model import Transformer
from tinygpt.sample import make_sampler
from tinygpt.tokenizers import TextStream, Tokenizer
from tinygpt.train import mode

Ids = npt.NDArray[np.int32]
Logits = npt.NDArray[np.float32]
Prompt = Tensor | npt.NDArray[np.integer] | Sequence[Sequence[int]]
Stop = int | Sequence[int] | Sequence[Sequence[int]]

SMALLEST_BUCKET = 16
LIVE_BATCH_SIZES = 4
FINISHED = -1
"""What ``generate_tokens`` yields for a row of a batch that has already met its stop."""


class Decoder:
    """A model's next-token logits, with a cache, so that each position is computed once.

    Prompts are padded on the right to a few lengths and decoding is one jitted function for all
    positions, so nothing is compiled twice. Weights may change between generations.
    """

    # Without a __dict__, tinygrad's get_parameters(model) never finds the caches in here.
    __slots__ = ("_batches", "_weights", "model")

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self._batches: dict[int, _Batch] = {}
        self._weights: list[UOp] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return Decoder, (self.model,)  # a copy of a model starts with empty caches

    def next_logits(self, context: Ids, owner: object) -> Logits:
        """Logits (B, V) of the token that follows each row of context (B, n); n may be any length.

        ``owner`` identifies one generation: its contexts grow by one token per call. Several may
        take turns; whoever finds the cache in other hands fills it anew. Beyond block_size only the
        last block_size tokens count, and as they then move under their learned positions, nothing
        that is cached holds any longer: each token costs a forward pass of the whole window.
        """
        block_size = self.model.config.block_size
        n = context.shape[1]
        with mode(self.model, training=False):
            batch = self._batch(len(context))
            if batch.holds(owner, n - 1) and n <= block_size:
                logits = batch.decode_step(context[:, -1:], n - 1)
            else:
                logits = batch.prefill(context[:, -block_size:])
        batch.owner, batch.length = owner, n
        return logits

    def _batch(self, size: int) -> _Batch:
        self._forget_replaced_weights()
        batch = self._batches.pop(size, None) or _Batch(self.model, size)
        self._batches[size] = batch  # last in line
        if len(self._batches) > LIVE_BATCH_SIZES:
            del self._batches[next(iter(self._batches))]
        return batch

    def _forget_replaced_weights(self) -> None:
        """A jit keeps the buffers it was captured with: it must go when ``replace`` swaps one."""
        weights = list(self.model.parameters().values())
        Tensor.realize(*weights)
        buffers = [w.uop.base for w in weights]
        if len(buffers) != len(self._weights) or any(
            new is not old for new, old in zip(buffers, self._weights, strict=True)
        ):
            self._batches.clear()
            self._weights = buffers


class _Batch:
    """Cache and jitted functions for B sequences that move in step."""

    def __init__(self, model: Transformer, size: int) -> None:
        self.owner: object = None
        self.length = 0
        self._model, self._cache = model, KVCache(model.config, size)
        self._block_size = model.config.block_size
        self._decode = TinyJit(self._one_position)
        self._prefill: dict[int, Callable[[Tensor, UOp], Tensor]] = {}

    def holds(self, owner: object, length: int) -> bool:
        """Whether the cache stands right before position ``length`` of this owner's sequences."""
        return self.owner is owner and self.length == length

    def prefill(self, context: Ids) -> Logits:
        """Fill the cache with context (B, n), n at most block_size; -> logits (B, V) of what follows.

        The padding comes after the context, where causal attention does not look, and leaves keys
        and values that are overwritten before they are read.
        """
        size, n = context.shape
        length = min(self._block_size, max(SMALLEST_BUCKET, 1 << (n - 1).bit_length()))
        padded = np.zeros((size, length), np.int32)
        padded[:, :n] = context
        forward = self._prefill.setdefault(length, TinyJit(self._whole_context))
        return self._run(forward, padded, Variable("last", 0, length - 1).bind(n - 1))

    def decode_step(self, tokens: Ids, position: int) -> Logits:
        """Append tokens (B, 1) at ``position``; -> logits (B, V) of what follows."""
        at = Variable("position", 0, self._block_size - 1).bind(position)
        return self._run(self._decode, tokens, at)

    def _run(self, forward: Callable[[Tensor, UOp], Tensor], tokens: Ids, where: UOp) -> Logits:
        self.owner = None  # until the cache is whole again
        ids = Tensor(np.ascontiguousarray(tokens, np.int32)).realize()
        logits: Logits = forward(ids, where).numpy()
        return logits

    def _whole_context(self, tokens: Tensor, last: UOp) -> Tensor:
        self._cache.position = 0
        x = self._model.hidden(tokens, self._cache)  # (B, T, C)
        return self._logits(x[:, last : last + 1])

    def _one_position(self, tokens: Tensor, position: UOp) -> Tensor:
        self._cache.position = position
        return self._logits(self._model.hidden(tokens, self._cache))

    def _logits(self, x: Tensor) -> Tensor:
        """(B, 1, C) -> (B, V)"""
        return self._model.unembed(x).squeeze(1).float().realize()


def generate_tokens(
    model: Transformer | Decoder,
    idx: Prompt,
    max_tokens: int,
    config: SampleConfig | None = None,
    seed: int | None = None,
    stop: Stop | None = None,
) -> Iterator[Ids]:
    """Continue each row of idx (B, T), yielding the next ids (B,) up to ``max_tokens`` times.

    A row is finished when its new tokens end in a ``stop``: an id, a list of ids each of which
    stops, or a list of sequences of ids. The stop itself is yielded; after it the row yields
    ``FINISHED`` (-1), and when all rows are finished the generator ends. The same seed gives the same
    ids, whatever else is in the batch. Wrong arguments raise UsageError at once, not at the first
    token.

    >>> for ids in generate_tokens(model, [[1, 2, 3]], max_tokens=5):
    ...     print(ids)
    """
    decoder = model if isinstance(model, Decoder) else Decoder(model)
    vocab_size = decoder.model.config.vocab_size
    context = check_prompt(idx, vocab_size)
    check_max_tokens(max_tokens)
    stops = check_stop(stop, vocab_size)
    pick = make_sampler(config or SampleConfig(), seed)

    def steps(context: Ids) -> Iterator[Ids]:
        owner, start = object(), context.shape[1]
        finished = np.zeros(len(context), bool)
        for _ in range(max_tokens):
            picked = pick(decoder.next_logits(context, owner), context)
            context = np.concatenate([context, picked[:, None]], axis=1)
            yield np.where(finished, FINISHED, picked).astype(np.int32)
            finished |= [_ends_in(row[start:], stops) for row in context]
            if finished.all():
                return

    return steps(context)


def generate(
    model: Transformer | Decoder,
    idx: Prompt,
    max_tokens: int,
    config: SampleConfig | None = None,
    seed: int | None = None,
    stop: Stop | None = None,
) -> Tensor:
    """The prompt and its continuation, int32 (B, T + n) with n at most ``max_tokens``.

    Arguments as for ``generate_tokens``. Rows that finish before others are filled up with the last
    token of their stop.
    """
    steps = generate_tokens(model, idx, max_tokens, config, seed, stop)
    columns = list(as_array(idx).astype(np.int32).T)
    for ids in steps:
        columns.append(np.where(ids == FINISHED, columns[-1], ids))
    return Tensor(np.stack(columns, axis=1).astype(np.int32))


def generate_text(
    model: Transformer | Decoder,
    tokenizer: Tokenizer,
    prompt: str,
    max_tokens: int,
    config: SampleConfig | None = None,
    seed: int | None = None,
    stop: Sequence[str] = (),
) -> Iterator[str]:
    """Continue a text, yielding pieces as soon as they are whole characters; the prompt is left out.

    Generation ends before the first of the ``stop`` strings, of which nothing is yielded even where
    it falls into several tokens. Special tokens written in the prompt are plain text.
    """
    stopper = StopStrings(stop)
    ids = tokenizer.encode(prompt)
    if not ids:
        raise UsageError(f"The prompt {prompt!r} is empty. Give at least one character, such as '\\n'.")
    tokens = generate_tokens(model, [ids], max_tokens, config, seed)

    def pieces() -> Iterator[str]:
        stream = TextStream(tokenizer)
        for (token,) in tokens:
            if piece := stopper.push(stream.push(int(token))):
                yield piece
            if stopper.stopped:
                return
        if piece := stopper.push(stream.flush()) + stopper.flush():
            yield piece

    return pieces()


class StopStrings:
    """Passes text on up to the first of some strings, holding back what may be its beginning.

    >>> stopper = StopStrings(["END"])
    >>> stopper.push("The E"), stopper.push("agle. EN"), stopper.push("D."), stopper.stopped
    ('The ', 'Eagle. ', '', True)
    """

    def __init__(self, strings: Sequence[str]) -> None:
        if isinstance(strings, str) or not all(isinstance(s, str) and s for s in strings):
            raise UsageError(f"stop={strings!r} is not a list of non-empty strings.")
        self.stopped = False
        self._strings, self._held = tuple(strings), ""

    def push(self, text: str) -> str:
        """Take some text; return what can be passed on."""
        if self.stopped:
            return ""
        held = self._held + text
        # The first to be complete counts, of those the longest: the same however the text is cut up.
        ends = [(held.find(s) + len(s), -len(s)) for s in self._strings if s in held]
        if ends:
            self.stopped, self._held = True, ""
            end, minus_length = min(ends)
            return held[: end + minus_length]
        keep = max((_overlap(held, s) for s in self._strings), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held


def as_array(idx: Prompt) -> npt.NDArray[Any]:
    """Token ids as numpy, unchecked but for rows of different lengths."""
    if isinstance(idx, Tensor):
        return np.asarray(idx.numpy())
    try:
        return np.asarray(idx)
    except ValueError:
        raise UsageError(
            "The prompts of a batch have different lengths. Give prompts of the same length, or "
            "generate from one after the other."
        ) from None


def check_prompt(idx: Prompt, vocab_size: int) -> Ids:
    """Token ids (B, T) as int32, or UsageError."""
    ids = as_array(idx)
    if ids.size == 0:
        raise UsageError(
            f"The prompt is empty (shape {ids.shape}). Give at least one token per row to continue."
        )
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise UsageError(
            f"The prompt has shape {ids.shape} and dtype {ids.dtype}; wanted integers of shape "
            f"(batch, time), for example [tokenizer.encode(text)]."
        )
    wrong = np.argwhere((ids < 0) | (ids >= vocab_size))
    if len(wrong):
        row, position = wrong[0]
        raise UsageError(
            f"Token {ids[row, position]} at position {position} of row {row} is outside the model's "
            f"vocabulary, 0 to {vocab_size - 1}. Was the text encoded with the model's tokenizer?"
        )
    return ids.astype(np.int32)


def check_max_tokens(max_tokens: int) -> None:
    """Raise UsageError unless this is a number of tokens."""
    whole = isinstance(max_tokens, int | np.integer) and not isinstance(max_tokens, bool)
    if not whole or max_tokens < 0:
        raise UsageError(f"max_tokens={max_tokens!r} is not a whole number from 0 up.")


def check_stop(stop: Stop | None, vocab_size: int) -> list[list[int]]:
    """The sequences of ids that ``stop`` stands for, or UsageError."""
    if stop is None:
        return []
    several = [stop] if isinstance(stop, int | np.integer) else stop
    advice = "wanted a token id, a list of ids, or a list of non-empty sequences of ids"
    if isinstance(stop, str) or not isinstance(several, Sequence | np.ndarray):
        raise UsageError(f"stop={stop!r}: {advice}. For text: stop=[tokenizer.encode(text)].")
    sequences = [[s] if isinstance(s, int | np.integer) else s for s in several]
    for sequence in sequences:
        ids = np.asarray(sequence)
        if ids.size == 0 or ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise UsageError(f"stop={stop!r}: {advice}.")
        if ids.min() < 0 or ids.max() >= vocab_size:
            raise UsageError(
                f"stop={stop!r} holds a token outside the vocabulary, 0 to {vocab_size - 1}."
            )
    return [[int(i) for i in sequence] for sequence in sequences]


def _ends_in(ids: Ids, sequences: list[list[int]]) -> bool:
    return any(ids[-len(s) :].tolist() == s for s in sequences)


def _overlap(text: str, string: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``string``."""
    longest = min(len(text), len(string) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(string[:n])), 0)
