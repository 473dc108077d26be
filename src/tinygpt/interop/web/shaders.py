"""A model's forward pass as WebGPU shaders: what tinygrad renders for a device that is not there.

Our own kernels are made for processors; here tinygrad's operations are rendered. A page runs them
where they turn out faster than its WebAssembly, which for a small model they never are: each of the
hundred launches of a token costs some microseconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

from tinygpt.config import GPTConfig
from tinygpt.errors import KernelError
from tinygpt.interop.web.page_forward import Call, Forward, answer, forward, in_own_process

if TYPE_CHECKING:
    from tinygpt.machine.tinygrad_internals import Buffer

WORTH_IT = 5_000_000
"""Parameters from which on a GPU may be faster."""
MOST_GROUPS = 65535
"""Workgroups along one axis that every WebGPU device takes."""
OFFSETS = 256
"""Bytes of which the place within a buffer has to be a multiple."""


@cache
def shaders(config: GPTConfig) -> dict[str, Any]:
    """What the page's ``webgpu.mjs`` needs to run a model of this shape, as JSON values.

    ``kernels`` are texts and ``buffers`` sizes in bytes; ``weights``, ``ids`` and each function's
    ``result`` say which buffer is which. A launch is its kernel, its buffers, as number, offset and
    bytes, its variables and, for each axis, the constant and the factor of the variable in the
    number of workgroups.
    """
    environment = {"DEV": "NULL:WGSL", "TINYGPT_THREADS": "0"}
    made: dict[str, Any] = in_own_process(__spec__.name, config, environment)
    return made


class _Shaders:
    def __init__(self, captured: Forward) -> None:
        self._numbers = {buffer.base: 0 for buffer in captured.ids}  # the same memory for all
        self._sizes = [max(buffer.nbytes for buffer in captured.ids)]
        self._kernels: dict[str, int] = {}
        weights = {name: self._number(buffer) for name, buffer in captured.weights.items()}
        functions = {
            function.name: {
                "launches": [self._launch(call) for call in function.calls],
                "result": self._place(function.result),
            }
            for function in captured.functions
        }
        self.described = {
            "kernels": list(self._kernels),
            "buffers": self._sizes,
            "ids": 0,
            "weights": weights,
            **functions,
        }

    def _place(self, buffer: Buffer) -> list[int]:
        """[number, offset, bytes]"""
        if buffer.offset % OFFSETS:
            raise KernelError(f"a buffer begins at byte {buffer.offset} of its memory")
        return [self._number(buffer), buffer.offset, -(-buffer.nbytes // 4) * 4]

    def _number(self, buffer: Buffer) -> int:
        if buffer.base not in self._numbers:
            self._numbers[buffer.base] = len(self._sizes)
            self._sizes.append(-(-buffer.base.nbytes // 4) * 4)
        return self._numbers[buffer.base]

    def _launch(self, call: Call) -> list[Any]:
        kernel = self._kernels.setdefault(call.text, len(self._kernels))
        buffers = [self._place(buffer) for buffer in call.buffers]
        return [kernel, buffers, list(call.variables), list(_groups(call))]


def _groups(call: Call) -> Iterator[list[int]]:
    """[constant, factor] of each axis."""
    from tinygrad import UOp

    from tinygpt.machine.tinygrad_internals import sym_infer

    for size in call.info.global_size:
        if not isinstance(size, UOp):
            yield [int(size), 0]
            continue
        (variable,) = size.variables()
        low, high = int(variable.vmin), int(variable.vmax)
        at = [int(sym_infer(size, {variable.expr: v})) for v in (low, low + 1, high)]
        factor = at[1] - at[0]
        if low or at[2] != at[0] + factor * high or at[2] > MOST_GROUPS:
            raise KernelError(f"{call.info.function_name} has a number of workgroups unlike others")
        yield [at[0], factor]


if __name__ == "__main__":
    answer(lambda config: _Shaders(forward(config, plain=True)).described)
