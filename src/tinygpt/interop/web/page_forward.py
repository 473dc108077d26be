"""Captures a model's forward pass as tinygrad's kernels, which ``capture`` and ``shaders`` render.

It depends on the model's shape and on nothing else: not on the weights, nor on the processor, the
number of its cores or the devices that this machine has. So it is captured in a process of its own,
which sees one core, or a device that is not there.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tinygpt.config import GPTConfig
from tinygpt.errors import KernelError
from tinygpt.files.strict_json import to_json
from tinygpt.machine import children

if TYPE_CHECKING:
    from tinygrad import Tensor, UOp

    from tinygpt.machine.tinygrad_internals import Buffer
    from tinygpt.model.cache import KVCache


@dataclass(frozen=True)
class Call:
    """One kernel's launch."""

    info: Any
    """tinygrad's: the kernel's name, sizes, and which of its arguments it writes."""
    text: str
    """Its source."""
    buffers: tuple[Buffer, ...]
    written: tuple[bool, ...]
    types: tuple[str, ...]
    variables: tuple[str, ...]


@dataclass(frozen=True)
class Function:
    name: str
    calls: tuple[Call, ...]
    result: Buffer
    """Logits (V,)."""


@dataclass(frozen=True)
class Forward:
    """``step(position)`` takes ids[0] to a position of the cache; ``window(last)`` takes all ids to
    the first block_size positions, of which the one called ``last`` counts."""

    weights: Mapping[str, Buffer]
    ids: tuple[Buffer, ...]
    zeros: tuple[Buffer, ...]
    """Those that begin as zeros: the cache, and the number of its slot."""
    functions: tuple[Function, ...]


class Slice:
    """The view of a `KVCache` with one slot that graphics cards compute with.

    ``position``, where the tokens begin, is a variable of the kernels and not data as in `Step`: so
    a card reads the positions up to there only, with as many workgroups as they need.
    """

    def __init__(self, cache: KVCache, position: int | UOp) -> None:
        self._cache, self._position = cache, position

    def positions(self, table: Tensor, T: int) -> Tensor:
        return table[self._position : self._position + T]

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        from tinygrad import Tensor

        from tinygpt.kernels.attention import merge_heads, plain_attention, split_heads

        n_head = self._cache.config.n_head
        q, k, v = (split_heads(x, n_head) for x in qkv.chunk(3, dim=2))  # (1, H, T, D)
        end = self._position + q.shape[2]

        def extended(buffer: Tensor, new: Tensor) -> Tensor:
            part = buffer[:, :, self._position : end]
            return Tensor(buffer.uop.after(part.uop.store(new.cast(buffer.dtype).uop)))[:, :, :end]

        keys, values = map(extended, self._cache.layers[layer], (k, v))
        return merge_heads(plain_attention(q, keys, values, is_causal=True))  # (1, T, C)


def forward(config: GPTConfig, plain: bool = False) -> Forward:
    """Capture both functions; ``plain`` takes tinygrad's own operations instead of our kernels."""
    from tinygrad import Context, Tensor, TinyJit, Variable, dtypes

    from tinygpt import kernels
    from tinygpt.machine.tinygrad_internals import ONE_PIECE
    from tinygpt.machine.transfer import zeros
    from tinygpt.model.cache import KVCache, Prefill, Step
    from tinygpt.model.transformer import Transformer

    model, cache = Transformer(config), KVCache(config, slots=1)
    one, ids = (zeros((1, n), dtypes.int32) for n in (1, config.block_size))
    slot = zeros((1,), dtypes.int32)  # the only one: number 0

    def step(position: UOp) -> Tensor:
        view = Slice(cache, position) if plain else Step(cache, slot, slot + Tensor(position))
        return model.unembed(model.hidden(one, view)).float().realize()

    def window(last: UOp) -> Tensor:
        view = Slice(cache, 0) if plain else Prefill(cache, slot)
        x = model.hidden(ids, view)  # (1, T, C)
        written = view.written if isinstance(view, Prefill) else []
        return model.unembed(x[:, last : last + 1]).float().realize(*written)

    functions = []
    with Context(JIT=2, **ONE_PIECE):  # each kernel by itself, and whole
        for function, name in ((step, "position"), (window, "last")):
            captured: Any = TinyJit(function)
            captured.cnt = 1  # captured at the first call
            with kernels.plain() if plain else nullcontext():
                captured(Variable(name, 0, config.block_size - 1).bind(0))
            calls = tuple(_calls(captured.captured.linear.src))
            result = captured.captured.ret.uop.buffer
            functions.append(Function(function.__name__, calls, result))
    begun = [_buffer(t) for t in (slot, *(t for layer in cache.layers for t in layer))]
    weights = {name: _buffer(p) for name, p in model.parameters().items()}
    return Forward(weights, (_buffer(one), _buffer(ids)), tuple(begun), tuple(functions))


def _calls(captured: Any) -> Iterator[Call]:
    from tinygpt.machine.tinygrad_internals import Ops, get_call_arg_uops, get_call_var_uops

    for call in captured:
        program = call.src[0]
        if program.op is not Ops.PROGRAM:
            raise KernelError(f"{program.op} is no kernel")
        info: Any = program.arg
        given = [get_call_arg_uops(call)[i] for i in info.globals]
        yield Call(
            info,
            next(s.arg for s in program.src if s.op is Ops.SOURCE),
            tuple(uop.buffer for uop in given),
            tuple(i in info.outs for i in info.globals),
            tuple(uop.dtype.name for uop in given),
            tuple(v.expr for v in get_call_var_uops(call, program)),
        )


def _buffer(tensor: Tensor) -> Any:
    return tensor.uop.base.buffer


def in_own_process(module: str, config: GPTConfig, environment: Mapping[str, str]) -> Any:
    """Run ``module`` as a program with a config as JSON; -> the JSON that it prints."""
    done = subprocess.run(
        **children.python_module(module, environment=environment),
        input=to_json(config.to_dict()).encode(),
        capture_output=True,
        check=False,
    )
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise KernelError(f"No code could be made of this model: {''.join(last) or 'killed'}.")
    return json.loads(done.stdout)


def answer(make: Callable[[GPTConfig], Any]) -> None:
    """The child's side of ``in_own_process``."""
    sys.stdout.write(to_json(make(GPTConfig.from_dict(json.load(sys.stdin)))))
