"""How well a model reads a whole text: every token but the first is predicted once.

The text is read in windows of block_size tokens, each ``stride`` further than the one before. The
first window predicts all of its tokens, each of the others the ``stride`` that are new to it, so
that they have at least block_size - stride tokens before them. With a stride of block_size, the
default, nothing is read twice, but the first tokens of a window have next to nothing before them,
and the loss is higher than that of a reader who remembers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinygpt.config.devices import device_names
from tinygpt.errors import DataError, UsageError
from tinygpt.machine.several import open_devices
from tinygpt.model.transformer import Transformer
from tinygpt.text.chat.packing import IGNORED, Conversations, Packed
from tinygpt.text.tokenizers import Tokenizer
from tinygpt.text.tokens import Tokens, byte_count
from tinygpt.training.metrics import bits_per_byte, perplexity
from tinygpt.training.replicas import Replicas
from tinygpt.training.step import make_evaluate

Ids = NDArray[np.int32]


@dataclass(frozen=True)
class Measured:
    """How well a text was predicted."""

    tokens: int
    """Predictions, one fewer than there are tokens."""
    loss: float
    """Their mean, in nats per token."""
    n_bytes: int
    """Bytes of UTF-8 that the predicted tokens spell."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "loss": self.loss,
            "perplexity": perplexity(self.loss),
            "bits_per_byte": bits_per_byte(self.loss, self.n_bytes / self.tokens),
        }


def measure(
    model: Transformer,
    tokens: Tokens,
    tokenizer: Tokenizer,
    batch_size: int = 16,
    stride: int | None = None,
    devices: int | str | None = None,
) -> Measured:
    """Loss, perplexity and bits per byte of a whole text, ``batch_size`` windows at a time.

    ``devices`` are as in ``TrainConfig``: each takes an equal part of the windows.
    """
    sums = batch_losses(model, tokens, batch_size, stride, devices)
    return summary(tokens, tokenizer, math.fsum(sums), model.config.block_size)


def summary(tokens: Tokens, tokenizer: Tokenizer, total: float, block_size: int) -> Measured:
    """What the sum of all losses of a text says; of conversations, of their answers."""
    predicted = tokens[1:]
    if isinstance(tokens, Conversations):
        packed = tokens.packed(block_size)
        predicted = packed.ids[:, 1:][packed.counted[:, 1:]]
    return Measured(len(predicted), total / len(predicted), byte_count(predicted, tokenizer))


def batch_losses(
    model: Transformer,
    tokens: Tokens,
    batch_size: int,
    stride: int | None = None,
    devices: int | str | None = None,
) -> Iterator[float]:
    """The losses in nats of a text, added up batch by batch, so many as `batches` says.

    ``devices`` divide each batch. Raises DeviceError for one that is not there.
    """
    check(model.config.block_size, tokens, batch_size, stride, len(device_names(devices)))
    if devices is None:
        evaluate_batch = make_evaluate(model)
    else:
        replicas = Replicas(model, open_devices(devices))
        evaluate_batch = make_evaluate(model, replicas=replicas)
    for x, y, count in windows(tokens, batch_size, model.config.block_size, stride):
        yield evaluate_batch(x, y) * count


def batches(block_size: int, tokens: Tokens, batch_size: int, stride: int | None = None) -> int:
    """The number of batches that a text takes."""
    if isinstance(tokens, Conversations):
        return math.ceil(len(tokens.packed(block_size).ids) / batch_size)
    further = max(0, len(tokens) - 1 - block_size)
    return math.ceil((1 + math.ceil(further / (stride or block_size))) / batch_size)


def check(
    block_size: int, tokens: Tokens, batch_size: int, stride: int | None, devices: int = 1
) -> None:
    """Raise UsageError or DataError for what cannot be measured."""
    if batch_size < 1:
        raise UsageError(f"batch_size={batch_size} is too small: it must be at least 1.")
    if batch_size % devices:
        raise UsageError(
            f"batch_size={batch_size} does not divide by the {devices} devices that share it. "
            f"Try --batch-size {batch_size - batch_size % -devices}."
        )
    if stride is not None and not 1 <= stride <= block_size:
        raise UsageError(
            f"--stride {stride} is out of range: windows are block_size={block_size} tokens long, "
            f"and may move by 1 to {block_size} of them. {max(1, block_size // 2)} is a good value."
        )
    if isinstance(tokens, Conversations) and stride not in (None, block_size):
        raise UsageError("--stride is for texts: a conversation is read in one block.")
    if len(tokens) < 2:
        raise DataError(f"The text has {len(tokens)} tokens; at least 2 are needed to predict one.")


def windows(
    tokens: Tokens, batch_size: int, block_size: int, stride: int | None = None
) -> Iterator[tuple[Ids, Ids, int]]:
    """Batches (B, T) of inputs and targets, and the number of real targets.

    Targets that another window predicts, and those behind the text's end, are -1. The windows of
    conversations are the blocks they are learned in, and all but their answers is -1.
    """
    if isinstance(tokens, Conversations):
        yield from _blocks(tokens.packed(block_size), batch_size, block_size)
        return
    stride, last = stride or block_size, len(tokens) - 1
    count = 1 + math.ceil(max(0, last - block_size) / stride)
    for first in range(0, count, batch_size):
        x = np.zeros((batch_size, block_size), np.int32)
        y = np.full((batch_size, block_size), -1, np.int32)
        for row in range(min(batch_size, count - first)):
            start = (first + row) * stride
            part = np.asarray(tokens[start : start + block_size + 1])
            known = block_size - stride if start else 0
            x[row, : len(part) - 1] = part[:-1]
            y[row, known : len(part) - 1] = part[1 + known :]
        yield x, y, int((y >= 0).sum())


def _blocks(packed: Packed, batch_size: int, block_size: int) -> Iterator[tuple[Ids, Ids, int]]:
    """All blocks of conversations in batches, the last filled up with blocks that do not count."""
    for first in range(0, len(packed.ids), batch_size):
        x = np.zeros((batch_size, block_size), np.int32)
        y = np.full((batch_size, block_size), IGNORED, np.int32)
        numbers = np.arange(first, min(first + batch_size, len(packed.ids)))
        x[: len(numbers)], y[: len(numbers)] = packed.rows(numbers)
        yield x, y, int((y >= 0).sum())
