"""The kernel language by itself: small kernels against numpy, for any number of cores."""

from __future__ import annotations

import doctest
import os
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from tinygrad import Device, Tensor, TinyJit, UOp, dtypes
from tinygrad.codegen import full_rewrite_to_sink, line_rewrite, linearize, pm_linearize_cleanups
from tinygrad.helpers import Target
from tinygrad.renderer.cstyle import OpenCLRenderer

import tinygpt.kernels.phases as phases
from tests.conftest import CUTS
from tinygpt.kernels.phases import Array, Kernel, build, exp2, minimum, run


def poisoned(*shape: int) -> Tensor:
    """A buffer full of NaN: what a kernel forgets to write shows."""
    return Tensor.full(shape, float("nan")).contiguous().realize()


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def tensor(x: np.ndarray) -> Tensor:
    return Tensor(x).contiguous().realize()


def add(k: Kernel, out: Array, a: Array, b: Array, *, n: int) -> None:
    i = k.units(-(-n // k.lanes))
    with k.phase() as lane:
        at = i * k.lanes + lane
        safe = minimum(at, n - 1)
        out.put(at, a[safe] + b[safe], where=at < n)


def row_sums(k: Kernel, out: Array, x: Array, *, n: int, m: int) -> None:
    row = k.units(n)
    acc, total = k.tile(1, shared=True), k.tile(1)
    with k.phase() as lane:
        acc[0, lane] = 0.0
    with k.loop(m // k.lanes) as j, k.phase() as lane:
        acc[0, lane] = acc[0, lane] + x[row * m + j * k.lanes + lane]
    k.fold(total, acc, rows=1)
    with k.phase(1):
        out[row] = total[0, 0]


def largest(k: Kernel, out: Array, x: Array) -> None:
    row = k.units(1)
    found, total = k.tile(1, shared=True), k.tile(1)
    with k.phase() as lane:
        found[0, lane] = x[row * k.lanes + lane]
    k.fold(total, found, 1, UOp.maximum, -1e30)
    with k.phase(1):
        out[row] = total[0, 0]


def prefix_sum(k: Kernel, out: Array, x: Array, count: Array) -> None:
    k.units(1)
    with k.phase(1):
        out[0] = 0.0
    with k.loop(count[0]) as i, k.phase(1):
        out[0] = out[0] + x[i]


def swap(k: Kernel, state: Array) -> None:
    k.units(1)
    with k.phase() as lane:
        a, b = state[lane], state[k.lanes + lane]
        state[lane] = b
        state[k.lanes + lane] = a


def gather(k: Kernel, out: Array, x: Array, ids: Array, *, n: int) -> None:
    i = k.units(n)
    with k.phase() as lane:
        out[i * k.lanes + lane] = x[ids[i] * k.lanes + lane]


def powers(k: Kernel, out: Array, x: Array) -> None:
    k.units(1)
    with k.phase() as lane:
        out[lane] = exp2(x[lane])


def square(k: Kernel, out: Array, x: Array) -> None:
    k.units(1)
    with k.phase() as lane:
        out[lane] = x[lane] * x[lane]


def times_twice(k: Kernel, out: Array, gradient: Array, x: Array) -> None:
    k.units(1)
    with k.phase() as lane:
        out[lane] = gradient[lane] * x[lane] * 2.0


def test_the_worked_example_of_the_docstring() -> None:
    found = doctest.testmod(phases)
    assert found.attempted >= 3 and found.failed == 0


@pytest.mark.parametrize("n", [1, 7, 16, 61])
def test_vector_add_writes_every_element_and_none_beyond(n: int) -> None:
    a, b = numbers(n, seed=1), numbers(n, seed=2)
    # the output is longer than the kernel is told: what lies beyond must stay as it was
    out = poisoned(n + 8)
    got = run(add, [out], [tensor(a), tensor(b)], lanes=8, n=n)[0].numpy()
    np.testing.assert_array_equal(got[:n], a + b)
    assert np.isnan(got[n:]).all()


@pytest.mark.parametrize("n", [1, 3, 7])
def test_row_sums_are_the_same_for_any_number_of_pieces(n: int, cut: Callable[[int], None]) -> None:
    x, sums = numbers(n, 32), []
    for pieces in CUTS:
        cut(pieces)
        sums.append(run(row_sums, [poisoned(n)], [tensor(x)], lanes=8, n=n, m=32)[0].numpy())
    np.testing.assert_allclose(sums[0], x.astype(np.float64).sum(1), rtol=1e-5, atol=1e-6)
    for other in sums[1:]:
        np.testing.assert_array_equal(sums[0], other)


@pytest.mark.parametrize("place", [0, 3, 7])
def test_the_largest_of_all_lanes_is_found_wherever_it_is(place: int) -> None:
    x = -np.abs(numbers(8)) - 1
    x[place] = -0.5
    assert run(largest, [poisoned(1)], [tensor(x)], lanes=8)[0].item() == -0.5


@pytest.mark.parametrize("count", [0, 1, 9])
def test_a_loop_can_be_as_long_as_a_number_in_memory_says(count: int) -> None:
    x = numbers(9)
    length = tensor(np.array([count], np.int32))
    got = run(prefix_sum, [poisoned(1)], [tensor(x), length], lanes=8)[0].item()
    assert got == pytest.approx(x[:count].sum(), abs=1e-5)


def test_one_kernel_serves_all_lengths_in_a_jit() -> None:
    x = numbers(9)

    @TinyJit
    def total(x: Tensor, count: Tensor) -> Tensor:
        return run(prefix_sum, [Tensor.empty(1)], [x, count], lanes=8)[0].realize()

    for count in (3, 9, 0, 5, 1):
        got = total(tensor(x), tensor(np.array([count], np.int32))).item()
        assert got == pytest.approx(x[:count].sum(), abs=1e-5)


def test_a_phase_reads_everything_before_it_writes() -> None:
    x = numbers(16)
    state = tensor(x)
    run(swap, [state], [], lanes=8)[0].realize()
    np.testing.assert_array_equal(state.numpy(), np.concatenate([x[8:], x[:8]]))


def test_integers_read_from_memory_can_index() -> None:
    x, ids = numbers(5, 8), np.array([4, 0, 0, 3], np.int32)
    got = run(gather, [poisoned(4, 8)], [tensor(x), tensor(ids)], lanes=8, n=4)[0]
    np.testing.assert_array_equal(got.numpy(), x[ids])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exp2_over_its_whole_range(dtype: type) -> None:
    x = np.linspace(-126, 127, 1001).astype(dtype)
    out = Tensor.empty(1001, dtype=dtypes.float32 if dtype is np.float32 else dtypes.float64)
    got = run(powers, [out], [tensor(x)], lanes=1001)[0].numpy()
    np.testing.assert_allclose(got, np.exp2(x), rtol=3e-7 if dtype is np.float32 else 1e-12)


def test_exp2_at_and_beyond_the_ends() -> None:
    x = np.array([-np.inf, -1e30, -150, 0, 1, 128, 1e30, np.inf, np.nan], np.float32)
    got = run(powers, [poisoned(9)], [tensor(x)], lanes=9)[0].numpy()
    np.testing.assert_array_equal(got, [0, 0, 0, 1, 2, np.inf, np.inf, np.inf, np.nan])


def test_backward_gives_the_gradient() -> None:
    x = (
        tensor(numbers(8)).requires_grad_()
        if hasattr(Tensor, "requires_grad_")
        else tensor(numbers(8))
    )

    def backward(gradient: Tensor, outputs: Sequence[Tensor]) -> list[Tensor]:
        return run(times_twice, [Tensor.empty(8)], [gradient.contiguous(), x], lanes=8)

    y = run(square, [Tensor.empty(8)], [x], lanes=8, backward=backward)[0]
    weights = tensor(numbers(8, seed=3))
    gradient = (y * weights).sum().gradient(x)[0]
    np.testing.assert_allclose(gradient.numpy(), 2 * x.numpy() * weights.numpy(), rtol=1e-6)


def test_a_kernel_is_built_once_for_the_same_shapes() -> None:
    x = tensor(numbers(4, 8))
    before = build.cache_info()
    for _ in range(3):
        run(row_sums, [Tensor.empty(4)], [x], lanes=4, n=4, m=8)
    after = build.cache_info()
    assert (after.misses - before.misses, after.hits - before.hits) == (1, 2)


def test_a_closure_is_refused() -> None:
    secret = 3

    def fn(k: Kernel, out: Array) -> None:
        k.units(secret)

    with pytest.raises(AssertionError, match="takes its constants as arguments"):
        run(fn, [Tensor.empty(3)], [], lanes=8)


def test_an_assignment_outside_a_phase_is_refused() -> None:
    k = Kernel(lanes=8)
    k.units(1)
    tile = k.tile(1)
    with pytest.raises(AssertionError, match="inside a phase"):
        tile[0, 0] = 1.0


def test_an_input_cannot_be_written() -> None:
    k = Kernel(lanes=8)
    x = Array(k, UOp.placeholder((8,), dtypes.float32, 0), written=False)
    k.units(1)
    with pytest.raises(AssertionError, match="outputs"), k.phase() as lane:
        x[lane] = 1.0


def test_on_a_gpu_lanes_are_threads_and_shared_tiles_have_barriers() -> None:
    buffers = tuple(UOp.placeholder((n,), dtypes.float32, i) for i, n in enumerate((7, 7 * 16)))
    sink = build(row_sums, buffers, 1, 8, False, True, None, 0, (("m", 16), ("n", 7)))
    renderer = OpenCLRenderer(Target(device="CL"))
    uops = line_rewrite(
        linearize(full_rewrite_to_sink(sink, renderer, optimize=False)), pm_linearize_cleanups
    )
    source = renderer.render(uops)
    assert "get_group_id(0)" in source and "get_local_id(0)" in source
    assert source.count("barrier") == 2 and "__local float" in source


@pytest.mark.skipif(os.environ.get("DEV", "CPU") != "CPU", reason="asks for the CPU's text")
def test_the_lanes_are_the_innermost_loop_on_a_cpu(cut: Callable[[int], None]) -> None:
    cut(3)
    buffers = tuple(UOp.placeholder((n,), dtypes.float32, i) for i, n in enumerate((7, 7 * 16)))
    sink = build(row_sums, buffers, 1, 8, False, False, None, 0, (("m", 16), ("n", 7)))
    renderer = Device["CPU"].renderer
    uops = line_rewrite(
        linearize(full_rewrite_to_sink(sink, renderer, optimize=False)), pm_linearize_cleanups
    )
    loops = [line for line in renderer.render(uops).split("\n") if "for (" in line]
    assert len(loops) == 5 and loops[3].count("< 8") == 1


def test_a_loop_as_long_as_another_loops_index_is_refused() -> None:
    k = Kernel(lanes=8)
    i = k.units(4)
    with pytest.raises(AssertionError, match="cannot depend on the index"), k.loop(i + 1):
        pass
