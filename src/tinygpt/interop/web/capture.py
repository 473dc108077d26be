"""The C text of a model's forward pass, made of the very kernels that generate on a CPU.

It depends on the model's shape and on nothing else: not on the weights, nor on the processor, the
number of its cores or the devices that this machine has. So it is made in a process of its own,
which sees one core and no accelerator: ``python -m tinygpt.interop.web.capture`` reads a config as
JSON and writes a ``Source`` as JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from tinygpt.config import GPTConfig
from tinygpt.errors import KernelError

if TYPE_CHECKING:
    from tinygrad import Tensor
    from tinygrad.device import Buffer
    from tinygrad.uop.ops import UOp

ALIGNMENT = 64
"""Bytes: a line of the cache, and a multiple of every vector."""

C_TYPES = {
    "float": "float",
    "int": "int",
    "unsigned int": "unsigned",
    "bool": "_Bool",
    "unsigned char": "unsigned char",
    "long": "long",
}
"""What tinygrad's types, the ones that a forward pass has, are called in C."""

HEAD = """\
#define long long long
#define EXPORT(name) __attribute__((export_name(#name))) name
#define ALIGNED __attribute__((aligned(64)))
"""
"""``long`` has 32 bits on wasm32, and tinygrad means 64 by it."""


@dataclass(frozen=True)
class Source:
    """C text with the functions ``step(position)`` and ``window(last)``.

    ``step`` takes the token in ``ids()[0]`` to a position of the cache, ``window`` all of ``ids()``
    to the first block_size positions, of which the one called ``last`` counts. Either leaves the
    logits (V,) of what follows in ``logits()``. The weights, float32, belong at ``weights()``.
    """

    text: str
    weights: tuple[tuple[str, int, int], ...]
    """Name, offset and size in bytes of each parameter within the weights."""
    size: int
    """Bytes of all weights."""


@cache
def capture(config: GPTConfig) -> Source:
    """The forward pass of a model of this shape. It takes some seconds the first time."""
    environment = {**os.environ, "DEV": "CPU", "TINYGPT_THREADS": "0"}
    done = subprocess.run(
        [sys.executable, "-m", __spec__.name],
        input=json.dumps(config.to_dict()).encode(),
        capture_output=True,
        env=environment,
        check=False,
    )
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise KernelError(f"No C could be made of this model: {''.join(last) or 'it was killed'}.")
    made = json.loads(done.stdout)
    return Source(made["text"], tuple(tuple(w) for w in made["weights"]), made["size"])


def main() -> None:
    config = GPTConfig.from_dict(json.load(sys.stdin))
    json.dump(asdict(_capture(config)), sys.stdout)


def _capture(config: GPTConfig) -> Source:
    from tinygrad import Variable, dtypes
    from tinygrad.helpers import Context

    from tinygpt.cache import KVCache
    from tinygpt.jit import jit
    from tinygpt.model import Transformer
    from tinygpt.transfer import zeros

    model, kv = Transformer(config).eval(), KVCache(config, 1)
    ids = zeros((1, config.block_size), dtypes.int32)
    one = zeros((1, 1), dtypes.int32)
    position = Variable("position", 0, config.block_size - 1)
    last = Variable("last", 0, config.block_size - 1)

    def step(position: UOp) -> Tensor:
        kv.position = position
        return model.unembed(model.hidden(one, kv)).float().realize()

    def window(last: UOp) -> Tensor:
        kv.position = 0
        x = model.hidden(ids, kv)  # (1, T, C)
        return model.unembed(x[:, last : last + 1]).float().realize()

    program = _Program({name: _buffer(p) for name, p in model.parameters().items()})
    program.name(_buffer(ids), "ids_")
    program.name(_buffer(one), "ids_")
    for layer in kv.layers:
        for tensor in (layer.keys, layer.values):
            program.scratch(_buffer(tensor))
    functions: list[tuple[Callable[[UOp], Tensor], UOp]] = [(step, position), (window, last)]
    with Context(JIT=2, NUM_CPU_THREADS=1):  # each kernel by itself, and whole
        for function, variable in functions:
            captured: Any = jit(function)
            captured(variable.bind(0))
            program.add(function.__name__, captured.captured)
    return program.source(4 * config.block_size)


class _Program:
    """Kernels and the memory they work on, as C."""

    def __init__(self, weights: Mapping[str, Buffer]) -> None:
        self._weights, self._size = [], 0
        self._names: dict[int, str] = {}  # of a buffer: the C expression for where it begins
        self._kept: list[Buffer] = []  # so that no other takes over its id
        self._scratch: list[str] = []
        self._kernels: dict[str, str] = {}
        self._types: dict[str, None] = {}
        self._functions: list[str] = []
        for name, buffer in weights.items():
            self.name(buffer, f"(weights_ + {self._size})")
            self._weights.append((name, self._size, buffer.nbytes))
            self._size += -(-buffer.nbytes // ALIGNMENT) * ALIGNMENT

    def name(self, buffer: Buffer, expression: str) -> None:
        """Say where a buffer is in C."""
        self._names[id(buffer.base)] = expression
        self._kept.append(buffer.base)

    def scratch(self, buffer: Buffer) -> None:
        """Give a buffer memory of its own."""
        name = f"scratch{len(self._scratch)}"
        size = -(-buffer.base.nbytes // ALIGNMENT) * ALIGNMENT
        self._scratch.append(f"static unsigned char {name}[{size}] ALIGNED;")
        self.name(buffer, name)

    def add(self, name: str, captured: Any) -> None:
        """A function that runs what was captured, and copies what comes of it to the logits."""
        calls, variables = [], set()
        for call in captured.linear.src:
            words, names = self._call(call)
            calls.append(f"  {words};")
            variables |= names
        result = captured.ret.uop.buffer
        out = f"(float *)({self._names[id(result.base)]} + {result.offset})"
        calls.append(f"  __builtin_memcpy(logits_, {out}, sizeof logits_);")
        self._logits = result.nbytes
        given = ", ".join(f"int {v}" for v in sorted(variables))
        self._functions.append("\n".join([f"void EXPORT({name})({given}) {{", *calls, "}"]))

    def source(self, ids: int) -> Source:
        """The whole, with room for so many bytes of ids."""
        memory = [
            f"static unsigned char weights_[{self._size}] ALIGNED;",
            f"static unsigned char ids_[{ids}] ALIGNED;",
            f"static unsigned char logits_[{self._logits}] ALIGNED;",
            *self._scratch,
        ]
        where = [
            f"void *EXPORT({n})(void) {{ return {n}_; }}" for n in ("weights", "ids", "logits")
        ]
        parts = [HEAD, *self._types, *self._kernels.values(), *memory, *where, *self._functions]
        return Source("\n".join(parts) + "\n", tuple(self._weights), self._size)

    def _call(self, call: UOp) -> tuple[str, set[str]]:
        """One kernel's call, and the variables in it."""
        from tinygrad.engine.realize import get_call_arg_uops, get_call_var_uops
        from tinygrad.uop.ops import Ops

        program = call.src[0]
        if program.op is not Ops.PROGRAM:
            raise KernelError(f"{program.op} is no kernel")
        info: Any = program.arg
        if any(n != 1 for n in info.global_size) or info.runtimevars:
            raise KernelError(f"{info.function_name} is split over several threads")
        text = next(s.arg for s in program.src if s.op is Ops.SOURCE)
        given = get_call_arg_uops(call)
        places = [self._place(given[i].buffer, i in info.outs) for i in info.globals]
        kinds = [C_TYPES[given[i].dtype.name] for i in info.globals]
        names = [v.expr for v in get_call_var_uops(call, program)]
        pointers = [f"({kind} *)({place})" for kind, place in zip(kinds, places, strict=True)]
        function = self._kernel(info.function_name, text)
        return f"{function}({', '.join(pointers + names)})", set(names)

    def _place(self, buffer: Buffer, written: bool) -> str:
        if id(buffer.base) not in self._names:
            if not written:
                raise KernelError("a buffer is read that nothing has written")
            self.scratch(buffer)
        return f"{self._names[id(buffer.base)]} + {buffer.offset}"

    def _kernel(self, name: str, text: str) -> str:
        """A kernel under a name made of its text: tinygrad gives different ones the same name."""
        unique = "k" + hashlib.sha256(text.encode()).hexdigest()[:12]
        if unique not in self._kernels:
            lines = re.sub(rf"\bvoid {re.escape(name)}\(", f"static void {unique}(", text)
            body = []
            for line in lines.strip().split("\n"):
                if line.startswith("typedef "):
                    self._types[line] = None
                else:
                    body.append(line)
            self._kernels[unique] = "\n".join(body)
        return unique


def _buffer(tensor: Tensor) -> Any:
    return tensor.uop.base.buffer


if __name__ == "__main__":
    main()
