"""Variables that are meant for other programs, in the environment of this one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tinygpt.errors import DeviceError
from tinygpt.machine import device, doctor, environment


@pytest.mark.parametrize(
    ("value", "default", "expected"),
    [
        ("2", 0, 2),
        ("-1", 0, -1),
        (" 3 ", 0, 3),
        ("true", 0, 1),
        ("Yes", 0, 1),
        ("ON", 0, 1),
        ("false", 1, 0),
        ("no", 1, 0),
        ("off", 1, 0),
        ("", 1, 1),
        ("  ", 7, 7),
        ("default", 0, 0),
        ("x", 32, 32),
        ("*", 1, 1),
        ("1.0", 0, 1),
        ("0x10", 4, 4),
        ("nan", 5, 5),
        ("inf", 5, 5),
        ("9" * 5000, 6, 6),
        ("0.5", 0.0, 0.5),
        ("fast", 0.25, 0.25),
        ("yes", False, True),
        ("0", True, False),
        ("true", "0", "1"),
        ("maybe", "-1", "-1"),
        ("3", "0", "3"),
        ("", "clang", "clang"),
        ("a word", "", "a word"),
        ("1", "", "1"),
        ("x", None, "x"),
    ],
)
def test_a_variable_is_read_as_its_default_says(
    value: str, default: Any, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_VARIABLE", value)
    found = environment.read("A_VARIABLE", default)
    assert (found, type(found)) == (expected, type(expected))


def test_a_variable_that_is_not_set_is_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("A_VARIABLE", raising=False)
    assert [environment.read("A_VARIABLE", d) for d in (3, "x", None)] == [3, "x", None]


OTHERS = {
    **{"DEBUG": "true", "NO_COLOR": "", "PROFILE": "default", "IMAGE": "x", "JIT": "false"},
    **{"BEAM": "no", "VIZ": "off", "NOOPT": "maybe", "TYPED": "1", "PARALLEL": "auto"},
    **{"TC": "{}", "LRU": "", "CACHELEVEL": "high", "CPU": "/proc/cpuinfo", "REGEN": "1"},
    **{"JIT_BATCH_SIZE": "many", "DEFAULT_FLOAT": "", "REDUCEOP_SPLIT_SIZE": "?", "MV": "mv -f"},
}
"""All of them end tinygrad's import, or its first kernel, where it reads them itself."""

REPORT = """
import json, os, sys
from tinygpt.machine import start
start()
from tinygrad import Tensor, helpers
sum = (Tensor([1.0, 2.0]) * 3).sum().item()
names = "DEBUG NO_COLOR PROFILE IMAGE JIT NOOPT PARALLEL LRU CACHELEVEL".split()
print(json.dumps([sum, [helpers.ContextVar._cache[n].value for n in names], dict(os.environ)]))
"""


def test_what_is_meant_for_others_stops_nothing_and_stays_as_it_is(
    child_environment: dict[str, str], tmp_path: Path
) -> None:
    given = child_environment | OTHERS | {"TINYGPT_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", REPORT], env=given, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    total, values, after = json.loads(done.stdout)  # and DEBUG=1 has printed nothing into it
    assert total == 9.0
    assert values == [1, 0, 0, 0, 0, 0, 0, 1, 2]
    assert {name: after[name] for name in OTHERS} == OTHERS
    assert "opened device" in done.stderr


def test_modules_of_tinygrad_print_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    environment.to_stderr("a", 1, end=";")
    assert capsys.readouterr() == ("", "a 1;")


def test_printing_without_a_stderr_fails_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    environment.to_stderr("lost")
    with open(os.devnull) as closed:  # noqa: PTH123
        monkeypatch.setattr(sys, "stderr", closed)
    environment.to_stderr("lost")


tinygrad = importlib.util.find_spec("tinygrad")


@pytest.mark.parametrize(
    "chosen",
    [
        *("CPU", "cpu", " CPU ", "CPU:LLVM", "CL", "cuda:PTX:sm_90", "NULL::gfx1100", "USB+AMD"),
        *("", "KFD:0,1+AMD", "NV;CPU:LLVM", "CPU:LLVM:x86_64,znver2"),
    ],
)
def test_devices_of_tinygrad_are_not_refused(chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tinygrad is not None
    monkeypatch.setenv("DEV", chosen)
    environment.check_device(tinygrad)


@pytest.mark.parametrize(
    "chosen", ["TOASTER", "gpu", "1", "CPU:a:b:c", "a+b+CPU", "CPU,CL", "DISK", "/dev/dri", "CPU;x"]
)
def test_a_device_that_tinygrad_lacks_is_refused_with_those_it_has(
    chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tinygrad is not None
    monkeypatch.setenv("DEV", chosen)
    with pytest.raises(DeviceError, match=r"AMD, CL, CPU, CUDA.*set DEV=CPU") as refused:
        environment.check_device(tinygrad)
    assert f"DEV={chosen}" in str(refused.value)


def test_doctor_names_the_devices_where_dev_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> str:
        assert tinygrad is not None
        environment.check_device(tinygrad)
        return ""

    monkeypatch.setenv("DEV", "TOASTER")
    monkeypatch.setattr(device, "require_device", refuse)
    [check] = doctor._device()
    assert not check.ok and "DEV=TOASTER" in check.found and "CUDA" in check.found
    assert check.cure == "unset DEV, or set DEV=CPU"


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with programs, the only one on PATH, on a machine with the extra offline."""
    for name in ("gcc", "x86_64-conda-linux-gnu-cc", "ccache", "my-clang"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TINYGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(environment, "instead", {})
    monkeypatch.setattr(device, "bundled_zig", lambda: Path("/opt/zig"))
    return tmp_path


@pytest.mark.parametrize(
    ("cc", "command"),
    [
        ("gcc", "/opt/zig clang"),
        ("gcc -std=gnu99", "/opt/zig clang"),
        ("ccache gcc", "/opt/zig clang"),
        ("x86_64-conda-linux-gnu-cc", "/opt/zig clang"),
        ("no-such-clang", "/opt/zig clang"),
        ("ccache my-clang", "ccache my-clang"),
        ("my-clang -O3 '-DX=a b'", "my-clang -O3 '-DX=a b'"),
        ("my-clang", None),
    ],
)
def test_cc_may_be_a_command_or_meant_for_other_programs(
    cc: str, command: str | None, tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", cc)
    before = dict(os.environ)
    device._choose_compiler()
    assert os.environ == before
    if command is None:
        assert not environment.instead
    else:
        script = Path(environment.instead["CC"]).read_text()
        assert script == f'#!/bin/sh\nexec {command} "$@"\n'


def test_flags_of_the_compiler_have_kernels_of_their_own(
    tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = set()
    for cc in ("my-clang", "my-clang -O1", "my-clang -O2"):
        environment.instead.clear()
        monkeypatch.setenv("CC", cc)
        device._choose_compiler()
        keys.add(device._kernel_key())
    monkeypatch.setenv("CCC_OVERRIDE_OPTIONS", "#O0")
    keys.add(device._kernel_key())
    assert len(keys) == 4
