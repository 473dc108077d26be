"""A jitted function takes numbers and gives numbers, the ones that it gives without a jit."""

import numpy as np
import pytest
from tinygrad import Context, Tensor, dtypes

from tinygpt.machine import transfer
from tinygpt.machine.jit import jit


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("enabled", [0, 1])
def test_calls_with_new_numbers_give_what_numpy_gives(short, enabled):
    affine = jit(lambda x, w, b: (x @ w + b).relu(), short=short)
    rng = np.random.default_rng(0)
    with Context(JIT=enabled):
        for _ in range(5):
            x, w = rng.normal(size=(2, 3)), rng.normal(size=(3, 4)).astype(np.float32)
            b = float(rng.normal())
            np.testing.assert_allclose(affine(x, w, b), np.maximum(x @ w + b, 0), atol=1e-6)
    assert len(affine.captures) == 1


def test_results_are_copies():
    double = jit(lambda x: x * 2)
    first = double([1, 2])
    second = double([3, 4])
    assert (first.tolist(), second.tolist()) == ([2, 4], [6, 8])


def test_a_tuple_of_results_is_a_tuple():
    both = jit(lambda x, y: (x + y, (x * y).sum()))
    for n in range(3):
        total, product = both([n, 1], [2, 3])
        assert total.tolist() == [n + 2, 4] and product.shape == () and product == 2 * n + 3


def test_each_combination_of_shapes_and_types_is_captured_once():
    seen = []

    def kinds(x, y):
        seen.append((x.shape, x.dtype, y.dtype))
        return x.sum() + y

    call = jit(kinds)
    for _ in range(3):
        call([1, 2], 3)
        call(np.array([1, 2], np.uint16), 4)  # the same: integers are int32
        call([1, 2], 0.5)
        call([1, 2, 3], np.uint32(2**32 - 1))
    assert seen == [
        ((2,), dtypes.int32, dtypes.int32),
        ((2,), dtypes.int32, dtypes.float32),
        ((3,), dtypes.int32, dtypes.uint32),
    ]


def test_what_a_function_changes_is_changed_at_every_call():
    total = transfer.zeros((2,), dtypes.float32)

    @jit
    def add(x: Tensor, first: Tensor) -> Tensor:
        return total.assign(first.where(x, total + x)).realize()

    found = [add([n, 1.0], n == 0.0).tolist() for n in (0.0, 2.0, 3.0, 4.0)]
    assert found == [[0, 1], [2, 2], [5, 3], [9, 4]] and total.tolist() == [9, 4]


def test_memory_is_where_a_tensors_values_are():
    x = Tensor.zeros(2, 3, dtype=dtypes.int32).contiguous().realize()
    values = transfer.memory(x)
    values[...] = [[1, 2, 3], [4, 5, 6]]
    assert x.tolist() == [[1, 2, 3], [4, 5, 6]]
    copy = transfer.read(x)
    values[...] = 7
    assert copy.tolist() == [[1, 2, 3], [4, 5, 6]] and x.tolist() == [[7] * 3] * 2
    x.assign(x + 1).realize()
    assert transfer.read(x).tolist() == [[8] * 3] * 2


def test_memory_out_of_reach_is_copied(monkeypatch):
    monkeypatch.setattr("tinygpt.machine.transfer.memory", lambda tensor: None)
    monkeypatch.setattr("tinygpt.machine.jit.memory", lambda tensor: None)
    x = Tensor.zeros(3, dtype=dtypes.int32).contiguous().realize()
    assert transfer.read(transfer.write(x, [1, 2, 3])).tolist() == [1, 2, 3]
    double = jit(lambda x: x * 2)
    assert [double([n, 4]).tolist() for n in range(3)] == [[0, 8], [2, 8], [4, 8]]


def test_a_capture_is_replayed_by_the_pool_alone():
    double = jit(lambda x: (x * 2).contiguous() + 1)
    assert double([1.0, 2.0]).tolist() == [3.0, 5.0]
    [capture] = double.captures.values()
    assert capture._graphs
    capture.kernels = None  # tinygrad's own way, which takes a hundred microseconds
    assert double([3.0, 4.0]).tolist() == [7.0, 9.0]
