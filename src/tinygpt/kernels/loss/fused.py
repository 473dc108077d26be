"""The loss fused with the output projection: the logits are never whole in memory.

With V = 50257 the logits of a batch are larger than everything else in a small model, and so is
their gradient. But a row's loss needs no other row, so the rows of X are worked off in chunks. For
each chunk, with the weight W (V, C) and the chunk's logits S = W Xᵀ (V, rows), there are::

    scores      for each block of the vocabulary its largest score m, exp(S - m) and their sum
    statistics  the blocks' m and sums combined, and from them each row's loss
    products    P = ∂loss/∂S, its products P W, in parts, and Pᵀ X, which is added to ∂loss/∂W
    add_parts   ∂loss/∂X of the chunk: the sum of the parts

That is three matrix products, two if the weight is frozen. The usual other way, to keep nothing and
compute the logits again in the backward pass, takes four. If no gradient is wanted there is only
the first.

A chunk's rows are the lanes of S, W is read as it lies, and nothing is summed across lanes but in
the end. A block of P, softmax and all, is made in a tile and used for both products while it is in
the cache. The blocks are dealt out in a fixed number of parts, each with a ∂loss/∂X of its own,
and these are added in order: the result does not depend on how many cores there are.

Three calls of `matmul` with a softmax between them were measured: they take 11 % longer with
V = 50257 and C = 128, for the logits and their gradient go to memory and back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from tinygrad import Tensor, UOp, dtypes

from tinygpt.kernels import pairs
from tinygpt.kernels.dispatch import first_device, operation
from tinygpt.kernels.linear import computed_in, linear, wide_product
from tinygpt.kernels.loss import chunked
from tinygpt.kernels.loss.chunked import Cut, cut_of
from tinygpt.kernels.loss.cross_entropy import cross_entropy
from tinygpt.kernels.phases import contiguous, empty, run, together, wide
from tinygpt.kernels.wmma import core_of
from tinygpt.machine.tinygrad_internals import Ops

WHOLE = 128
"""Tensor cores need a vocabulary that is a multiple of their tiles; GPT-2's 50257 is none."""


def plain_loss(
    x: Tensor, weight: Tensor, targets: Tensor, gradient: bool = False, frozen: bool = False
) -> Tensor:
    """All logits, then their cross-entropy; on a GPU by its kernel.

    The logits of numbers of 16 bits are float32.
    """
    kind, V = computed_in(x, weight), int(weight.shape[0])
    if core_of(x):
        # copied, and so is its gradient: tinygrad would compute products of 50257 rows otherwise
        whole = weight.cast(kind).pad(((0, -V % WHOLE), (0, 0))).contiguous().contiguous_backward()
        return cross_entropy(wide_product(x, whole), targets, V)
    logits = linear(x.cast(wide(kind)), (weight.cast(kind) if x.dtype == kind else weight))
    return cross_entropy(logits, targets)


@operation("loss", plain_loss, integers=("targets",), cpu=True)
def loss(
    x: Tensor, weight: Tensor, targets: Tensor, gradient: bool = False, frozen: bool = False
) -> Tensor:
    """Mean cross-entropy in nats () of targets (N,), given logits = x Wᵀ, x (N, C), weight (V, C).

    Targets below 0 are left out. With ``gradient`` the gradients are computed along with the loss,
    which takes three matrix products; without, it takes one, and three more when gradients are
    asked for. That of a ``frozen`` weight is not computed. If x is bfloat16, so are the operands of
    the products: the weight is rounded as it is read, and P, where `pairs` can multiply them.
    """
    (N, C), V = map(int, x.shape), int(weight.shape[0])
    x, weight = contiguous(x), contiguous(weight)
    in_pairs = x.dtype == dtypes.bfloat16 and weight.dtype != dtypes.float64 and C > 2
    in_pairs = in_pairs and pairs.available(first_device(x))
    cut = cut_of(N, C, V, frozen, in_pairs)
    inverse, statistics, ready = work_off(x, weight, targets, cut, gradient)

    def backward(g: Tensor, _: Sequence[Tensor]) -> list[Tensor | None]:
        found = ready or work_off(x, weight, targets, cut, gradient=True)[2]
        if not _is_one(g.uop):
            found = [d * g for d in found]
        grads = [d.cast(t.dtype) for d, t in zip(found, (x, weight), strict=not frozen)]
        return [None for _ in (inverse, *statistics)] + grads + [None] * frozen

    out, inputs = [empty(x, 1, dtype=wide(x.dtype))], [inverse, *statistics, x, weight]
    launch = partial(run, lanes=cut.lanes, cut=cut, name="loss", backward=backward)
    return launch(chunked.mean, out, inputs)[0].reshape(())


def _is_one(g: UOp) -> bool:
    """Whether a gradient is the number 1, however shaped, as for a loss that nothing follows."""
    return g.base.op is Ops.CONST and g.base.arg == 1


def work_off(
    x: Tensor, weight: Tensor, targets: Tensor, cut: Cut, gradient: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """-> 1 / counted rows, each chunk's statistics, and with ``gradient`` [dx, dweight].

    Some buffers serve all chunks: the powers, the parts, dx and dweight.
    """
    new, ids = partial(empty, x, dtype=wide(x.dtype)), partial(empty, x, dtype=dtypes.int32)

    def launch(
        kernel: Callable[..., None], outputs: list[Tensor], inputs: list[Tensor], products: int = 0
    ) -> list[Tensor]:
        name = f"loss_{kernel.__name__}_{cut.N}x{cut.V}x{cut.C}"
        ops = products * 2 * cut.rows * cut.V * cut.C
        return run(kernel, outputs, inputs, lanes=cut.lanes, name=name, ops=ops, cut=cut)

    outputs = [new(1), ids(cut.padded), *(ids(1) for _ in range(cut.chunks))]
    given = [contiguous(targets.cast(dtypes.int32))]
    inverse, padded, *numbers = launch(chunked.prepare, outputs, given)
    packed = partial(new, dtype=dtypes.uint32) if cut.pairs else new
    rows = cut.padded // cut.numbers
    panels = [packed(cut.padded * cut.steps), packed(rows * cut.columns)]
    by_row, by_column = launch(chunked.pack, panels, [x])
    powers, parts, dx = new(*cut.powers), new(*cut.dx_parts), new(cut.N, cut.C)
    dweight = [] if cut.frozen else [new(cut.V, cut.C)]
    found = list[Tensor]()
    for number in numbers:
        outputs = [powers, new(cut.blocks, cut.rows), new(cut.blocks, cut.rows)]
        powers, largest, sums = launch(chunked.scores, outputs, [number, by_row, weight], 1)
        given = [number, largest, sums, by_row, weight, padded, inverse]
        found += launch(chunked.statistics, [new(3, cut.rows)], given)
        if gradient:
            given = [number, powers, largest, found[-1], padded, inverse, weight, by_column]
            outputs = [parts, *dweight]
            parts, *dweight = launch(chunked.products, outputs, given, len(outputs))
            [dx] = launch(chunked.add_parts, [dx], [number, parts])
    if not gradient:
        return inverse, found, []
    dx, *rest = together(dx, *found, *dweight)
    return inverse, rest[: cut.chunks], [dx, *rest[cut.chunks :]]
