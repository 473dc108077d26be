"""The rule behind ``tinygpt train --minutes``: from a text, a pace and a time to settings.

In a given time a larger model learns more from what it reads, and reads less; a larger vocabulary
reads more bytes with the same tokens, and has to meet each token often enough. ``expected_bits``
puts numbers to that, and ``choose`` takes the shape and the vocabulary for which they are best.
After the pace of that shape has been measured, ``fix_steps`` fills the time that is left.
`docs/learning.md` has the measurements that the constants were fitted to.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from tinygpt.config import GPTConfig, TrainConfig
from tinygpt.config.devices import device_names
from tinygpt.errors import UsageError
from tinygpt.training.preflight import preflight, seconds_per_step

Values = Mapping[str, Any]

SHAPES = (
    (2, 64), (2, 96), (3, 96), (3, 128), (4, 128), (4, 160), (4, 192), (5, 192), (6, 192), (6, 256),
    (6, 320), (6, 384), (8, 384), (8, 512), (12, 512), (12, 768),
)  # fmt: skip
"""Layers and width of the models to choose from, the smallest first."""
BLOCKS = ((64, 0), (128, 4e6), (256, 4e7))
"""Lengths of a block, each with the tokens that a run must see to make use of it."""
HEAD = 32
"""Width of a head; twice that in models wider than 256."""
RECIPES: dict[str, dict[str, Any]] = {
    "muon": {
        "muon_learning_rate": 0.02,
        "muon_momentum": 0.9,
        "learning_rate": 1.5e-2,
        "beta2": 0.95,
        "decay_start": 0.4,
    },
    "adam": {"learning_rate": 5e-3, "beta2": 0.99, "decay_start": 0.0},
}
"""What each optimizer learns best with, whatever the shape."""
PER_BYTE = 5
"""Parameters for each byte of the text, at most: a larger model learns it by heart."""
MAX_EPOCHS = 30
"""After so many times through a text a model learns it by heart, and nothing else."""
EVALUATING = 0.05
"""Share of the time that evaluations and samples may take."""
MAX_EVALUATIONS = 20
CLOSING = 0.9
"""Seconds from the last step to the end of the process."""


class Vocabulary(NamedTuple):
    """A way to make tokens of a text."""

    size: int
    bytes_per_token: float


class Text(NamedTuple):
    """What the rule has to know of a text."""

    training: int
    """Bytes to learn from."""
    held_out: int
    """Bytes kept for validation."""
    vocabularies: Mapping[str | None, Vocabulary]
    """Those to choose from, by the names that --tokenizer takes; None is the text's own."""


class Pace(NamedTuple):
    """Seconds that the parts of a run take."""

    step: float
    evaluation: float
    """Of one batch."""
    sample: float


@dataclass(frozen=True)
class Plan:
    """What a run of so many seconds should look like."""

    seconds: float
    """For the steps alone."""
    tokenizer: str | None
    vocabulary: Vocabulary
    model: dict[str, Any]
    train: dict[str, Any]
    step: float
    """Seconds that a step should take."""
    tokens: int
    """Tokens that the run sees."""
    epochs: float
    """Times that it sees the text."""
    bits: float
    """Expected bits per byte of the held-out text, up to a constant of the text."""


def expected_bits(parameters: float, vocabulary: Vocabulary, tokens: float, epochs: float) -> float:
    """Bits per byte of a held-out text after ``tokens``, up to a constant of the text.

    ``parameters`` are those of the blocks. Both terms are power laws (Hoffmann et al., 2022), and
    what is read again is worth less each time (Muennighoff et al., 2023).
    """
    read = tokens * vocabulary.bytes_per_token
    once = read / max(1.0, epochs)
    again = max(0.0, epochs - 1)
    worth = once * (1 + REPEATS * (1 - math.exp(-again / REPEATS)))
    rare = RARE * vocabulary.size * vocabulary.bytes_per_token / worth
    words = WORDS * math.log2(vocabulary.size)
    return float(SIZE * parameters**-SIZE_POWER + READ * worth**-READ_POWER + rare - words)


SIZE, SIZE_POWER = 50.0, 0.4
READ, READ_POWER = 165.0, 0.4
WORDS, RARE = 0.02, 0.5
"""What a vocabulary of twice the size is worth, and what an entry costs for each time it is met."""
REPEATS = 2.0
"""Epochs after which reading once more teaches little."""


def choose(
    text: Text, rate: float, seconds: float, model: Values, train: Values, shapes: Iterable[Values]
) -> Plan:
    """The best of ``shapes`` and vocabularies for ``seconds`` of steps.

    ``rate`` is that of a matrix product, in floating-point operations per second. What ``model``
    and ``train`` say is kept.
    """
    fixed = sorted(({**shape, **model} for shape in shapes), key=_blocks)
    small = [shape for shape in fixed if _blocks(shape) <= PER_BYTE * text.training]
    plans = [
        _plan(text, name, rate, seconds, shape, train)
        for name in text.vocabularies
        for shape in small or fixed[:1]
    ]
    return min(plans, key=lambda plan: plan.bits)


def _blocks(shape: Values) -> int:
    """Parameters of the blocks, without biases and norms."""
    return int(12 * shape["n_layer"] * shape["n_embd"] ** 2)


def ladder(model: Values) -> Iterator[dict[str, Any]]:
    """The shapes to choose from that agree with what ``model`` says."""
    heads = model.get("n_head")
    for layers, width in SHAPES:
        width = model.get("n_embd", width if heads is None else math.ceil(width / heads) * heads)
        yield {
            "n_layer": model.get("n_layer", layers),
            "n_head": heads or _heads(width),
            "n_embd": width,
        }


def _heads(width: int) -> int:
    """The most heads of a usual width that divide ``width``."""
    most = max(1, width // (HEAD if width <= 256 else 2 * HEAD))
    return next(heads for heads in range(most, 0, -1) if width % heads == 0)


def sized(parameters: int, shapes: Iterable[Values], vocabulary: int = 1024) -> Values:
    """The shape whose number of parameters comes nearest, with a vocabulary of that size."""

    def ratio(shape: Values) -> float:
        return GPTConfig(**{"vocab_size": vocabulary, **shape}).num_params() / parameters

    return min(shapes, key=lambda shape: abs(math.log(ratio(shape))))


def _plan(
    text: Text, name: str | None, rate: float, seconds: float, shape: Values, train: Values
) -> Plan:
    """The run with this vocabulary and this shape."""
    vocabulary = text.vocabularies[name]
    optimizer = train.get("optimizer", "muon")
    recipe = {"optimizer": optimizer, "decay": "linear", "weight_decay": 0.1, **RECIPES[optimizer]}
    known = max(1.0, text.training / vocabulary.bytes_per_token)  # tokens to learn from
    model, tokens = dict(shape), min(1e6, MAX_EPOCHS * known)
    devices = len(device_names(train.get("devices")))
    unit = math.lcm(4, devices)  # sequences; each device has an equal part
    for _ in range(3):  # block and batch follow from the tokens, and these from the pace with both
        model = {**model, "block_size": _block(text, vocabulary, tokens), **shape}
        positions = min(max(1.2 * math.sqrt(tokens), 1024), 16_384)
        batch = max(devices, round(positions / model["block_size"] / unit) * unit)
        recipe = {**recipe, "batch_size": batch, **train}
        config = GPTConfig(**{"vocab_size": vocabulary.size, **model})
        estimate = preflight(config, TrainConfig(**{**recipe, "max_iters": 1}))
        step = seconds_per_step(estimate, rate)
        tokens = estimate.tokens * seconds / step
        tokens = min(tokens, MAX_EPOCHS * known)
    epochs = tokens / known
    bits = expected_bits(_blocks(shape), vocabulary, tokens, epochs)
    chance = epochs * _blocks(shape) / max(1, text.training)
    model = {**model, "dropout": dropout(chance), **shape}
    return Plan(seconds, name, vocabulary, model, recipe, step, int(tokens), epochs, bits)


def _block(text: Text, vocabulary: Vocabulary, tokens: float) -> int:
    """The longest block that pays, and of which each part of the text has at least two."""
    length = max(length for length, least in BLOCKS if tokens >= least)
    shortest = min(text.training, text.held_out or text.training) / vocabulary.bytes_per_token
    while length > 1 and 2 * length >= shortest:
        length //= 2
    return length


def dropout(chance: float) -> float:
    """Dropout keeps a model from learning by heart what it reads again and again.

    ``chance``, to do so, grows with the parameters for each byte of the text and with the epochs;
    it is their product. Where it is small dropout costs more than it saves.
    """
    return 0.0 if chance < 40 else 0.1 if chance < 120 else 0.2


def fix_steps(
    model: GPTConfig,
    train: TrainConfig,
    pace: Pace,
    seconds: float,
    spent: float,
    training: int,
    interval: int | None = None,
) -> dict[str, int]:
    """Steps, warm-up and evaluations that fill ``seconds``, of which some are ``spent``.

    ``training`` is the number of tokens to learn from; evaluations are ``interval`` steps apart, if
    that is given. Raises UsageError if there is no time for a single step.
    """
    left = seconds - spent - CLOSING
    cost = train.eval_iters * pace.evaluation + pace.sample
    evaluations = int(min(max(EVALUATING * left / cost, 1), MAX_EVALUATIONS))
    steps = int((left - evaluations * cost) / pace.step)
    if interval is not None:
        steps = int((left - cost) / (pace.step + cost / interval))
    if steps < 1:
        least = spent + CLOSING + cost + pace.step
        raise UsageError(
            f"{seconds:g} seconds are too few for a single step: {spent:.1f} of them have gone "
            f"into starting, reading the text and compiling. {math.ceil(1.5 * least)}s would do."
        )
    positions = train.batch_size * train.grad_accum_steps * model.block_size
    steps = min(steps, math.ceil(MAX_EPOCHS * training / positions))
    return {
        "max_iters": steps,
        "warmup_steps": min(max(20, steps // 50), steps // 5),
        "eval_interval": interval or math.ceil(steps / evaluations),
    }
