"""The default device: an accelerator if there is one, and never OpenCL on the processor."""

from __future__ import annotations

import ctypes
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import pytest

from tinygpt.machine import choice, hook, resources


def a_machine(*working: str) -> SimpleNamespace:
    """tinygrad.device where the named devices open."""

    class Opens(dict[str, SimpleNamespace]):
        opened: ClassVar[list[str]] = []

        def __missing__(self, name: str) -> SimpleNamespace:
            self.opened.append(name)
            raise RuntimeError(f"no {name}")

    devices = Opens({name: SimpleNamespace(device=name) for name in working})
    return SimpleNamespace(ALL_DEVICES=["METAL", "CUDA", "CL", "CPU", "WEBGPU"], Device=devices)


@pytest.mark.parametrize(
    ("working", "real", "chosen"),
    [
        (("CL", "CPU"), False, "CPU"),
        (("CL", "CPU"), True, "CL"),
        (("CUDA", "CL", "CPU"), False, "CUDA"),
        (("METAL", "CPU"), False, "METAL"),
        (("CPU", "WEBGPU"), False, "CPU"),
    ],
)
def test_an_accelerator_is_the_default_and_opencl_on_the_processor_never(
    working: tuple[str, ...],
    real: bool,
    chosen: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(choice, "opencl_accelerators", lambda: int(real))
    with caplog.at_level(logging.WARNING):
        assert next(choice.available(a_machine(*working))) == chosen
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (chosen != "CPU")
    assert all(f"run on {chosen}" in line and "DEV=CPU" in line for line in said)


def test_opencl_on_the_processor_is_not_even_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "opencl_accelerators", lambda: 0)
    fake = a_machine("CPU")
    assert list(choice.available(fake)) == ["CPU"]
    assert "CL" not in fake.Device.opened and "CUDA" in fake.Device.opened


@pytest.mark.parametrize(
    ("status", "accelerators", "expected"), [(0, 0, False), (0, 2, True), (-1, 0, False)]
)
def test_opencl_is_asked_for_accelerators_before_it_is_opened(
    status: int, accelerators: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tinygrad.runtime.autogen import opencl as cl

    def devices(platform: object, kinds: int, n: int, out: object, count: ctypes.c_uint32) -> int:
        assert kinds == cl.CL_DEVICE_TYPE_GPU | cl.CL_DEVICE_TYPE_ACCELERATOR
        count.value = accelerators
        return status

    monkeypatch.setattr(cl, "clGetPlatformIDs", lambda *_: 0)
    monkeypatch.setattr(cl, "clGetDeviceIDs", devices)
    assert bool(choice.opencl_accelerators()) is expected


@pytest.mark.parametrize(
    ("drivers", "expected"),
    [
        ([], False),
        (["libpocl.so.2.10.0"], False),
        (["/opt/intel/lib/libintelocl.so\n", "libpocl.so"], False),
        (["libpocl.so", "libnvidia-opencl.so.1"], True),
        (["libigdrcl.so"], True),
    ],
)
def test_a_driver_for_the_processor_is_no_sign_of_an_accelerator(
    drivers: list[str], expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(resources, "ACCELERATORS", ())
    monkeypatch.setattr(resources, "MAKERS", ())
    monkeypatch.setattr(resources, "USB_BRIDGES", ())
    monkeypatch.setattr(resources, "OPENCL_DRIVERS", tmp_path)
    for i, library in enumerate(drivers):
        (tmp_path / f"{i}.icd").write_text(library)
    assert resources.may_have_accelerator() is expected


def test_a_module_is_changed_after_its_import_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "late_module.py").write_text("value = 1\nprint('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(hook, "PACKAGE", "late_module")

    def change(module: ModuleType) -> None:
        module.value += 1

    try:
        for _ in range(2):
            hook.after_import("late_module", change)
        import late_module  # type: ignore[import-not-found]

        assert late_module.value == 2
        hook.after_import("late_module", change)
        assert late_module.value == 3
    finally:
        sys.modules.pop("late_module", None)


CHOOSE = """
import os, tinygpt.machine.device as device
os.environ.pop("DEV", None)
device.may_have_accelerator = lambda: True
device.prepare()
from tinygrad import Device
print(Device.DEFAULT, *Device._opened_devices)
"""


def test_tinygrad_itself_chooses_by_this_rule(child_environment: dict[str, str]) -> None:
    """In a process of its own: with pocl installed this is a real choice."""
    patched = CHOOSE + "print(Device.get_available_devices.__module__)"
    command = [sys.executable, "-c", patched]
    done = subprocess.run(
        command, env=child_environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    *chosen, module = done.stdout.split()
    assert module == "tinygpt.machine.choice"
    if not any(map(os.path.exists, resources.ACCELERATORS)):
        assert chosen == ["CPU", "CPU"]
