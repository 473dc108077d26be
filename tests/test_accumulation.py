"""A step's gradients are summed as a tree, whose subtrees are the sums of fewer micro-batches."""

from __future__ import annotations

import numpy as np
import pytest

from tinygpt.config import GPTConfig, TrainConfig
from tinygpt.machine.flat_buffer import FlatBuffer
from tinygpt.machine.transfer import read, write
from tinygpt.model.transformer import Transformer
from tinygpt.training.accumulation import PartialSums, levels, most_halves, run_length
from tinygpt.training.optim import make_optimizer
from tinygpt.training.step import make_train_step

KINDS = [((), "CPU"), ((3, 5), "CPU"), ((17,), "CPU")]


def tree(leaves: np.ndarray, halves: int = 16) -> np.ndarray:
    """The sum as the module's text describes it, written down once more by recursion."""
    if len(leaves) % 2 == 0 and halves > 1:
        half = len(leaves) // 2
        return tree(leaves[:half], halves // 2) + tree(leaves[half:], halves // 2)
    total = leaves[0]
    for leaf in leaves[1:]:
        total = total + leaf
    return total


def leaves_of(count: int) -> np.ndarray:
    rng = np.random.default_rng(count)
    return rng.standard_normal((count, 17)).astype(np.float32) * 10.0 ** rng.integers(-4, 4, 17)


def summed(leaves: np.ndarray, run: int | None = None) -> np.ndarray:
    """The last tensor of a PartialSums' result."""
    sums = PartialSums(KINDS)

    def add_leaf(i: int, first: bool) -> None:
        place = sums.levels[0].tensors[-1]
        write(place, leaves[i] if first else read(place) + leaves[i])

    level = sums.sum(len(leaves), add_leaf, run)
    assert len(sums.levels) == level + 1
    return read(sums.levels[level].tensors[-1])


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 8, 12, 16, 64, 96])
def test_the_order_is_that_of_a_tree_of_halves(count: int) -> None:
    leaves = leaves_of(count).astype(np.float32)
    assert summed(leaves).tobytes() == tree(leaves).tobytes()


@pytest.mark.parametrize(
    ("count", "parts"), [(4, 2), (4, 4), (6, 2), (8, 4), (12, 4), (64, 2), (64, 16)]
)
def test_a_part_of_the_leaves_is_a_subtree(count: int, parts: int) -> None:
    assert most_halves(count) % parts == 0
    leaves = leaves_of(count).astype(np.float32)
    run = run_length(count, parts)
    shares = np.stack([summed(share, run) for share in np.split(leaves, parts)])
    assert tree(shares).tobytes() == summed(leaves).tobytes()


def test_another_order_would_be_seen() -> None:
    leaves = leaves_of(8).astype(np.float32)
    total = leaves[0]
    for leaf in leaves[1:]:
        total = total + leaf
    assert total.tobytes() != summed(leaves).tobytes()


def test_more_processes_than_halves_have_one_each() -> None:
    assert run_length(64, 16) == run_length(64) == 4
    assert run_length(64, 32) == 2
    leaves = leaves_of(64).astype(np.float32)
    shares = np.stack([summed(share, run_length(64, 32)) for share in np.split(leaves, 32)])
    assert tree(shares, 32).tobytes() == summed(leaves, 2).tobytes() != summed(leaves).tobytes()


def test_buffers_are_few_however_many_micro_batches() -> None:
    assert [levels(n) for n in (1, 2, 4, 8, 16, 32, 64, 1024)] == [1, 1, 2, 3, 4, 5, 5, 5]


def test_runs_are_odd_or_pairs() -> None:
    assert [run_length(n) for n in range(1, 9)] == [1, 2, 3, 2, 5, 3, 7, 2]


def test_the_tensors_of_a_flat_buffer_are_its_array() -> None:
    buffer = FlatBuffer(KINDS)
    assert buffer.array.ctypes.data % 64 == 0
    for n, tensor in enumerate(buffer.tensors, 1):
        write(tensor, np.full(tensor.shape, n))
    buffer.fetch()
    assert buffer.array.sum() == 1 + 2 * 15 + 3 * 17
    buffer.array[:] *= 2
    buffer.put()
    assert [float(read(t).max()) for t in buffer.tensors] == [2.0, 4.0, 6.0]


def test_a_step_of_four_micro_batches_is_their_tree() -> None:
    """Against gradients taken one at a time and added here, in float32 and in the tree's order."""
    shape, rng = GPTConfig(block_size=4, vocab_size=11, n_layer=1, n_head=2, n_embd=8), 0
    x, y = np.random.default_rng(rng).integers(0, 11, (2, 4, 2, 4))

    def after(count: int, xs: np.ndarray, ys: np.ndarray) -> list[float]:
        model = Transformer(shape, seed=1)
        config = TrainConfig(batch_size=2, grad_accum_steps=count)
        step = make_train_step(model, make_optimizer(model.trainable(), config), config)
        return step(xs, ys, 1e-3, (1, 0))

    found = after(4, x, y)
    single = np.float32([after(1, x[i : i + 1], y[i : i + 1]).loss for i in range(4)])
    assert np.float32(found.loss) == tree(single) / 4
