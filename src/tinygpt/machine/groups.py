"""What the control groups of this process allow it: cores and memory (Linux).

A limit may stand at any level: a container has one at the root it sees, systemd, Slurm and
Kubernetes set theirs on groups below, and the lowest counts. Version 1 has a tree for each
controller, version 2 one for all; a system may use both. See cgroups(7).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

PROCESS = Path("/proc/self")
UNLIMITED = 1 << 60
"""Version 1 has no word for no limit, but a number of pages that no machine has."""


def core_quota() -> float | None:
    """Cores that this process may keep busy on average, or None without a limit."""
    quotas = []
    for group in _groups("cpu"):
        words = _read(group / "cpu.max")  # "max 100000" or "150000 100000"
        words = words or _read(group / "cpu.cfs_quota_us") + _read(group / "cpu.cfs_period_us")
        numbers = [int(word) for word in words if word.isdigit()]  # neither "max" nor "-1"
        if len(numbers) == 2 and all(numbers):
            quotas.append(numbers[0] / numbers[1])
    return min(quotas, default=None)


def memory_limit() -> int | None:
    """Bytes that this process may have at most, or None without a limit."""
    return min((limit for limit, _ in _memory()), default=None)


def memory_left() -> int | None:
    """Bytes that it could still take, caches of files counted as free, or None without a limit."""
    left = [max(limit - _used(group), 0) for limit, group in _memory()]
    return min(left, default=None)


def _memory() -> Iterator[tuple[int, Path]]:
    """The limits of all levels, each with its group."""
    for group in _groups("memory"):
        for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
            words = _read(group / name)
            if words and words[0].isdigit() and 0 < int(words[0]) < UNLIMITED:
                yield int(words[0]), group


def _used(group: Path) -> int:
    """Bytes of a group and of those below it, without caches that the system would give up."""
    used = _read(group / "memory.current") or _read(group / "memory.usage_in_bytes")
    words = _read(group / "memory.stat")
    stat = dict(zip(words[::2], words[1::2], strict=False))
    cached = stat.get("total_inactive_file") or stat.get("inactive_file", "0")
    with suppress(ValueError, IndexError):
        return max(int(used[0]) - int(cached), 0)
    return 0


def _groups(controller: str) -> Iterator[Path]:
    """The folders of this process's groups for a controller, from its own up to the root."""
    for root, mounted in _mounts(controller):
        path = _path(controller, mounted)
        if path is None:
            continue
        # Inside a container the root may be the group that the path begins with.
        inner = path[len(root) :] if root != "/" and f"{path}/".startswith(f"{root}/") else path
        own = mounted / inner.lstrip("/")
        if ".." in own.parts or not own.is_dir():  # a path that is outside of what is mounted
            own = mounted
        yield own
        yield from (p for p in own.parents if p == mounted or mounted in p.parents)


def _mounts(controller: str) -> Iterator[tuple[str, Path]]:
    """Where groups for a controller are mounted, and which group is the root there."""
    for line in _lines("mountinfo"):
        # id parent device ROOT PLACE options [fields] - KIND source OPTIONS
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or not kind:
            continue
        first = kind[0] == "cgroup" and controller in kind[-1].split(",")
        if first or kind[0] == "cgroup2":
            yield fields[3], Path(fields[4].replace("\\040", " "))


def _path(controller: str, mounted: Path) -> str | None:
    """The path of this process's group, as /proc/self/cgroup has it for that tree."""
    second = (mounted / "cgroup.controllers").exists()
    for line in _lines("cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if (number == "0" and not controllers) if second else controller in controllers.split(","):
            return path
    return None


def _lines(name: str) -> list[str]:
    try:
        return (PROCESS / name).read_text(errors="replace").splitlines()
    except OSError:
        return []


def _read(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except (OSError, UnicodeDecodeError):
        return []
