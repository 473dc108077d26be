"""tinygrad's kernels on the pool: the same bits as without it, and a well-behaved process."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from tinygrad import Device, Tensor, TinyJit, UOp, codegen
from tinygrad.engine.realize import graph_cache, runtime_cache
from tinygrad.helpers import NUM_CPU_THREADS
from tinygrad.runtime.ops_cpu import CPUProgram
from tinygrad.uop.ops import AxisType, KernelInfo, Ops

from tinygpt.errors import UsageError
from tinygpt.kernels import matmul
from tinygpt.kernels.gelu import gelu
from tinygpt.kernels.linear import linear
from tinygpt.kernels.matmul import Plan, register_tile
from tinygpt.machine import pool as multicore
from tinygpt.machine.pool import runner
from tinygpt.machine.pool.workers import Commands, command, command_list
from tinygpt.machine.resources import cores

pytestmark = [
    pytest.mark.skipif(Device.DEFAULT != "CPU", reason="tinygrad's default device is another"),
]

PIECES = 6


@pytest.fixture(scope="module", autouse=True)
def tests_elsewhere_have_the_pool() -> Iterator[None]:
    before = multicore.installed()
    yield
    if before:
        runtime_cache.clear()
        graph_cache.clear()
        multicore.install()


@pytest.fixture(autouse=True)
def tinygrad_as_it_was() -> Iterator[None]:
    multicore.uninstall()
    runtime_cache.clear()  # or a kernel would keep the way of launching of its first test
    graph_cache.clear()
    yield
    multicore.uninstall()


def split_kernel(out: UOp, *inputs: UOp) -> UOp:
    """out[row] = the sum of that row of all inputs: one piece for each row."""
    row = UOp.range(PIECES, 0, AxisType.THREAD)
    column = UOp.range(inputs[0].shape[1], 1, AxisType.REDUCE)
    total = sum((other[row, column] for other in inputs[1:]), inputs[0][row, column])
    store = out[row].store(total.reduce(column, arg=Ops.ADD)).end(row)
    return store.sink(arg=KernelInfo(name=f"rows_{len(inputs)}", opts_to_apply=()))


def rows(*inputs: Tensor) -> Tensor:
    return Tensor.custom_kernel(Tensor.empty(PIECES), *inputs, fxn=split_kernel)[0]


def random(*shape: int) -> Tensor:
    return Tensor(np.random.standard_normal(shape).astype(np.float32)).realize()


def launches() -> list[str]:
    """The class of what launches each kernel that was made since the test began."""
    return [type(program).__name__ for program in runtime_cache.values()]


# ---- results ----


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_a_split_kernel_gives_the_same_bits_on_any_number_of_threads(threads: int) -> None:
    x = random(PIECES, 1000)
    expected = rows(x).numpy()
    runtime_cache.clear()
    assert multicore.install(threads) == threads
    for _ in range(5):
        assert np.array_equal(rows(x).numpy(), expected)
    assert "PoolProgram" in launches()
    jitted = TinyJit(lambda x: (rows(x) + 1).realize())
    for _ in range(5):
        assert np.array_equal(jitted(x).numpy(), expected + np.float32(1))
    assert len(graph_cache) > 0


def test_a_stock_matrix_product_gives_the_same_bits() -> None:
    a, b = random(160, 160), random(160, 160)
    expected = (a @ b).numpy()
    for threads in (1, 2, 4):
        multicore.install(threads)
        assert np.array_equal((a @ b).numpy(), expected)
        jitted = TinyJit(lambda a, b: ((a @ b) * 2).contiguous().add(1).realize())
        for _ in range(4):
            out = jitted(a, b).numpy()
        assert np.array_equal(out, expected * np.float32(2) + np.float32(1))


def test_a_jit_follows_its_inputs() -> None:
    multicore.install(2)

    @TinyJit
    def step(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        total = rows(x, y)
        return total.realize(), (total * 2 + x[:, 0]).realize()

    for _ in range(6):
        x, y = random(PIECES, 40), random(PIECES, 40)
        sums, doubled = (t.numpy() for t in step(x, y))
        expected = (x.numpy() + y.numpy()).sum(axis=1)
        np.testing.assert_allclose(sums, expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(doubled, sums * 2 + x.numpy()[:, 0], rtol=1e-6)


def test_a_jit_follows_a_part_of_an_input() -> None:
    multicore.install(2)
    step = TinyJit(lambda x: ((x[1:3].contiguous() + 1).contiguous() * 2).realize())
    for _ in range(5):
        x = random(6, 40)
        assert np.array_equal(step(x).numpy(), (x.numpy()[1:3] + 1) * 2)
    [graph] = graph_cache.values()
    assert any(u.op is Ops.SHRINK for call in graph.linear.src for u in call.src[1:])


def test_a_jit_carries_state_that_it_assigns() -> None:
    multicore.install(2)
    state = Tensor.zeros(PIECES).contiguous().realize()
    step = TinyJit(lambda x: state.assign(state * 0.5 + rows(x)).realize())
    expected = np.zeros(PIECES, np.float32)
    for _ in range(6):
        x = random(PIECES, 30)
        step(x)
        expected = expected * 0.5 + x.numpy().sum(axis=1)
        np.testing.assert_allclose(state.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_a_jit_follows_a_variable() -> None:
    multicore.install(2)
    x = random(10, 64)

    @TinyJit
    def step(i: UOp) -> Tensor:
        part = x[i : i + 2]
        return (part.sum(axis=1).contiguous() + i).realize()

    position = UOp.variable("i", 0, 8)
    for i in (0, 3, 7, 2, 8, 1):
        expected = x.numpy()[i : i + 2].sum(axis=1) + i
        np.testing.assert_allclose(step(position.bind(i)).numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("inputs", [1, 6, 7, 14, 15, 30, 31, 61])
def test_kernels_of_any_number_of_arguments(inputs: int) -> None:
    multicore.install(2)
    tensors = [random(PIECES, 3) for _ in range(inputs)]
    expected = sum(t.numpy().sum(axis=1, dtype=np.float64) for t in tensors)
    step = TinyJit(lambda *t: (rows(*t) + 1).contiguous().mul(2).realize())
    for _ in range(3):
        out = step(*tensors).numpy()
    np.testing.assert_allclose(out, (expected + 1) * 2, rtol=1e-4, atol=1e-4)


def test_more_arguments_than_tinygrad_takes_are_left_to_tinygrad() -> None:
    multicore.install(2)
    step = TinyJit(lambda *t: (rows(*t) + 1).contiguous().mul(2).realize())
    with pytest.raises(AssertionError, match="at most 63 arguments"):
        step(*[random(PIECES, 3) for _ in range(63)])


def counting(launches: int) -> tuple[Commands, Tensor]:
    """A list of launches that each add one to all PIECES numbers of a tensor, and the tensor."""

    def kernel(out: UOp) -> UOp:
        piece = UOp.range(PIECES, 0, AxisType.THREAD)
        store = out[piece].store(out[piece] + 1).end(piece)
        return store.sink(arg=KernelInfo(name="count", opts_to_apply=()))

    counter = Tensor.custom_kernel(Tensor.zeros(PIECES).contiguous(), fxn=kernel)[0].realize()
    program = next(p for p in runtime_cache.values() if p.name == "count")
    address = counter.uop.buffer._buf.va_addr
    return command_list(
        command(program.addr, PIECES, program.core, [address, 0]) * launches
    ), counter


def test_callers_at_the_same_time_do_not_disturb_each_other() -> None:
    multicore.install(2)
    pool, work = multicore._engine().pool, [counting(100) for _ in range(3)]

    def call(commands: Commands) -> None:
        for _ in range(100):
            pool.run(commands, 100)

    callers = [threading.Thread(target=call, args=(commands,)) for commands, _ in work]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for _, counter in work:
        assert counter.tolist() == [1 + 100 * 100] * PIECES


@pytest.mark.parametrize("threads", [2, 5])
def test_ten_thousand_tiny_launches_are_all_done(threads: int) -> None:
    multicore.install(threads)
    commands, counter = counting(100)
    for i in range(100):
        multicore._engine().pool.run(commands, 100)
        if i % 10 == 0:
            time.sleep(0.001)  # let the workers fall asleep
    assert counter.tolist() == [1 + 10_000] * PIECES


class Busy:
    """A process that burns time on one CPU while the block lasts."""

    def __enter__(self) -> None:
        burn = "import os; hasattr(os, 'sched_setaffinity') and os.sched_setaffinity(0, {%d})\n"
        cpu = max(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
        self.process = subprocess.Popen([sys.executable, "-c", burn % cpu + "while True: pass"])

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


def test_one_kernel_gives_the_same_bits_on_any_number_of_threads_and_on_a_slow_core(
    cut: Callable[[int], None],
) -> None:
    """Forward and backward through a layer, in many pieces, as one compiled kernel for all."""
    cut(32)
    x, w, b = random(70, 40), random(90, 40), random(90)
    dy = random(70, 90)

    def step() -> list[np.ndarray]:
        y = gelu(linear(x, w, b))
        found = [y, *y.gradient(x, w, b, gradient=dy)]
        Tensor.realize(*found)
        return [t.numpy() for t in found]

    multicore.install(1)
    wanted = step()
    kernels = len(codegen.to_program_cache)
    for threads in (1, 2, 3, 6):
        multicore.install(threads)
        for _ in range(3):
            for a, b_ in zip(step(), wanted, strict=True):
                assert np.array_equal(a, b_)
    with Busy():
        for _ in range(10):
            for a, b_ in zip(step(), wanted, strict=True):
                assert np.array_equal(a, b_)
    assert len(codegen.to_program_cache) == kernels  # of any other number of threads, too


def test_a_slow_core_takes_fewer_pieces() -> None:
    """A worker that is stuck in its piece leaves all the others to the caller."""
    multicore.install(2)
    pool = multicore._engine().pool
    first, done = threading.Event(), []

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint64)
    def kernel(out: int, piece: int) -> None:
        caller = threading.current_thread() is threading.main_thread()
        if not caller:
            first.set()
            time.sleep(0.2)  # lets go of the interpreter
        elif not first.is_set():
            first.wait(1)
        done.append((piece, caller))

    address = ctypes.cast(kernel, ctypes.c_void_p).value
    pool.run(command_list(command(address, 20, 1, [0, 0])), 1)
    assert sorted(piece for piece, _ in done) == list(range(20))
    assert sum(caller for _, caller in done) >= 18


# ---- the share of busy cores ----

BABY = [(768, 128, 384), (768, 128, 128), (768, 128, 512), (768, 512, 128)]
GPT2 = [(1024, 768, 2304), (1024, 768, 768), (1024, 768, 3072), (1024, 3072, 768)]
"""Rows, inputs and outputs of the layers."""
TILES = [{32: 8, 16: 8}, {32: 5, 16: 8}, {32: 3, 24: 3, 16: 4}]
"""Of AMD's and Intel's processors with AVX-512, and of those with AVX2."""


def cut(layers: list[tuple[int, int, int]]) -> Iterator[tuple[Plan, int, int, int]]:
    """The products of a training step: plan, lanes, chunks of rows, groups of panels."""
    for m, n_in, n_out in layers:
        for shape, strides in (
            ((m, n_out, n_in), ((n_in, 1), (1, n_in))),
            ((m, n_in, n_out), ((n_out, 1), (n_in, 1))),
            ((n_out, n_in, m), ((1, n_out), (n_in, 1))),
        ):
            lanes, rows = register_tile(shape[1])
            plan = Plan(*shape, *strides, rows)
            yield plan, lanes, *plan.split(-(-shape[1] // lanes), lanes)


def busy(layers: list[tuple[int, int, int]], cores: int) -> float:
    """The share of the cores that the products of a training step keep busy, waste left out."""
    work = time = 0.0
    for plan, lanes, chunks, groups in cut(layers):
        tiles, panels = -(-plan.m // plan.rows), -(-plan.n // lanes)
        unit = -(-tiles // chunks) * plan.rows * (panels // groups) * lanes * plan.depth
        work += plan.m * plan.n * plan.depth
        time += -(-chunks * groups // cores) * unit
    return work / (time * cores)


@pytest.mark.parametrize(
    ("layers", "shares"),
    [
        (BABY, {1: 0.99, 2: 0.98, 3: 0.85, 4: 0.96, 6: 0.71, 8: 0.84, 12: 0.6, 16: 0.49}),
        (GPT2, {1: 0.99, 2: 0.99, 3: 0.99, 6: 0.99, 8: 0.95, 12: 0.97, 16: 0.82, 24: 0.84}),
    ],
)
@pytest.mark.parametrize("tiles", TILES)
def test_products_keep_many_cores_busy(
    layers: list[tuple[int, int, int]],
    shares: dict[int, float],
    tiles: dict[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(matmul, "register_tiles", lambda: tiles)
    found = {cores: busy(layers, cores) for cores in shares}
    assert all(found[cores] >= least for cores, least in shares.items()), found


@pytest.mark.parametrize(("layers", "most"), [(BABY, 0.035), (GPT2, 0.01)])
@pytest.mark.parametrize("tiles", TILES)
def test_cutting_for_many_cores_costs_one_core_little(
    layers: list[tuple[int, int, int]],
    most: float,
    tiles: dict[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each chunk copies ``b`` again, each group ``a``: what that takes, as a share of the work."""
    monkeypatch.setattr(matmul, "register_tiles", lambda: tiles)
    work = extra = 0
    for plan, _, chunks, groups in cut(layers):
        fewest = -(-plan.m // matmul.COPIED_ROWS) if plan.copies_a else 1
        copy = matmul.COPY_ACROSS if plan.b_strides[0] == 1 else matmul.COPY
        extra += copy * (chunks - fewest) * plan.n * plan.depth
        extra += matmul.COPY * (groups - 1) * plan.m * plan.depth * plan.copies_a
        work += plan.m * plan.n * plan.depth
    assert extra / work < most


def test_more_than_256_cores_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TINYGPT_THREADS", raising=False)
    for number in (300, 1024):
        monkeypatch.setattr(multicore, "cores", lambda number=number: number)
        assert multicore._checked(None) == number
    monkeypatch.setattr(multicore, "cores", lambda: 5000)
    assert multicore._checked(None) == multicore.MAX_THREADS
    multicore.install(300)
    x = random(PIECES, 1000)
    assert np.array_equal(rows(x).numpy(), rows(x).numpy())
    commands, counter = counting(10)
    multicore._engine().pool.run(commands, 10)
    assert (multicore.threads(), counter.tolist()) == (300, [11.0] * PIECES)


# ---- switching on and off ----


def test_uninstall_gives_tinygrad_its_own_way_back() -> None:
    device, pieces = Device["CPU"], NUM_CPU_THREADS.value
    before = threading.active_count()
    multicore.install(3)
    assert (device.graph is not None, NUM_CPU_THREADS.value) == (True, runner.PIECES)
    assert threading.active_count() == before + 2
    multicore.uninstall()
    assert (device.graph, device.runtime_t) == (None, CPUProgram)
    assert NUM_CPU_THREADS.value == pieces
    assert threading.active_count() == before
    x = random(PIECES, 20)
    np.testing.assert_allclose(rows(x).numpy(), x.numpy().sum(axis=1), rtol=1e-4, atol=1e-5)
    assert launches()[-1] == "CPUProgram"


def test_a_captured_jit_outlives_changes_of_the_pool() -> None:
    multicore.install(2)
    step = TinyJit(lambda x: (rows(x).contiguous() + 1).realize())
    for change in (None, None, None, 3, 0, 1, 2):
        if change is not None:
            multicore.install(change)
        x = random(PIECES, 40)
        expected = x.numpy().sum(axis=1) + 1
        np.testing.assert_allclose(step(x).numpy(), expected, rtol=1e-4, atol=1e-5)


def test_the_number_of_threads_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYGPT_THREADS", "3")
    assert multicore.install() == 3
    assert multicore.install(2) == 2
    monkeypatch.setenv("TINYGPT_THREADS", "")
    assert multicore.install() == cores()
    monkeypatch.setenv("TINYGPT_THREADS", "0")
    assert multicore.install() == 1
    assert Device["CPU"].graph is None


@pytest.mark.parametrize("given", [-1, 1025, "two"])
def test_a_number_of_threads_that_makes_no_sense_is_refused(
    given: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=r"threads=.* from 1 to 1024.* may use \d+"):
        multicore.install(given)  # type: ignore[arg-type]
    monkeypatch.setenv("TINYGPT_THREADS", str(given))
    with pytest.raises(UsageError, match="TINYGPT_THREADS="):
        multicore.install()


def unknown_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "0.15.1")


def other_plug_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Device["CPU"], "graph", object())


def broken_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object, source: str) -> bytes:
        raise subprocess.CalledProcessError(1, "clang")

    monkeypatch.setattr("tinygrad.device.Compiler.compile_cached", fail)


@pytest.mark.parametrize("trouble", [unknown_version, other_plug_in, broken_compiler])
def test_what_cannot_work_is_left_to_tinygrad_with_a_notice(
    trouble: Callable[[pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    multicore._engine.cache_clear()
    with monkeypatch.context() as patch:
        trouble(patch)
        assert multicore.install(2) == 1
    assert "one core" in caplog.text and "TINYGPT_THREADS=0" in caplog.text
    assert Device["CPU"].graph is None and multicore.threads() == 1
    assert multicore.install(2) == multicore.threads() == 2


# ---- a well-behaved process ----


def test_idle_workers_use_no_cpu_time() -> None:
    multicore.install(3)
    x = random(PIECES, 1000)
    rows(x).realize()
    time.sleep(0.05)
    start = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - start < 0.03


def test_a_signal_reaches_the_main_thread_while_kernels_run() -> None:
    multicore.install(2)
    commands, _ = counting(1000)

    def interrupt(number: int, frame: object) -> None:
        raise InterruptedError

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(InterruptedError):
            for _ in range(10**6):
                multicore._engine().pool.run(commands, 1000)
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.mark.skipif(sys.platform != "linux" or cores() < 2, reason="needs two cores and Linux")
def test_a_worker_leaves_the_core_of_its_caller() -> None:
    multicore.install(2)
    pool, (commands, _) = multicore._engine().pool, counting(1000)
    [worker], everywhere = pool._crew.workers, os.sched_getaffinity(0)
    home = min(everywhere)
    try:
        for _ in range(100):
            for thread in (0, worker.native_id):
                os.sched_setaffinity(thread, {home})
            os.sched_setaffinity(0, everywhere)  # free to go, but still there
            pool.run(commands, 1000)
            if os.sched_getaffinity(worker.native_id) == everywhere - {home}:
                return
        pytest.fail("the worker stayed")
    finally:
        os.sched_setaffinity(0, everywhere)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_leave_signals_to_the_main_thread() -> None:
    multicore.install(2)
    [worker] = multicore._engine().pool._crew.workers
    status = Path(f"/proc/self/task/{worker.native_id}/status").read_text().splitlines()
    blocked = int(next(line for line in status if line.startswith("SigBlk")).split()[1], 16)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
        assert blocked & 1 << number - 1


def in_a_process(body: str) -> str:
    """What ``body`` prints when it is run, after this file, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(body)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
        timeout=60,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_a_process_ends_cleanly_while_workers_wait() -> None:
    printed = in_a_process("""
        from test_multicore import *
        multicore.install(3)
        print(rows(Tensor.ones(PIECES, 5).contiguous()).tolist())
    """)
    assert printed == f"{[5.0] * PIECES}\n"


ENDINGS = """
    import atexit, gc, sys, warnings
    from test_multicore import *
    multicore.install(2)
    pool, (commands, counter) = multicore._engine().pool, counting(50)
    multicore.install(1)

    def forever():
        while True:
            pool.run(commands, 50)

    def ends(way):
        multicore.install(3)
        for _ in range(2):
            threading.Thread(target=forever, daemon=True).start()
        time.sleep(0.01)
        if way == "exit":
            sys.exit(0)
        elif way == "exception":
            raise ValueError("an end like any other")
        elif way == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        elif way == "another size":
            for size in (2, 4, 1, 3):
                multicore.install(size)
        elif way == "later work":
            atexit._run_exitfuncs()
            pool.run(commands, 50)

    def end_of(child):
        for _ in range(1000):
            if (ended := os.waitpid(child, os.WNOHANG))[0]:
                return os.waitstatus_to_exitcode(ended[1])
            time.sleep(0.01)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return "hangs"

    warnings.simplefilter("ignore")  # newer Pythons warn of any fork of a threaded process
    gc.freeze()  # a child that ends looks through all objects of before otherwise
    children = []
    for way in ("return", "exit", "exception", "interrupt", "another size", "later work") * 3:
        if (child := os.fork()) == 0:
            sys.stderr = open(os.devnull, "w")
            ends(way)
            sys.exit(0)
        children.append((way, end_of(child)))
    print(sorted(set(children), key=str))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_process_ends_whatever_its_threads_run() -> None:
    """Two daemon threads run kernels back to back: of both the one that has the pool and the other,
    a new kernel must not undo the pool's end. Each way is tried three times, in forked children."""
    wanted = {"return": 0, "exit": 0, "exception": 1, "interrupt": -signal.SIGINT}
    wanted |= {"another size": 0, "later work": 0}
    assert in_a_process(ENDINGS) == f"{sorted(wanted.items())}\n"


def test_a_forked_child_runs_alone_and_its_parent_goes_on() -> None:
    printed = in_a_process("""
        import warnings
        from test_multicore import *
        multicore.install(3)
        pool, (commands, counter) = multicore._engine().pool, counting(100)
        warnings.simplefilter("ignore")  # newer Pythons warn of any fork of a threaded process
        if (child := os.fork()) == 0:
            pool.run(commands, 100)  # on memory that tinygrad shares between the two
            os._exit(pool.threads)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        pool.run(commands, 100)
        print(pool.threads, counter.tolist())
    """)
    assert printed == f"1\n3 {[201.0] * PIECES}\n"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_a_process_bound_to_one_core_takes_one_thread_and_may_take_more() -> None:
    printed = in_a_process("""
        import os
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        from test_multicore import *
        os.environ.pop("TINYGPT_THREADS", None)
        print(multicore.install())
        print(multicore.install(3))
        commands, counter = counting(500)
        multicore._engine().pool.run(commands, 500)
        print(counter.tolist())
    """)
    assert printed == f"1\n3\n{[501.0] * PIECES}\n"


def test_no_module_of_the_package_hides_its_functions() -> None:
    import tinygpt.machine.pool.runner  # noqa: F401 - it imports the others

    assert multicore.threads() >= 1
