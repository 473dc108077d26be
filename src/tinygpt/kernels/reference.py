"""The plain twin of every kernel, in stock operations: the oracle, the fallback and the lesson.

Shapes use the field's letters: B batch, T positions, C width, H heads, D head size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from tinygrad import Tensor, dtypes


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: Literal["gelu"] | None = None,
) -> Tensor:
    """y = x Wᵀ + b, then + residual or GELU, for x (..., I), weight (O, I), bias (O,)."""
    y = x @ weight.transpose(0, 1)
    if bias is not None:
        y = y + bias
    if residual is not None:
        y = y + residual
    return gelu(y) if activation == "gelu" else y


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    """Normalise the last axis to mean 0 and variance 1, then scale and shift (Ba et al., 2016)."""
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    y = centred * (variance + eps).rsqrt() * weight
    return y if bias is None else y + bias


def gelu(x: Tensor) -> Tensor:
    """GPT-2's GELU, the tanh approximation of x Φ(x) (Hendrycks and Gimpel, 2016)."""
    return 0.5 * x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)).tanh())


def embedding(tokens: Tensor, weight: Tensor, positions: Tensor | None = None) -> Tensor:
    """Rows of weight (V, C) at tokens (B, T), plus the first T rows of positions -> (B, T, C)."""
    rows = weight[tokens]
    return rows if positions is None else rows + positions[: tokens.shape[1]]


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


def packed_attention(qkv: Tensor, n_head: int) -> Tensor:
    """Causal attention of queries, keys and values (B, T, 3C), side by side -> (B, T, C)."""
    q, k, v = (split_heads(part, n_head) for part in qkv.chunk(3, dim=2))  # (B, H, T, D)
    return merge_heads(attention(q, k, v, is_causal=True))


def split_heads(x: Tensor, n_head: int) -> Tensor:
    """(B, T, C) -> (B, H, T, D)"""
    B, T, C = x.shape
    return x.reshape(B, T, n_head, C // n_head).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, T, D) -> (B, T, C)"""
    B, H, T, D = x.shape
    return x.transpose(1, 2).reshape(B, T, H * D)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean of -log softmax(logits)[target] in nats; logits (N, V), targets (N,).

    Targets below 0 are left out.
    """
    counted = targets >= 0
    picked = (Tensor.arange(logits.shape[-1]) == targets.unsqueeze(-1)).where(logits, 0).sum(-1)
    losses = counted.where(logits.logsumexp(-1) - picked, 0)
    return losses.sum() / counted.cast(dtypes.int32).sum().maximum(1)


def global_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm () of all gradients taken as one vector."""
    total = gradients[0].float().square().sum()
    for gradient in gradients[1:]:
        total = total + gradient.float().square().sum()
    return total.sqrt()


def clip_factor(norm: Tensor, limit: float) -> Tensor:
    """What to multiply gradients of this norm by so that it is at most ``limit``."""
    return (limit / (norm + 1e-6)).minimum(1.0)


def adamw_update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    m: Sequence[Tensor],
    v: Sequence[Tensor],
    lr: Tensor,
    b1_t: Tensor,
    b2_t: Tensor,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    decay: Sequence[float],
    clip: float = 0.0,
    scale: float = 1.0,
) -> Tensor:
    """One step of AdamW, in place; -> the gradients' norm ().

    The gradients are multiplied by ``scale`` and then clipped to the norm ``clip``, if it is not 0.
    What is updated has to be realized together with the norm. b1_t and b2_t are the powers of the
    betas so far. Kingma and Ba (2015); decoupled decay: Loshchilov and Hutter (2019).
    """
    norm = global_norm(grads) * scale
    factor = clip_factor(norm, clip) * scale if clip else scale
    b1_t.assign(b1_t * beta1)
    b2_t.assign(b2_t * beta2)
    for p, gradient, m_p, v_p, rate in zip(params, grads, m, v, decay, strict=True):
        g = gradient * factor
        m_p.assign(beta1 * m_p + (1 - beta1) * g)
        v_p.assign(beta2 * v_p + (1 - beta2) * g * g)
        direction = (m_p / (1 - b1_t)) / ((v_p / (1 - b2_t)).sqrt() + eps)
        p.assign((p.detach() * (1 - lr * rate) - lr * direction).cast(p.dtype))
    return norm
