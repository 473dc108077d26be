"""Lowered kernels: made on all cores, and kept on disk.

To make C of a kernel's graph takes tinygrad 30 to 120 ms of Python, for each of the fifty kernels
of a training step, in every process anew; only what the C compiler makes of it is kept. ``install``
lets tinygrad find the whole program again, in the same cache, at 0.3 ms each. What a graph
becomes depends on the graph, on tinygrad's settings, and on tinygrad itself: all three are in the
key. Processor and compiler are in the key of the cache (``disk_cache``).

The first time, the kernels of a step are shared out among forked processes, which end with it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from tinygrad import UOp

from tinygpt.machine import pool
from tinygpt.machine.tinygrad_internals import (
    DEBUG,
    PARALLEL,
    TRACEMETA,
    VIZ,
    ContextVar,
    Ops,
    TLSFAllocator,
    codegen,
    helpers,
    ops_cpu,
    realize,
)

log = logging.getLogger(__name__)

_own_workers = realize.get_worker_pool

TABLE = "tinygpt_programs"
WORTH_A_FORK = 3
"""Kernels for each process, at least."""

Task = tuple[int, Any, Any]
Made = tuple[int, UOp]


class Programs(dict[tuple[Any, ...], UOp]):
    """tinygrad's dictionary of programs by the key of their graph, with a disk behind it."""

    def __contains__(self, key: object) -> bool:
        return self.get(key) is not None

    def get(self, key: Any, default: Any = None) -> Any:
        found = super().get(key)
        if found is None and (found := _load(key)) is not None:
            super().__setitem__(key, found)
        return default if found is None else found

    def __setitem__(self, key: tuple[Any, ...], program: UOp) -> None:
        super().__setitem__(key, program)
        _save(key, program)


def install() -> None:
    """Let tinygrad keep lowered kernels on disk from now on; where it cannot, do nothing.

    tinygrad's own ``CACHELEVEL=0`` switches it off, along with everything else it keeps.
    """
    _keep_nothing()
    own = codegen.to_program_cache
    if isinstance(own, Programs) or DEBUG >= 2 or VIZ:  # the user wants to see them lowered
        return
    if own is not getattr(realize, "to_program_cache", None):
        log.info("Kernels are lowered anew in each process: tinygrad is not as expected.")
        return
    kept = Programs(own)
    codegen.to_program_cache = kept
    realize.to_program_cache = kept
    realize.get_worker_pool = _workers
    ops_cpu.do_to_program = codegen.to_program  # four little programs that the device opens with


def _keep_nothing() -> None:
    """Close two leaks of tinygrad 0.14.

    The plans of memory, one for each schedule, are never freed: two of their methods, which shift a
    number, are cached with the plan as a part of the key. And each gradient adds the names of its
    operations, which only DEBUG and VIZ show, to those of constants that live for ever.
    """
    if not DEBUG and not VIZ:
        TRACEMETA.value = 0
    for name in ("lv1", "lv2"):
        method = getattr(TLSFAllocator, name, None)
        if plain := getattr(method, "__wrapped__", None):
            setattr(TLSFAllocator, name, plain)


def _load(key: object) -> UOp | None:
    found = helpers.diskcache_get(TABLE, _name(key))
    whole = isinstance(found, UOp) and found.op is Ops.PROGRAM and found.src[-1].op is Ops.BINARY
    return found if whole else None


def _save(key: object, program: UOp) -> None:
    helpers.diskcache_put(TABLE, _name(key), program)


def _name(key: object) -> str:
    return hashlib.sha256(f"{_installation()} {_settings()} {key!r}".encode()).hexdigest()


def _settings() -> str:
    """tinygrad's settings that lowering depends on and that ``key`` lacks."""
    return repr([_environment(), *(v.value for v in ContextVar._cache.values() if v.key in VALUES)])


@cache
def _environment() -> list[str | None]:
    return [os.environ.get(name) for name in READ]  # once, as tinygrad reads them


VALUES = ("BEAM", "FLOAT16", "TUPLE_ORDER")
"""Settings that tinygrad's code generator looks at, besides those in its own key."""
READ = (
    *("ALIGNED", "ALLOW_HALF8", "DMC", "EXPAND_SSA", "MV", "MV_BLOCKSIZE", "MV_ROWS_PER_THREAD"),
    *("MV_THREADS_PER_ROW", "OCCUPANCY_FLOOR", "THREADS", "TC", "TC_OPT", "NOLOCALS"),
    *("BEAM_DEV_TIMEOUT", "BEAM_ESTIMATE", "BEAM_LOCAL_MAX", "BEAM_MIN_PROGRESS", "BEAM_PADTO"),
    *("BEAM_STRICT_MODE", "BEAM_TIMEOUT_SEC", "BEAM_UOPS_MAX", "BEAM_UPCAST_MAX"),
)
"""Variables that it reads from the environment where it needs them."""


@cache
def _installation() -> str:
    """This very tinygrad: its version, and the date of its code generator."""
    from importlib.metadata import version

    return f"{version('tinygrad')} {Path(codegen.__file__).stat().st_mtime_ns}"


# ---- several at once ----


class Forks:
    """What tinygrad asks of a pool of processes. These live for one call."""

    def __init__(self, count: int) -> None:
        self.count = count

    def imap_unordered(self, make: Callable[[Task], Made], tasks: Iterable[Task]) -> Iterator[Made]:
        """``make`` of each task, in any order."""
        todo = {task[0]: task for task in tasks}
        shares = list(todo.values())
        count = max(1, min(self.count, len(shares) // WORTH_A_FORK))
        children = {_fork(make, shares[i::count]) for i in range(1, count)}
        try:
            for task in shares[0::count]:
                yield make(task)
                del todo[task[0]]
            for child in list(children):
                for number, program in child.receive():
                    yield number, program
                    del todo[number]
            for task in todo.values():  # of a child that failed: here its error is raised
                yield make(task)
        finally:
            for child in children:
                child.end()


def _workers() -> Any:
    """Forks on Linux, if there is more than one core; elsewhere tinygrad's own pool, if
    ``PARALLEL`` asks for one; else None."""
    forks = sys.platform == "linux"
    if forks:
        return Forks(pool.threads()) if pool.threads() > 1 else None
    if PARALLEL:  # its processes, later ones too, import before they are given this one's path
        os.environ.setdefault("PYTHONSAFEPATH", "1")
    return _own_workers()  # type: ignore[no-untyped-call]


class Child:
    """A process that makes some programs and ends."""

    def __init__(self, pid: int, results: BinaryIO) -> None:
        self.pid, self.results = pid, results

    def receive(self) -> list[Made]:
        """What it made, once it is done; nothing if it failed."""
        try:
            made: list[Made] = pickle.loads(self.results.read())
        except (EOFError, pickle.UnpicklingError):
            return []
        return made

    def end(self) -> None:
        """Stop it if it is still at work.

        A host program that ignores SIGCHLD, or waits for every child, may have reaped it already.
        """
        self.results.close()
        with suppress(ChildProcessError, ProcessLookupError):
            if os.waitpid(self.pid, os.WNOHANG) == (0, 0):  # else its number may be another's
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)


def _fork(make: Callable[[Task], Made], tasks: list[Task]) -> Child:
    """Start a process that makes ``tasks``."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():  # the threads of this process are not needed over there
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid:
        os.close(writing)
        return Child(pid, os.fdopen(reading, "rb"))
    try:  # in the child, which returns nowhere
        os.close(reading)
        with os.fdopen(writing, "wb") as out:
            out.write(pickle.dumps([make(task) for task in tasks]))
    finally:
        os._exit(0)
