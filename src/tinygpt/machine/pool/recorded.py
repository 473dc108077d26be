"""Captured functions on disk: the list of launches that the pool replays, without their graph.

To capture a function, tinygrad writes its graph, schedules it and plans its memory, in every
process anew: a third of a second of Python for the smallest model. What remains is a `Recording`:
the machine code of the kernels, and for each launch the places of its arguments in the function's
buffers. ``record`` makes one of a capture, and a `Replay` is one with the buffers of this process.

A recording is found under a hash of all that it depends on: what the caller says of the function
(`Kept`), shapes and types of arguments and state, the content of our own source, this very tinygrad
and its settings, Python, and the number of threads. Processor and compiler are in the key of the
cache (``disk_cache``), which also keeps damaged entries from being used. TINYGPT_RECORDINGS=0
switches it off; a function that is not found is captured as ever, with the same results.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tinygrad import Tensor, dtypes

from tinygpt.machine import disk_cache, pool
from tinygpt.machine.pool.runner import PoolGraph, address, words_of
from tinygpt.machine.pool.workers import Pool, command, command_list
from tinygpt.machine.tinygrad_internals import (
    DEBUG,
    PROFILE,
    VIZ,
    Buffer,
    ContextVar,
    CPUDevice,
    CPUProgram,
    TinyELF,
    _to_np_dtype,
    buffers,
    helpers,
)

log = logging.getLogger(__name__)

SWITCH = "TINYGPT_RECORDINGS"
"""Set to 0, this environment variable makes every process capture its functions itself."""
TABLE = "tinygpt_recordings"
ROOMS = ("config", "machine", "kernels", "model", "training", "generation")
"""The rooms whose code decides what a captured function computes."""
STARTED = time.time()
"""About when this process read its code: source that was changed later is not what it runs."""


class Kept(NamedTuple):
    """What a captured function depends on besides its arguments; asked at each capture."""

    about: Callable[[], str | None]
    """All that its code looks at: settings, classes of layers. None where that cannot be said."""
    state: Callable[[], Sequence[Tensor]]
    """All Tensors that it reads or changes, in an order that is the same in every process."""


class Place(NamedTuple):
    """A number of bytes into a buffer of the function: inputs, then state, then scratch memory."""

    buffer: int
    offset: int


class Launch(NamedTuple):
    """One kernel, as `workers.command` takes it."""

    kernel: int
    pieces: int
    slot: int
    places: tuple[Place, ...]
    variables: int


class Output(NamedTuple):
    """One result: where its values lie once everything has run."""

    place: Place
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Recording:
    """A captured function, without anything of the process that it was captured in."""

    kernels: tuple[TinyELF, ...]
    batches: tuple[tuple[Launch, ...], ...]
    scratch: tuple[int, ...]
    """Bytes of the buffers that hold what is computed on the way."""
    outputs: tuple[Output, ...]
    several: bool
    """Whether the function returns a tuple."""


class Replay:
    """A batch of launches of a recording, in the buffers of this process."""

    def __init__(self, engine_pool: Pool, words: Sequence[int], count: int, *alive: object) -> None:
        self._pool, self._commands, self._count = engine_pool, command_list(words), count
        self._alive = alive  # machine code and memory, of which the commands hold addresses

    def replay(self) -> None:
        self._pool.run(self._commands, self._count)


class Attached(NamedTuple):
    """What stands for a capture in this process."""

    replays: list[Replay]
    outputs: list[np.ndarray[Any, Any]]
    """Where the results lie after a replay."""
    several: bool


def name_of(kept: Kept, function: str, inputs: Sequence[Tensor], short: bool) -> str | None:
    """The name under which a function is kept, or None if it cannot be."""
    on = os.environ.get(SWITCH, "") != "0" and not (DEBUG >= 2 or PROFILE or VIZ)
    ours = getattr(helpers.diskcache_get, "__module__", "") == disk_cache.__name__
    if not (on and ours and helpers.CACHELEVEL >= 1 and pool.installed()):
        return None
    if (about := kept.about()) is None or (sources := _sources()) is None:
        return None
    state = kept.state()
    if not all(_plain(tensor) for tensor in (*inputs, *state)):
        return None
    kinds = [(tuple(t.shape), t.dtype.name) for t in (*inputs, *state)]
    told = (function, about, len(inputs), kinds, short, pool.threads(), *_process(), sources)
    return hashlib.sha256(repr(told).encode()).hexdigest()


def find(name: str, own: Sequence[Tensor]) -> Attached | None:
    """The recording of this name, over these arguments and this state; None if there is none."""
    found = helpers.diskcache_get(TABLE, name)
    try:
        return attach(found, own) if isinstance(found, Recording) else None
    except Exception as error:  # it is a cache: what goes wrong is captured as ever
        log.info("A recording cannot be used: %r", error)
        return None


def allocated() -> list[Buffer]:
    """Every buffer that has memory now. To be asked when a function has been traced and not run:
    what it reads of these, and is neither argument nor state, is data that a recording lacks."""
    return [b for b in list(buffers.values()) if isinstance(b, Buffer) and b.is_allocated()]


def keep(
    name: str,
    own: Sequence[Tensor],
    before: Sequence[Buffer],
    data: Sequence[Buffer],
    graphs: Sequence[PoolGraph],
    made: Tensor | tuple[Tensor, ...],
) -> None:
    """Record a capture that has run, if it can be; ``own`` are its arguments and its state, and
    ``before`` the buffers that those had."""
    try:
        if any(a is not b for a, b in zip(buffers_of(own), before, strict=True)):
            raise LookupError("a Tensor of its state has another buffer afterwards")
        helpers.diskcache_put(TABLE, name, record(graphs, before, made, data))
    except Exception as error:  # besides ours whatever tinygrad's insides raise
        log.info("A captured function is not kept: %s", error)


def record(
    graphs: Sequence[PoolGraph],
    own: Sequence[Buffer],
    made: Tensor | tuple[Tensor, ...],
    data: Sequence[Buffer],
) -> Recording:
    """The recording of a capture; LookupError says why there can be none."""
    outputs = made if isinstance(made, tuple) else (made,)
    numbers = {id(buffer): i for i, buffer in enumerate(own)}
    if any(t.dtype == dtypes.bfloat16 for t in outputs):
        raise LookupError("numpy has no bfloat16")
    if len(numbers) < len(own):
        raise LookupError("two of its Tensors share a buffer")
    foreign = {id(buffer.base) for buffer in data} - numbers.keys()
    scratch = list[int]()
    kernels = dict[bytes, tuple[int, TinyELF]]()

    def place(buffer: Buffer) -> Place:
        base = buffer.base
        if id(base) in foreign:
            raise LookupError("it reads a Tensor that is not said to be its state")
        if base.device != "CPU":
            raise LookupError(f"it works on {base.device}")
        if id(base) not in numbers:
            numbers[id(base)] = len(own) + len(scratch)
            scratch.append(base.nbytes)
        return Place(numbers[id(base)], buffer.offset)

    def launch(graph: PoolGraph, j: int) -> Launch:
        program, given = graph.calls[j][1:3]
        pieces, slot, variables = words_of(program.arg)
        number, _ = kernels.setdefault(program.key, (len(kernels), program.to_elf()))
        places = tuple(place(given[p]) for p in program.arg.globals)
        return Launch(number, pieces, slot, places, variables)

    batches = tuple(tuple(launch(g, j) for j in range(len(g.calls))) for g in graphs)
    results = tuple(
        Output(place(_stored_in(t)), t.dtype.name, tuple(map(int, t.shape))) for t in outputs
    )
    elves = tuple(elf for _, elf in kernels.values())
    return Recording(elves, batches, tuple(scratch), results, made is outputs)


def attach(recording: Recording, own: Sequence[Tensor]) -> Attached:
    """A recording over these arguments and this state."""
    engine = pool.engine()
    device = engine.devices[0]
    assert isinstance(device, CPUDevice)
    memories = [buffer.ensure_allocated() for buffer in buffers_of(own)]
    memories += [Buffer("CPU", n, dtypes.uint8).ensure_allocated() for n in recording.scratch]
    bases = [address(buffer) for buffer in memories]
    programs = [CPUProgram(device, elf) for elf in recording.kernels]
    replays = []
    for batch in recording.batches:
        words = list[int]()
        for kernel, pieces, slot, places, variables in batch:
            arguments = [bases[buffer] + offset for buffer, offset in places] + [0] * variables
            words += command(programs[kernel].addr, pieces, slot, arguments)
        replays.append(Replay(engine.pool, words, len(batch), programs, memories))
    values = [_view(memories, output) for output in recording.outputs]
    return Attached(replays, values, recording.several)


def _view(memories: Sequence[Buffer], output: Output) -> np.ndarray[Any, Any]:
    dtype = np.dtype(_to_np_dtype(getattr(dtypes, output.dtype)))
    whole = memories[output.place.buffer].as_memoryview(force_zero_copy=True)
    count = int(np.prod(output.shape, dtype=int))
    values = np.frombuffer(whole, np.uint8)[output.place.offset :][: count * dtype.itemsize]
    return values.view(dtype).reshape(output.shape)


def buffers_of(tensors: Sequence[Tensor]) -> list[Buffer]:
    """The buffers of Tensors that have one of their own, on one device."""
    found = [tensor.uop.base.buffer for tensor in tensors]
    plain = [buffer.base for buffer in found if isinstance(buffer, Buffer)]
    assert len(plain) == len(found), "on one device"
    return plain


def _stored_in(tensor: Tensor) -> Buffer:
    if not tensor.uop.has_buffer_identity() or not isinstance(
        found := tensor.uop.base.buffer, Buffer
    ):
        raise LookupError("a result has no buffer of its own")
    return found


def _plain(tensor: Tensor) -> bool:
    """Whether a Tensor is all of a buffer on the processor."""
    return tensor.device == "CPU" and tensor.uop.has_buffer_identity()


def _process() -> list[object]:
    """What code generation depends on that is the same for all functions of a process."""
    settings = [(v.key, v.value) for v in ContextVar._cache.values()]
    ours = {k: v for k, v in os.environ.items() if k.startswith("TINYGPT_")}
    ours.pop("TINYGPT_CACHE", None)
    return [sys.version, sorted(settings, key=str), sorted(ours.items()), _environment()]


@cache
def _environment() -> list[str | None]:
    from tinygpt.machine.kernel_store import READ

    return [os.environ.get(name) for name in READ]


@cache
def _sources() -> str | None:
    """A hash of our own code, and of size and date of tinygrad's; None if it was changed since this
    process began."""
    home, tinygrad = Path(pool.__file__).parents[2], Path(helpers.__file__).parent
    digest = hashlib.sha256()
    try:
        ours = [p for room in ROOMS for p in (home / room).rglob("*") if p.suffix in (".py", ".c")]
        for path in sorted(ours):
            digest.update(f"{path.relative_to(home)} {path.stat().st_size}\n".encode())
            digest.update(path.read_bytes())
            if path.stat().st_ctime > STARTED:
                return None
        for path in sorted(tinygrad.rglob("*.py")):
            found = path.stat()
            digest.update(f"{path} {found.st_size} {found.st_mtime_ns}\n".encode())
            if found.st_ctime > STARTED:
                return None
    except OSError:  # such as a package in a zip file
        return None
    return digest.hexdigest() if ours else None
