"""Every kernel of GPT-2 on a GPU, compiled for CUDA: registers, spills and shared memory.

    python benchmarks/gpu_kernels.py [--plan NAME ...] [--write] [--sources FOLDER] [--json FILE]

No card is needed. Steps of training and decoding are captured for a device that is not there, as
tinygrad would run them on a card; NVIDIA's nvrtc, which has ptxas inside, then compiles each kernel
for every generation in ``CARDS``. It comes with the extra ``test`` (the wheels nvidia-cuda-nvrtc
and -runtime; Linux). ``--write`` renews the table beside this file, gpu_kernels.tsv, which
tests/test_gpu_kernels.py keeps from getting worse.
"""

from __future__ import annotations

import csv
import ctypes
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from common import arguments, machine, write_json

from tinygpt.machine import children
from tinygpt.machine.device import nvrtc_in_wheels

CARDS = ("sm_80", "sm_90", "sm_100")
"""A100, H100 and H200, B200."""
TABLE = Path(__file__).with_suffix(".tsv")
SEEN_WITH = "nvrtc 13.5"
"""What the table was made with: another compiler gives other numbers of registers."""

LAYERS: dict[str, Any] = {
    "n_layer": 1,
    "n_head": 12,
    "n_embd": 768,
    "block_size": 1024,
    "vocab_size": 50257,
}
"""GPT-2 124M with one of its twelve layers, which are alike."""
BATCH = 4
PLANS: dict[str, dict[str, str]] = {
    "train": {"dtype": "float32"},
    "train-bf16": {"dtype": "bfloat16"},
    "muon": {"optimizer": "muon"},
    "decode": {"dtype": "float32"},
    "decode-bf16": {"dtype": "bfloat16"},
}
"""What is captured: a step of training, or the prefill and a step of decoding."""


@dataclass(frozen=True)
class Compiled:
    """What ptxas says of one kernel."""

    plan: str
    kernel: str
    card: str
    registers: int
    """Of a thread; 255 is the most there is."""
    spilled: int
    """Bytes of a thread that are stored because registers ran out."""
    stack: int
    """Bytes of a thread's own memory: spills, and arrays that a loop indexes."""
    shared: int
    """Bytes of a workgroup; 49,152 is the most that needs no permission."""
    tensor_cores: bool

    @property
    def key(self) -> tuple[str, str, str]:
        return self.plan, self.kernel, self.card


class Nvrtc:
    """NVIDIA's runtime compiler, from the wheels. Raises OSError where they are not installed."""

    def __init__(self) -> None:
        if (wheels := nvrtc_in_wheels()) is None:
            raise OSError("nvidia-cuda-nvrtc and -runtime are not installed")
        library, headers = wheels
        self._library = ctypes.CDLL(str(library))
        self._include = f"-I{headers / 'include'}".encode()
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check(self._library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
        self.version = f"nvrtc {major.value}.{minor.value}"

    def compile(self, source: str, card: str) -> str:
        """What ptxas reports of a kernel. Raises ValueError with the log if it does not compile."""
        program = ctypes.c_void_p()
        create = self._library.nvrtcCreateProgram
        self._check(create(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None))
        options = [f"--gpu-architecture={card}".encode(), self._include, b"--ptxas-options=-v"]
        given = (ctypes.c_char_p * len(options))(*options)
        failed = self._library.nvrtcCompileProgram(program, len(options), given)
        size = ctypes.c_size_t()
        self._check(self._library.nvrtcGetProgramLogSize(program, ctypes.byref(size)))
        log = ctypes.create_string_buffer(size.value)
        self._check(self._library.nvrtcGetProgramLog(program, log))
        self._library.nvrtcDestroyProgram(ctypes.byref(program))
        if failed:
            raise ValueError(log.value.decode())
        return log.value.decode()

    @staticmethod
    def _check(code: int) -> None:
        if code:
            raise OSError(f"nvrtc failed with code {code}")


def compiled(
    nvrtc: Nvrtc, plan: str, sources: dict[str, str], cards: Sequence[str] = CARDS
) -> Iterator[Compiled]:
    """What every kernel of a plan takes on the cards."""
    for name, source in sources.items():
        for card in cards:
            log = nvrtc.compile(source, card)
            yield Compiled(
                plan, name, card,
                registers=_number(r"Used (\d+) registers", log),
                spilled=_number(r"(\d+) bytes spill stores", log),
                stack=_number(r"(\d+) bytes stack frame", log),
                shared=_number(r"(\d+) bytes smem", log),
                tensor_cores="mma.sync" in source,
            )  # fmt: skip


def _number(pattern: str, log: str) -> int:
    found = re.search(pattern, log)
    return int(found.group(1)) if found else 0


def read_table(path: Path = TABLE) -> dict[tuple[str, str, str], Compiled]:
    """The committed table, by plan, kernel and card."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t")
        texts = ("plan", "kernel", "card")
        plain = [{k: v if k in texts else int(v) for k, v in row.items()} for row in rows]
        found = [Compiled(**values) for values in plain]
    return {row.key: row for row in found}


def write_table(rows: Iterable[Compiled], path: Path = TABLE) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(field.name for field in fields(Compiled))
        for row in sorted(rows, key=lambda row: row.key):
            writer.writerow(int(x) if isinstance(x, bool) else x for x in astuple(row))


# In a process of its own, whose device is one that is not there --------------------------------


def capture(plan: str) -> dict[str, str]:
    """The sources of a plan's kernels by name, captured in a process of its own."""
    environment = {"DEV": f"NULL:CUDA:{CARDS[0]}", "TINYGPT_THREADS": "0"}
    with tempfile.TemporaryDirectory() as folder:  # kernels that are stored are not written again
        environment["CACHEDB"] = str(Path(folder, "kernels.db"))
        done = subprocess.run(
            **children.python_code(CHILD, environment=environment),
            input=json.dumps([str(Path(__file__).parent), plan]).encode(),
            capture_output=True,
            timeout=900,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(done.stderr.decode(errors="replace"))
    found: dict[str, str] = json.loads(done.stdout)
    return found


CHILD = """
import json, sys
folder, plan = json.load(sys.stdin)
sys.path.insert(0, folder)
import gpu_kernels
json.dump(gpu_kernels.kernels_of(plan), sys.stdout)
"""


def kernels_of(plan: str) -> dict[str, str]:
    """Compute what a plan says on the device that is not there; -> the sources of its kernels."""
    sources = record()
    (decode if plan.startswith("decode") else train)(**PLANS[plan])
    return sources


def record() -> dict[str, str]:
    """Collect every source that tinygrad has compiled from now on, and compile nothing."""
    from dataclasses import replace

    from tinygrad import Device
    from tinygrad.device import Compiler
    from tinygrad.runtime.support import compiler_cuda

    sources: dict[str, str] = {}

    class Recorder(Compiler):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(None)

        def compile(self, src: str) -> bytes:
            found = re.search(r"__launch_bounds__\(\d+\) (\w+)\(", src)
            assert found, "a kernel"
            name = found.group(1)
            alike = sum(known.split("#")[0] == name for known in sources)
            sources[f"{name}#{alike + 1}" if alike else name] = src
            return b"not compiled"

    compiler_cuda.NVRTCCompiler = Recorder  # which the renderer would load the library for
    renderer = Device[Device.DEFAULT].renderer
    renderer.target = replace(renderer.target, device="CUDA")  # on which TF32 is not used
    return sources


def train(dtype: str = "float32", optimizer: str = "adam") -> None:
    """A step of training: forward, backward, clipping, update."""
    import numpy as np

    from tinygpt.config import GPTConfig, TrainConfig
    from tinygpt.model.transformer import Transformer
    from tinygpt.training.optim import make_optimizer
    from tinygpt.training.step import make_train_step

    config = TrainConfig(batch_size=BATCH, optimizer=optimizer, dtype=dtype)
    model = Transformer(GPTConfig(**LAYERS), seed=None)
    step = make_train_step(model, make_optimizer(model.parameters(), config), config)
    x = np.zeros((1, BATCH, LAYERS["block_size"]), np.int32)
    _quietly(lambda: step(x, x, 1e-3, (1, 1)))


def decode(dtype: Any = "float32") -> None:
    """The first tokens of a sequence, then the next one of several."""
    import numpy as np

    from tinygpt.config import GPTConfig
    from tinygpt.config.weights import weights
    from tinygpt.generation.decoder import _passes
    from tinygpt.model.half import halve
    from tinygpt.model.transformer import Transformer

    config = GPTConfig(**LAYERS)
    shapes = {weight.name: weight.shape for weight in weights(config)}
    model = Transformer(config, seed=None)
    halve(model, dtype, lambda name: np.zeros(shapes[name], np.float32))
    passes = _passes(model, slots=8)
    _quietly(lambda: passes.prefill([[0] * 64], [0], [[63]]))
    _quietly(lambda: passes.step([[0] * 8], [0] * 8, [0] * 8))


def _quietly(work: Any) -> None:
    """Results cannot be read from a device that is not there; all is compiled by then."""
    try:
        work()
    except RuntimeError as error:
        if "copyout" not in str(error):
            raise


# The program -----------------------------------------------------------------------------------


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--plan", nargs="+", choices=PLANS, default=list(PLANS))
    parser.add_argument("--write", action="store_true", help=f"renew {TABLE.name}")
    parser.add_argument("--sources", type=Path, metavar="FOLDER", help="write the sources there")
    options = parser.parse_args()
    nvrtc, rows = Nvrtc(), list[Compiled]()
    print(f"{nvrtc.version}; the table was made with {SEEN_WITH}")
    print(f"{'plan':12} {'kernel':48} {'card':6} regs spill stack shared tensor cores")
    for plan in options.plan:
        sources = capture(plan)
        for name, text in sources.items() if options.sources else ():
            options.sources.mkdir(parents=True, exist_ok=True)
            (options.sources / f"{plan}-{name}.cu").write_text(text, "utf-8")
        for row in compiled(nvrtc, plan, sources):
            rows.append(row)
            print(
                f"{row.plan:12} {row.kernel:48} {row.card:6} {row.registers:4} {row.spilled:5} "
                f"{row.stack:5} {row.shared:6} {'yes' if row.tensor_cores else ''}"
            )
    if options.write:
        old = read_table().values() if TABLE.exists() else ()
        kept = [row for row in old if row.plan not in options.plan]
        write_table([*kept, *rows])
    write_json(options.json, {"machine": machine(), "compiler": nvrtc.version, "rows": rows})


if __name__ == "__main__":
    sys.exit(main())
