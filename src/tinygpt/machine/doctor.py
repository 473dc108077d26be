"""``doctor``: what tinygpt finds on this machine, and the command that cures what is missing."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path

from tinygpt.config import __version__
from tinygpt.errors import DeviceError, extras
from tinygpt.files import folders
from tinygpt.files.disk import size
from tinygpt.machine import device, disk_cache, pace, resources
from tinygpt.text.tokenizers import vocabulary

NOT_FOR_USERS = ("test", "fuzz", "oracle", "docs")
"""Extras for the development of tinygpt itself."""


@dataclass(frozen=True)
class Check:
    """One line of ``tinygpt doctor``."""

    name: str
    """What was looked at."""
    ok: bool
    """Whether it is as it should be."""
    found: str
    """What was found, in words."""
    cure: str | None = None
    """What puts it right: a command where there is one."""
    optional: bool = False
    """Whether tinygpt works without it."""


def examine() -> list[Check]:
    """All checks, in the order they are read. A check that fails to run is one that failed."""
    checks: list[Check] = []
    for group in (_packages, _device, _compiler, _machine, _caches, _vocabulary, _extras):
        try:
            checks.extend(group())
        except Exception as error:
            why = f"could not be checked: {type(error).__name__}: {error}"
            checks.append(Check(group.__name__.strip("_"), False, why))
    return checks


def _packages() -> Iterator[Check]:
    yield Check("python", True, f"{platform.python_version()} ({sys.executable})")
    yield Check("tinygpt", True, f"{__version__} ({Path(__file__).parents[1]})")
    for requirement in extras.requirements(None):
        name, version = _installed(requirement)
        fits = version is not None and _fits(version, requirement)
        found = version or "not installed"
        if version and not fits:
            found += f", but tinygpt needs {requirement}"
        yield Check(name, fits, found, None if fits else extras.install_command(requirement))


def _device() -> Iterator[Check]:
    try:
        yield Check("device", True, device.require_device())
    except DeviceError as error:
        unknown = error.__cause__ is None and "DEV=" in str(error)
        why = (str(error), "unset DEV, or set DEV=CPU") if unknown else None
        yield Check("device", False, *(why or device.trouble(error.__cause__)))


def time_devices() -> Iterator[Check]:
    """The time of a step on each, where there are several."""
    names = pace.candidates()
    if len(names) == 1:
        return
    used = os.environ.get("DEV", "").upper().split(":")[0]
    for name in names:
        if (seconds := pace.seconds_per_step(name)) is not None:
            chosen = "used now" if name == used else f"DEV={name} chooses it"
            found = f"{1000 * seconds:,.1f} ms for a small step; {chosen}"
            yield Check(f"device {name}", True, found, optional=True)


def _compiler() -> Iterator[Check]:
    path = shutil.which(device.compiler())
    version = _first_line([path, "--version"]) if path else ""
    if path is None or "clang" not in version:
        found = f"{path}, {version or 'does not start'}" if path else "none"
        needed = os.environ.get("DEV", "CPU").startswith("CPU")
        yield Check("compiler", False, found, device.trouble()[1], optional=not needed)
    elif device.is_shim(path):
        yield Check("compiler", True, f"{version} in {device.bundled_zig()}, the wheel ziglang")
    else:
        chosen = "CC" if os.environ.get("CC") else "PATH"
        yield Check("compiler", True, f"{version} in {path}, found by {chosen}")


def _machine() -> Iterator[Check]:
    yield Check("cores", True, f"{resources.cores()} usable of {os.cpu_count()}")
    yield Check("memory", True, size(resources.total_memory()))


def _caches() -> Iterator[Check]:
    wanted, used = folders.wanted_cache_dir(), folders.cache_dir()
    taken = disk_cache.size_of(used.rglob("*"))
    found = f"{used} ({size(taken)})"
    if used != wanted:
        found = f"{wanted} cannot be written; using {found}"
    cure = None if used == wanted else "set TINYGPT_CACHE to a folder of yours"
    yield Check("cache", used == wanted, found, cure, optional=True)
    clear = "tinygpt doctor --clear-cache"
    kernels = disk_cache.folder_of(device.kernel_database())
    trouble = disk_cache.trouble(kernels)
    found = f"{kernels} {trouble or f'({size(disk_cache.taken(kernels))})'}"
    yield Check("kernel cache", not trouble, found, clear if trouble else None, optional=True)
    taken, limit = disk_cache.size_of(folders.token_files()), folders.cache_limit()
    found = f"{next(folders.token_folders())} ({size(taken)}, kept below {size(limit)})"
    yield Check("token cache", True, found, optional=True)


def clear_caches() -> tuple[int, list[str]]:
    """Delete kernels and token files; -> the bytes of them, and what could not be deleted."""
    places = {disk_cache.folder_of(device.kernel_database())}
    for folder in (folders.cache_dir(), folders.private_temp()):
        places.update(folder.glob(disk_cache.PATTERN))
    files = [file for place in places for file in disk_cache.entries(place)]
    files += folders.token_files()
    before = disk_cache.size_of(files)
    disk_cache.remove(files)
    return before - disk_cache.size_of(files), [str(path) for path in files if path.exists()]


def _vocabulary() -> Iterator[Check]:
    # tiktoken names the two files, and their hashes, in the code of its function gpt2.
    gpt2 = import_module("tiktoken_ext.openai_public").gpt2
    pinned = [c for c in gpt2.__code__.co_consts if isinstance(c, str)]
    hashes = {c for c in pinned if re.fullmatch("[0-9a-f]{64}", c)}
    urls = [c for c in pinned if c.startswith("https://")]
    if hashes <= _hashes(map(vocabulary.cache_path, urls)):
        found = f"tiktoken's cache {Path(str(vocabulary.cache_path(urls[0]))).parent}"
    elif hashes <= _hashes(vocabulary.offline_path(url.rpartition("/")[2]) for url in urls):
        found = "the extra offline"
    else:
        found = "not on this machine; downloaded when it is first used"
        yield Check("GPT-2 vocabulary", False, found, device.compiler_cure(), optional=True)
        return
    yield Check("GPT-2 vocabulary", True, found, optional=True)


def _extras() -> Iterator[Check]:
    for extra in extras.names():
        if extra in NOT_FOR_USERS:
            continue
        packages = [_installed(requirement) for requirement in extras.requirements(extra)]
        missing = [name for name, version in packages if version is None]
        found = ", ".join(f"{name} {version or 'not installed'}" for name, version in packages)
        cure = extras.cure(extra) if missing else None
        yield Check(f"extra {extra}", not missing, found, cure, optional=True)


def _installed(requirement: str) -> tuple[str, str | None]:
    """The name in a requirement, and the version that is installed."""
    name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
    try:
        return name, metadata.version(name)
    except metadata.PackageNotFoundError:
        return name, None


def _fits(version: str, requirement: str) -> bool:
    """Whether a version meets a pin such as ``==0.14.*``; pip has seen to the other kinds."""
    pin = re.search(r"==([\d.]+)\*", requirement)
    return pin is None or version.startswith(pin.group(1))


def _hashes(paths: Iterable[Path | None]) -> set[str]:
    return {hashlib.sha256(p.read_bytes()).hexdigest() for p in paths if p and p.is_file()}


def _first_line(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return (done.stdout.splitlines() or [""])[0]
