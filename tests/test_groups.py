"""Limits of control groups: both versions, at every level, and as containers see them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tinygpt.machine import groups, resources

GB = 1 << 30


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Build a process with these mounts and groups, and these files in them; -> the tree."""

    def build(mountinfo: str, cgroup: str, files: dict[str, str]) -> Path:
        process, tree = tmp_path / "self", tmp_path / "tree"
        process.mkdir()
        (process / "mountinfo").write_text(
            "22 1 8:1 / / rw - ext4 /dev/sda rw\n" + mountinfo % {"t": tree}
        )
        (process / "cgroup").write_text(cgroup)
        for name, text in files.items():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_text(text + "\n")
        monkeypatch.setattr(groups, "PROCESS", process)
        return tree

    return build


V2 = "30 22 0:26 / %(t)s rw,nosuid shared:4 - cgroup2 cgroup2 rw\n"
V1 = """\
32 31 0:29 / %(t)s/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / %(t)s/memory rw - cgroup cgroup rw,memory
36 31 0:33 / %(t)s/systemd rw - cgroup cgroup rw,name=systemd
"""
HYBRID = V1 + "41 31 0:38 / %(t)s/unified rw - cgroup2 cgroup2 rw\n"
DOCKER_V1 = V1.replace("0:29 /", "0:29 /docker/abc").replace("0:32 /", "0:32 /docker/abc")
HERE = {"cgroup.controllers": "cpu memory"}

CASES = {
    "a container sees its limit at the root": (
        V2, "0::/\n", HERE | {"cpu.max": "250000 100000", "memory.max": f"{4 * GB}"}, 2.5, 4
    ),
    "systemd sets it on a unit": (
        V2, "0::/user.slice/user-1000.slice/run-7.scope\n",
        HERE | {"user.slice/cpu.max": "400000 100000", "user.slice/memory.max": "max",
         "user.slice/user-1000.slice/cpu.max": "300000 100000",
         "user.slice/user-1000.slice/memory.high": f"{3 * GB}",
         "user.slice/user-1000.slice/run-7.scope/cpu.max": "max 100000",
         "user.slice/user-1000.slice/run-7.scope/memory.max": f"{6 * GB}"}, 3.0, 3
    ),
    "no limit anywhere": (
        V2, "0::/a/b\n", HERE | {"a/cpu.max": "max 100000", "a/b/memory.max": "max"}, None, None
    ),
    "the path is outside of a container's namespace": (
        V2, "0::/../../other\n", HERE | {"cpu.max": "50000 100000"}, 0.5, None
    ),
    "the path is the host's": (
        V2, "0::/kubepods/pod1/c2\n", HERE | {"cpu.max": "100000 100000"}, 1.0, None
    ),
    "version 1, Slurm sets it on a job": (
        V1, "5:memory:/slurm/uid_1/job_9/step_0/task_0\n3:cpu,cpuacct:/slurm/uid_1/job_9\n"
        "1:name=systemd:/x\n",
        {"cpu,cpuacct/slurm/uid_1/job_9/cpu.cfs_quota_us": "-1",
         "cpu,cpuacct/slurm/uid_1/job_9/cpu.cfs_period_us": "100000",
         "cpu,cpuacct/slurm/cpu.cfs_quota_us": "800000",
         "cpu,cpuacct/slurm/cpu.cfs_period_us": "100000",
         "memory/slurm/uid_1/job_9/memory.limit_in_bytes": f"{2 * GB}",
         "memory/slurm/uid_1/job_9/step_0/task_0/memory.limit_in_bytes": "9223372036854771712",
         "memory/memory.limit_in_bytes": "9223372036854771712"}, 8.0, 2
    ),
    "version 1, in a container that sees its own groups only": (
        DOCKER_V1, "5:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n",
        {"cpu,cpuacct/cpu.cfs_quota_us": "150000", "cpu,cpuacct/cpu.cfs_period_us": "50000",
         "memory/memory.limit_in_bytes": f"{GB}"}, 3.0, 1
    ),
    "version 1, in a group of such a container": (
        DOCKER_V1, "5:memory:/docker/abc/job\n3:cpu,cpuacct:/docker/abc\n",
        {"memory/memory.limit_in_bytes": f"{4 * GB}",
         "memory/job/memory.limit_in_bytes": f"{GB}"}, None, 1
    ),
    "both versions at once": (
        HYBRID, "5:memory:/m\n3:cpu,cpuacct:/c\n0::/u\n",
        {"unified/cgroup.controllers": "", "unified/u/cgroup.procs": "",
         "cpu,cpuacct/c/cpu.cfs_quota_us": "200000", "cpu,cpuacct/c/cpu.cfs_period_us": "100000",
         "memory/m/memory.limit_in_bytes": f"{5 * GB}"}, 2.0, 5
    ),
    "files that make no sense": (
        V2, "0::/a\nnonsense\n", HERE | {"a/cpu.max": "x", "cpu.max": "5 0", "a/memory.max": ""},
        None, None
    ),
    "no control groups": ("", "", {}, None, None),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_lowest_limit_of_all_levels_counts(case: str, system: Callable[..., Path]) -> None:
    mountinfo, cgroup, files, cores, memory = CASES[case]
    system(mountinfo, cgroup, files)
    assert groups.core_quota() == cores
    assert groups.memory_limit() == (memory and memory * GB)


def test_what_is_left_is_that_of_the_tightest_level(system: Callable[..., Path]) -> None:
    """The own group has used little of its limit, the one above nearly all of its own."""
    files = {
        "a/memory.max": "1000000", "a/memory.current": "900000",
        "a/memory.stat": "anon 1\ninactive_file 150000", "a/b/memory.max": "700000",
        "a/b/memory.current": "100000", "a/b/memory.stat": "anon 1",
    }  # fmt: skip
    system(V2, "0::/a/b\n", HERE | files)
    assert groups.memory_left() == 250_000
    assert resources.available_memory() == 250_000 and resources.total_memory() == 700_000


def test_what_is_left_in_version_1_counts_caches_of_all_below(system: Callable[..., Path]) -> None:
    files = {
        "memory/m/memory.limit_in_bytes": "1000000", "memory/m/memory.usage_in_bytes": "900000",
        "memory/m/memory.stat": "inactive_file 5\ntotal_inactive_file 300000",
    }  # fmt: skip
    system(V1, "5:memory:/m\n", files)
    assert groups.memory_left() == 400_000


@pytest.mark.parametrize(("quota", "usable"), [("200000", 2), ("50000", 1), ("290000", 2)])
def test_cores_respect_the_quota_of_a_group_below_the_root(
    quota: str, usable: int, system: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)), raising=False)
    system(V2, "0::/job\n", HERE | {"job/cpu.max": f"{quota} 100000"})
    assert resources.cores() == usable
