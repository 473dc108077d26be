"""What the kernels should compute, in float64 and numpy: results, and their gradients by hand.

Every function takes the gradient of its result last, and returns the result and the gradients of
its inputs. Shapes are those of ``kernels``.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from tinygpt.kernels.newton_schulz import STEPS

Array = npt.NDArray[np.float64]
Ids = npt.NDArray[Any]


def attention(q: Array, k: Array, v: Array, causal: bool, grad: Array) -> list[Array]:
    """softmax(q kᵀ / √D) v; causal queries are the last of the positions."""
    (Tq, D), Tk = q.shape[2:], k.shape[2]
    scores = q @ k.swapaxes(2, 3) / math.sqrt(D)  # (B, H, Tq, Tk)
    if causal:
        scores = np.where(np.tri(Tq, Tk, Tk - Tq, dtype=bool), scores, -np.inf)
    weights = softmax(scores)
    dv, dweights = weights.swapaxes(2, 3) @ grad, grad @ v.swapaxes(2, 3)
    dscores = weights * (dweights - (dweights * weights).sum(-1, keepdims=True)) / math.sqrt(D)
    return [weights @ v, dscores @ k, dscores.swapaxes(2, 3) @ q, dv]


def packed_attention(qkv: Array, n_head: int, grad: Array) -> list[Array]:
    """Causal attention of queries, keys and values (B, T, 3C) side by side."""
    B, T, width = qkv.shape
    D = width // (3 * n_head)
    q, k, v = qkv.reshape(B, T, 3, n_head, D).transpose(2, 0, 3, 1, 4)  # each (B, H, T, D)
    by_head = grad.reshape(B, T, n_head, D).transpose(0, 2, 1, 3)
    out, *gradients = attention(q, k, v, True, by_head)
    dqkv = np.stack(gradients).transpose(1, 3, 0, 2, 4).reshape(B, T, width)
    return [out.transpose(0, 2, 1, 3).reshape(B, T, width // 3), dqkv]


def rows_attention(
    qkv: Array, keys: Array, values: Array, slots: Ids, positions: Ids
) -> list[Array]:
    """Row i writes its key and value at its position of its slot, and attends up to there."""
    (n, _), (_, H, _, D) = qkv.shape, keys.shape
    q, k, v = qkv.reshape(n, 3, H, D).swapaxes(0, 1)
    keys, values, out = keys.copy(), values.copy(), np.zeros((n, H, D))
    keys[slots, :, positions], values[slots, :, positions] = k, v
    for i, (slot, at) in enumerate(zip(slots, positions, strict=True)):
        weights = softmax(np.einsum("hd,htd->ht", q[i], keys[slot, :, : at + 1]) / math.sqrt(D))
        out[i] = np.einsum("ht,htd->hd", weights, values[slot, :, : at + 1])
    return [out.reshape(n, H * D), keys, values]


def keep(qkv: Array, keys: Array, values: Array, slot: Ids) -> list[Array]:
    """The keys and values of T' tokens become the first positions of a slot."""
    (n, _), (_, H, _, D) = qkv.shape, keys.shape
    _, *new = qkv.reshape(n, 3, H, D).transpose(1, 2, 0, 3)
    for cache, x in zip((keys := keys.copy(), values := values.copy()), new, strict=True):
        cache[slot[0], :, :n] = x
    return [keys, values]


def linear(x: Array, weight: Array, bias: Array, grad: Array) -> list[Array]:
    """x Wᵀ + b"""
    return [x @ weight.T + bias, grad @ weight, grad.T @ x, grad.sum(0)]


def gelu(u: Array, grad: Array) -> list[Array]:
    """u (1 + tanh(c (u + 0.044715 u³))) / 2"""
    c = math.sqrt(2 / math.pi)
    t = np.tanh(c * (u + 0.044715 * u**3))
    slope = (1 + t) / 2 + u / 2 * (1 - t**2) * c * (1 + 3 * 0.044715 * u**2)
    return [u * (1 + t) / 2, grad * slope]


def quantized_linear(x: Array, weight: Ids, scale: Array, bias: Array) -> list[Array]:
    """x Wᵀ + b with W = weight scale"""
    return [x @ (weight * scale[:, None]).T + bias]


def int4_linear(x: Array, weight: Ids, scale: Array, bias: Array) -> list[Array]:
    """x Wᵀ + b, where bytes of weight hold two numbers, 16 apart, of blocks of 32"""
    blocks = weight.reshape(*scale.shape, 16).astype(np.int64)  # of uint8, 7 - 8 would be 255
    numbers = np.concatenate([blocks % 16, blocks // 16], axis=-1) - 8
    return [x @ (numbers * scale[..., None]).reshape(len(weight), -1).T + bias]


def layer_norm(x: Array, weight: Array, bias: Array, grad: Array) -> list[Array]:
    """The last axis of x (N, C) with mean 0 and variance 1, scaled and shifted."""
    rstd = 1 / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    normal = (x - x.mean(-1, keepdims=True)) * rstd
    g = grad * weight
    along = (g * normal).mean(-1, keepdims=True)
    dx = rstd * (g - g.mean(-1, keepdims=True) - normal * along)
    return [normal * weight + bias, dx, (grad * normal).sum(0), grad.sum(0)]


def dropout(x: Array, key: Ids, p: float, grad: Array) -> list[Array]:
    """x / (1 - p) where the mask keeps x: kernels/dropout.py has the mask's formula."""

    def mix(x: Ids) -> Ids:
        x = (x ^ x >> np.uint32(16)) * np.uint32(0x7FEB352D)
        x = (x ^ x >> np.uint32(15)) * np.uint32(0x846CA68B)
        hashed: Ids = x ^ x >> np.uint32(16)
        return hashed

    row, column = (np.arange(n, dtype=np.uint32) for n in x.shape)
    start = mix(mix(row ^ key[0]) + key[1])
    stride = mix(mix(row ^ key[1]) + (key[:1] + np.uint32(0x9E3779B9))) | np.uint32(1)
    bits = mix(start[:, None] + stride[:, None] * column)
    factor = (bits < round((1 - p) * 2**32)) / (1 - p)
    return [factor * x, factor * grad]


def embedding(weight: Array, positions: Array, tokens: Ids, grad: Array) -> list[Array]:
    """weight[tokens] + positions, tokens (B, T)"""
    dweight = np.zeros_like(weight)
    np.add.at(dweight, tokens, grad)
    return [weight[tokens] + positions, dweight, grad.sum(0)]


def loss(x: Array, weight: Array, targets: Ids, grad: Array) -> list[Array]:
    """Mean of -log softmax(x Wᵀ)[target] over the targets that are not negative."""
    mean, dlogits = cross_entropy(x @ weight.T, targets, grad)
    return [mean, dlogits @ weight, dlogits.T @ x]


def cross_entropy(logits: Array, targets: Ids, grad: Array) -> list[Array]:
    """Mean of -log softmax(logits)[target] over the targets that are not negative."""
    counted = np.flatnonzero(targets >= 0)
    p = softmax(logits[counted])
    at = np.arange(len(counted)), targets[counted]
    mean = -np.log(p[at]).mean()
    p[at] -= 1
    dlogits = np.zeros_like(logits)
    dlogits[counted] = p / len(counted) * grad
    return [mean, dlogits]


def adamw(
    parts: list[tuple[Array, ...]],
    step: int,
    *,
    lr: float,
    decay: float,
    clip: float,
    **adam: float,
) -> list[Array]:
    """Step number ``step`` for (parameter, gradient, m, v)s -> norm, then parameter, m, v of each.

    The gradients are first clipped to the norm ``clip`` of all of them.
    """
    beta1, beta2, eps = adam["beta1"], adam["beta2"], adam["eps"]
    norm = np.sqrt(sum((g**2).sum() for _, g, _, _ in parts))
    found = [norm]
    for p, g, m, v in parts:
        g = g * min(1.0, clip / (norm + 1e-6))
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        update = (m / (1 - beta1**step)) / (np.sqrt(v / (1 - beta2**step)) + eps)
        found += [p * (1 - lr * decay) - lr * update, m, v]
    return found


def muon(
    parts: list[tuple[Array, Array, Array]],
    counts: list[int],
    *,
    lr: float,
    momentum: float,
    decay: float,
    clip: float,
    norm: float,
) -> list[Array]:
    """A step of Muon for (parameter, gradient, momentum)s -> parameter and momentum of each.

    The gradients are clipped to the norm ``clip``; ``norm`` is that of all of them.
    """
    found = []
    for (p, g, m), count in zip(parts, counts, strict=True):
        g = g * min(1.0, clip / (norm + 1e-6))
        m = momentum * m + (1 - momentum) * g
        u = momentum * m + (1 - momentum) * g
        step = np.concatenate([newton_schulz(x) for x in np.split(u, count)])
        root = max(1, p.shape[0] / p.shape[1]) ** 0.5
        found += [p * (1 - lr * decay) - lr * root * step, m]
    return found


def newton_schulz(x: Array) -> Array:
    """The orthogonal factor, nearly: singular values x become p(x), of each step's polynomial p."""
    u, s, v = np.linalg.svd(x, full_matrices=False)
    s = s / (np.sqrt((s**2).sum()) + 1e-7)
    for a, b, c in STEPS:
        s = a * s + b * s**3 + c * s**5
    return np.asarray(u * s @ v)


def softmax(scores: Array) -> Array:
    """Of the last axis."""
    e: Array = np.exp(scores - scores.max(-1, keepdims=True))
    e /= e.sum(-1, keepdims=True)
    return e
