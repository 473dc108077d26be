"""Do two programs compute the same from the same weights? What every export ends with.

``plain_logits`` is a third opinion that needs nothing but numpy: GPT-2's forward pass over weights
that are named and laid out as Hugging Face has them, one tensor at a time. It shares no line with
``model`` or the kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tinygpt.config import GPTConfig
from tinygpt.errors import InteropError

if TYPE_CHECKING:
    from tinygpt.model.transformer import Transformer

Ids = npt.NDArray[np.int32]
Floats = npt.NDArray[Any]
"""float32, or float64 where that is asked for."""
Fetch = Callable[[str], npt.NDArray[Any]]
"""From a tensor's name to its values."""

TOLERANCE = 1e-4
"""Largest difference of two logits in float32; the order of the sums alone makes about 1e-5."""
ROUNDINGS, RELATIVE = 4.0, 1e-4
"""How many times the error of float32 may be the difference, and its share of the largest logit."""
POSITIONS = 64
"""Tokens that are compared at most."""
ROWS = 4096
"""Tokens whose logits are computed at a time, so that the embedding need not fit in memory."""


def fixed_prompt(config: GPTConfig) -> Ids:
    """Token ids (1, T) from all over the vocabulary, the same ones each time.

    >>> fixed_prompt(GPTConfig(vocab_size=100, block_size=5)).tolist()
    [[0, 61, 23, 85, 99]]
    """
    T = min(POSITIONS, config.block_size)
    golden = (math.sqrt(5) - 1) / 2  # its multiples never come close to one another
    ids = (np.arange(T) * golden % 1 * config.vocab_size).astype(np.int32)
    ids[-1] = config.vocab_size - 1
    return ids[None]


def our_logits(model: Transformer, ids: Ids) -> Floats:
    """Logits (T, V) of our model for ids (1, T), without dropout."""
    from tinygrad import Tensor

    from tinygpt.model.transformer import INFERENCE

    logits: Floats = model(Tensor(ids, dtype="int32"), drop=INFERENCE).numpy()[0]
    return logits


class Comparison(NamedTuple):
    """The largest difference of two logits, and how large it may be."""

    difference: float
    allowed: float


def compare(
    ours: Floats,
    theirs: Floats,
    reader: str = "the other program",
    rounding: Callable[[], float] | None = None,
) -> Comparison:
    """How far two arrays of logits (T, V) lie apart; InteropError where that is too far.

    Allowed is ``TOLERANCE``, and where that does not suffice a few times what ``rounding`` returns:
    the error that float32 itself makes in this model. With large weights that is more; the logits
    of two right programs can then differ by a thousandth. What is no number is a failure.
    """
    if ours.shape != theirs.shape:
        raise InteropError(
            f"{reader} gives logits of shape {theirs.shape}, not {ours.shape}. Nothing was written."
        )
    difference = float(np.abs(ours.astype(np.float64) - theirs.astype(np.float64)).max())
    allowed = TOLERANCE
    if rounding is not None and TOLERANCE < difference < math.inf:
        largest = float(np.abs(ours).max())
        allowed = max(TOLERANCE, min(ROUNDINGS * rounding(), RELATIVE * largest))
    if not difference <= allowed:
        raise InteropError(
            f"{reader} computes something else from the same weights: the logits differ by up to "
            f"{difference:.3g}, and {allowed:.3g} is allowed. Nothing was written. Is a weight not "
            f"finite? tinygpt doctor --kernels tells whether the kernels are right on this machine."
        )
    return Comparison(difference, allowed)


def prove(model: Transformer, fetch: Fetch, theirs: Floats, reader: str) -> Comparison:
    """``compare`` for a model's logits of ``fixed_prompt`` and those that a reader of it gives.

    ``fetch`` gives the model's weights, for the error that float32 makes.
    """
    ids = fixed_prompt(model.config)
    rounding = partial(rounding_error, fetch, model.config, ids)
    return compare(our_logits(model, ids), theirs, reader, rounding)


# GPT-2 in numpy ---------------------------------------------------------------------------------


def rounding_error(fetch: Fetch, config: GPTConfig, ids: Ids) -> float:
    """The largest error that float32 makes in a logit, by the forward pass in float64."""
    single = plain_logits(fetch, config, ids)
    double = plain_logits(fetch, config, ids, np.float64)
    return float(np.abs(single - double).max())


def plain_logits(
    fetch: Fetch, config: GPTConfig, ids: Ids, dtype: type[np.floating[Any]] = np.float32
) -> Floats:
    """Logits (T, V) for ids (1, T), of weights named as in ``GPT2LMHeadModel``.

    ``fetch`` gives each tensor when it is its turn, so no more than one is held.
    """
    T = ids.shape[1]
    x = fetch("transformer.wte.weight")[ids[0]].astype(dtype)  # (T, C)
    x = x + _like(x, fetch("transformer.wpe.weight")[:T])
    for i in range(config.n_layer):
        block = f"transformer.h.{i}"
        x = x + _attention(fetch, f"{block}.attn", _norm(fetch, f"{block}.ln_1", x), config.n_head)
        inner = _gelu(_conv(fetch, f"{block}.mlp.c_fc", _norm(fetch, f"{block}.ln_2", x)))
        x = x + _conv(fetch, f"{block}.mlp.c_proj", inner)
    x = _norm(fetch, "transformer.ln_f", x)
    head = fetch("transformer.wte.weight" if config.tie_embeddings else "lm_head.weight")  # (V, C)
    parts = [x @ _like(x, head[at : at + ROWS]).T for at in range(0, len(head), ROWS)]
    return np.concatenate(parts, axis=1)


def _like(x: Floats, values: npt.NDArray[Any]) -> Floats:
    return np.asarray(values, x.dtype)


def _conv(fetch: Fetch, name: str, x: Floats) -> Floats:
    """A linear layer whose weight is stored (in, out)."""
    y: Floats = x @ _like(x, fetch(f"{name}.weight")) + _like(x, fetch(f"{name}.bias"))
    return y


def _norm(fetch: Fetch, name: str, x: Floats) -> Floats:
    centred = x - x.mean(axis=-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)
    y: Floats = scaled * _like(x, fetch(f"{name}.weight")) + _like(x, fetch(f"{name}.bias"))
    return y


def _gelu(x: Floats) -> Floats:
    """GPT-2's, which goes by way of tanh."""
    y: Floats = x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return y


def _attention(fetch: Fetch, name: str, x: Floats, n_head: int) -> Floats:
    """(T, C) -> (T, C), every position from itself and those before it."""
    T, C = x.shape
    qkv = _conv(fetch, f"{name}.c_attn", x)  # (T, 3C)
    q, k, v = qkv.reshape(T, 3, n_head, C // n_head).transpose(1, 2, 0, 3)  # each (H, T, D)
    scores = q @ k.transpose(0, 2, 1) / math.sqrt(C // n_head)  # (H, T, T)
    scores = np.where(np.tri(T, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    gathered = (weights @ v).transpose(1, 0, 2).reshape(T, C)  # (T, C)
    return _conv(fetch, f"{name}.c_proj", gathered)
