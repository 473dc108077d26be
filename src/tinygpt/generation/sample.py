"""From logits to the next token: filters, probabilities, a draw.

A filter takes the logits (V,) of one sequence and returns logits (V,) in which excluded tokens have
-inf. `filter_logits` applies those that a SampleConfig asks for, `draw` picks a token, `choose`
does both for a batch. Everything is float64 numpy on the host, so that a seed gives the same text
on every device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tinygpt.config import SampleConfig
from tinygpt.errors import TinyGPTError, UsageError

Logits = npt.NDArray[np.float64]
Ids = npt.NDArray[np.integer]
Sampler = Callable[[npt.ArrayLike, Ids | Sequence[Sequence[int]]], npt.NDArray[np.int32]]
"""(logits (B, V), all ids so far (B, n)) -> the next ids (B,)."""


def penalise_repetition(logits: Logits, seen: Ids, penalty: float) -> Logits:
    """Make tokens that occurred less likely: positive logits are divided, negative ones multiplied.

    Keskar et al., "CTRL" (2019).
    """
    out = logits.copy()
    ids = np.unique(seen)
    picked = out[ids]
    out[ids] = np.where(picked > 0, picked / penalty, picked * penalty)
    return out


@dataclass(frozen=True)
class Penalties:
    """What is subtracted from, or added to, the logits before any filter, as in OpenAI's API."""

    presence: float = 0.0
    """Subtracted from each token that was generated before."""
    frequency: float = 0.0
    """Subtracted from each token once for every time that it was generated."""
    bias: Mapping[int, float] = field(default_factory=dict)
    """Added to tokens, by their ids; ids outside the vocabulary are ignored."""

    def apply(self, logits: npt.ArrayLike, written: Ids) -> Logits:
        """New logits (V,), given the ids that were generated so far, without the prompt.

        >>> Penalties(1.0, 0.5, {2: 9.0}).apply([0.0, 0.0, 0.0], np.array([1, 1])).tolist()
        [0.0, -2.0, 9.0]
        """
        out: Logits = np.array(logits, np.float64)
        ids, counts = np.unique(written, return_counts=True)
        out[ids] -= self.frequency * counts + self.presence
        for token, value in self.bias.items():
            if token < out.size:
                out[token] += value
        return out


def scale_by_temperature(logits: Logits, temperature: npt.ArrayLike) -> Logits:
    """Divide by a temperature above 0: low ones sharpen the distribution, high ones flatten it.

    The largest logit becomes 0, which changes no probability and lets the temperature be tiny.
    Several rows (B, V) may have a temperature each, (B, 1).
    """
    with np.errstate(over="ignore"):  # to -inf, rightly
        scaled: Logits = (logits - logits.max(axis=-1, keepdims=True)) / temperature
    return scaled


def keep_top_k(logits: Logits, k: int) -> Logits:
    """Keep the k likeliest tokens; of equals the lower ids. More than V means all."""
    return _only(logits, _largest(logits, k))


def keep_top_p(logits: Logits, p: float) -> Logits:
    """Keep the fewest tokens whose probabilities reach the sum p; of equals the lower ids.

    Holtzman et al., "The Curious Case of Neural Text Degeneration" (2020).
    """
    if p >= 1:
        return logits
    probabilities = softmax(logits)
    count = 64  # sorting a vocabulary is slow, and the nucleus is nearly always small
    while True:
        ids = _largest(probabilities, count)
        ids = ids[np.argsort(-probabilities[ids], kind="stable")]  # likeliest first, then lowest id
        reached = np.flatnonzero(np.cumsum(probabilities[ids]) >= p)
        if reached.size:
            return _only(logits, ids[: reached[0] + 1])
        if count >= logits.size:  # the sum fell short of p by rounding
            return logits
        count *= 8


def keep_min_p(logits: Logits, fraction: float) -> Logits:
    """Keep tokens at least ``fraction`` times as likely as the likeliest (Nguyen et al., 2024)."""
    return np.where(logits >= logits.max() + math.log(fraction), logits, -np.inf)


def softmax(logits: Logits) -> Logits:
    """Probabilities (V,) of logits (V,)."""
    weights: Logits = np.exp(logits - logits.max())
    total: float = weights.sum()
    return weights / total


def filter_logits(logits: npt.ArrayLike, seen: Ids, config: SampleConfig) -> Logits:
    """The logits (V,) after every filter that ``config`` asks for; ``seen`` holds the ids so far.

    The order is repetition penalty, temperature (unless it is 0), top-k, top-p, min-p. Raises
    TinyGPTError if the logits are not numbers.
    """
    out = _finite(logits)
    if config.repetition_penalty is not None:
        out = penalise_repetition(out, seen, config.repetition_penalty)
    if config.temperature > 0:
        out = scale_by_temperature(out, config.temperature)
    if config.top_k is not None:
        out = keep_top_k(out, config.top_k)
    if config.top_p is not None:
        out = keep_top_p(out, config.top_p)
    if config.min_p is not None:
        out = keep_min_p(out, config.min_p)
    return out


def _finite(logits: npt.ArrayLike) -> Logits:
    """A copy in float64 of logits (..., V), or TinyGPTError if they are not numbers."""
    out: Logits = np.array(logits, np.float64)
    if not math.isfinite(out.max(axis=-1).sum()):  # NaN wins every max
        raise TinyGPTError(
            f"Nothing can be sampled from these logits: of {out.size} values {np.isnan(out).sum()} "
            f"are not numbers and {np.isinf(out).sum()} are infinite. The model's training "
            f"diverged; use an earlier checkpoint, or train with a lower learning_rate."
        )
    return out


def draw(logits: Logits, uniform: float) -> int:
    """The token that a number from [0, 1) picks: the inverse of the cumulative distribution."""
    return draw_each(logits[None], [uniform])[0]


def draw_each(logits: Logits, uniforms: Sequence[float]) -> list[int]:
    """``draw`` for each row of (B, V), the slow part of it for all rows at once."""
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    picked = []
    for row, sums, uniform in zip(weights, weights.cumsum(axis=1), uniforms, strict=True):
        i = int(sums.searchsorted(uniform * sums[-1], side="right"))
        picked.append(i if i < row.size else int(np.flatnonzero(row)[-1]))
    return picked


class Choice:
    """How the tokens of one sequence are chosen: settings, and a random stream of its own."""

    __slots__ = ("config", "penalties", "plain", "prompt", "stream")

    def __init__(
        self,
        config: SampleConfig,
        seed: np.random.SeedSequence,
        penalties: Penalties | None = None,
        prompt: int = 0,
    ) -> None:
        """``prompt`` is the length of the prompt, to which no penalty applies."""
        self.config, self.penalties, self.prompt = config, penalties, prompt
        self.stream = np.random.Generator(np.random.Philox(seed))
        filters = config.top_k, config.top_p, config.min_p, config.repetition_penalty
        self.plain = filters == (None,) * 4 and penalties is None
        """Whether temperature is all there is."""

    def pick(self, logits: npt.ArrayLike, seen: Ids) -> int:
        """The next token, given its logits (V,) and the ids so far."""
        if self.penalties is not None:
            logits = self.penalties.apply(logits, seen[self.prompt :])
        out = filter_logits(logits, seen, self.config)
        return int(out.argmax()) if self.config.temperature == 0 else draw(out, self.uniform())

    def uniform(self) -> float:
        """The next random number from [0, 1)."""
        return self.stream.random()


def first_choice(
    config: SampleConfig,
    seed: int | None = None,
    penalties: Penalties | None = None,
    prompt: int = 0,
) -> Choice:
    """The `Choice` of the first row of ``make_sampler(config, seed)``."""
    first = np.random.SeedSequence(_checked_seed(seed)).spawn(1)[0]
    return Choice(config, first, penalties, prompt)


def choose(
    logits: npt.ArrayLike, seen: Ids | Sequence[Sequence[int]], choices: Sequence[Choice]
) -> npt.NDArray[np.int32]:
    """The next tokens (B,) of several sequences, given their logits (B, V) and all ids so far.

    Rows without filters or penalties are computed together, with the same results as alone.
    """
    rows: Logits = np.asarray(logits)
    picked = np.zeros(len(rows), np.int32)
    greedy, drawn = list[int](), list[int]()
    for i, choice in enumerate(choices):
        if not choice.plain:
            picked[i] = choice.pick(rows[i], np.asarray(seen[i]))
        else:
            (greedy if choice.config.temperature == 0 else drawn).append(i)
    if greedy:
        picked[greedy] = _finite(rows[greedy]).argmax(axis=1)
    if drawn:
        some = [choices[i] for i in drawn]
        temperature = np.array([[choice.config.temperature] for choice in some])
        scaled = scale_by_temperature(_finite(rows[drawn]), temperature)
        picked[drawn] = draw_each(scaled, [choice.uniform() for choice in some])
    return picked


def make_sampler(config: SampleConfig, seed: int | None = None) -> Sampler:
    """The function that picks each sequence's next token; with temperature 0 the likeliest one.

    Every row draws from a random stream of its own, made from the seed and the row's number, so
    what a row becomes does not depend on how many others there are. Without a seed, each sampler
    differs.

    >>> pick = make_sampler(SampleConfig(temperature=0))
    >>> pick([[0.1, 2.0, 0.3]], np.array([[0]])).tolist()
    [1]
    """
    root = np.random.SeedSequence(_checked_seed(seed))
    choices: list[Choice] = []

    def pick(logits: npt.ArrayLike, seen: Ids | Sequence[Sequence[int]]) -> npt.NDArray[np.int32]:
        n = len(np.asarray(logits))
        while len(choices) < n:
            choices.append(Choice(config, root.spawn(1)[0]))
        return choose(logits, seen, choices[:n])

    return pick


def log_probabilities(logits: npt.ArrayLike) -> Logits:
    """Natural logs of the probabilities (..., V) of logits (..., V)."""
    out: Logits = np.array(logits, np.float64)
    out -= out.max(axis=-1, keepdims=True)
    out -= np.log(np.exp(out).sum(axis=-1, keepdims=True))
    return out


def likeliest(values: Logits, k: int) -> list[int]:
    """Ids of the k largest values, the largest first; of equals the lower ids."""
    ids = _largest(values, k) if k else np.arange(0)
    order = np.argsort(-values[ids], kind="stable")
    return [int(i) for i in ids[order]]


def _checked_seed(seed: int | None) -> int | None:
    if seed is None or (isinstance(seed, int | np.integer) and seed >= 0):
        return seed
    raise UsageError(
        f"seed={seed!r} is not a whole number from 0 up. Leave it out for a random one."
    )


def _largest(values: Logits, k: int) -> Ids:
    """Ids of the k largest values, ascending; of equals the lower ids."""
    if k >= values.size:
        return np.arange(values.size)
    least = np.partition(values, values.size - k)[values.size - k]
    above = np.flatnonzero(values > least)
    equal = np.flatnonzero(values == least)[: k - above.size]
    return np.sort(np.concatenate([above, equal]))


def _only(logits: Logits, ids: Ids) -> Logits:
    out = np.full_like(logits, -np.inf)
    out[ids] = logits[ids]
    return out
