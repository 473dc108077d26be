"""The plain twin of every kernel, in stock operations: the oracle, the fallback and the lesson.

Shapes use the field's letters: B batch, T positions, C width, H heads, D head size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from tinygrad import Tensor, dtypes

from tinygpt.kernels.masks import keeps, stream


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


def dropout_mask(rows: int, columns: int, p: float, key: Tensor) -> Tensor:
    """Boolean (rows, columns): what dropout with probability p keeps, by ``key`` (2,) uint32."""
    row = Tensor.arange(rows, dtype=dtypes.uint32).reshape(rows, 1)
    column = Tensor.arange(columns, dtype=dtypes.uint32)
    start, stride = stream((key[0], key[1]), row)
    return keeps(start, stride, column, p)


def dropout(x: Tensor, p: float, key: Tensor, residual: Tensor | None = None) -> Tensor:
    """residual + x, of which each element is 0 with probability p, the rest divided by 1 - p."""
    width = int(x.shape[-1])
    mask = dropout_mask(int(x.numel()) // width, width, p, key.to(x.device))
    y = mask.reshape(x.shape).where(x / (1 - p), 0)
    return y if residual is None else residual + y


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    is_causal: bool = False,
    dropout: float = 0.0,
    key: Tensor | None = None,
) -> Tensor:
    """softmax(q kᵀ / √D) v, the formula of Vaswani et al. (2017).

    q is (B, H, Tq, D), k and v are (B, H, Tk, D). With ``is_causal`` the queries are the last Tq of
    the Tk positions and see nothing behind themselves. With ``dropout``, the probability,
    weights are dropped by ``key``, in a mask with a row for each sequence, head and key position.
    """
    scores = q @ k.transpose(-2, -1) * (1 / math.sqrt(q.shape[-1]))  # (B, H, Tq, Tk)
    if is_causal and q.shape[-2] != 1:  # a single query is the last position: it sees every key
        mask = causal_mask(int(q.shape[-2]), int(k.shape[-2]))
        scores = mask.where(scores, -math.inf)
    weights = scores.softmax(-1)
    if dropout:
        assert key is not None, "dropout needs a key"
        (B, H, Tq, _), Tk = map(int, q.shape), int(k.shape[2])
        mask = dropout_mask(B * H * Tk, Tq, dropout, key.to(q.device))
        mask = mask.reshape(B, H, Tk, Tq).transpose(2, 3)
        weights = mask.where(weights / (1 - dropout), 0)
    return weights @ v


def packed_attention(
    qkv: Tensor, n_head: int, dropout: float = 0.0, key: Tensor | None = None
) -> Tensor:
    """Causal attention of queries, keys and values (B, T, 3C), side by side -> (B, T, C)."""
    q, k, v = (split_heads(part, n_head) for part in qkv.chunk(3, dim=2))  # (B, H, T, D)
    return merge_heads(attention(q, k, v, True, dropout, key))


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
    loss: Tensor | None = None,
    limits: Tensor | None = None,
) -> Tensor:
    """One step of AdamW, in place; -> the loss, the gradients' norm, was the step taken? (3,)

    Loss and gradients are multiplied by ``scale``, the gradients then clipped to the norm ``clip``,
    if it is not 0. The step is taken if ``loss`` () and the norm lie below the ``limits`` (2,).
    What is updated has to be realized together with the result. b1_t and b2_t are the powers of the
    betas so far. Kingma and Ba (2015); decoupled decay: Loshchilov and Hutter (2019).
    """
    loss, limits = judged(loss, limits, lr)
    norm = global_norm(grads) * scale
    report = verdict(loss * scale, norm, limits)
    taken = report[2] > 0
    factor = clip_factor(norm, clip) * scale if clip else scale
    assign_if(taken, b1_t, b1_t * beta1)
    assign_if(taken, b2_t, b2_t * beta2)
    for p, gradient, m_p, v_p, rate in zip(params, grads, m, v, decay, strict=True):
        g = gradient * factor
        assign_if(taken, m_p, beta1 * m_p + (1 - beta1) * g)
        assign_if(taken, v_p, beta2 * v_p + (1 - beta2) * g * g)
        direction = (m_p / (1 - b1_t)) / ((v_p / (1 - b2_t)).sqrt() + eps)
        assign_if(taken, p, (p.detach() * (1 - lr * rate) - lr * direction).cast(p.dtype))
    return report


def judged(loss: Tensor | None, limits: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """The loss and the limits (2,) that decide on a step: 0 and infinities where not given."""
    loss = like.zeros_like().contiguous() if loss is None else loss
    limits = like.full_like(math.inf).expand(2).contiguous() if limits is None else limits
    return loss.reshape(()), limits


def verdict(loss: Tensor, norm: Tensor, limits: Tensor) -> Tensor:
    """(3,): the loss, the norm, and 1 if both are finite and below their limits, else 0."""
    taken = (loss > -math.inf) & (loss < limits[0]) & (norm < limits[1])
    return Tensor.stack(loss.cast(norm.dtype), norm, taken.cast(norm.dtype))


def assign_if(taken: Tensor, tensor: Tensor, value: Tensor) -> Tensor:
    """Assign ``value`` if ``taken`` () is true; else every bit stays as it is."""
    return tensor.assign(taken.where(value, tensor.detach()))
