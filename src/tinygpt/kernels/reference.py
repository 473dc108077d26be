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
    """y = x Wᵀ + b, then + residual, then GELU, for x (..., I), weight (O, I), bias (O,)."""
    y = x @ weight.transpose(0, 1)
    if bias is not None:
        y = y + bias
    if residual is not None:
        y = y + residual
    return gelu(y) if activation == "gelu" else y


def dequantized(weight: Tensor, scale: Tensor) -> Tensor:
    """The numbers that int8 weights (O, I) stand for, with a scale (O,) for each row."""
    return weight.cast(scale.dtype) * scale.unsqueeze(1)


def quantized_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: Literal["gelu"] | None = None,
) -> Tensor:
    """`linear` of an int8 weight (O, I) with a scale (O,) for each row."""
    return linear(x, dequantized(weight, scale), bias, residual, activation)


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
    """Rows of weight (V, C) at tokens (B, T), plus the first T rows of positions -> (B, T, C).

    An id outside of 0..V-1 gives a row of NaN, and no gradient.
    """
    known = _known(tokens, weight)
    rows = known.unsqueeze(-1).where(weight[known.where(tokens, 0)], math.nan)
    return rows if positions is None else rows + positions[: tokens.shape[1]]


def quantized_embedding(
    tokens: Tensor, weight: Tensor, scale: Tensor, positions: Tensor | None = None
) -> Tensor:
    """`embedding` of an int8 weight (V, C) with a scale (V,) for each row."""
    known = _known(tokens, weight)
    row = known.where(tokens, 0)
    rows = weight[row].cast(scale.dtype) * scale[row].unsqueeze(-1)
    if positions is not None:
        rows = rows + positions[: tokens.shape[1]]
    return known.unsqueeze(-1).where(rows, math.nan)


def _known(tokens: Tensor, weight: Tensor) -> Tensor:
    """Which of the ids have a row."""
    return (tokens >= 0) & (tokens < int(weight.shape[0]))


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


def rows_attention(
    qkv: Tensor, keys: Tensor, values: Tensor, places: Tensor, positions: Tensor
) -> Tensor:
    """Attention of n rows (n, 3C) that stand at positions (n,) of their places (n,) -> (n, C).

    Each row's key and value are written into keys and values (P, H, T, D), in place.
    """
    (P, H, T, D), n = map(int, keys.shape), int(qkv.shape[0])
    q, k, v = (part.reshape(n, H, 1, D) for part in qkv.chunk(3, dim=1))
    times = Tensor.arange(T).reshape(1, T)
    positions = positions.reshape(n, 1)
    here = (Tensor.arange(P).reshape(1, P) == places.reshape(n, 1)).reshape(n, P, 1)
    here = (here & (times == positions).reshape(n, 1, T)).reshape(n, P, 1, T, 1)

    def at_own_place(cache: Tensor, new: Tensor) -> Tensor:
        """The caches (n, H, T, D) of the rows, once they have written what is new."""
        put = here.where(new.reshape(n, 1, H, 1, D), 0).sum(0)
        return in_place(cache, here.any(0).where(put, cache))[places]

    scores = q @ at_own_place(keys, k).transpose(-2, -1) * (1 / math.sqrt(D))  # (n, H, 1, T)
    seen = (times <= positions).reshape(n, 1, 1, T)
    weights = seen.where(scores, -math.inf).softmax(-1)
    return (weights @ seen.reshape(n, 1, T, 1).where(at_own_place(values, v), 0)).reshape(n, H * D)


def keep(qkv: Tensor, keys: Tensor, values: Tensor, place: Tensor) -> list[Tensor]:
    """Keys and values of qkv (T', 3C) into the first positions of a place (1,) of a cache."""
    (P, H, T, D), n = map(int, keys.shape), int(qkv.shape[0])
    here = (Tensor.arange(P) == place).reshape(P, 1, 1, 1)
    here = here & (Tensor.arange(T) < n).reshape(1, 1, T, 1)
    _, *new = (part.reshape(1, n, H, D).transpose(1, 2) for part in qkv.chunk(3, dim=1))
    padded = (x.pad((None, None, (0, T - n), None)) for x in new)
    return [in_place(c, here.where(x, c)) for c, x in zip((keys, values), padded, strict=True)]


def in_place(buffer: Tensor, value: Tensor) -> Tensor:
    """The buffer once it holds the value; it has to be realized, the value may depend on it."""
    return Tensor(buffer.uop.after(buffer.uop.store(value.cast(buffer.dtype).uop)))


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

    Targets below 0 are left out; one from V on makes it NaN.
    """
    counted, exists = targets >= 0, targets < int(logits.shape[-1])
    picked = (Tensor.arange(logits.shape[-1]) == targets.unsqueeze(-1)).where(logits, 0).sum(-1)
    losses = counted.where(exists.where(logits.logsumexp(-1) - picked, math.nan), 0)
    return losses.sum() / counted.cast(dtypes.int32).sum().maximum(1)


def global_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm () of all gradients taken as one vector."""
    total = gradients[0].float().square().sum()
    for gradient in gradients[1:]:
        total = total + gradient.float().square().sum()
    return total.sqrt()


def group_norms(
    gradients: Sequence[Tensor], groups: Sequence[int], scale: float = 1.0
) -> list[Tensor]:
    """The norm () of each group of gradients; ``groups`` has the number of each one's, from 0."""
    members = ([g for g, n in zip(gradients, groups, strict=True) if n == i] for i in set(groups))
    return [global_norm(group) * scale for group in members]


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
    groups: Sequence[int] = (),
) -> Tensor:
    """One step of AdamW, in place; -> the loss, the gradients' norm, was the step taken? (3,)

    Loss and gradients are multiplied by ``scale``, the gradients then clipped to the norm ``clip``,
    if it is not 0. The step is taken if ``loss`` () and the norm lie below the ``limits`` (2,).
    What is updated has to be realized together with the result. b1_t and b2_t are the powers of the
    betas so far. With ``groups``, a number from 0 for each parameter, the norms of the groups'
    gradients follow (3 + groups,). Kingma and Ba (2015); decoupled decay: Loshchilov and Hutter
    (2019).
    """
    loss, limits = judged(loss, limits, lr)
    norm = global_norm(grads) * scale
    report = verdict(loss * scale, norm, limits, *group_norms(grads, groups, scale))
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


def verdict(loss: Tensor, norm: Tensor, limits: Tensor, *others: Tensor) -> Tensor:
    """The loss, the norm, 1 if both are finite and below their limits, else 0, and the others."""
    taken = (loss > -math.inf) & (loss < limits[0]) & (norm < limits[1])
    return Tensor.stack(loss.cast(norm.dtype), norm, taken.cast(norm.dtype), *others)


def assign_if(taken: Tensor, tensor: Tensor, value: Tensor) -> Tensor:
    """Assign ``value`` if ``taken`` () is true; else every bit stays as it is."""
    return tensor.assign(taken.where(value, tensor.detach()))
