"""A C compiler for tinygrad, and the device that it opens with it."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import math
import os
import re
import shlex
import shutil
import stat
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType

from tinygpt.config.devices import device_names
from tinygpt.errors import DeviceError, extras
from tinygpt.files.folders import cache_dir, private_temp, put, wanted_cache_dir
from tinygpt.machine import choice, disk_cache, environment, hook
from tinygpt.machine.resources import may_have_accelerator, processor

log = logging.getLogger(__name__)

SHIM_PREFIX = "zig-clang-"
OTHER_COMPILERS = re.compile(r"(^|-)(gcc|cc|g\+\+|c\+\+|tcc|icc|icx|nvcc|pgcc)(-[\d.]+)?$")
"""Names of compilers that are no clang; on macOS ``cc`` is one."""
TOOLKIT_HEADER = Path("/usr/local/cuda/include/cuda_bf16.h")
"""One of those that kernels for NVIDIA's cards include, where the toolkit has it."""
COMPILER_SETTINGS = ("CCC_OVERRIDE_OPTIONS", "LLVMOPT")
"""What changes the machine code that clang and tinygrad's LLVM make of the same source."""


def prepare() -> None:
    """Set CC, CACHEDB, DEV, PARALLEL and NVRTC_PATH for tinygrad where the user has not.

    It is cheap and idempotent.

    CC becomes a shim around the clang inside the wheel ``ziglang`` if no clang is on PATH. Each
    compiler and processor gets a kernel cache of its own: kernels are compiled for the very
    processor they run on, and a home folder may be shared. PARALLEL=0 keeps tinygrad from
    starting compile processes that would live as long as the program. DEV=CPU is set where there is
    plainly no other device: to try them all takes tinygrad half a second. Where tinygrad has to
    try, ``choice`` gives the order.

    This starts no process and never fails: ``require_device`` and ``doctor`` report what is wrong.
    """
    os.environ.setdefault("PARALLEL", "0")
    if math.isinf(environment.number(os.environ["PARALLEL"], math.inf)):
        environment.instead["PARALLEL"] = "0"
    hook.after_import("tinygrad.device", choice.install)  # which may have read DEV, or set it
    if may_have_accelerator():
        _name_nvrtc()
    elif not os.environ.get("DEV"):
        os.environ["DEV"] = "CPU"
    try:
        _choose_compiler()
        if not os.environ.get("CACHEDB"):
            os.environ["CACHEDB"] = str(kernel_database())
            hook.after_import("tinygrad.helpers", _say_where_the_cache_is)
    except OSError:  # no folder can be written: tinygrad's own defaults are as good
        pass
    hook.after_import("tinygrad.helpers", environment.change_helpers)
    hook.after_import("tinygrad.helpers", _keep_kernels)


def prefer(devices: int | str | None) -> None:
    """Let a list of devices, such as CL:0,CL:1, choose the default device: its kind.

    This must come before tinygrad is imported; later, nothing happens, and
    ``several.open_devices`` says what to do.
    """
    if "tinygrad" in sys.modules:
        return
    kind = device_names(devices)[0].split(":")[0]
    if kind and not os.environ.get("DEV", "").upper().startswith(kind):
        os.environ["DEV"] = kind


def _name_nvrtc() -> None:
    """Set NVRTC_PATH and CUDA_PATH where NVIDIA's compiler lies in wheels and nowhere else.

    tinygrad looks for it, and for its headers, in the folders of the system only.
    """
    given = any(os.environ.get(name) for name in ("NVRTC_PATH", "CUDA_PATH"))
    if not (given or TOOLKIT_HEADER.exists()) and (found := nvrtc_in_wheels()):
        os.environ["NVRTC_PATH"], os.environ["CUDA_PATH"] = map(str, found)


def nvrtc_in_wheels() -> tuple[Path, Path] | None:
    """NVIDIA's runtime compiler, and the folder of its ``include``; PyTorch brings them, too."""
    try:
        spec = importlib.util.find_spec("nvidia")
    except (ImportError, ValueError):
        return None
    for folder in (spec and spec.submodule_search_locations) or ():
        for library, headers in (("cu13", "cu13"), ("cuda_nvrtc", "cuda_runtime")):
            found = sorted(Path(folder, library, "lib").glob("libnvrtc.so.*"))
            if found and Path(folder, headers, "include", TOOLKIT_HEADER.name).exists():
                return found[0], Path(folder, headers)
    return None


def require_device() -> str:
    """Open tinygrad's default device and return its name, such as ``CPU``.

    Raises DeviceError, saying how to get one, where no device or no compiler works.
    """
    from tinygrad import Device

    try:
        name = str(Device[Device.DEFAULT].device)
    except Exception as error:  # tinygrad raises whatever its backends raise
        raise DeviceError(" ".join(trouble(error))) from error
    # Opening may have been answered from the kernel cache; the next new kernel would fail.
    if name.split(":")[0] == "CPU" and not shutil.which(compiler()):
        raise DeviceError(" ".join(trouble()))
    return name


def compiler() -> str:
    """The C compiler that tinygrad calls: a name on PATH, or a path."""
    if helpers := sys.modules.get("tinygrad.helpers"):
        return str(helpers.getenv("CC", "clang"))  # tinygrad never looks twice
    return _wanted_compiler()


def _wanted_compiler() -> str:
    return environment.read("CC", "clang")  # type: ignore[no-any-return]


def _choose_compiler() -> None:
    """Find a clang where CC names none. Raises OSError where no script can be written."""
    words = _words(environment.read("CC", ""))
    if not words:
        if not clang_on_path() and (zig := bundled_zig()):
            os.environ["CC"] = str(shim(zig))
    elif not _may_be_clang(words):
        zig = bundled_zig()
        if clang := clang_on_path() or (zig and str(shim(zig))):
            environment.instead["CC"] = clang
    elif len(words) > 1 and shutil.which(words[0]):
        environment.instead["CC"] = str(script_for(words, "cc-"))


def _words(cc: str) -> list[str]:
    """CC as a shell would split it, but for a path with spaces in it."""
    if shutil.which(cc):
        return [cc]
    try:
        return shlex.split(cc)
    except ValueError:  # a quotation without an end
        return [cc]


def _may_be_clang(words: list[str]) -> bool:
    """False for a program that is missing, or plainly another, which others than us shall use."""
    program = next((w for w in words if Path(w).name not in ("ccache", "sccache", "env")), "")
    path = shutil.which(program)
    if path is None or not shutil.which(words[0]):
        return False
    name = Path(path).resolve().name  # cc may be a link to a clang
    return not (OTHER_COMPILERS.search(name) and sys.platform == "linux")


def trouble(error: BaseException | None = None) -> tuple[str, str]:
    """What keeps the device from working, and what to do about it."""
    name, chosen, device = compiler(), os.environ.get("CC"), os.environ.get("DEV", "")
    if device and (not device.upper().startswith("CPU") or "renderer" in str(error)):
        return (
            f"The device DEV={device} could not be opened: {error}.",
            "Unset DEV to let tinygrad choose one, or set DEV=CPU.",
        )
    if chosen and name != _wanted_compiler():
        return (
            f"tinygrad was used before tinygpt was imported, and stays with the compiler {name!r}.",
            f"Import tinygpt first, or set CC={shlex.quote(chosen)} before Python starts.",
        )
    if chosen and not is_shim(chosen):
        return (
            f"The compiler CC={chosen!r} does not work for tinygrad, which needs clang; gcc will "
            "not do.",
            f"Set CC to a clang, or unset CC; a clang comes with: {compiler_cure()}",
        )
    if not shutil.which(name):
        system = "xcode-select --install" if sys.platform == "darwin" else "apt install clang"
        return (
            "tinygrad needs the C compiler clang to use this processor, and none is on PATH.",
            f"Get one with: {compiler_cure()} (or: {system})",
        )
    return (
        f"tinygrad could not open this processor with the compiler {shutil.which(name)}: {error}.",
        f"Run `tinygpt doctor` to see more. Another clang comes with: {compiler_cure()}",
    )


def compiler_cure() -> str:
    """Brings a clang from a package registry, wherever pip works (the wheel ``ziglang``)."""
    return extras.cure("offline")


def clang_on_path() -> str | None:
    """The path of a working clang of the system's own, or None."""
    found = shutil.which("clang")
    if sys.platform == "darwin" and found == "/usr/bin/clang":
        # Every Mac has this file; without the developer tools it only offers to install them.
        tools = ("/Library/Developer/CommandLineTools", "/Applications/Xcode.app")
        return found if any(map(os.path.exists, (*tools, "/var/db/xcode_select_link"))) else None
    return found


def bundled_zig() -> Path | None:
    """The executable in the wheel ``ziglang``, found without importing it, or None."""
    try:
        spec = importlib.util.find_spec("ziglang")
    except (ImportError, ValueError):
        return None
    for folder in (spec and spec.submodule_search_locations) or ():
        zig = Path(folder).absolute() / "zig"
        if os.access(zig, os.X_OK):
            return zig
    return None


def shim(zig: Path) -> Path:
    """Write, or find, a script that stands for ``zig clang``: CC can only name one executable."""
    return script_for([str(zig), "clang"], SHIM_PREFIX)


def script_for(words: list[str], prefix: str) -> Path:
    """A script that runs a command with more arguments, in a file of its own."""
    script = os.fsencode(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
    name = prefix + hashlib.sha256(script).hexdigest()[:16]
    for folder in (cache_dir, private_temp):
        path = folder() / name
        with suppress(OSError):  # such as a full disk, or a script of another user
            if not (path.is_file() and path.read_bytes() == script):
                put(path, script, stat.S_IRWXU)  # another process may be about to start it
            if os.access(path, os.X_OK):  # false too on a file system mounted noexec
                return path
    raise PermissionError(f"programs cannot be run from {path.parent}")


def is_shim(cc: str) -> bool:
    """Whether a compiler is a script that ``shim`` wrote."""
    return Path(cc).name.startswith(SHIM_PREFIX)


def kernel_database() -> Path:
    """The value of CACHEDB: the user's, or one for this compiler and this processor."""
    return Path(os.environ.get("CACHEDB") or cache_dir() / f"kernels-{_kernel_key()}.db")


def _say_where_the_cache_is(helpers: ModuleType) -> None:
    wanted, used = wanted_cache_dir(), cache_dir()
    if used != wanted:
        log.warning(
            "%s cannot be written, so kernels and other files that can be made again are kept in "
            "%s. TINYGPT_CACHE names another folder.",
            wanted,
            used,
        )


def _keep_kernels(helpers: ModuleType) -> None:
    try:
        disk_cache.install(helpers, _kernel_key())
    except (AttributeError, OSError) as error:  # tinygrad has changed
        log.info("Kernels are kept in tinygrad's own way: %r", error)


def _kernel_key() -> str:
    """Names the compiler and the processor, so that kernels are reused only where they fit."""
    cc = _wanted_compiler()
    zig = bundled_zig() if is_shim(cc) else None
    programs = [zig] if zig else [Path(shutil.which(w) or w).resolve() for w in _words(cc)]
    sizes = [p.stat().st_size if p.is_file() else 0 for p in programs]
    named = " ".join(f"{p.name} {size}" for p, size in zip(programs, sizes, strict=True))
    flags = " ".join(os.environ.get(name, "") for name in COMPILER_SETTINGS)
    return hashlib.sha256(f"{named} {flags} {processor()}".encode()).hexdigest()[:16]
