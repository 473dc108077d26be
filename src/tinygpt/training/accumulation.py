"""The sum of a step's gradients over its micro-batches, in an order that ranks can share.

Floats have no associative sum, so the order of the additions is fixed once, for any number of
processes that share a step: the micro-batches are the leaves of a tree. An even number of them is
halved, and the sum is that of the first half plus that of the second; an odd number is summed from
left to right. Process r of W, a power of two that divides the number, sums a whole subtree, and
pairs of such sums are added until one is left, which is the rest of the tree.

There are no more than ``MOST_HALVES`` of the smallest halves, however many micro-batches: each is
then summed from left to right. So a process needs at most one buffer for each doubling up to that,
and any number of processes up to that gives the same bits; more have as many halves as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

from tinygrad import Tensor

from tinygpt.machine.flat_buffer import FlatBuffer, Kind
from tinygpt.machine.jit import jit
from tinygpt.machine.ranks.alone import Alone, LostRankError

MOST_HALVES = 16
"""Of the smallest halves of a tree."""


def run_length(count: int, ranks: int = 1) -> int:
    """How many neighbours of ``count`` are summed from left to right before halves are added.

    >>> [run_length(n) for n in (1, 2, 3, 4, 6, 40, 64)]
    [1, 2, 3, 2, 3, 5, 4]
    """
    halves = max(ranks, min(most_halves(count), MOST_HALVES))
    return max(count // halves, min(2, count) if most_halves(count) == count else 1)


def most_halves(count: int) -> int:
    """The largest power of two that divides ``count``: as many processes can share the sum."""
    return count & -count


def levels(count: int, run: int | None = None) -> int:
    """How many buffers, each as large as all gradients, the sum of ``count`` leaves needs.

    >>> [levels(n) for n in (1, 2, 3, 4, 6, 8, 40, 1024)]
    [1, 1, 1, 2, 2, 3, 4, 5]
    """
    return (count // (run or run_length(count))).bit_length()


class PartialSums:
    """Buffers for the partial sums of one tree: ``levels[0]`` for runs, then for larger halves."""

    def __init__(self, kinds: Sequence[Kind]) -> None:
        self._kinds = kinds
        self.levels: list[FlatBuffer] = []
        """Made when a sum needs them."""
        self._carries: list[Callable[[bool], object]] = []

    def sum(
        self, count: int, add_leaf: Callable[[int, bool], object], run: int | None = None
    ) -> int:
        """Sum ``count`` leaves, in runs of ``run``; -> the level whose buffer holds the sum.

        ``add_leaf(i, first)`` must put leaf i into ``levels[0]`` if it is the first of a run, or
        else add it to what is there.
        """
        count, own = max(1, count), count
        run = min(count, run or run_length(count))
        top = levels(count, run) - 1
        while len(self.levels) <= top:
            self._add_level()
        for i in range(own):
            add_leaf(i, i % run == 0)
            if i % run == run - 1:
                self._carry(i // run, top)
        return top

    def over(
        self,
        ranks: Alone,
        count: int,
        add_leaf: Callable[[int, bool], object],
        apart: bool = False,
        divided: bool = False,
    ) -> int:
        """``sum``, of leaves that ranks share; on every rank the same bits, unless they are apart.

        Ranks that are apart sum no more than their own, as do those that have a divided optimizer:
        that adds up the rest of the tree.
        """
        while True:
            own = ranks.share(count)
            run = None if apart else run_length(count, ranks.size)
            level = self.sum(len(own), partial(_leaf_of, add_leaf, own.start), run)
            if ranks.size == 1 or apart or divided:
                return level
            with suppress(LostRankError):  # then those left take all of it again
                ranks.sum(self.levels[level], self.levels[0])
                return 0

    def _add_level(self) -> None:
        self.levels.append(FlatBuffer(self._kinds))
        if len(self.levels) > 1:
            self._carries.append(_adder(self.levels[-1], self.levels[-2]))

    def _carry(self, group: int, top: int) -> None:
        """Add the finished run number ``group`` to the halves that it completes, as in a binary
        counter: level l holds a sum of 2^l runs."""
        for level in range(top):
            second = group >> level & 1
            self._carries[level](not second)
            if not second:
                return


def add_to(totals: Sequence[Tensor], values: Sequence[Tensor], first: Tensor) -> Tensor:
    """Add values to totals in place, or replace them if they are the ``first`` (); realized."""
    there = {str(first.device): first}
    for total, value in zip(totals, values, strict=True):
        device = str(total.device)
        if device not in there:
            there[device] = first.to(device).contiguous()
        total.assign(there[device].where(value, total + value))  # not total * 0: a NaN would stay
    return totals[0].realize(*totals[1:])


def _leaf_of(add_leaf: Callable[[int, bool], object], start: int, i: int, first: bool) -> None:
    """Leaf i of those from ``start`` on."""
    add_leaf(start + i, first)


def _adder(upper: FlatBuffer, lower: FlatBuffer) -> Callable[[bool], object]:
    return jit(lambda first: add_to(upper.tensors, lower.tensors, first))
