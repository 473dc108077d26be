"""What the model computes with: fast kernels, each with a plain twin in ``reference``.

A fast kernel takes what it can run, a device, a shape and a type, and hands the rest to its twin.
Within ``plain()`` every call goes to the twins, for tests and benchmarks that compare the two.

Shapes use the field's letters: B batch, T positions, C width, H heads, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from tinygrad import Tensor
from tinygrad.uop.ops import UOp

from tinygpt import multicore
from tinygpt.kernels import reference
from tinygpt.kernels.adamw import adamw_update as fast_adamw_update
from tinygpt.kernels.attention import decode_attention, flash_attention
from tinygpt.kernels.attention import packed_attention as fast_packed_attention
from tinygpt.kernels.cross_entropy import cross_entropy as fast_cross_entropy
from tinygpt.kernels.embedding import embedding as fast_embedding
from tinygpt.kernels.linear import linear as fast_linear
from tinygpt.kernels.linear_cross_entropy import linear_cross_entropy
from tinygpt.kernels.norm import layer_norm as fast_layer_norm

multicore.install()  # every core, unless TINYGPT_THREADS says otherwise

_only_twins = False


@contextmanager
def plain() -> Iterator[None]:
    """Within this block everything is computed by the plain twins."""
    global _only_twins
    before, _only_twins = _only_twins, True
    try:
        yield
    finally:
        _only_twins = before


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: Literal["gelu"] | None = None,
) -> Tensor:
    """y = x Wᵀ + b, then + residual or GELU, for x (..., I), weight (O, I) -> (..., O)."""
    function = reference.linear if _only_twins else fast_linear
    return function(x, weight, bias, residual, activation)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The last axis of x (..., C) with mean 0 and variance 1, scaled and shifted."""
    return (reference.layer_norm if _only_twins else fast_layer_norm)(x, weight, bias)


def embedding(tokens: Tensor, weight: Tensor, positions: Tensor | None = None) -> Tensor:
    """Rows of weight (V, C) at tokens (B, T), plus the first T rows of positions -> (B, T, C)."""
    function = reference.embedding if _only_twins else fast_embedding
    return function(tokens, weight, positions)


def self_attention(qkv: Tensor, n_head: int) -> Tensor:
    """Causal attention of queries, keys and values (B, T, 3C), side by side -> (B, T, C)."""
    return (reference.packed_attention if _only_twins else fast_packed_attention)(qkv, n_head)


def cached_attention(q: Tensor, keys: Tensor, values: Tensor, length: int | UOp) -> Tensor:
    """Causal attention of q (B, H, T, D), the last T of ``length`` positions -> (B, H, T, D).

    keys and values (B, H, block_size, D) are a cache. A single query is the step of decoding:
    ``length`` may then be a bound variable.
    """
    if q.shape[2] == 1 and not _only_twins:
        return decode_attention(q, keys, values, length)
    k, v = keys[:, :, :length], values[:, :, :length]
    if _only_twins:
        return reference.attention(q, k, v, is_causal=True)
    return flash_attention(q, k, v, is_causal=True)


def loss(x: Tensor, weight: Tensor, targets: Tensor, gradient: bool) -> Tensor:
    """Mean cross-entropy in nats of targets (N,), given logits = x Wᵀ, x (N, C), weight (V, C).

    The logits never exist as a whole. With ``gradient`` the gradients are computed along with the
    loss, which saves a product. Targets below 0 are left out.
    """
    if _only_twins:
        return reference.cross_entropy(reference.linear(x, weight), targets)
    return linear_cross_entropy(x, weight, targets, gradient=gradient)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean of -log softmax(logits)[target] in nats, logits (N, V), targets (N,)."""
    function = reference.cross_entropy if _only_twins else fast_cross_entropy
    return function(logits, targets)


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
    """
    function = reference.adamw_update if _only_twins else fast_adamw_update
    return function(
        params, grads, m, v, lr, b1_t, b2_t,
        beta1=beta1, beta2=beta2, eps=eps, decay=decay, clip=clip, scale=scale,
    )  # fmt: skip
