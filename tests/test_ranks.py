"""Several processes train one model, bit for bit as one would, and go on when one is lost."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tinygpt.cli import main
from tinygpt.cli.proving import compare
from tinygpt.errors import MissingExtraError, UsageError
from tinygpt.machine import children
from tinygpt.machine.ranks import join, launcher
from tinygpt.machine.ranks.alone import Alone
from tinygpt.machine.ranks.tree import add_in_pairs, from_bfloat16, to_bfloat16
from tinygpt.machine.ranks.world import Process, Ranks

TEXT = "To be, or not to be, that is the question:\n" * 200
SETTINGS = (
    *("--tokenizer", "char", "--n-layer", "1", "--n-embd", "16", "--n-head", "2"),
    *("--block-size", "8", "--batch-size", "2", "--grad-accum-steps", "8", "--dropout", "0.1"),
    *("--eval-interval", "4", "--eval-iters", "3", "--warmup-steps", "2", "--keep-last", "0"),
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
    assert ended.value.code == 2


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
    world.size = ranks
    with pytest.raises(UsageError, match=wanted):
        world.check(micro_batches, 8)
    world.check(12 if ranks == 4 else 4, 8) if ranks != 3 else None


# ---- what is sent ----


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_rows_are_added_in_pairs(count: int) -> None:
    rows = np.random.default_rng(count).standard_normal((count, 33)).astype(np.float32)

    def tree(rows: np.ndarray) -> np.ndarray:
        half = len(rows) // 2
        return tree(rows[:half]) + tree(rows[half:]) if half else rows[0]

    assert add_in_pairs(rows.copy()).tobytes() == tree(rows).tobytes()


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
        self.process = subprocess.Popen(
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
            run.end(within=1)


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
