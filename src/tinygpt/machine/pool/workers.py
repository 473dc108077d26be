"""The pool of threads that runs kernels: ``pool.c``, its memory and its workers.

The C is compiled by the compiler that makes tinygrad's kernels, kept in the same cache and loaded
into memory in the same way. So it works wherever a kernel does: no linker, no headers, no file of
ours on disk. It gets what it needs of libc (a mutex, a condition variable, the clock) as pointers.

The workers are Python threads that enter the C once and stay there, without the interpreter lock,
until the pool stops. The words of this folder:

- A *piece* is one call of a kernel's function, with the piece's number as an argument. The pieces
  of a kernel are independent; a large kernel has up to some hundred, whatever the number of cores.
- A *command* is a kernel with its arguments and the number of its pieces. A list of commands, such
  as a whole training step, is one call into the C and runs in order.
- The *caller* is the thread that asked for it. It works on pieces like a worker and waits, at the
  end of each command, until the last piece is done: the next kernel reads what this one wrote.
- A *worker* waits for the next command, takes pieces until none is left, and waits again.

Both wait by spinning first. From one kernel to the next a few microseconds pass, and a thread that
sleeps takes 50 µs to wake up: with a hundred kernels in a step of 10 ms, sleeping at once would
cost half of it. After `PATIENCE` the thread sleeps, so that a pool without work takes no processor
time. Where there are more threads than CPUs, none spins: it would hold the very CPU that the thread
it waits for needs.
"""

from __future__ import annotations

import atexit
import ctypes
import mmap
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from tinygpt.machine.tinygrad_internals import ClangRenderer, CPUDevice, CPUProgram, TinyELF

PATIENCE = 50_000
"""Nanoseconds that a thread spins before it goes to sleep; waking it takes about as long."""

MAX_ARGS = 63
"""Arguments of one kernel: tinygrad's own limit on the CPU."""

MEMORY = 4 << 10  # bytes, more than sizeof(struct pool)
FAULTS = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT}


_LIBC = {
    "init_mutex": "pthread_mutex_init",
    "lock": "pthread_mutex_lock",
    "unlock": "pthread_mutex_unlock",
    "init_condition": "pthread_cond_init",
    "wait": "pthread_cond_wait",
    "wake_all": "pthread_cond_broadcast",
    "clock": "clock_gettime",
    "cpu": "sched_getcpu",
    "get_affinity": "sched_getaffinity",
    "set_affinity": "sched_setaffinity",
}


class _Head(ctypes.Structure):
    """The part of ``struct pool`` that is filled in here."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _LIBC),
        *((name, ctypes.c_uint64) for name in ("process", "clock_id", "patience", "threads")),
    )


_RUN, _SERVE, _START, _STOP = range(4)  # what the one entry of pool.c is to do, as numbered there


Commands = ctypes.Array[ctypes.c_uint64]
"""A list of kernels in memory, as ``pool.c`` reads it."""


def command(kernel: int, pieces: int, slot: int, arguments: Sequence[int]) -> list[int]:
    """One kernel as ``pool.c`` reads it; the number of the piece goes into argument ``slot``."""
    return [kernel, pieces | slot << 16 | len(arguments) << 32, *arguments]


def command_list(words: Sequence[int]) -> Commands:
    """Commands in a row, ready to run. Negative numbers become their two's complement."""
    return (ctypes.c_uint64 * len(words))(*words)


@cache
def _addresses() -> dict[str, int | None]:
    """Of what ``pool.c`` calls; found once: a forked child must not wait for the linker's lock."""
    libc = ctypes.CDLL(None)
    return {
        field: ctypes.cast(getattr(libc, name), ctypes.c_void_p).value
        for field, name in _LIBC.items()
        if not name.startswith("sched_") or sys.platform == "linux"
    }


class Crew:
    """The memory of one ``struct pool`` and the workers that serve it.

    Each start of a pool makes another one: a thread that is still running kernels on the one
    before, whose workers have left, finishes there by itself.
    """

    def __init__(self, threads: int, patience: int) -> None:
        # Zeros at first, on a page boundary, so that the fields that pool.c aligns to cache lines
        # are aligned. Private, so that a forked child has its own copy.
        self._memory = mmap.mmap(-1, MEMORY, mmap.MAP_ANON | mmap.MAP_PRIVATE)
        head = _Head.from_buffer(self._memory)
        self.threads, self.address = threads, ctypes.addressof(head)
        self.workers: list[threading.Thread] = []
        for field, address in _addresses().items():
            setattr(head, field, address)
        head.process, head.clock_id = os.getpid(), time.CLOCK_MONOTONIC
        head.patience, head.threads = patience, threads


class Pool:
    """The caller and its workers.

    A pool that is not started, has been stopped, or finds itself in a forked process, runs
    everything on the caller, with the same results. So does a thread that runs kernels while
    another does.
    """

    def __init__(self, device: CPUDevice) -> None:
        source = Path(__file__).with_name("pool.c").read_text(encoding="ascii")
        target = replace(device.renderer.target, renderer="CLANG")
        compiler = ClangRenderer(target).compiler
        assert compiler is not None
        code = compiler.compile_cached(source)
        self._program = CPUProgram(device, TinyELF(code, "tinygpt_pool", target, ()))
        word = ctypes.c_uint64
        self._enter = ctypes.CFUNCTYPE(None, ctypes.c_void_p, word, word, word)(self._program.addr)
        self._crew = Crew(1, 0)
        os.register_at_fork(after_in_child=self._dismiss)
        atexit.register(self.stop)

    @property
    def threads(self) -> int:
        """The caller and the workers; 1 without workers."""
        return self._crew.threads

    def run(self, commands: Commands, count: int) -> None:
        """Run ``count`` commands in order, each kernel's pieces on all threads."""
        crew = self._crew  # its memory stays while this call lasts
        self._enter(crew.address, _RUN, ctypes.addressof(commands), count)

    def start(self, threads: int, cpus: int) -> None:
        """Start ``threads - 1`` workers in a process that may use ``cpus`` CPUs."""
        self.stop()
        # With fewer CPUs than threads, to spin is to keep the thread that is waited for from
        # running: sleep at once.
        crew = Crew(threads, PATIENCE if threads <= cpus else 0)
        self._enter(crew.address, _START, 0, 0)
        self._crew = crew
        # Signals belong to the main thread: there they interrupt a wait and become exceptions.
        # A thread inherits what is blocked where it is started.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - FAULTS)
        try:
            for rank in range(1, threads):  # rank 0 is the caller
                worker = threading.Thread(target=self._serve, args=(crew, rank), daemon=True)
                worker.name = f"tinygpt-{rank}"
                worker.start()
                crew.workers.append(worker)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def stop(self) -> None:
        """Let the workers finish, and wait for them; other threads may run kernels meanwhile."""
        crew = self._dismiss()  # from here on callers work alone, so no command reaches the workers
        if crew.workers:
            self._enter(crew.address, _STOP, 0, 0)
        for worker in crew.workers:
            worker.join()

    def _serve(self, crew: Crew, rank: int) -> None:
        self._enter(crew.address, _SERVE, rank, 0)

    def _dismiss(self) -> Crew:
        """Go on without workers; return the crew so far, which in a forked child is none."""
        crew, self._crew = self._crew, Crew(1, 0)
        return crew
