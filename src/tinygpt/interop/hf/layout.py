"""How Hugging Face names and stores GPT-2's weights.

Names begin with ``transformer.``, but for that of the projection onto the vocabulary. The blocks'
linear layers are ``Conv1D``, whose weight is (in, out); ours are (out, in). All of them have
biases: those that a model of ours lacks are written as zeros.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from tinygpt.config import GPTConfig
from tinygpt.config.weights import Weight, weights
from tinygpt.interop.parity import Fetch, Floats

if TYPE_CHECKING:
    from tinygpt.model.transformer import Transformer

PREFIX = "transformer."


def all_weights(config: GPTConfig) -> dict[str, Weight]:
    """Every weight by Hugging Face's name, in our order, with the biases that it always has."""
    found = weights(replace(config, bias=True))
    return {w.name if w.kind == "output" else PREFIX + w.name: w for w in found}


def stored_shape(weight: Weight) -> tuple[int, ...]:
    """The shape that a weight has in a file."""
    return weight.shape[::-1] if weight.kind == "linear" else weight.shape


def turned(weight: Weight, values: Floats) -> Floats:
    """A weight's values in the other layout, from ours to that of a file or back."""
    return values.T if weight.kind == "linear" else values


def fetch_from(model: Transformer) -> Fetch:
    """A model's weights by the names, and in the layout, that they have in a folder."""
    from tinygpt.machine.transfer import read

    parameters, named = model.parameters(), all_weights(model.config)

    def fetch(name: str) -> Floats:
        weight = named[name]
        if weight.name not in parameters:
            return np.zeros(weight.shape, np.float32)
        return turned(weight, read(parameters[weight.name]))

    return fetch
