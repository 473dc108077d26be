"""A model's forward pass as C, made of the very kernels that generate on a CPU."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import TYPE_CHECKING

from tinygpt.config import GPTConfig
from tinygpt.errors import KernelError
from tinygpt.interop.web.page_forward import Call, Function, answer, forward, in_own_process

if TYPE_CHECKING:
    from tinygpt.machine.tinygrad_internals import Buffer

ALIGNMENT = 64
"""Bytes: a line of the cache, and a multiple of every vector."""

HEAD = """\
#define bool _Bool
#define long long long
#define EXPORT(name) __attribute__((export_name(#name))) name
#define ALIGNED __attribute__((aligned(64)))
"""
"""``long`` has 32 bits on wasm32, and tinygrad means 64 by it."""


@dataclass(frozen=True)
class Source:
    """C text with the functions ``step(position)`` and ``window(last)`` of ``forward``.

    Either leaves the logits (V,) of what follows in ``logits()``. Ids, int32, belong at ``ids()``,
    and the weights, float32, at ``weights()``.
    """

    text: str
    weights: tuple[tuple[str, int, int], ...]
    """Name, offset and size in bytes of each parameter within the weights."""
    size: int
    """Bytes of all weights."""


@cache
def capture(config: GPTConfig) -> Source:
    """The forward pass of a model of this shape. It takes some seconds the first time."""
    environment = {"DEV": "CPU", "TINYGPT_THREADS": "0"}
    made = in_own_process(__spec__.name, config, environment)
    return Source(made["text"], tuple(tuple(w) for w in made["weights"]), made["size"])


def _capture(config: GPTConfig) -> Source:
    captured = forward(config)
    program = _Program(captured.weights)
    for buffer in captured.ids:
        program.name(buffer, "ids_")
    for buffer in captured.zeros:
        program.scratch(buffer)
    for function in captured.functions:
        program.add(function)
    return program.source(4 * config.block_size, 4 * config.vocab_size)


class _Program:
    """Kernels and the memory they work on, as C."""

    def __init__(self, weights: Mapping[str, Buffer]) -> None:
        self._weights: list[tuple[str, int, int]] = []
        self._size = 0
        self._names: dict[Buffer, str] = {}  # the C expression for where a buffer begins
        self._scratch: list[str] = []
        self._kernels: dict[str, str] = {}
        self._types: dict[str, None] = {}
        self._functions: list[str] = []
        for name, buffer in weights.items():
            self.name(buffer, f"(weights_ + {self._size})")
            self._weights.append((name, self._size, buffer.nbytes))
            self._size += _aligned(buffer.nbytes)

    def name(self, buffer: Buffer, expression: str) -> None:
        """Set the C expression for the start of a buffer."""
        self._names[buffer.base] = expression

    def scratch(self, buffer: Buffer) -> None:
        """Give a buffer memory of its own."""
        name = f"scratch{len(self._scratch)}"
        size = _aligned(buffer.base.nbytes)
        self._scratch.append(f"static unsigned char {name}[{size}] ALIGNED;")
        self.name(buffer, name)

    def add(self, function: Function) -> None:
        """Add a function that runs the captured calls and copies their result to the logits."""
        calls = [f"  {self._call(call)};" for call in function.calls]
        calls.append(f"  __builtin_memcpy(logits_, {self._at(function.result)}, sizeof logits_);")
        variables = sorted({name for call in function.calls for name in call.variables})
        head = f"void EXPORT({function.name})({', '.join(f'int {v}' for v in variables)}) {{"
        self._functions.append("\n".join([head, *calls, "}"]))

    def source(self, ids: int, logits: int) -> Source:
        """The whole program, with so many bytes for ids and for logits."""
        memory = [
            f"static unsigned char weights_[{self._size}] ALIGNED;",
            f"static unsigned char ids_[{ids}] ALIGNED;",
            f"static unsigned char logits_[{logits}] ALIGNED;",
            *self._scratch,
        ]
        where = [
            f"void *EXPORT({n})(void) {{ return {n}_; }}" for n in ("weights", "ids", "logits")
        ]
        parts = [HEAD, *self._types, *self._kernels.values(), *memory, *where, *self._functions]
        return Source("\n".join(parts) + "\n", tuple(self._weights), self._size)

    def _call(self, call: Call) -> str:
        if any(n != 1 for n in call.info.global_size) or call.info.runtimevars:
            raise KernelError(f"{call.info.function_name} is split over several threads")
        pointers = []
        for buffer, written, kind in zip(call.buffers, call.written, call.types, strict=True):
            if buffer.base not in self._names:
                if not written:
                    raise KernelError("a buffer is read that nothing has written")
                self.scratch(buffer)
            pointers.append(f"({kind} *)({self._at(buffer)})")
        kernel = self._kernel(call.info.function_name, call.text)
        return f"{kernel}({', '.join([*pointers, *call.variables])})"

    def _at(self, buffer: Buffer) -> str:
        return f"{self._names[buffer.base]} + {buffer.offset}"

    def _kernel(self, name: str, text: str) -> str:
        """A kernel under a name made of its text: tinygrad gives different ones the same name."""
        unique = "k" + hashlib.sha256(text.encode()).hexdigest()[:12]
        if unique not in self._kernels:
            text = re.sub(rf"\bvoid {re.escape(name)}\(", f"static void {unique}(", text)
            lines = text.strip().split("\n")
            self._types |= dict.fromkeys(line for line in lines if line.startswith("typedef "))
            self._kernels[unique] = "\n".join(line for line in lines if line not in self._types)
        return unique


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


if __name__ == "__main__":
    answer(lambda config: asdict(_capture(config)))
