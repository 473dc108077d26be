"""The optimizer's state divided among ranks: stage 1 of ZeRO (Rajbhandari et al., 2020).

Each rank keeps the moments of some neighbouring parameters. Of the sum of all gradients it gets
their piece only, decides on the step with all others by the squares of every gradient, changes its
parameters, and gives them to all. So what an all-reduce of gradients would send in its second half
are weights here: the same traffic, the same bits, and a fraction of the moments' memory.

Parameters are not cut, since Muon needs whole matrices: the shares are as equal as that allows. A
lost rank takes its moments with it, so the run ends then, and goes on from its last checkpoint,
for which the first rank fetches the moments of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, pairwise

import numpy as np
from tinygrad import Tensor
from tinygrad.nn.optim import Optimizer

from tinygpt import kernels
from tinygpt.errors import UsageError
from tinygpt.kernels.adamw import PARTS
from tinygpt.machine.flat_buffer import FlatBuffer
from tinygpt.machine.jit import jit
from tinygpt.machine.ranks.alone import Alone
from tinygpt.machine.ranks.tree import add_in_pairs
from tinygpt.machine.transfer import Array, read, write
from tinygpt.training.optim import AdamW


def bounds(sizes: Sequence[int], count: int) -> list[int]:
    """Where ``count`` shares of neighbours begin and end, each bound the nearest to an equal one.

    >>> bounds([5, 3, 3, 1], 2)
    [0, 1, 4]
    """
    ends = [0, *accumulate(sizes)]
    wanted = [ends[-1] * r / count for r in range(1, count)]
    inner = [min(range(len(ends)), key=lambda i: abs(ends[i] - at)) for at in wanted]
    return [0, *inner, len(sizes)]


class RankShares:
    """The share of this rank; the moments of all other parameters are freed."""

    def __init__(self, optimizer: Optimizer, ranks: Alone) -> None:
        """The optimizer's state must be the same on all ranks. Raises UsageError."""
        if not isinstance(optimizer, AdamW):
            raise UsageError(
                f"shard_optimizer divides the moments of AdamW and Muon, and this optimizer is "
                f"{type(optimizer).__name__}. Leave shard_optimizer out, or the optimizer."
            )
        self.optimizer, self.ranks, params = optimizer, ranks, optimizer.params
        self.bounds = bounds([int(p.numel()) for p in params], ranks.size)
        self.own = range(self.bounds[ranks.rank], self.bounds[ranks.rank + 1])
        self.part = optimizer.share(self.own, [params[i] for i in self.own])
        for rank, share in enumerate(pairwise(self.bounds)):
            if rank != ranks.rank:
                for moment in (m for i in range(*share) for m in optimizer.moments(i)):
                    _free(moment)
                    optimizer.elsewhere[id(moment)] = partial(ranks.fetch, rank)

    def send(self) -> None:
        """Give the first rank this one's moments; that takes them as it copies the state."""
        if not self.ranks.first:
            for moment in (*self.part.m, *self.part.v, *getattr(self.part, "b", ())):
                self.ranks.give(read(moment))  # in the order of ``optimizer_state``

    def updater(
        self, buffer: FlatBuffer, clip: float, scale: float
    ) -> Callable[[float, Array], Array]:
        """A step by what the ranks have summed in their ``buffer``: the loss, then gradients.

        The function takes the learning rate and the limits, and returns ``AdamW.update``'s report.
        """
        optimizer, grads = self.optimizer, buffer.tensors[1:]
        own = [grads[i] for i in self.own]
        starts = [0, *(buffer.starts[1 + i] for i in self.bounds[1:-1]), buffer.array.size]
        counts = [b - a for a, b in pairwise(starts)]
        rows = [1 + PARTS * (b - a) for a, b in pairwise(self.bounds)]

        def squares() -> Tensor:
            found = kernels.squared_sums(own)
            return found[0].cat(*found[1:]).contiguous()

        def change(squared: Tensor, loss: Tensor, lr: Tensor, limits: Tensor) -> Tensor:
            optimizer.lr.assign(lr.reshape(1))
            numbers, report = kernels.adamw_numbers(
                [squared], optimizer.lr, optimizer.b1_t, optimizer.b2_t,
                beta1=optimizer.beta1, beta2=optimizer.beta2, clip=clip, scale=scale,
                loss=loss, limits=limits,
            )  # fmt: skip
            changed = self.part.follow(own, numbers, report, clip, scale)
            return report.realize(optimizer.lr, optimizer.b1_t, optimizer.b2_t, *changed)

        square, apply = jit(squares), jit(change)

        def update(lr: float, limits: Array) -> Array:
            loss = np.float32(read(buffer.tensors[0]))
            self.ranks.sum_pieces(buffer, counts)
            mine = square().reshape(-1) if self.own else np.empty(0, np.float32)
            found = self.ranks.rows(np.concatenate([[loss], mine]).astype(np.float32), rows)
            losses = np.array([[row[0]] for row in found], np.float32)
            squared = np.concatenate([row[1:] for row in found]).reshape(-1, PARTS)
            report: Array = apply(squared, add_in_pairs(losses)[0], lr, limits)
            self._give_weights(buffer, counts)
            return report

        return update

    def _give_weights(self, buffer: FlatBuffer, counts: list[int]) -> None:
        """Give all ranks the parameters that each has changed, by way of the gradients' memory."""
        params, places = self.optimizer.params, buffer.places()[1:]
        for i in self.own:
            places[i][:] = read(params[i]).reshape(-1)
        self.ranks.gather(buffer.array, counts)
        for i, (p, place) in enumerate(zip(params, places, strict=True)):
            if i not in self.own:
                write(p, place)


def _free(moment: Tensor) -> None:
    """Give the memory of a moment back; its shape stays."""
    shape = tuple(map(int, moment.shape))
    moment.replace(Tensor.empty(*shape, dtype=moment.dtype, device=moment.device))
