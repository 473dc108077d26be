"""Flash attention: softmax(q kᵀ / √D) v and its gradients, without the T x T matrix of weights.

The formula is Vaswani et al. (2017), and `plain_attention` computes it as it stands. The kernels
follow Dao et al., "FlashAttention" (2022), and Milakov and Gimelshein, "Online normalizer
calculation for softmax" (2018). Memory is linear in T: the forward kernel keeps its result and one
number per query, from which the backward kernels make the weights again, tile by tile.
docs/attention.md derives it; `tiles`, `forward`, `backward`, `rows` are to be read in this order.

Results are the same, bit for bit, for any number of cores. float32, half and bfloat16 are
computed in float32, float64 in float64. Tensors that are cut along the batch, or along the heads,
are computed where they lie; cut otherwise, or with dropout, they go to the plain twins.

``dropout`` is the probability with which a weight is dropped; the others are divided by 1 - dropout
(GPT-2 does so in training). ``key``, (2,) uint32, chooses which: kernels/dropout.py says how.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from tinygrad import Tensor, dtypes

from tinygpt.errors import UsageError
from tinygpt.kernels import pairs
from tinygpt.kernels.attention import backward, warps
from tinygpt.kernels.attention.forward import forward
from tinygpt.kernels.attention.tiles import Problem, tile_shape
from tinygpt.kernels.dispatch import first_device, operation
from tinygpt.kernels.dropout import is_part, plain_mask
from tinygpt.kernels.phases import Backward, contiguous, empty, on_gpu, run, wide
from tinygpt.kernels.wmma import CORES, WARP, core_of

HEADS = 12
"""From so many on, of all sequences, a head is a unit of the backward pass."""


# The plain twins -------------------------------------------------------------------------------


def split_heads(x: Tensor, n_head: int) -> Tensor:
    """(B, T, C) -> (B, H, T, D)"""
    B, T, C = x.shape
    return x.reshape(B, T, n_head, C // n_head).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, T, D) -> (B, T, C)"""
    B, H, T, D = x.shape
    return x.transpose(1, 2).reshape(B, T, H * D)


def causal_mask(queries: int, keys: int) -> Tensor:
    """Boolean (queries, keys): query i, the i-th of the last ones, sees keys up to its own."""
    i = Tensor.arange(queries).reshape(queries, 1) + (keys - queries)
    return Tensor.arange(keys).reshape(1, keys) <= i


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    is_causal: bool = False,
    dropout: float = 0.0,
    key: Tensor | None = None,
) -> Tensor:
    """The weights as a matrix. A mask of dropout has a row for each sequence, head and key."""
    given = q.dtype
    q, k, v = (x.cast(wide(x.dtype)) for x in (q, k, v))
    scores = q @ k.transpose(-2, -1) * (1 / math.sqrt(q.shape[-1]))  # (B, H, Tq, Tk)
    if is_causal and q.shape[-2] != 1:  # a single query is the last position: it sees every key
        mask = causal_mask(int(q.shape[-2]), int(k.shape[-2]))
        scores = mask.where(scores, -math.inf)
    weights = scores.softmax(-1)
    if dropout:
        assert key is not None, "dropout needs a key"
        (B, H, Tq, _), Tk = map(int, q.shape), int(k.shape[2])
        mask = plain_mask(B * H * Tk, Tq, dropout, key.to(q.device), H * Tk)
        mask = mask.reshape(B, H, Tk, Tq).transpose(2, 3)
        weights = mask.where(weights / (1 - dropout), 0)
    return (weights @ v).cast(given)


def plain_self_attention(
    qkv: Tensor, n_head: int, dropout: float = 0.0, key: Tensor | None = None
) -> Tensor:
    """Causal attention by heads."""
    q, k, v = (split_heads(part, n_head) for part in qkv.chunk(3, dim=2))  # (B, H, T, D)
    return merge_heads(plain_attention(q, k, v, True, dropout, key))


# The kernels -----------------------------------------------------------------------------------


@operation("attention", plain_attention, integers=("key",), axes=(0, 1))
def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    is_causal: bool = False,
    dropout: float = 0.0,
    key: Tensor | None = None,
) -> Tensor:
    """softmax(q kᵀ / √D) v for q (B, H, Tq, D), k and v (B, H, Tk, D) -> (B, H, Tq, D).

    With ``is_causal`` the queries are the last Tq of the Tk positions, and see nothing behind
    themselves.
    """
    _check(q, k, v, is_causal)
    (B, H, Tq, D), Tk = map(int, q.shape), int(k.shape[2])
    (b, h), causal = _each(q, B, H), is_causal and Tq > 1
    part = key is not None and is_part(key)
    problem = Problem(b, h, Tq, Tk, D, causal, packed=False, dropout=dropout, part=part)
    return _attention(problem, (B, H, Tq, D), (B, H, Tq), [contiguous(x) for x in (q, k, v)], key)


@operation("attention", plain_self_attention, integers=("key",), axes=(0,))
def self_attention(
    qkv: Tensor, n_head: int, dropout: float = 0.0, key: Tensor | None = None
) -> Tensor:
    """Causal self-attention of the queries, keys and values (B, T, 3C) side by side -> (B, T, C).

    The same as ``flash_attention``, for arrays as the linear layers around it write and read them:
    no transposes, and one gradient.
    """
    if len(qkv.shape) != 3 or qkv.shape[2] % (3 * n_head):
        raise UsageError(
            f"qkv of shape {qkv.shape} does not split into queries, keys and values of {n_head} "
            f"heads. Give (batch, time, 3 * n_head * head_size)."
        )
    _check_dtypes(qkv)
    B, T, width = map(int, qkv.shape)
    D = width // (3 * n_head)
    b, h = _each(qkv, B, n_head)
    part = key is not None and is_part(key)
    problem = Problem(b, h, T, T, D, T > 1, packed=True, dropout=dropout, part=part)
    return _attention(problem, (B, T, width // 3), (B, n_head, T), [contiguous(qkv)], key)


def _attention(
    p: Problem,
    shape: tuple[int, ...],
    rows: tuple[int, ...],
    inputs: list[Tensor],
    key: Tensor | None,
) -> Tensor:
    """The result, of the given shape; ``rows`` is that of a number for each query (B, H, Tq)."""
    x = inputs[0]
    p = replace(p, pairs=_in_pairs(p, x))
    _check_dropout(p.dropout, key)
    keys = [contiguous(key)] if p.dropout and key is not None else []

    def gradients(gradient: Tensor, outputs: Sequence[Tensor]) -> list[Tensor | None]:
        out, lse = outputs
        saved = [out.detach(), lse]
        grad = contiguous(gradient.cast(out.dtype))
        return [*_gradients(p, grad, saved, inputs, keys), *(None for _ in keys)]

    outputs = [empty(x, *shape), empty(x, *rows, dtype=wide(x.dtype))]
    if core := _core(p, x):
        return _warps(warps.forward, p, core, p.Tq, 2, outputs, inputs, gradients)[0]
    return _run(forward, p, 2, outputs, [*inputs, *keys], gradients)[0]


def _gradients(
    p: Problem, grad: Tensor, saved: list[Tensor], inputs: list[Tensor], keys: list[Tensor]
) -> list[Tensor]:
    """The gradients of the inputs, given that of the result; ``keys`` is dropout's, if any."""
    if core := _core(p, grad):
        return _gradients_on_tensor_cores(p, core, grad, saved, inputs)
    out, lse = saved
    sums = [empty(x, *map(int, x.shape), dtype=lse.dtype) for x in inputs]
    delta = empty(lse, *map(int, lse.shape))
    fuse = not on_gpu(grad) and p.B * p.H >= HEADS
    if fuse:
        found = _run(backward.fused, p, 5, [*sums, delta], [grad, out, lse, *inputs, *keys])[:-1]
    else:
        delta = _run(backward.deltas, p, 0, [delta], [grad, out])[0]
        given = [grad, lse, delta, *inputs, *keys]
        first = _run(backward.queries, p, 3, sums[:1], given)
        rest = first if p.packed else sums[1:]
        found = _run(backward.keys, p, 4, rest, given)
        found = found if p.packed else first + found
    return [x.cast(like.dtype) for x, like in zip(found, inputs, strict=True)]


def _in_pairs(p: Problem, x: Tensor) -> bool:
    """Whether products are of bfloat16 pairs; each needs two steps at least, and whole vectors."""
    suits = x.dtype == dtypes.bfloat16 and p.D % 2 == 0 and p.D > 2
    device = first_device(x)
    return suits and pairs.available(device) and tile_shape(False)[0] % pairs.VECTOR == 0


def _core(p: Problem, x: Tensor) -> str | None:
    """The tensor cores that a problem with numbers such as x can be computed on, or None."""
    core = core_of(x)
    return core if core and warps.fits(p, CORES[core]) else None


def _gradients_on_tensor_cores(
    p: Problem, core: str, grad: Tensor, saved: list[Tensor], inputs: list[Tensor]
) -> list[Tensor]:
    out, lse = saved
    product = grad.cast(lse.dtype) * out.cast(lse.dtype)  # (B, T, C) if packed, (B, H, T, D)
    delta = (split_heads(product, p.H) if p.packed else product).sum(-1)  # (B, H, T)
    given = [grad, lse, contiguous(delta), *inputs]
    sums = [empty(x, *map(int, x.shape)) for x in inputs]
    first = _warps(warps.queries, p, core, p.Tq, 3, sums[:1], given)
    rest = _warps(warps.keys, p, core, p.Tk, 4, first if p.packed else sums[1:], given)
    return rest if p.packed else first + rest


def _warps(
    kernel: Callable[..., None],
    p: Problem,
    core: str,
    T: int,
    products: int,
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    gradients: Backward | None = None,
) -> list[Tensor]:
    """A kernel for tensor cores, whose units are tiles of T rows."""
    return run(
        kernel,
        outputs,
        inputs,
        lanes=WARP * warps.warps(T, CORES[core]),
        name=p.name(f"{kernel.__name__}_warps"),
        ops=p.ops(products),
        backward=gradients,
        p=p,
        core=core,
    )


def _run(
    kernel: Callable[..., None],
    p: Problem,
    products: int,
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    gradients: Backward | None = None,
) -> list[Tensor]:
    return run(
        kernel,
        outputs,
        inputs,
        lanes=tile_shape(on_gpu(inputs[0]))[0],
        name=p.name(kernel.__name__),
        ops=p.ops(products),
        backward=gradients,
        p=p,
    )


def _each(x: Tensor, B: int, H: int) -> tuple[int, int]:
    """How much of a batch of B with H heads each device has, x being cut along one or neither."""
    if isinstance(x.device, str):
        return B, H
    count = len(x.device or ())
    return (B // count, H) if x.uop.axis == 0 else (B, H // count)


def _check(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> None:
    shapes = f"q {q.shape}, k {k.shape} and v {v.shape}"
    fits = len(q.shape) == 4 == len(k.shape) and k.shape == v.shape
    if not fits or (q.shape[:2], q.shape[3]) != (k.shape[:2], k.shape[3]):
        raise UsageError(
            f"{shapes} do not fit together. Give (B, H, Tq, D) and twice (B, H, Tk, D)."
        )
    if is_causal and q.shape[2] > k.shape[2]:
        raise UsageError(
            f"{shapes} have more queries than keys, so that the first queries would see nothing. "
            f"Causal queries are the last ones: give as many keys, or is_causal=False."
        )
    _check_dtypes(q, k, v)


def _check_dropout(dropout: float, key: Tensor | None) -> None:
    if not 0 <= dropout < 1:
        raise UsageError(f"dropout={dropout!r} is not a probability from 0 to less than 1.")
    if dropout and (key is None or key.shape not in ((2,), (3,)) or key.dtype != dtypes.uint32):
        given = "none" if key is None else f"{key.shape} {key.dtype.name}"
        raise UsageError(f"dropout={dropout:g} needs a key (2,) of type uint32; given was {given}.")


def _check_dtypes(*inputs: Tensor) -> None:
    if len({x.dtype for x in inputs}) > 1 or not dtypes.is_float(inputs[0].dtype):
        given = ", ".join(x.dtype.name for x in inputs)
        raise UsageError(f"inputs of type {given} were given. Cast them to one floating type.")
