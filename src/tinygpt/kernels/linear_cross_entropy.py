"""The loss fused with the output projection: the logits are never whole in memory.

With V = 50257 the logits of a batch are larger than everything else in a small model, and so is
their gradient. But a row's loss needs no other row, so the rows are worked off in chunks. For each
chunk of rows X, with the weight W (V, C) and its logits S = W Xᵀ::

    scores     for each block of the vocabulary the largest score m, exp(S - m) and its sum
    losses     the blocks' m and sums combined, and from them each row's loss
    products   P = ∂loss/∂S = (softmax(S) - one-hot) / rows,  ∂loss/∂X += P W,  ∂loss/∂W += Pᵀ X

That is three matrix products, two if the weight is frozen. The usual other way, to keep nothing and
compute the logits again in the backward pass, takes four. If no gradient is wanted there is only
the first.

A chunk's rows are the lanes of S, W is read as it lies, and nothing is ever summed across lanes but
in the end. A block of P, softmax and all, is made in a tile and used for both products while it is
in the cache. Blocks of the vocabulary are dealt out in a fixed number of parts, each with a
∂loss/∂X of its own, and these are added in order: the result does not depend on how many cores
there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from tinygrad import Tensor, dtypes

from tinygpt.kernels import loss_kernels, reference
from tinygpt.kernels.cross_entropy import cross_entropy
from tinygpt.kernels.fallback import falls_back, obstacle
from tinygpt.kernels.linear import supported
from tinygpt.kernels.loss_kernels import BLOCK, Plan
from tinygpt.kernels.matmul import register_tile
from tinygpt.kernels.norm import empty, largest_divisor, sum_dtype
from tinygpt.kernels.phases import contiguous, run

CHUNK = 512
"""About how many rows are worked off at a time."""
MOST_CHUNKS = 48
"""A kernel takes something of every chunk, and tinygrad 62 buffers at most."""


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, *, gradient: bool = False, frozen: bool = False
) -> Tensor:
    """cross_entropy(x weightᵀ, targets) for x (N, C), weight (V, C), integer targets (N,) -> ().

    With ``gradient`` the gradients are computed along with the loss, which takes three matrix
    products; without, it takes one for the loss and three more when gradients are asked for.
    ``frozen``: nobody will ask for the weight's. GPUs take the plain way.
    """
    if falls_back("loss", obstacle(x, weight, ids=[targets])):
        return reference.cross_entropy(reference.linear(x, weight), targets)
    if not supported(x, weight):
        return cross_entropy(reference.linear(x, weight), targets)
    (N, C), V = map(int, x.shape), int(weight.shape[0])
    x, weight = contiguous(x), contiguous(weight)
    plan = plan_of(N, C, V, frozen)
    work = Work(x, weight, targets, plan)
    statistics = work.run(gradient)
    ready = gradient

    def backward(g: Tensor, _: Sequence[Tensor]) -> list[Tensor | None]:
        nonlocal ready
        if not ready:  # not computed with the loss, or already scaled for another caller
            work.run(gradient=True)
        ready = False
        grads = zip(work.scaled(contiguous(g)), (x, weight), strict=not frozen)
        found = [d.cast(t.dtype) for d, t in grads] + [None] * frozen
        return [*(None for _ in (work.inverse, *statistics)), *found]

    out, inputs = [work.new(1)], [work.inverse, *statistics, x, weight]
    loss: Tensor = work.launch(loss_kernels.loss, out, inputs, name="loss", backward=backward)[0]
    return loss.reshape(())


def plan_of(N: int, C: int, V: int, frozen: bool = False) -> Plan:
    """How N rows of width C and V rows of weight are cut up on this machine."""
    chunk = max(CHUNK, -(-N // MOST_CHUNKS))
    lanes, rows = register_tile(chunk)
    return Plan(N, C, V, lanes, largest_divisor(BLOCK // 2, rows), chunk, frozen)


class Work:
    """The launches for all chunks, and the buffers that go from one to the next.

    Two buffers serve all chunks and are written in place: the powers and dweight. Whoever realizes
    one result after another must not make tinygrad run a launch again whose inputs are gone. So
    each launch depends on all that came before it, by inputs that it does not use if need be.
    """

    def __init__(self, x: Tensor, weight: Tensor, targets: Tensor, plan: Plan) -> None:
        self.plan, self.weight = plan, weight
        self.launch = partial(run, lanes=plan.lanes, plan=plan)
        self.new = partial(empty, x, dtype=sum_dtype(x))
        ids = partial(empty, x, dtype=dtypes.int32)
        rows = plan.chunks * plan.rows
        self.inverse, self.targets, *self.chunks = self.launch(
            loss_kernels.prepare,
            [self.new(1), ids(rows), *(ids(1) for _ in range(plan.chunks))],
            [contiguous(targets.cast(dtypes.int32))],
            name=f"loss_prepare_{plan.name}",
        )
        self.by_row, self.by_column = self.launch(
            loss_kernels.pack,
            [self.new(rows * plan.C), self.new(rows * plan.columns)],
            [x],
            name=f"loss_pack_{plan.name}",
        )

    def run(self, gradient: bool) -> list[Tensor]:
        """Work off all rows; -> each chunk's statistics. With ``gradient`` sets dx and dweight."""
        plan, new, launch = self.plan, self.new, self.launch
        powers = new(*plan.powers)
        self.dx: list[Tensor] = []
        self.dweight = [] if plan.frozen else [new(plan.V, plan.C)]
        found: list[Tensor] = []
        before: list[Tensor] = []
        flops = 2 * plan.rows * plan.V * plan.C
        for chunk in self.chunks:
            outputs = [powers, new(plan.blocks, plan.rows), new(plan.blocks, plan.rows)]
            inputs = [chunk, self.by_row, self.weight, *before]
            powers, largest, sums = launch(
                loss_kernels.scores, outputs, inputs, name=f"loss_scores_{plan.name}", ops=flops
            )
            inputs = [chunk, largest, sums, self.by_row, self.weight, self.targets, self.inverse]
            out = [new(3, plan.rows)]
            before = launch(loss_kernels.statistics, out, inputs, name=f"loss_rows_{plan.name}")
            found += before
            if gradient:
                outputs = [new(*plan.dx_parts), *self.dweight]
                inputs = [chunk, powers, largest, found[-1], self.targets, self.inverse]
                parts, *self.dweight = launch(
                    loss_kernels.products,
                    outputs,
                    [*inputs, self.weight, self.by_column],
                    name=f"loss_products_{plan.name}",
                    ops=flops * len(outputs),
                )
                out, inputs = [new(plan.rows, plan.C)], [parts, *self.dweight]
                before = launch(loss_kernels.add_parts, out, inputs, name=f"loss_dx_{plan.name}")
                self.dx += before
        return found

    def scaled(self, g: Tensor) -> list[Tensor]:
        """dx (N, C) and, if the weight is not frozen, dweight (V, C), times the loss's gradient."""
        out = [self.new(self.plan.N, self.plan.C)]
        found = self.launch(loss_kernels.collect, out, [g, *self.dx], name="loss_collect")
        if self.dweight:
            inputs = [g, self.dx[-1]]
            found += self.launch(loss_kernels.scale, self.dweight, inputs, name="loss_scale")
        return found
