"""The ranks of a run, as it sees them: who sums what, what all of them agree on, who was lost."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn, Self

import numpy as np

from tinygpt.errors import TinyGPTError, TrainingError, UsageError
from tinygpt.machine.ranks import launcher
from tinygpt.machine.ranks.alone import Alone, LostRankError
from tinygpt.machine.ranks.tree import TreeSum

if TYPE_CHECKING:
    import numpy.typing as npt
    from tinygrad import Tensor

    from tinygpt.config import TrainConfig
    from tinygpt.machine.flat_buffer import FlatBuffer


STATE = 1
"""The tag of moments that are sent to the first rank."""
SAVE = 1024.0
"""In the sum of votes a rank that wants to stop counts 1, one that wants a checkpoint this."""


class Heart:
    """A thread that keeps MPI sending signs of life while this process computes for minutes.

    Open MPI sends them in any call, but not in each: at least in one of eight (5.0.11).
    """

    def __init__(self, comm: Any) -> None:
        self._comm, self._stop = comm, threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="tinygpt-heart")

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()  # MPI must not end in the middle of a call

    def _beat(self) -> None:
        while not self._stop.wait(1.0):
            for _ in range(16):
                self._comm.Iprobe()


class Ranks(Alone):
    """The processes of an MPI job. ``first`` is true on rank 0, which writes and shows.

    Under ``mpiexec --with-ft ulfm`` of Open MPI the loss of other ranks is survived: those left
    agree on which exchanges count, and as many as the tree allows go on. The rest then receive
    results only, so that they can step in.
    """

    def __init__(self, mpi: ModuleType) -> None:
        super().__init__()
        self.mpi = mpi
        self.world = self.comm = mpi.COMM_WORLD
        self.comm.Set_errhandler(mpi.ERRORS_RETURN)
        self.rank, self.size = self.comm.Get_rank(), self.comm.Get_size()
        self.first = self.rank == 0
        self.tolerant = launcher.tolerant()
        self.members = list(range(self.size))
        """The ranks that are left, by their numbers at the start."""
        self._ended = self._started = self._stop_agreed = self._save_agreed = False
        self._sum = TreeSum(self.comm, self.size)
        self._micro_batches, self._apart, self._divided = self.size, False, False
        self.hosts: list[Process] = self.comm.allgather(Process.this())

    @property
    def stopping(self) -> bool:
        return self._stop_agreed

    @property
    def saving(self) -> bool:
        return self._save_agreed

    def saved(self) -> None:
        self._save_agreed = False

    # ---- before the first step ----

    @contextlib.contextmanager
    def together(self) -> Iterator[Self]:
        with Heart(self.mpi.COMM_SELF) if self.tolerant else contextlib.nullcontext():
            try:
                yield self
                if not self._started:
                    self._meet({})
            except BaseException as error:
                if not self._started:
                    self._tell(error)
                elif not self.over:
                    self._abort(error)  # of this rank alone: the others would wait for it
                else:
                    self._send(getattr(error, "exit_code", 1))
                if self.first:
                    raise
                raise SystemExit(0) from error  # as ``leave`` says

    def leave(self, code: int = 0) -> int:
        if not self._started:
            return code
        if self.first:
            codes = [self._receive(rank) for rank in range(1, self.comm.Get_size())]
            self._send(code)
            return code or next(filter(None, codes), 0)
        with _ignoring(signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # it ends already
            self._send(code)
            if self._receive(0) is None:
                self._end_without_first()
        return 0

    def _send(self, code: int) -> None:
        """Send a word to the first rank, or from the first one to all others."""
        for rank in range(1, self.comm.Get_size()) if self.first else [0]:
            with contextlib.suppress(self.mpi.Exception):
                self.comm.send(code, rank)

    def _receive(self, rank: int) -> int | None:
        """The word of another rank; None if that was lost."""
        try:
            return int(self.comm.recv(source=rank))
        except self.mpi.Exception:
            return None

    def _tell(self, error: BaseException) -> None:
        """Tell the other ranks, which wait in `_meet` or will come there, that this one ends."""
        if not self._ended:
            self._ended = True
            code = getattr(error, "exit_code", 1)
            self.comm.allgather({"error": str(error) or type(error).__name__, "code": code})

    def _meet(self, message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """Wait for all ranks; -> their messages. Ends this rank if another one has failed."""
        try:
            messages: list[Mapping[str, Any]] = self.comm.allgather(dict(message))
        except self.mpi.Exception as error:
            self._ended = True
            raise TrainingError(f"A rank was lost before the first step: {error}.") from error
        failed = [rank for rank, other in enumerate(messages) if "error" in other]
        if not failed:
            return messages
        self._ended = True
        other = messages[failed[0]]
        if not self.first:
            raise SystemExit(0)
        raise TrainingError(f"{self._name(failed[0])}: {other['error']}")

    def _abort(self, error: BaseException) -> NoReturn:
        kind = "" if isinstance(error, TinyGPTError) else f"{type(error).__name__}: "
        os.write(2, f"rank {self.rank}: {kind}{error}\n".encode())
        if self.first or self._divided or not self.tolerant:
            self.world.Abort(getattr(error, "exit_code", 1))
        launcher.end_at_once(1)

    @property
    def active(self) -> int:
        return self._sum.active

    def check(self, config: TrainConfig) -> None:
        micro_batches, batch_size, ranks = config.grad_accum_steps, config.batch_size, self.size
        self._micro_batches, self._apart = micro_batches, config.sync_every is not None
        self._divided, self._sum.half = config.shard_optimizer, config.wire == "bfloat16"
        if self._divided and (self._apart or config.n_devices > 1):
            other = "sync_every" if self._apart else "devices"
            raise UsageError(
                f"shard_optimizer divides among ranks the moments of weights that all of them "
                f"change alike, on one device each. Leave out {other} or shard_optimizer."
            )
        if ranks & (ranks - 1):
            less = 1 << ranks.bit_length() - 1
            raise UsageError(
                f"{ranks} ranks cannot share a step: their number must be a power of two, so that "
                f"they sum it in the same order as one would. Start {less} or {2 * less}."
            )
        if micro_batches % ranks:
            more = -(-micro_batches // ranks) * ranks
            smaller = batch_size * micro_batches // more
            same = (
                f" For as many sequences a step: --grad-accum-steps {more} --batch-size {smaller}."
                if smaller * more == batch_size * micro_batches
                else ""
            )
            fewer = micro_batches & -micro_batches
            start = f", or start {fewer} rank{'s' * (fewer > 1)}" if fewer < ranks else ""
            raise UsageError(
                f"grad_accum_steps={micro_batches} cannot be shared by {ranks} ranks: it must be a "
                f"multiple of {ranks}. Try --grad-accum-steps {more}{start}.{same}"
            )

    def same(self, facts: Mapping[str, str]) -> None:
        messages = self._meet({"facts": {"code": code(), **facts}})
        wanted = messages[0]["facts"]
        for rank, message in enumerate(messages):
            found = message["facts"]
            differing = [k for k in {**wanted, **found} if wanted.get(k) != found.get(k)]
            if differing:
                self._ended = True  # on all ranks at once
                listed = ", ".join(f"{k}: {found.get(k)}, not {wanted.get(k)}" for k in differing)
                raise UsageError(
                    f"{self._name(rank)} differs from rank 0 in {listed}. All ranks must be "
                    f"started with the same code, settings, data and vocabulary."
                )

    def copy_first(
        self, state: Callable[[], Mapping[str, Any]], tensors: Sequence[Tensor]
    ) -> Mapping[str, Any] | None:
        from tinygpt.machine.transfer import read, write

        found = self._meet({"state": state()} if self.first else {})[0]
        for tensor in tensors:
            values = read(tensor)
            self.comm.Bcast(values.reshape(-1).view(np.uint8), root=0)
            if not self.first:
                write(tensor, values)
        self._started = True
        return None if self.first else found["state"]

    # ---- while it trains ----

    def share(self, count: int) -> range:
        if self._apart:  # the same for the whole run: a rank has moments of its own
            own = count // self.size
            return range(self.rank * own, (self.rank + 1) * own)
        own, place = count // self._sum.active, self.comm.Get_rank()
        return range(place * own, (place + 1) * own) if place < self._sum.active else range(0)

    def sum(self, part: FlatBuffer, out: FlatBuffer, whole: bool = False) -> None:
        part.fetch()
        asked, part.array[-1] = self._vote()
        self._surely(lambda: self._sum(part.array, out.array, whole))
        self._count_votes(asked, float(out.array[-1]))
        out.put()

    def _vote(self) -> tuple[bool, float]:
        """Whether this rank asks for a checkpoint, and its vote."""
        return (asked := self.save_asked), self.stop_asked + SAVE * asked

    def _count_votes(self, asked: bool, votes: float) -> None:
        saves, stops = divmod(votes, SAVE)
        self._stop_agreed, self._save_agreed = stops > 0, saves > 0
        if asked:  # not what was asked meanwhile
            self.save_asked = False

    def sum_pieces(self, part: FlatBuffer, counts: list[int]) -> None:
        part.fetch()
        start = sum(counts[: self.rank])

        def exchange() -> None:
            part.array[start : start + counts[self.rank]] = self._sum.piece(part.array, counts)

        self._surely(exchange)
        part.put()

    def gather(self, values: npt.NDArray[np.float32], counts: list[int]) -> None:
        self._surely(lambda: self.comm.Allgatherv(self.mpi.IN_PLACE, [values, counts]))

    def rows(
        self, own: npt.NDArray[np.float32], counts: list[int]
    ) -> list[npt.NDArray[np.float32]]:
        asked, vote = self._vote()
        ends = np.cumsum([n + 1 for n in counts])
        everything = np.empty(int(ends[-1]), np.float32)
        mine = everything[int(ends[self.rank]) - len(own) - 1 : int(ends[self.rank])]
        mine[:-1], mine[-1] = own, vote
        self.gather(everything, [n + 1 for n in counts])
        found = np.split(everything, ends[:-1])
        self._count_votes(asked, float(sum(row[-1] for row in found)))
        return [row[:-1] for row in found]

    def give(self, values: npt.NDArray[Any]) -> None:
        self._surely(lambda: self.comm.Send(values, 0, STATE), alone=True)

    def fetch(self, rank: int, out: npt.NDArray[Any]) -> None:
        self._surely(lambda: self.comm.Recv(out, rank, STATE), alone=True)

    def each(self, compute: Callable[[int], float], count: int) -> list[float]:
        while True:
            place, size = self.comm.Get_rank(), self.comm.Get_size()
            own = np.array([compute(i) for i in range(place, count, size)] or [0.0])
            rows = np.zeros((size, -(-count // size)))
            own.resize(rows.shape[1], refcheck=False)
            with contextlib.suppress(LostRankError):
                self._surely(partial(self.comm.Allgather, own, rows))
                return [float(rows[i % size, i // size]) for i in range(count)]

    def _surely(self, exchange: Callable[[], object], alone: bool = False) -> None:
        """Make an exchange, and raise LostRankError on every rank unless all of them have it.

        With divided moments, which a lost rank takes with it, it is a TrainingError; so it is in an
        exchange that not all of them make, ``alone``.
        """
        done = True
        try:
            exchange()
        except self.mpi.Exception as error:
            if not self.tolerant or self._divided or alone:
                moments = " Its share of the moments is lost with it." if self._divided else ""
                raise TrainingError(
                    f"An exchange between the ranks failed: {error}.{moments} Resume the run."
                ) from error
            done = False
            self.comm.Revoke()  # wakes those that still wait for this exchange
        if self.tolerant and not (self._divided or alone):
            with contextlib.suppress(self.mpi.Exception):  # raised on all or none
                if self.comm.Agree(int(done)):
                    return
            self._close_ranks()
            raise LostRankError

    def _close_ranks(self) -> None:
        """Go on with the ranks that are left; TrainingError without the first."""
        self.comm = self.comm.Shrink()
        self.comm.Set_errhandler(self.mpi.ERRORS_RETURN)
        group, everyone = self.comm.Get_group(), self.world.Get_group()
        left = self.mpi.Group.Translate_ranks(group, range(group.Get_size()), everyone)
        gone = sorted(set(self.members) - set(left))
        self.members = list(left)
        for rank in gone:
            self._end(rank)
        if 0 not in self.members:
            self._end_without_first()
        most = self._micro_batches & -self._micro_batches
        active = min(most, 1 << len(left).bit_length() - 1)
        self._sum = TreeSum(self.comm, active, self._sum.half)
        self.lost += gone
        names = " and ".join(map(self._name, gone)) or "no rank"
        were = "were" if len(gone) > 1 else "was"
        rest = f"{active} of the {len(left)} left share a step, and take it again"
        self.news.append(f"{names} {were} lost: {rest}")

    def _end_without_first(self) -> NoReturn:
        if self.rank == min(set(self.members) - {0}):
            os.write(2, b"rank 0, which writes the run, was lost: the others end. Resume it.\n")
        os._exit(1)  # its launcher has ended or will end the job

    def _end(self, rank: int) -> None:
        """End a rank that was declared lost but hangs, if this is the rank on its host to do so."""
        lost = self.hosts[rank]
        there = [r for r in self.members if self.hosts[r].place == lost.place]
        if there and there[0] == self.rank:
            lost.kill()

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self.hosts[rank].host}"


@contextlib.contextmanager
def _ignoring(*numbers: signal.Signals) -> Iterator[None]:
    """Ignore these signals, which only the main thread can."""
    here = threading.current_thread() is threading.main_thread()
    before = {n: signal.signal(n, signal.SIG_IGN) for n in numbers if here}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@dataclass(frozen=True)
class Process:
    """A process, so described that no other one is taken for it."""

    host: str
    namespace: str
    number: int
    began: str
    """When it began, in the units of the system."""

    @classmethod
    def this(cls) -> Self:
        return cls.of(os.getpid())

    @classmethod
    def of(cls, number: int) -> Self:
        namespace = began = ""
        with contextlib.suppress(OSError, IndexError):
            namespace = str(Path(f"/proc/{number}/ns/pid").readlink())
            began = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[19]
        return cls(platform.node(), namespace, number, began)

    @property
    def place(self) -> tuple[str, str]:
        """Where its number means it."""
        return self.host, self.namespace

    def kill(self) -> None:
        """End it, if it is still the one that was described."""
        if self.began and asdict(self) == asdict(Process.of(self.number)):
            with contextlib.suppress(OSError):
                os.kill(self.number, signal.SIGKILL)


def code() -> str:
    """A hash of this package, and the versions of what it computes with."""
    root, found = Path(__file__).parents[2], hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.suffix in (".py", ".c")):
        found.update(f"{path.relative_to(root)} {path.stat().st_size}\n".encode())
        found.update(path.read_bytes())
    versions = f"tinygrad {version('tinygrad')}, numpy {np.__version__}"
    return f"tinygpt {found.hexdigest()[:12]}, {versions}, Python {platform.python_version()}"
