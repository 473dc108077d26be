"""What tinygrad calls: a graph of kernels inside a ``TinyJit``, and a kernel outside of one."""

from __future__ import annotations

import ctypes
import time
from typing import Any

from tinygrad.device import Buffer, Compiled, MultiBuffer, TinyELF
from tinygrad.engine.jit import GraphRunner
from tinygrad.engine.realize import get_call_arg_uops, resolve_params
from tinygrad.runtime.ops_cpu import CPUDevice, CPUProgram
from tinygrad.runtime.support.hcq import HCQBuffer
from tinygrad.uop.ops import Ops, UOp

from tinygpt.multicore.pool import MAX_ARGS, Pool, command, command_list

NO_SLOT = 0xFFFF  # for a kernel that is not split


class PoolGraph(GraphRunner):
    """Kernels that a ``TinyJit`` captured, as one list for the pool.

    tinygrad makes one for each batch of kernels; this is the place where CUDA and Metal plug in
    their graphs. A call patches the addresses and numbers that change into the list and runs it.
    """

    def __init__(self, pool: Pool, linear: UOp, input_uops: tuple[UOp, ...] = ()) -> None:
        super().__init__(linear, input_uops)
        self.pool = pool
        words: list[int] = []
        # (place in the list, call, argument): an address that follows the inputs
        self.inputs: list[tuple[int, UOp, int]] = []
        self.variables: dict[tuple[int, int], int] = {}  # (call, variable) -> place in the list
        for j, (call, (_, ast, buffers, _)) in enumerate(
            zip(self.linear.src, self.calls, strict=True)
        ):
            info, runtime = ast.arg, self.runtimes[j]
            place = len(words) + 2
            moving = {p for p, u in enumerate(get_call_arg_uops(call)) if _follows_input(u)}
            self.inputs += [(place + i, call, p) for i, p in enumerate(info.globals) if p in moving]
            place += len(info.globals)
            self.variables |= {(j, i): place + i for i in range(len(info.vars))}
            core = info.runtimevars.get("core_id")
            words += command(
                runtime.addr,
                pieces=1 if core is None else info.global_size[0],
                slot=NO_SLOT if core is None else len(info.globals) + core,
                arguments=[_pointer(buffers[p]) for p in info.globals] + [0] * len(info.vars),
            )
        self.commands = command_list(words)

    def __call__(
        self, input_uops: tuple[UOp, ...], var_vals: dict[str, int], wait: bool = False
    ) -> float | None:
        start = time.perf_counter()
        for place, call, argument in self.inputs:
            self.commands[place] = _pointer(resolve_params(call, input_uops)[argument].buffer)
        for j, i, value in self.updated_vars(var_vals):
            self.commands[self.variables[j, i]] = value
        self.pool.run(self.commands, len(self.calls))
        return time.perf_counter() - start if wait else None

    @staticmethod
    def supports_uop(batch_devs: list[Compiled], new_call: UOp) -> bool:
        """A compiled kernel of one CPU device, called by the C calling convention."""
        if not GraphRunner.supports_uop(batch_devs, new_call):
            return False
        info = new_call.src[0].arg
        return (
            len(info.globals) + len(info.vars) <= MAX_ARGS
            and info.target.renderer != "LVP"
            and all(isinstance(device, CPUDevice) for device in batch_devs)
        )


class PoolProgram(CPUProgram):
    """A kernel that is launched by itself: split over the pool if it has pieces."""

    def __init__(self, pool: Pool, device: CPUDevice, obj: TinyELF) -> None:
        super().__init__(device, obj)
        self.pool = pool
        names = [name for name, *_ in obj.signature]
        self.core = names.index("core_id") if "core_id" in names and not self.lvp else None

    def __call__(
        self,
        *bufs: HCQBuffer,
        global_size: tuple[int, int, int] = (1, 1, 1),
        local_size: tuple[int, int, int] = (1, 1, 1),
        vals: tuple[int | None, ...] = (),
        wait: bool = False,
        timeout: int | None = None,
    ) -> float | None:
        count = len(bufs) + len(vals)
        if self.core is None or self.pool.threads == 1 or count > MAX_ARGS:
            return super().__call__(
                *bufs, global_size=global_size, local_size=local_size, vals=vals, wait=wait,
                timeout=timeout,
            )
        start = time.perf_counter()
        arguments = [b.va_addr for b in bufs] + [value or 0 for value in vals]
        words = command(self.addr, global_size[0], self.core, arguments)
        self.pool.run(command_list(words), 1)
        return time.perf_counter() - start if wait else None
