"""Products as machine code for any processor, and what their innermost blocks do with memory."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass

from tinygrad import Device, UOp, dtypes
from tinygrad.codegen import full_rewrite_to_sink, line_rewrite, pm_linearize_cleanups
from tinygrad.codegen.late.linearizer import linearize

from tinygpt.kernels import matmul
from tinygpt.kernels.phases import build
from tinygpt.machine.device import compiler

FLAGS = ("-S", "-x", "c", "-O2", "-fPIC", "-ffreestanding", "-fno-math-errno", "-nostdlib")
"""tinygrad's, for assembly in the place of an object file."""
KINDS = ("nt", "nn", "tn")
FUNCTION = re.compile(r"^(\w+):", re.MULTILINE)
LABEL = re.compile(r"^(\.L\w+):")
JUMP = re.compile(r"^\s+(?:j[a-z]+|b\.\w+|cbn?z|tbn?z|b)\s.*?(\.L\w+)")
MULTIPLICATION = re.compile(r"^\s+(?:vfn?madd\w*|fmla|fmad|v?mulps)\s")
STACK = re.compile(r"\(%r[sb]p\)|\[sp(?:, #-?\w+)?\]")
"""A fixed place on the stack. The copies of the operands, which lie there too, are indexed."""
STORE = re.compile(r"^\s+(?:v?mov\w+\s+%[xyz]mm\d+, .*\)|st\w+\s)")


@dataclass(frozen=True)
class Block:
    """A loop's body: instructions that multiply vectors, and such that use the stack or store."""

    multiplications: int
    spills: int


def product_source(lanes: int, rows: int, kind: str) -> str:
    """The C of a function ``product_LANES_ROWS_KIND``."""
    m, n, depth = 24 * rows, 8 * lanes, 256
    strides = {
        "nt": ((depth, 1), (1, depth)),
        "nn": ((depth, 1), (n, 1)),
        "tn": ((1, m), (n, 1)),
    }[kind]
    plan = matmul.Plan(m, n, depth, *strides, rows, sums=kind == "tn")
    sizes = [m * n, *([m] if plan.sums else []), m * depth, n * depth]
    buffers = tuple(UOp.placeholder((size,), dtypes.float32, i) for i, size in enumerate(sizes))
    name, fixed = f"product_{lanes}_{rows}_{kind}", (("plan", plan),)
    sink = build(matmul.product, buffers, len(sizes) - 2, lanes, False, False, name, 10**9, fixed)
    renderer = Device["CPU"].renderer
    uops = linearize(full_rewrite_to_sink(sink, renderer, optimize=False))
    return renderer.render(line_rewrite(uops, pm_linearize_cleanups))


def innermost_blocks(source: str, target: list[str]) -> dict[str, Block]:
    """Of each function of the source: the innermost loop that multiplies the most."""
    command = [compiler(), *FLAGS, *target, "-", "-o", "-"]
    done = subprocess.run(command, input=source, text=True, capture_output=True, check=True)
    names = [name for name in FUNCTION.findall(done.stdout) if name.startswith("product_")]
    texts = re.split("|".join(f"^{name}:" for name in names), done.stdout, flags=re.MULTILINE)
    return dict(zip(names, map(_innermost, texts[1:]), strict=True))


def _innermost(text: str) -> Block:
    """A loop is what lies between a label and the jump back to it."""
    lines, labels, blocks = text.splitlines(), {}, []
    for i, line in enumerate(lines):
        if label := LABEL.match(line):
            labels[label[1]] = i
        start = labels.get(jump[1]) if (jump := JUMP.match(line)) else None
        if start is not None and not any(map(LABEL.match, lines[start + 1 : i])):
            body = lines[start:i]
            spills = sum(bool(STACK.search(s) or STORE.match(s)) for s in body)
            blocks.append(Block(sum(map(bool, map(MULTIPLICATION.match, body))), spills))
    return max(blocks, key=lambda block: block.multiplications)
