"""Tensor cores: products of small matrices that the threads of a warp take part in together.

One instruction computes C (m, n) + A (m, depth) B (depth, n), of half or bfloat16 numbers with sums
in float32. Each matrix is spread over the 32 threads of a warp: a thread holds a few elements, its
*fragment*. A `Core` says which; tinygrad has the instruction (`UOp.wmma`) and the device PYTHON
computes it. In both layouts below the fragment of a result is also that of a left operand, so one
product feeds the next without an exchange between threads.

NVIDIA: PTX ISA, "Matrix Fragments for mma.m16n8k16". Apple: simdgroup_matrix, 8 x 8 x 8.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tinygrad import Device, Tensor, UOp, dtypes

from tinygpt.kernels.dispatch import first_device, obstacle
from tinygpt.machine import precision
from tinygpt.machine.tinygrad_internals import DType

WARP = 32
"""Threads that compute a product together."""

Place = Callable[[UOp, int], tuple[UOp, UOp]]
"""(thread of the warp, number of its element) -> the (row, column) of the element."""


@dataclass(frozen=True)
class Core:
    """The sizes of an instruction's product, and where a thread's elements lie in its matrices."""

    device: str
    """What tinygrad calls the makers' devices."""
    m: int
    n: int
    depth: int
    sizes: tuple[int, int, int]
    """Elements of a thread's fragments of A, B and C."""
    a: Place
    b: Place
    c: Place
    quarter: Callable[[UOp], UOp]
    """Four threads share a row of C: the number of one of them."""

    @property
    def rows(self) -> int:
        """Rows of C that a thread has elements of."""
        return self.sizes[2] // 2

    def row(self, element: int) -> int:
        """Which of its rows an element of a thread's C is in: pairs lie side by side."""
        return element // 2

    def product(self, a: Sequence[UOp], b: Sequence[UOp], c: Sequence[UOp]) -> list[UOp]:
        """The fragment of C + A B from those of A, B and C."""
        shape = self.n, self.m, self.depth
        found = UOp.wmma(UOp.stack(*a), UOp.stack(*b), UOp.stack(*c), shape, self.device, WARP)
        return [found.index(i) for i in range(self.sizes[2])]


def _nvidia() -> Core:
    def a(thread: UOp, e: int) -> tuple[UOp, UOp]:
        return thread // 4 + e // 2 % 2 * 8, thread % 4 * 2 + (e % 2 + e // 4 * 8)

    def b(thread: UOp, e: int) -> tuple[UOp, UOp]:
        return thread % 4 * 2 + (e % 2 + e // 2 * 8), thread // 4

    def c(thread: UOp, e: int) -> tuple[UOp, UOp]:
        return thread // 4 + e // 2 * 8, thread % 4 * 2 + e % 2

    return Core("CUDA", 16, 8, 16, (8, 4, 4), a, b, c, lambda thread: thread % 4)


def _apple() -> Core:
    def at(thread: UOp, e: int) -> tuple[UOp, UOp]:
        return thread // 2 % 4 + thread // 16 * 4, thread % 2 * 2 + thread // 8 % 2 * 4 + e

    quarter = lambda thread: thread % 2 + thread // 8 % 2 * 2  # noqa: E731
    return Core("METAL", 8, 8, 8, (2, 2, 2), at, at, at, quarter)


CORES = {core.device: core for core in (_nvidia(), _apple())}
"""By the device that tinygrad writes the instruction for."""
NVRTC = (
    "NVIDIA's compiler comes with: pip install nvidia-cuda-nvrtc nvidia-cuda-runtime, "
    "of the CUDA version that nvidia-smi names, or an older one"
)
MAKERS = {"CUDA": "CUDA", "NV": "CUDA", "METAL": "METAL"}
"""tinygrad's devices -> those of ``CORES``."""


def core_of(x: Tensor) -> str | None:
    """Which of ``CORES`` multiplies numbers of x's type on its device; None if none does."""
    return core_for(first_device(x), x.dtype)


def core_for(device: str, dtype: DType) -> str | None:
    """The same for a device and a type."""
    renderer = Device[device].renderer
    name = MAKERS.get(renderer.target.device)
    if name is None or dtype not in (dtypes.float16, dtypes.bfloat16):
        return None
    core = CORES[name]
    wanted = (core.n, core.m, core.depth), dtype, dtypes.float32
    found = ((t.dims, t.dtype_in, t.dtype_out) for t in renderer.tensor_cores)
    return name if wanted in found else None


def plan(device: str) -> str | None:
    """What kernels will do on a GPU, for a person; None for a device without threads."""
    renderer = Device[device].renderer
    if not renderer.has_local:
        return None
    kind = renderer.target.arch or renderer.target.device
    if why := obstacle(Tensor.empty(1, device=device)):
        return f"{kind}: no fast kernels, since {why}; {NVRTC if 'PTX' in why else ''}".rstrip("; ")
    there = precision.available(device)
    halves = [name for name in there if core_for(device, precision.type_of(name))]
    if halves:
        return (
            f"{kind}: with --dtype {' or '.join(halves)} products and attention run on tensor "
            f"cores, with sums in float32; attention with dropout, and float32, without them"
        )
    return f"{kind}: no tensor cores that the kernels know; --dtype {' or '.join(there)}"
