"""What tinygrad calls: a graph of kernels inside a ``TinyJit``, and a kernel outside of one.

tinygrad has two places where a device may put code of its own. ``device.graph`` makes an object of
each batch of captured kernels, which is called at every replay: `PoolGraph` writes the batch as a
list of commands, once, and a replay only replaces the addresses and numbers that have changed.
``device.runtime_t`` makes an object of each compiled kernel, which is called at every launch:
`PoolProgram`. Both end in `Pool.run`, which returns when everything is done.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from tinygrad import Device, UOp, getenv

from tinygpt.machine.pool.workers import MAX_ARGS, Pool, command, command_list
from tinygpt.machine.resources import cores
from tinygpt.machine.tinygrad_internals import (
    Buffer,
    Compiled,
    CPUDevice,
    CPUProgram,
    GraphRunner,
    HCQBuffer,
    Ops,
    TinyELF,
    get_call_arg_uops,
    get_graph_runtime,
    pieces_of_kernels,
    resolve_params,
)

COMPILERS = ("", "CLANG", "LLVM")
"""Those of tinygrad's renderers for the CPU whose kernels follow C's calling convention."""
PIECES = 32
"""The most that tinygrad makes of a kernel of its own, for any number of threads: one kernel cache
serves them all."""
UNSPLIT = 0xFFFF  # the slot of a kernel that takes no number of a piece


class Engine:
    """The pool, and how it plugs into tinygrad's CPU devices."""

    def __init__(self) -> None:
        device = Device["CPU"]
        if getenv("HCQ2"):
            raise RuntimeError("HCQ2=1 has queues of its own")
        if not isinstance(device, CPUDevice) or device.runtime_t is not CPUProgram or device.graph:
            raise RuntimeError("something else has plugged into tinygrad's CPU device")
        self.devices, self.pool = [device], Pool(device)
        self.stock = device.graph, device.runtime_t, pieces_of_kernels()
        self.plugged = False

    def plug_in(self, threads: int) -> None:
        """Run kernels on ``threads`` threads; those that are made from now on come in PIECES."""
        if threads != self.pool.threads:
            self.pool.start(threads, cores())
        self.plugged = True
        self._tell_devices()
        pieces_of_kernels(PIECES)

    def extend(self, device: CPUDevice) -> None:
        """Run the kernels of another CPU device, such as CPU:1, on the same threads."""
        if device not in self.devices:
            self.devices.append(device)
            self._tell_devices()

    def unplug(self) -> None:
        """Put everything back as it was."""
        self.pool.stop()
        self.plugged = False
        self._tell_devices()
        pieces_of_kernels(self.stock[2])

    def _tell_devices(self) -> None:
        """Give each device our way of running kernels, or its own back."""
        ours = partial(PoolGraph, self.pool), partial(PoolProgram, self.pool)
        for device in self.devices:
            device.graph, device.runtime_t = ours if self.plugged else self.stock[:2]  # type: ignore[assignment]


class PoolGraph(GraphRunner):
    """Kernels that a ``TinyJit`` captured, as one list for the pool.

    tinygrad makes one for each batch of kernels; CUDA and Metal plug in their graphs in the
    same way. A call writes what has changed, inputs and variables, into the list and runs it.
    """

    def __init__(self, pool: Pool, linear: UOp, input_uops: tuple[UOp, ...] = ()) -> None:
        super().__init__(linear, input_uops)
        self.pool = pool
        self.inputs: list[tuple[int, UOp, int]] = []  # place in the list, call, its argument
        self.variables: dict[tuple[int, int], int] = {}  # (call, its variable) -> place
        words: list[int] = []
        for j, call in enumerate(self.linear.src):
            # a command is two words and its arguments: first the buffers, then the variables
            info, buffers, place = call.src[0].arg, self.calls[j][2], len(words) + 2
            runtime = self.runtimes[j]
            assert isinstance(runtime, CPUProgram), "supports_uop takes compiled kernels only"
            pieces, slot, variables = words_of(info)
            arguments = [address(buffers[p]) for p in info.globals] + [0] * variables
            words += command(runtime.addr, pieces, slot, arguments)
            # the batch's own buffers stay where they are; inputs may be others at every call
            moving = {p for p, u in enumerate(get_call_arg_uops(call)) if _is_input(u)}
            for i, p in enumerate(info.globals):
                if p in moving:
                    self.inputs.append((place + i, call, p))
            for i in range(len(info.vars)):
                self.variables[j, i] = place + len(info.globals) + i
        self.commands = command_list(words)

    def __call__(
        self, input_uops: tuple[UOp, ...], var_vals: dict[str, int], wait: bool = False
    ) -> float | None:
        start = time.perf_counter()
        for place, call, argument in self.inputs:
            buffer = resolve_params(call, input_uops)[argument].buffer
            assert isinstance(buffer, Buffer), "a call on one device has plain buffers"
            self.commands[place] = address(buffer)
        for j, i, value in self.updated_vars(var_vals):
            self.commands[self.variables[j, i]] = value
        self.pool.run(self.commands, len(self.calls))
        return time.perf_counter() - start if wait else None

    def replay(self) -> None:
        """Run the list as it is, where it is ``fixed``."""
        self.pool.run(self.commands, len(self.calls))

    @property
    def fixed(self) -> bool:
        """Whether the list is the same at every call."""
        return not (self.inputs or self.vars)

    @staticmethod
    def supports_uop(batch_devs: list[Compiled], new_call: UOp) -> bool:
        """A compiled kernel that works on one CPU device and follows C's calling convention."""
        if not GraphRunner.supports_uop(batch_devs, new_call):
            return False
        info = new_call.src[0].arg
        return (
            len(info.globals) + len(info.vars) <= MAX_ARGS
            and info.target.renderer in COMPILERS
            and all(isinstance(device, CPUDevice) for device in batch_devs)
        )


class PoolProgram(CPUProgram):
    """A kernel that is launched by itself: its pieces, if it has any, go over the pool."""

    def __init__(self, pool: Pool, device: CPUDevice, obj: TinyELF) -> None:
        super().__init__(device, obj)
        self.pool = pool
        names = [name for name, *_ in obj.signature]
        callable_from_c = obj.target.renderer in COMPILERS
        self.core = names.index("core_id") if "core_id" in names and callable_from_c else None

    def __call__(
        self,
        *bufs: HCQBuffer,
        global_size: tuple[int, int, int] = (1, 1, 1),
        vals: tuple[int | None, ...] = (),
        **rest: Any,
    ) -> float | None:
        if self.core is None or self.pool.threads == 1 or len(bufs) + len(vals) > MAX_ARGS:
            return super().__call__(*bufs, global_size=global_size, vals=vals, **rest)
        start = time.perf_counter()
        arguments = [int(b.va_addr) for b in bufs] + [value or 0 for value in vals]
        words = command(self.addr, global_size[0], self.core, arguments)
        self.pool.run(command_list(words), 1)
        return time.perf_counter() - start if rest.get("wait") else None


def fixed_graphs(linear: UOp) -> list[PoolGraph]:
    """The graphs that are all of a captured ``TinyJit``, if each is `fixed`; otherwise none."""
    graphs = list[PoolGraph]()
    for call in linear.src:
        is_graph = call.src[0].op is Ops.CUSTOM_FUNCTION and call.src[0].arg == "graph"
        graph = get_graph_runtime(call.src[0]) if is_graph else None
        if not isinstance(graph, PoolGraph) or not graph.fixed:
            return []
        graphs.append(graph)
    return graphs


def _is_input(argument: UOp) -> bool:
    """True for an input of the jit, or a view of one."""
    return any(u.op is Ops.PARAM for u in argument.toposort())


def words_of(info: Any) -> tuple[int, int, int]:
    """-> how many pieces a compiled kernel has, in which argument their number goes, and how many
    variables it takes"""
    core = info.runtimevars.get("core_id")
    if core is None:
        return 1, UNSPLIT, len(info.vars)
    return info.global_size[0], len(info.globals) + core, len(info.vars)


def address(buffer: Buffer) -> int:
    """Where a buffer's memory begins."""
    return int(buffer.ensure_allocated()._buf.va_addr)
