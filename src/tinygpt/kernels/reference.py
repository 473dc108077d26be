"""The plain twin of every kernel, in stock operations: the oracle, the fallback and the lesson.

Shapes use the field's letters: B batch, T positions, C width, H heads, D head size, V vocabulary.
"""

from __future__ import annotations

import math

from tinygrad import Tensor, dtypes


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + b for x (..., I), weight (O, I), bias (O,) -> (..., O)."""
    y = x @ weight.transpose(0, 1)
    return y if bias is None else y + bias


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    """Normalise the last axis to mean 0 and variance 1, then scale and shift (Ba et al., 2016)."""
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    y = centred * (variance + eps).rsqrt() * weight
    return y if bias is None else y + bias


def gelu(x: Tensor) -> Tensor:
    """GPT-2's GELU, the tanh approximation of x Φ(x) (Hendrycks and Gimpel, 2016)."""
    return 0.5 * x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)).tanh())


def embedding(tokens: Tensor, weight: Tensor) -> Tensor:
    """Rows of weight (V, C) at tokens (B, T) -> (B, T, C)."""
    return weight[tokens]


def causal_mask(queries: int, keys: int) -> Tensor:
    """Boolean (queries, keys): query i, the i-th of the last ones, sees keys up to its own."""
    i = Tensor.arange(queries).reshape(queries, 1) + (keys - queries)
    return Tensor.arange(keys).reshape(1, keys) <= i


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    is_causal: bool = False,
    keep: Tensor | None = None,
    keep_probability: float = 1.0,
) -> Tensor:
    """softmax(q kᵀ / √D) v, the formula of Vaswani et al. (2017).

    q is (B, H, Tq, D), k and v are (B, H, Tk, D). With ``is_causal`` the queries are the last Tq of
    the Tk positions and see nothing behind themselves. ``keep`` (B, H, Tq, Tk) is dropout's mask.
    """
    scores = q @ k.transpose(-2, -1) * (1 / math.sqrt(q.shape[-1]))  # (B, H, Tq, Tk)
    if is_causal and q.shape[-2] != 1:  # a single query is the last position: it sees every key
        mask = causal_mask(int(q.shape[-2]), int(k.shape[-2]))
        scores = mask.where(scores, -math.inf)
    weights = scores.softmax(-1)
    if keep is not None:
        weights = keep.where(weights, 0) / keep_probability
    return weights @ v


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean of -log softmax(logits)[target] in nats; logits (N, V), targets (N,).

    Targets below 0 are left out.
    """
    counted = targets >= 0
    picked = (Tensor.arange(logits.shape[-1]) == targets.unsqueeze(-1)).where(logits, 0).sum(-1)
    losses = counted.where(logits.logsumexp(-1) - picked, 0)
    return losses.sum() / counted.cast(dtypes.int32).sum().maximum(1)
