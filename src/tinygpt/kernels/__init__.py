"""What the model computes with: fast kernels, each with a plain twin in ``reference``.

A fast kernel takes what it can run, a device, a shape and a type, and hands the rest to its twin,
which ``fallback`` tells. Within ``plain()`` every call goes to the twins, for tests and benchmarks
that compare the two.

Shapes use the field's letters: B batch, T positions, C width, H heads, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

from tinygrad import Tensor, UOp

from tinygpt.config import AttentionMethod
from tinygpt.errors import KernelError
from tinygpt.kernels import reference
from tinygpt.kernels.activation import activate as fast_gelu
from tinygpt.kernels.adamw import adamw_update as fast_adamw_update
from tinygpt.kernels.attention import decode_attention, flash_attention
from tinygpt.kernels.attention import packed_attention as fast_packed_attention
from tinygpt.kernels.attention.rows import keep as fast_keep
from tinygpt.kernels.attention.rows import rows_attention as fast_rows_attention
from tinygpt.kernels.cross_entropy import cross_entropy as fast_cross_entropy
from tinygpt.kernels.dropout import dropout as fast_dropout
from tinygpt.kernels.embedding import embedding as fast_embedding
from tinygpt.kernels.fallback import falls_back, obstacle
from tinygpt.kernels.linear import linear as fast_linear
from tinygpt.kernels.linear import supported as linear_supported
from tinygpt.kernels.linear_cross_entropy import linear_cross_entropy
from tinygpt.kernels.masks import next_key as next_key
from tinygpt.kernels.norm import layer_norm as fast_layer_norm
from tinygpt.kernels.quantized import embedding as fast_quantized_embedding
from tinygpt.kernels.quantized import linear as fast_quantized_linear

_only_twins = ContextVar("only_twins", default=False)  # of each thread, not of the process


@contextmanager
def plain() -> Iterator[None]:
    """Within this block everything that this thread computes is computed by the plain twins."""
    before = _only_twins.get()
    _only_twins.set(True)
    try:
        yield
    finally:
        _only_twins.set(before)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: Literal["gelu"] | None = None,
) -> Tensor:
    """y = x Wᵀ + b, then + residual, then GELU, for x (..., I), weight (O, I) -> (..., O)."""
    given = [t for t in (x, weight, bias, residual) if t is not None]
    if _only_twins.get() or falls_back("linear", obstacle(*given)):
        return reference.linear(x, weight, bias, residual, activation)
    return fast_linear(x, weight, bias, residual, activation)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The last axis of x (..., C) with mean 0 and variance 1, scaled and shifted."""
    return (reference.layer_norm if _only_twins.get() else fast_layer_norm)(x, weight, bias)


def gelu(x: Tensor) -> Tensor:
    """GPT-2's GELU of x, element by element."""
    if _only_twins.get() or falls_back("gelu", obstacle(x)) or not linear_supported(x):
        return reference.gelu(x)  # on GPUs tinygrad makes it part of its product
    return fast_gelu(x)


def embedding(tokens: Tensor, weight: Tensor, positions: Tensor | None = None) -> Tensor:
    """Rows of weight (V, C) at tokens (B, T), plus the first T rows of positions -> (B, T, C)."""
    function = reference.embedding if _only_twins.get() else fast_embedding
    return function(tokens, weight, positions)


def quantized_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: Literal["gelu"] | None = None,
) -> Tensor:
    """`linear` of an int8 weight (O, I) with a scale (O,) for each row; without a gradient."""
    function = reference.quantized_linear if _only_twins.get() else fast_quantized_linear
    return function(x, weight, scale, bias, residual, activation)


def quantized_embedding(
    tokens: Tensor, weight: Tensor, scale: Tensor, positions: Tensor | None = None
) -> Tensor:
    """`embedding` of an int8 weight (V, C) with a scale (V,) for each row; without a gradient."""
    function = reference.quantized_embedding if _only_twins.get() else fast_quantized_embedding
    return function(tokens, weight, scale, positions)


def dropout(x: Tensor, p: float, key: Tensor, residual: Tensor | None = None) -> Tensor:
    """residual + x (..., C), of which each element is dropped with probability p.

    ``key`` (2,) uint32 chooses which; the others are divided by 1 - p.
    """
    return (reference.dropout if _only_twins.get() else fast_dropout)(x, p, key, residual)


def self_attention(
    qkv: Tensor,
    n_head: int,
    method: AttentionMethod = "auto",
    dropout: float = 0.0,
    key: Tensor | None = None,
) -> Tensor:
    """Causal attention of queries, keys and values (B, T, 3C), side by side -> (B, T, C).

    Weights are dropped with the probability ``dropout``; ``key`` (2,) uint32 chooses which.
    """
    if takes_flash(method, obstacle(qkv, axes=() if dropout else (0,))):
        return fast_packed_attention(qkv, n_head, dropout, key)
    return reference.packed_attention(qkv, n_head, dropout, key)


def cached_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    length: int | UOp,
    method: AttentionMethod = "auto",
) -> Tensor:
    """Causal attention of q (B, H, T, D), the last T of ``length`` positions -> (B, H, T, D).

    keys and values (B, H, block_size, D) are a cache. A single query is the step of decoding:
    ``length`` may then be a bound variable.
    """
    decoding = q.shape[2] == 1
    flash = takes_flash(method, obstacle(q, keys, values, axes=() if decoding else (0, 1)))
    if flash and decoding:
        return decode_attention(q, keys, values, length)
    k, v = keys[:, :, :length], values[:, :, :length]
    return (flash_attention if flash else reference.attention)(q, k, v, is_causal=True)


def rows_attention(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    places: Tensor,
    positions: Tensor,
    method: AttentionMethod = "auto",
) -> Tensor:
    """The step of decoding for n texts of different lengths: qkv (n, 3C) -> (n, C).

    Each row's key and value are written into keys and values (P, H, block_size, D), at its place
    and its position; both are int32 (n,). Its query sees the positions up to there.
    """
    flash = takes_flash(method, obstacle(qkv, keys, values, ids=[places, positions]))
    function = fast_rows_attention if flash else reference.rows_attention
    return function(qkv, keys, values, places, positions)


def keep(qkv: Tensor, keys: Tensor, values: Tensor, place: Tensor) -> list[Tensor]:
    """Write the keys and values of qkv (T, 3C) into the first positions of a place (1,), in place.

    The keys and values (P, H, block_size, D) that are returned have to be realized.
    """
    return (reference.keep if _only_twins.get() else fast_keep)(qkv, keys, values, place)


def takes_flash(method: AttentionMethod, why: str | None) -> bool:
    """Whether flash attention runs, which it cannot if there is a reason ``why`` not.

    Raises KernelError if it must and cannot.
    """
    if _only_twins.get() or method == "plain":
        return False
    if why and method == "flash":
        raise KernelError(
            f"attention='flash' was asked for, and flash attention cannot run here: {why}. "
            f"attention='auto' takes the plain formula in such a case, attention='plain' always."
        )
    return not falls_back("attention", why)


def loss(
    x: Tensor, weight: Tensor, targets: Tensor, gradient: bool, frozen: bool = False
) -> Tensor:
    """Mean cross-entropy in nats of targets (N,), given logits = x Wᵀ, x (N, C), weight (V, C).

    The logits never exist as a whole. With ``gradient`` the gradients are computed along with the
    loss, which saves a product; that of a ``frozen`` weight is not. Targets below 0 are left out.
    """
    if _only_twins.get():
        return reference.cross_entropy(reference.linear(x, weight), targets)
    return linear_cross_entropy(x, weight, targets, gradient=gradient, frozen=frozen)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean of -log softmax(logits)[target] in nats, logits (N, V), targets (N,)."""
    function = reference.cross_entropy if _only_twins.get() else fast_cross_entropy
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
    loss: Tensor | None = None,
    limits: Tensor | None = None,
    groups: Sequence[int] = (),
) -> Tensor:
    """One step of AdamW, in place; -> the loss, the gradients' norm, was the step taken? (3,)

    Loss and gradients are multiplied by ``scale``, the gradients then clipped to the norm ``clip``,
    if it is not 0. Nothing is changed unless loss and norm lie below the ``limits`` (2,). With
    ``groups``, a number for each parameter, the norms of the groups follow (3 + groups,).
    """
    function = reference.adamw_update if _only_twins.get() else fast_adamw_update
    return function(
        params, grads, m, v, lr, b1_t, b2_t,
        beta1=beta1, beta2=beta2, eps=eps, decay=decay, clip=clip, scale=scale,
        loss=loss, limits=limits, groups=groups,
    )  # fmt: skip
