"""Several processes train one model, bit for bit as one would, and go on when one is lost."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tinygpt.cli import main
from tinygpt.cli.proving import compare
from tinygpt.config import TrainConfig
from tinygpt.errors import MissingExtraError, UsageError
from tinygpt.machine import children
from tinygpt.machine.ranks import join, launcher
from tinygpt.machine.ranks.alone import Alone
from tinygpt.machine.ranks.tree import TreeSum, add_in_pairs, from_bfloat16, to_bfloat16
from tinygpt.machine.ranks.world import Process, Ranks
from tinygpt.machine.transfer import read, write
from tinygpt.runs import checkpoint
from tinygpt.runs.history import History
from tinygpt.training.meeting import Meeting
from tinygpt.training.optim import make_optimizer, optimizer_state
from tinygpt.training.rank_shares import bounds

TEXT = "To be, or not to be, that is the question:\n" * 200
SETTINGS = (
    *("--tokenizer", "char", "--n-layer", "1", "--n-embd", "16", "--n-head", "2"),
    *("--block-size", "8", "--batch-size", "2", "--grad-accum-steps", "8", "--dropout", "0.1"),
    *("--eval-interval", "4", "--eval-iters", "3", "--warmup-steps", "2", "--keep-last", "0"),
)
CHATS = (
    *("--tokenizer", "byte", *SETTINGS[2:8], "--block-size", "64", "--batch-size", "2"),
    *("--grad-accum-steps", "4", *SETTINGS[14:]),
)


def mpiexec() -> str | None:
    """The launcher of the MPI that mpi4py finds, if there is one."""
    try:
        import mpi4py  # noqa: F401
    except ImportError:
        return None
    beside = Path(sys.prefix, "bin", "mpiexec")
    return str(beside) if beside.exists() else shutil.which("mpiexec")


needs_mpi = pytest.mark.skipif(mpiexec() is None, reason="needs mpi4py and mpiexec (extra mpi)")


def command(ranks: int, *arguments: object) -> dict[str, Any]:
    """What subprocess needs to run tinygpt on so many ranks of this host."""
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    own = {"TINYGPT_THREADS": "1", "OMPI_MCA_mpi_yield_when_idle": "1"}
    program = children.python_module("tinygpt", *map(str, arguments), environment=root | own)
    launch = [mpiexec(), "--with-ft", "ulfm", "--oversubscribe", "-n", str(ranks)]
    return {**program, "args": [*launch, *program["args"]]}


PROGRAM = """
import sys, time
from types import SimpleNamespace
import numpy as np
from tinygpt.machine.ranks.alone import LostRankError
from tinygpt.machine.ranks.join import join

kind, ranks = sys.argv[1], join()
buffer = SimpleNamespace(array=np.ones(64, np.float32), fetch=lambda: None, put=lambda: None)
with ranks.together():
    ranks._started = True
    ranks.sum(buffer, buffer)
    if kind == "error" and not ranks.first:
        raise ValueError("of this rank alone")
    if kind == "error":
        try:
            ranks.sum(buffer, buffer)
        except LostRankError:
            ranks.sum(buffer, buffer)
        print("went on with", ranks.active, "for", ranks.lost)
    ranks.over = True
    if ranks.first:
        time.sleep(1.5)  # writes a checkpoint, and shows what came of it
        print("all of it kept", flush=True)
    code = ranks.leave(0 if ranks.first else 143)
sys.exit(code)
"""


def program(tmp_path: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """What a program of two ranks leaves that calls what a run calls."""
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    found = command(2)
    launch = found["args"][: found["args"].index("-n")]
    return subprocess.run(
        [*(word for word in launch if word not in arguments), "-n", "2",
         sys.executable, path, *(word for word in arguments if word not in launch)],
        env=found["env"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=100,
    )  # fmt: skip


def on_ranks(ranks: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        **command(ranks, *arguments),
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    return done


def differing(one: Path, two: Path) -> dict[str, tuple[str, ...]]:
    return {row.what: row.differing for row in compare(one, two) if row.differing}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "hamlet.txt"
    path.write_text(TEXT)
    return path


def trained(text: Path, out: Path, steps: int) -> Path:
    """A run of one process."""
    assert main(["train", str(text), "--out", str(out), "--max-iters", str(steps), *SETTINGS]) == 0
    return out


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations with answers of very different lengths."""
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    rng = random.Random(1)
    asked = (("Why? " * rng.randint(1, 4), "So. " * rng.randint(1, 9)) for _ in range(80))
    records = ({"prompt": question, "completion": answer} for question, answer in asked)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def alone(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(text, tmp_path_factory.mktemp("runs") / "alone", 8)


# ---- what a launcher says ----

OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}
SRUN = {"SLURM_STEP_NUM_TASKS": "6", "SLURM_PROCID": "5", "SLURM_STEP_TASKS_PER_NODE": "2(x3)"}


def test_launchers_are_read_from_their_environment() -> None:
    found = [(launcher.size(e), launcher.rank(e), launcher.name(e)) for e in (OPEN_MPI, SRUN, {})]
    assert found == [(4, 3, "mpiexec"), (6, 5, "srun"), (1, 0, "mpiexec")]
    assert launcher.local_size(SRUN) == 2
    assert launcher.size({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) == 1  # a batch script


def test_ranks_of_one_host_share_its_cores_unless_they_were_bound() -> None:
    two = OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    assert launcher.own_cores(8, 8, two) == 4
    assert launcher.own_cores(4, 8, two) == 4
    assert launcher.own_cores(1, 1, two) == 1
    assert launcher.own_cores(8, 8, {}) == 8


def test_other_processes_than_mpi_sees_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    world = SimpleNamespace(Get_size=lambda: 1)
    mpi = SimpleNamespace(COMM_WORLD=world, Get_library_version=lambda: "Other MPI 3, of today")
    package = SimpleNamespace(MPI=mpi, rc=SimpleNamespace())
    monkeypatch.setitem(sys.modules, "mpi4py", package)
    monkeypatch.setenv("PMI_SIZE", "2")
    with pytest.raises(UsageError, match=r"2 processes, but mpi4py's Other MPI 3 sees 1"):
        join.join()
    monkeypatch.setenv("PMI_RANK", "1")
    with pytest.raises(SystemExit) as ended:  # one message is enough
        join.join()
    assert ended.value.code == 0  # the first one's code is the job's


def test_without_mpi4py_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(MissingExtraError, match=r"mpiexec started 2 processes.*extra 'mpi'"):
        join.join()
    assert main(["train", str(text), "--out", str(tmp_path / "run"), *SETTINGS]) == 1
    assert "mpi4py" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_one_process_needs_no_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "1")
    assert type(join.join()) is Alone


@pytest.mark.parametrize(
    ("ranks", "micro_batches", "wanted"),
    [
        (3, 6, "Start 2 or 4"),
        (4, 6, "--grad-accum-steps 8, or start 2 ranks"),
        (2, 1, "--grad-accum-steps 2, or start 1 rank. For as many sequences a step: "
         "--grad-accum-steps 2 --batch-size 4"),
    ],
)  # fmt: skip
def test_a_step_that_ranks_cannot_share_is_refused(
    ranks: int, micro_batches: int, wanted: str
) -> None:
    world = object.__new__(Ranks)
    world.size, world._sum = ranks, SimpleNamespace(half=False)
    with pytest.raises(UsageError, match=wanted):
        world.check(TrainConfig(grad_accum_steps=micro_batches, batch_size=8))


def test_moments_that_ranks_do_not_share_are_not_divided() -> None:
    world = object.__new__(Ranks)
    world.size, world._sum = 2, SimpleNamespace(half=False)
    for other in ({"sync_every": 5}, {"devices": 2}):
        config = TrainConfig(shard_optimizer=True, grad_accum_steps=2, **other)
        with pytest.raises(UsageError, match=f"Leave out {next(iter(other))} or shard_optimizer"):
            world.check(config)


@pytest.mark.parametrize(
    ("sizes", "count", "wanted"),
    [([4, 4, 4, 4], 2, [0, 2, 4]), ([100, 1, 1], 2, [0, 1, 3]), ([1, 100], 4, [0, 1, 1, 2, 2])],
)
def test_shares_of_neighbours_are_as_equal_as_whole_parameters_allow(
    sizes: list[int], count: int, wanted: list[int]
) -> None:
    assert bounds(sizes, count) == wanted


# ---- what is sent ----


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_rows_are_added_in_pairs(count: int) -> None:
    rows = np.random.default_rng(count).standard_normal((count, 33)).astype(np.float32)

    def tree(rows: np.ndarray) -> np.ndarray:
        half = len(rows) // 2
        return tree(rows[:half]) + tree(rows[half:]) if half else rows[0]

    assert add_in_pairs(rows.copy()).tobytes() == tree(rows).tobytes()


class Threads:
    """A communicator of threads, with the few calls that a sum makes."""

    def __init__(self, size: int) -> None:
        self.size, self.given = size, [None] * size
        self.barrier = threading.Barrier(size, timeout=20)

    def run(self, work: Any) -> list[Any]:
        """``work(comm of rank r)`` in a thread for each rank."""
        results: list[Any] = [None] * self.size
        views = [Threads.View(self, rank) for rank in range(self.size)]

        def one(rank: int) -> None:
            results[rank] = work(views[rank])

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        return results

    class View:
        def __init__(self, world: Threads, rank: int) -> None:
            self.world, self.rank = world, rank

        def Get_rank(self) -> int:  # noqa: N802
            return self.rank

        def Get_size(self) -> int:  # noqa: N802
            return self.world.size

        def _all(self, value: Any) -> list[Any]:
            self.world.given[self.rank] = value
            self.world.barrier.wait()
            given = list(self.world.given)
            self.world.barrier.wait()
            return given

        def Alltoallv(self, sent: Any, got: Any) -> None:  # noqa: N802
            array, counts = got
            pieces = [
                np.split(a.copy(), np.cumsum(n)[:-1])[self.rank]
                for a, n in self._all((sent[0].copy(), sent[1]))
                if n[self.rank]
            ]
            assert [len(p) for p in pieces] == [n for n in counts if n]
            if pieces:
                array[...] = np.stack(pieces)

        def Allgatherv(self, sent: Any, got: Any) -> None:  # noqa: N802
            pieces = [a[:n] for a, n in self._all((sent[0].copy(), sent[1]))]
            assert [len(p) for p in pieces] == got[1]
            got[0][...] = np.concatenate(pieces)

        def Allgather(self, sent: Any, got: Any) -> None:  # noqa: N802
            got[...] = np.stack(self._all(sent.copy()))


@pytest.mark.parametrize(
    ("size", "active"), [(1, 1), (2, 2), (4, 4), (8, 8), (3, 2), (7, 4)], ids=str
)
@pytest.mark.parametrize("half", [False, True])
def test_the_sum_over_ranks_is_the_tree_of_their_parts(size: int, active: int, half: bool) -> None:
    """Also where some ranks are left over; with bfloat16 as near as its 8 bits are."""
    parts = np.random.default_rng(size).standard_normal((active, 101)).astype(np.float32)
    wanted = add_in_pairs(parts.copy())

    def work(comm: Any) -> tuple[Any, int]:
        out, total = np.empty(101, np.float32), TreeSum(comm, active, half)
        part = parts[comm.rank] if comm.rank < active else np.full(101, np.nan, np.float32)
        total(part.copy(), out)
        return out, total.sent

    found = Threads(size).run(work)
    for out, _ in found:
        assert out.tobytes() == found[0][0].tobytes()
    if half:
        bound = np.abs(parts).sum(0) * 2**-7
        assert (np.abs(found[0][0] - wanted) <= bound).all()
        assert (found[0][0] != wanted).any()
        assert (found[0][0][:16] == wanted[:16]).all() and found[0][0][-1] == wanted[-1]
    else:
        assert found[0][0].tobytes() == wanted.tobytes()
    if size == active:
        bytes_each = 2 * 101 * (size - 1) / size * (2 if half else 4)
        assert sum(sent for _, sent in found) == pytest.approx(size * bytes_each)


def test_a_meeting_is_nesterov_momentum_on_how_far_weights_have_moved() -> None:
    """Against the same in float64."""
    from tinygrad import Tensor

    rng = np.random.default_rng(5)
    weights = write(Tensor.empty(7, 3), rng.standard_normal((7, 3)))
    optimizer = make_optimizer({"w": weights.is_param_()}, TrainConfig(sync_every=5))
    meeting, velocity = Meeting(optimizer, Alone()), np.zeros((7, 3))
    common = read(weights).astype(np.float64)
    for _ in range(3):
        moved = rng.standard_normal((7, 3)) * 0.1
        write(weights, common - moved)
        meeting.take()
        velocity = 0.9 * velocity + moved
        common = common - 0.7 * (moved + 0.9 * velocity)
        assert np.abs(read(weights) - common).max() < 1e-5
    kept = optimizer_state(optimizer, {"w": weights})["outer.w"]
    assert np.abs(read(kept) - velocity).max() < 1e-5


def test_bfloat16_is_the_nearest_with_ties_to_even() -> None:
    from tinygrad import Tensor, dtypes

    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    ties = np.array([1.00390625, 1.01171875, np.inf, -np.inf, 0.0, -0.0], np.float32)
    values = np.concatenate([values * 10.0 ** np.arange(-20, 20).repeat(25), ties])
    values = values.astype(np.float32)
    theirs = Tensor(values).cast(dtypes.bfloat16).cast(dtypes.float32).numpy()
    assert from_bfloat16(to_bfloat16(values)).tobytes() == theirs.tobytes()
    assert np.isnan(from_bfloat16(to_bfloat16(np.array([np.nan], np.float32)))).all()


def test_only_the_process_that_was_described_is_killed() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        described = Process.of(child.pid)
        Process(described.host, described.namespace, child.pid, "1").kill()
        time.sleep(0.1)
        assert child.poll() is None
        described.kill()
        assert child.wait(20) == -signal.SIGKILL
    finally:
        child.kill()
        child.wait()


# ---- several processes ----


@needs_mpi
@pytest.mark.parametrize("ranks", [2, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_any_number_of_ranks_leaves_the_same_bits(
    ranks: int, alone: Path, text: Path, tmp_path: Path
) -> None:
    """Weights, moments, metrics and samples; and going on with another number does, too."""
    out = tmp_path / "ranks"
    done = on_ranks(ranks, "train", text, "--out", out, "--max-iters", 8, *SETTINGS)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("step 8/8") == 1
    assert differing(alone, out) == {}
    if ranks == 2:
        resumed = on_ranks(4, "train", out / "ckpt_4", "--resume", "--out", tmp_path / "on")
        assert resumed.returncode == 0, resumed.stderr
        assert {*differing(alone, tmp_path / "on")} <= {"metrics", "samples"}  # of steps before
    else:
        assert main(["train", str(out / "ckpt_4"), "--resume", "--out", str(tmp_path / "on")]) == 0
    assert set(differing(alone, tmp_path / "on")) <= {"metrics", "samples"}


@needs_mpi
@pytest.mark.parametrize(
    "given",
    [
        ("--dtype", "bfloat16", "--recompute"),
        *(pytest.param(words, marks=pytest.mark.slow) for words in (
            (), ("--dtype", "float16"), ("--dtype", "float16", "--recompute"), ("--recompute",),
        )),
    ],
    ids=str,
)  # fmt: skip
def test_ranks_learn_answers_with_the_same_bits(
    given: tuple[str, ...], chats: Path, tmp_path: Path
) -> None:
    """Micro-batches weigh what they count of all answers of a step, whichever rank has them."""
    one, out, on = tmp_path / "one", tmp_path / "run", tmp_path / "on"
    settings = ("--max-iters", 8, *CHATS, *given)
    assert main([*map(str, ["train", chats, "--out", one, *settings])]) == 0
    done = on_ranks(2, "train", chats, "--out", out, *settings)
    assert done.returncode == 0, done.stderr
    assert "the loss counts only these" in done.stderr
    assert differing(one, out) == {}
    words = ["train", out / "ckpt_4", "--resume", "--out", on]
    if len(given) > 1:
        assert main([*map(str, words)]) == 0
    else:
        resumed = on_ranks(4, *words)
        assert resumed.returncode == 0, resumed.stderr
    assert set(differing(one, on)) <= {"metrics", "samples"}


@needs_mpi
@pytest.mark.slow
@pytest.mark.parametrize("given", [("--dtype", "float16"), ("--devices", "2")], ids=str)
def test_ranks_take_other_types_and_devices(
    given: tuple[str, str], text: Path, tmp_path: Path
) -> None:
    one, out, settings = tmp_path / "one", tmp_path / "run", ("--max-iters", 8, *given, *SETTINGS)
    assert main([*map(str, ["train", text, "--out", one, *settings])]) == 0
    done = on_ranks(2, "train", text, "--out", out, *settings)
    assert done.returncode == 0, done.stderr
    assert differing(one, out) == {}


@needs_mpi
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("optimizer", ["muon", pytest.param("adam", marks=pytest.mark.slow)])
def test_divided_moments_leave_the_same_bits(
    ranks: int, optimizer: str, alone: Path, text: Path, tmp_path: Path
) -> None:
    """Checkpoints too, from which any number of ranks goes on."""
    out, on, given = tmp_path / "run", tmp_path / "on", ("--max-iters", 8, *SETTINGS)
    wanted = alone
    if optimizer == "muon":
        given, wanted = (*given, "--optimizer", "muon"), tmp_path / "alone"
        words = ["train", text, "--out", wanted, *given]
        assert main([*map(str, words)]) == 0
    done = on_ranks(ranks, "train", text, "--out", out, "--shard-optimizer", *given)
    assert done.returncode == 0, done.stderr
    assert differing(wanted, out) == {"state": ("train",)}  # the setting itself
    words = ["train", out / "ckpt_4", "--resume", "--out", on]
    assert main([*map(str, words)]) == 0
    assert {*differing(out, on)} <= {"metrics", "samples"}


@needs_mpi
def test_ranks_that_met_go_on_as_if_they_had_not_ended(chats: Path, tmp_path: Path) -> None:
    """With the outer momentum, and one state of the inner optimizer, from a checkpoint."""
    out, on = tmp_path / "run", tmp_path / "on"
    given = ("--out", out, "--max-iters", 8, "--sync-every", 3, *CHATS)
    done = on_ranks(2, "train", chats, *given, "--dtype", "bfloat16", "--recompute")
    assert done.returncode == 0, done.stderr
    resumed = on_ranks(2, "train", out / "ckpt_4", "--resume", "--out", on)
    assert resumed.returncode == 0, resumed.stderr
    assert set(differing(out, on)) <= {"metrics", "samples"}
    _, tensors = checkpoint.read(on / "ckpt_8.safetensors")
    assert all(np.abs(a).max() > 0 for n, a in tensors.items() if ".outer." in n)
    assert any(".outer." in name for name in tensors)


def run_of_ranks(out: Path) -> dict[int, int]:
    """The processes, by rank, that train into a folder."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if str(out).encode() in (folder / "cmdline").read_bytes():
                words = (folder / "environ").read_bytes().split(b"\0")
                rank = [w for w in words if w.startswith(b"OMPI_COMM_WORLD_RANK=")]
                found.update({int(w.partition(b"=")[2]): int(folder.name) for w in rank})
        except OSError:
            continue
    return found


@pytest.fixture(scope="module")
def undisturbed(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(text, tmp_path_factory.mktemp("runs") / "undisturbed", 200)


class Started:
    """A run of several ranks that is under way."""

    def __init__(self, ranks: int, out: Path, *arguments: object) -> None:
        self.out, self.rows = out, out / "metrics.jsonl"
        self.process: Any = subprocess.Popen(
            **command(ranks, "train", *arguments, "--out", out, *SETTINGS),
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def wait_for_rows(self, count: int) -> None:
        end = time.monotonic() + 120
        while not self.rows.exists() or self.rows.read_bytes().count(b"\n") < count:
            assert self.process.poll() is None and time.monotonic() < end
            time.sleep(0.005)

    def send(self, number: signal.Signals, *ranks: int) -> None:
        found = run_of_ranks(self.out)
        for rank in ranks:
            os.kill(found[rank], number)

    def end(self, within: float = 150) -> tuple[int, str]:
        try:
            _, messages = self.process.communicate(timeout=within)
        finally:
            for number in run_of_ranks(self.out).values():
                os.kill(number, signal.SIGKILL)
            self.process.kill()
        return self.process.returncode, messages


@pytest.fixture
def start(text: Path, tmp_path: Path) -> Iterator[Any]:
    runs: list[Started] = []

    def begin(ranks: int, *arguments: object) -> Started:
        runs.append(Started(ranks, tmp_path / f"run{len(runs)}", text, *arguments))
        return runs[-1]

    yield begin
    for run in runs:
        if run.process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                run.end(within=1)
        run.process.wait(20)
        run.process.stderr.close()


@needs_mpi
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 100))]
)
def test_a_killed_rank_costs_one_step(seed: int, undisturbed: Path, start: Any) -> None:
    rng = random.Random(seed)
    run = start(4, "--max-iters", 200)
    run.wait_for_rows(rng.randrange(1, 120))
    time.sleep(rng.random() / 50)
    run.send(signal.SIGKILL, rng.randrange(1, 4))
    code, messages = run.end()
    assert code == 0, messages
    assert "was lost: 2 of the 3 left share a step" in messages
    assert '"lost_ranks":' in run.rows.read_text()
    assert differing(undisturbed, run.out) == {}


@needs_mpi
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_the_end_of_the_first_rank_is_that_of_the_run(start: Any) -> None:
    run = start(2, "--max-iters", 100000)
    run.wait_for_rows(9)
    run.send(signal.SIGKILL, 0)
    code, messages = run.end(within=60)
    assert code != 0 and "rank 0, which writes the run, was lost" in messages
    assert main(["verify", str(run.out)]) == 0


@needs_mpi
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_a_signal_to_any_rank_stops_all_with_a_checkpoint(start: Any) -> None:
    run = start(2, "--max-iters", 100000)
    run.wait_for_rows(2)
    run.send(signal.SIGTERM, 1)
    code, messages = run.end(within=60)
    assert code == 128 + signal.SIGTERM, messages
    rows = run.rows.read_bytes().count(b"\n")
    assert "all of it kept" in messages and (run.out / f"ckpt_{rows}.safetensors").exists()


@needs_mpi
@pytest.mark.parametrize("tolerant", [True, False])
def test_a_stopped_rank_waits_until_the_first_has_kept_everything(
    tolerant: bool, tmp_path: Path
) -> None:
    """A launcher ends the job, or loses its output, when any process ends with a code."""
    done = program(tmp_path, *([] if tolerant else ["--with-ft", "ulfm"]), "stop")
    assert done.returncode == 143 and "all of it kept" in done.stdout, done


@needs_mpi
def test_an_error_of_one_rank_alone_is_its_loss(tmp_path: Path) -> None:
    done = program(tmp_path, "error")
    assert "rank 1: ValueError: of this rank alone" in done.stderr
    assert done.returncode == 0 and "went on with 1 for [1]" in done.stdout, done


@needs_mpi
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_a_hung_rank_is_declared_lost(
    undisturbed: Path, start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMPI_MCA_mpi_ft_detector_period", "2")
    monkeypatch.setenv("OMPI_MCA_mpi_ft_detector_timeout", "8")
    run = start(4, "--max-iters", 200)
    run.wait_for_rows(20)
    run.send(signal.SIGSTOP, 2)
    code, messages = run.end()
    assert code == 0 and "rank 2 on" in messages
    assert differing(undisturbed, run.out) == {}


@needs_mpi
def test_ranks_with_other_settings_are_refused_with_the_difference(
    text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    one = command(1, "train", text, "--out", out, "--max-iters", 4, *SETTINGS)
    other = command(1, "train", text, "--out", out, "--max-iters", 5, *SETTINGS)
    both = [*one["args"], ":", *other["args"][3:]]
    done = subprocess.run(
        both, env=one["env"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0 and not out.exists()
    assert "differs from rank 0 in train.max_iters: 5, not 4" in done.stderr


@needs_mpi
@pytest.mark.slow
@pytest.mark.parametrize("given", [("--wire", "bfloat16"), ("--sync-every", "5")], ids=str)
def test_less_traffic_learns_as_well(
    given: tuple[str, str], undisturbed: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    done = on_ranks(2, "train", text, "--out", out, "--max-iters", 200, *given, *SETTINGS)
    assert done.returncode == 0, done.stderr
    losses = [
        [row["val_loss"] for row in History(run / "metrics.jsonl") if "val_loss" in row][-1]
        for run in (undisturbed, out)
    ]
    assert differing(undisturbed, out) and losses[1] < losses[0] * 1.05


@needs_mpi
@pytest.mark.slow
def test_the_proof_of_resuming_takes_ranks(
    text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMPI_ALLOW_RUN_AS_ROOT", "1")
    monkeypatch.setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
    shape = SETTINGS[:8]
    assert main(["verify-resume", str(text), "--ranks", "2", *shape, "--batch-size", "2"]) == 0
    told = capsys.readouterr()
    assert "bit for bit" in told.out and "2 fresh processes" in told.err
    assert main(["verify-resume", str(text), "--ranks", "3"]) == 2
