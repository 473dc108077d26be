"""What ``machine.start`` does to a process, and that nothing else does."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from inspect import ismodule
from pathlib import Path

import pytest
import tinygrad
import tinygrad.nn

from tinygpt import machine
from tinygpt.machine import tinygrad_internals

PACKAGE = Path(machine.__file__).parents[1]

SNAPSHOT = """
import os, signal, sys, threading

def snapshot():
    modules = {name: m for name, m in sys.modules.items() if name.startswith("tinygrad") and m}
    from tinygrad import Device
    from tinygrad.helpers import ContextVar
    return {
        "environment": dict(os.environ),
        "tinygrad": {name: dict(vars(modules[name])) for name in sorted(seen or modules)},
        "settings": {name: setting.value for name, setting in ContextVar._cache.items()},
        "devices": {name: dict(vars(Device[name])) for name in Device._opened_devices},
        "finders": list(sys.meta_path),
        "threads": len(os.listdir("/proc/self/task")) if sys.platform == "linux" else
            threading.active_count(),
        "signals": [signal.getsignal(number) for number in sorted(signal.valid_signals())],
    }

seen = None
"""

IMPORTS = (
    SNAPSHOT
    + """
import importlib, pkgutil
import numpy, tinygrad, tinygrad.nn, tinygrad.engine.realize, tinygrad.runtime.ops_cpu
import tinygpt
tinygrad.Device[tinygrad.Device.DEFAULT]
seen, before = [name for name in sys.modules if name.startswith("tinygrad")], None
before = snapshot()
count = 0
for module in pkgutil.walk_packages(tinygpt.__path__, "tinygpt."):
    try:
        importlib.import_module(module.name)
        count += 1
    except ImportError as error:  # an extra that is not installed
        assert not (error.name or "").startswith("tinygpt"), error
after = snapshot()
for name in before:
    if name == "tinygrad":  # a module has its submodules as attributes
        for module, values in before[name].items():
            found = after[name][module]
            assert {key: found[key] for key in values} == values, module
    else:
        assert before[name] == after[name], (name, before[name], after[name])
print(count)
"""
)


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_importing_every_module_changes_nothing_in_the_process() -> None:
    done = run(IMPORTS)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 120


STARTED = """
import os, threading
{imports}
from tinygrad import Device, Tensor, codegen
print(type(codegen.to_program_cache).__name__, Device["CPU"].graph is not None)
print(threading.active_count(), Tensor([1.0, 2.0]).sum().item())
"""


@pytest.mark.parametrize(
    "imports",
    [
        "from tinygpt import GPT",
        "from gpt import train",
        "import tinygrad; from tinygpt import gradcheck",
        "from tinygpt import GPTConfig; import tinygrad",
        "from tinygpt.machine import start; start(); start()",
        "from tinygpt.api import GPT; from tinygpt.config import GPTConfig; "
        "GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, vocab_size=8))",
    ],
)
@pytest.mark.skipif(tinygrad.Device.DEFAULT != "CPU", reason="the pool is for the processor")
def test_public_names_start_the_machine_before_or_after_tinygrad(imports: str) -> None:
    done = run(STARTED.format(imports=imports), TINYGPT_THREADS="3")
    assert done.stdout.split() == ["Programs", "True", "3", "3.0"], done.stderr


PLAIN = """
import threading
from tinygpt import kernels
from tinygrad import Device, Tensor
x = Tensor([[float(i * j % 7) for i in range(512)] for j in range(64)])
y, threads = kernels.linear(x, x[:32].contiguous()).sum().item(), threading.active_count()
assert (threads, Device["CPU"].graph) == (1, None)
from tinygpt.machine import start
start()
assert kernels.linear(x, x[:32].contiguous()).sum().item() == y == (x @ x[:32].T).sum().item()
"""


def test_kernels_are_right_in_a_process_that_was_not_started() -> None:
    done = run(PLAIN, TINYGPT_THREADS="2")
    assert done.returncode == 0, done.stderr


def test_a_number_of_threads_that_makes_no_sense_is_an_error_each_time() -> None:
    code = """
from tinygpt.errors import UsageError
for _ in range(2):
    try:
        from tinygpt import GPT
    except UsageError as error:
        print(error)
"""
    lines = run(code, TINYGPT_THREADS="many").stdout.splitlines()
    assert len(lines) == 2 and all("TINYGPT_THREADS='many'" in line for line in lines)


# ---- tinygrad's private names ----


PUBLIC = {
    *(f"tinygrad.{name}" for name, value in vars(tinygrad).items() if not ismodule(value)),
    "tinygrad.nn.optim.Optimizer",
    "tinygrad.nn.state.get_parameters",
}
"""What users of tinygrad import."""
LAZY = {"tinygrad.runtime.autogen.opencl"}
"""A table of OpenCL, which is read where there is a driver for it: see ``choice``."""


def private_imports(path: Path) -> list[str]:
    """The names that a file imports from tinygrad, other than the public ones."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = node.names if isinstance(node, ast.Import | ast.ImportFrom) else []
        origin = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
        found += [origin + each.name for each in names]
    return [n for n in found if n.split(".")[0] == "tinygrad" and n not in PUBLIC | LAZY]


def test_private_names_of_tinygrad_stand_in_one_module() -> None:
    home = Path(tinygrad_internals.__file__)
    others = {p: private_imports(p) for p in PACKAGE.rglob("*.py") if p != home}
    assert {path: names for path, names in others.items() if names} == {}
    names = private_imports(home)
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    "change", ["del jit.GraphRunner", "del realize.get_worker_pool", "del helpers.diskcache_get"]
)
def test_a_tinygrad_that_lacks_a_name_is_one_line_of_advice(change: str) -> None:
    code = f"""
import sys
from tinygrad import helpers
from tinygrad.engine import jit, realize
{change}
from tinygpt.cli import main
sys.exit(main(["gradcheck"]))
"""
    done = run(code)
    [line] = done.stderr.splitlines()
    assert done.returncode == 1 and "error: This tinygrad" in line
    assert change.rpartition(".")[2] in line and "tinygrad==0.14.*" in line
