"""The names of tinygrad that are not public: the one place where they are imported.

Public is what ``from tinygrad import ...`` and ``tinygrad.nn`` offer. All else may change with any
release, so the rest of the package takes it from here, and a test lists it: a newer tinygrad is
tried by going through this file. Every name was last seen in tinygrad 0.14.0.
"""

from importlib import import_module

from tinygpt.errors import DeviceError, extras

SEEN_IN = "0.14."
"""The versions that the names below were seen in; others may lack them, or mean something else."""

PIECE = "core_id"
"""The variable of a CPU kernel that tinygrad runs once for each value: the number of a piece."""

REPLACED = (
    "tinygrad.codegen.to_program",
    "tinygrad.codegen.to_program_cache",
    "tinygrad.engine.realize.get_worker_pool",
    "tinygrad.engine.realize.to_program_cache",
    "tinygrad.helpers.diskcache_clear",
    "tinygrad.helpers.diskcache_get",
    "tinygrad.helpers.diskcache_put",
    "tinygrad.helpers.getenv",
    "tinygrad.runtime.ops_cpu.do_to_program",
)
"""What is put in the place of a function of tinygrad's, by that module's name for it."""

try:
    # Memory: a Tensor's buffer, its type in numpy.
    # Compilation: the C renderer, the compiled kernel, the cache of lowered kernels.
    # These modules are here because functions in them are replaced (see REPLACED).
    from tinygrad import codegen as codegen
    from tinygrad import helpers as helpers
    from tinygrad.device import ALL_DEVICES as ALL_DEVICES
    from tinygrad.device import Buffer as Buffer
    from tinygrad.device import Compiled as Compiled
    from tinygrad.device import TinyELF as TinyELF
    from tinygrad.dtype import AddrSpace as AddrSpace
    from tinygrad.dtype import DType as DType
    from tinygrad.dtype import _to_np_dtype as _to_np_dtype
    from tinygrad.dtype import least_upper_dtype as least_upper_dtype
    from tinygrad.engine import realize as realize

    # Replay of a captured jit: what a device's ``graph`` is made from.
    from tinygrad.engine.jit import GraphRunner as GraphRunner
    from tinygrad.engine.realize import get_call_arg_uops as get_call_arg_uops
    from tinygrad.engine.realize import get_call_var_uops as get_call_var_uops
    from tinygrad.engine.realize import get_graph_runtime as get_graph_runtime
    from tinygrad.engine.realize import resolve_params as resolve_params

    # Settings, each with ``value``.
    from tinygrad.helpers import DEBUG as DEBUG
    from tinygrad.helpers import NUM_CPU_THREADS as _NUM_CPU_THREADS
    from tinygrad.helpers import PARALLEL as PARALLEL
    from tinygrad.helpers import PROFILE as PROFILE
    from tinygrad.helpers import TRACEMETA as TRACEMETA
    from tinygrad.helpers import VIZ as VIZ
    from tinygrad.helpers import ContextVar as ContextVar
    from tinygrad.renderer import Estimates as Estimates
    from tinygrad.renderer.cstyle import ClangRenderer as ClangRenderer
    from tinygrad.renderer.cstyle import CStyleLanguage as CStyleLanguage
    from tinygrad.runtime import ops_cpu as ops_cpu
    from tinygrad.runtime.ops_cpu import CPUDevice as CPUDevice
    from tinygrad.runtime.ops_cpu import CPUProgram as CPUProgram
    from tinygrad.runtime.support.hcq import HCQBuffer as HCQBuffer
    from tinygrad.runtime.support.memory import TLSFAllocator as TLSFAllocator

    # The graph of a kernel.
    from tinygrad.uop.ops import AxisType as AxisType
    from tinygrad.uop.ops import KernelInfo as KernelInfo
    from tinygrad.uop.ops import Ops as Ops
    from tinygrad.uop.ops import buffers as buffers
    from tinygrad.uop.ops import sym_infer as sym_infer

    for replaced in REPLACED:
        module, _, name = replaced.rpartition(".")
        if not hasattr(import_module(module), name):
            raise ImportError(f"{module} has no {name!r}")
except ImportError as error:
    raise DeviceError(
        f"This tinygrad is not one that tinygpt can use: {error}. "
        f"Get one with: {extras.install_command(f'tinygrad=={SEEN_IN}*')}"
    ) from error


ONE_PIECE = {"NUM_CPU_THREADS": 1}
"""For ``tinygrad.Context``: within the block kernels for the CPU are made whole."""


def pieces_of_kernels(most: int | None = None) -> int:
    """How many pieces kernels for the CPU are made of at most; with ``most``, from now on.

    tinygrad's setting is one of the threads that its next release deletes.
    """
    if most is not None:
        _NUM_CPU_THREADS.value = most
    pieces: int = _NUM_CPU_THREADS.value
    return pieces
