"""The kernel cache: whatever happens to its files, work goes on, and one line says why."""

from __future__ import annotations

import errno
import logging
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tinygpt.cli import main
from tinygpt.files import folders
from tinygpt.machine import disk_cache, doctor
from tinygpt.machine.disk_cache import KernelCache

Said = Callable[[], list[str]]


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Said:
    """What was said so far."""
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of 100 kernels of 2 kB."""
    path = tmp_path_factory.mktemp("filled") / "kernels-0.db.d"
    cache = KernelCache(path)
    for i in range(100):
        cache.put("kernel", i, bytes([i]) * 2000)
    return path


@pytest.fixture
def path(filled: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(filled, tmp_path / "kernels-0.db.d"))


def test_what_was_kept_is_found_in_every_thread_and_by_the_next_process(path: Path) -> None:
    cache = KernelCache(path)
    found = [cache.get("kernel", 7)]
    thread = threading.Thread(target=lambda: found.append(cache.get("kernel", 7)))
    thread.start()
    thread.join()
    code = (
        "import sys; from tinygpt.machine.disk_cache import *; print(len(KernelCache(Path(%r)).%s))"
    )
    command = [sys.executable, "-c", code % (str(path), "get('kernel', 7)")]
    assert found == [bytes([7]) * 2000] * 2
    assert subprocess.check_output(command, text=True) == "2000\n"
    assert cache.get("kernel", 100) is None and cache.get("other", 7) is None


def test_an_entry_for_another_machine_or_version_is_not_found(path: Path) -> None:
    assert KernelCache(path, "another processor").get("kernel", 7) is None


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "garbage": lambda data: b"garbage\n",
    "head": lambda data: b"\0" * 20 + data[20:],
    "byte": lambda data: data[:700] + b"\xa5" + data[701:],
    "cut": lambda data: data[:900],
    "empty": lambda data: b"",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_never_run_and_made_again(damage: str, path: Path, said: Said) -> None:
    cache = KernelCache(path)
    damaged = cache._path("kernel", 9)
    damaged.write_bytes(DAMAGE[damage](damaged.read_bytes()))
    assert cache.get("kernel", 9) is None and cache.get("kernel", 8) == bytes([8]) * 2000
    cache.put("kernel", 9, b"new")
    assert KernelCache(path).get("kernel", 9) == b"new" and said() == []
    assert len(disk_cache.entries(path)) == 100


def test_a_file_that_the_user_named_is_left_alone(tmp_path: Path, said: Said) -> None:
    """Such as an SQLite file of tinygrad's own: kernels then lie in a folder beside it."""
    mine = tmp_path / "cache.db"
    mine.write_text("my notes")
    cache = KernelCache(disk_cache.folder_of(mine))
    cache.put("kernel", 1, "value")
    assert cache.get("kernel", 1) == "value" and said() == []
    cache.clear()
    assert cache.get("kernel", 1) is None and mine.read_text() == "my notes"


@pytest.mark.parametrize("place", ["file", "file/below", "pipe"])
def test_a_place_that_cannot_hold_it_is_done_without(
    place: str, tmp_path: Path, said: Said
) -> None:
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    cache = KernelCache(tmp_path / place)
    for _ in range(3):
        cache.put("kernel", 1, "value")
        assert cache.get("kernel", 1) is None
    assert len(said()) == 1 and str(tmp_path / place) in said()[0]
    assert "compiled again" in said()[0] and "compiler" not in said()[0]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EIO])
def test_what_cannot_be_written_is_still_read(
    code: int, path: Path, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Path, data: bytes) -> None:
        with self.open("wb") as file:
            file.write(data[:100])
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "write_bytes", fails)
    cache = KernelCache(path)
    for _ in range(3):
        cache.put("kernel", "new", "value")
    assert cache.get("kernel", 3) == bytes([3]) * 2000
    assert cache.get("kernel", "new") is None
    assert len(said()) == 1 and os.strerror(code) in said()[0]
    assert len(list(path.iterdir())) == 100  # nothing half written stays


def test_a_folder_in_which_nothing_can_be_written_is_read(
    path: Path, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    for file in path.iterdir():
        os.utime(file, (0, 0))
    monkeypatch.setattr(os, "utime", refused)
    monkeypatch.setattr(Path, "write_bytes", refused)
    cache = KernelCache(path)
    assert cache.get("kernel", 3) == bytes([3]) * 2000
    cache.put("kernel", 101, b"new")
    assert cache.get("kernel", 3) == bytes([3]) * 2000
    assert len(said()) == 1 and "Permission denied" in said()[0]


def test_what_cannot_be_pickled_is_not_kept_and_stops_nothing(path: Path) -> None:
    cache = KernelCache(path)
    cache.put("kernel", 7, lambda: None)
    assert cache.get("kernel", 7) == bytes([7]) * 2000


def test_kernels_that_were_not_used_for_longest_go_first(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, now = KernelCache(path), time.time()
    for i in range(100):
        os.utime(cache._path("kernel", i), (now, now - 100 * disk_cache.DAY + i))
    monkeypatch.setenv("TINYGPT_CACHE_GB", "0.0010")  # a tenth of it: 100 kB for 200 kB
    assert cache.get("kernel", 0) == bytes([0]) * 2000  # used today
    cache.put("kernel", "new", b"new")
    kept = {i for i in range(100) if cache.get("kernel", i) is not None}
    assert 0 in kept and cache.get("kernel", "new") == b"new"
    assert 30 < len(kept) < 50 and kept - {0} == set(range(101 - len(kept), 100))


def test_a_cache_below_its_limit_is_not_listed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To list tens of thousands of files takes as much memory as a small model in training."""
    listed: list[Path] = []
    monkeypatch.setattr(disk_cache, "entries", lambda place: listed.append(place) or [])
    size = sum(file.stat().st_size for file in path.iterdir())
    disk_cache.make_room(path, size)
    assert listed == []
    disk_cache.make_room(path, size - 1)
    assert listed == [path]


def test_kernels_for_other_processors_go_when_all_exceed_the_limit(path: Path) -> None:
    """Also what an earlier version left, which kept all of them in one file."""
    for days, name in enumerate(
        ["kernels-1.db", "damaged-kernels-2.db", "kernels-3.db.d/x.kernel"]
    ):
        other = path.parent / name
        other.parent.mkdir(exist_ok=True)
        other.write_bytes(b"x" * 100_000)
        os.utime(other, (0, 1000 * days))
    foreign = [path.parent / "my.db", path / "mine.txt"]
    for file in foreign:
        file.write_bytes(b"x" * 1_000_000)
    size = disk_cache.size_of(disk_cache.entries(path))
    disk_cache.make_room(path, size + 300_000)
    assert (path.parent / "kernels-1.db").exists()
    disk_cache.make_room(path, (size + 100_000) * 4 // 3)
    left = sorted(str(p.relative_to(path.parent)) for p in path.parent.rglob("*") if p.is_file())
    ours = [p for p in left if p.startswith("kernels-0.db.d/") and p.endswith(".kernel")]
    assert len(ours) == 100
    assert [p for p in left if p not in ours] == [
        "kernels-0.db.d/mine.txt",
        "kernels-3.db.d/x.kernel",
        "my.db",
    ]
    disk_cache.make_room(path, size)
    assert not (path.parent / "kernels-3.db.d").exists() and all(file.exists() for file in foreign)


@pytest.mark.parametrize(
    ("given", "limit"), [("", 10e9), ("2.5", 2.5e9), ("0", 0), ("x", 10e9), ("inf", 10e9)]
)
def test_the_limit_is_what_the_environment_says(
    given: str, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINYGPT_CACHE_GB", given)
    assert folders.cache_limit() == limit


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({"XDG_CACHE_HOME": "/x/cache"}, "/x/cache/tinygpt"),
        ({"XDG_CACHE_HOME": "relative"}, "/x/me/.cache/tinygpt"),
        ({"XDG_CACHE_HOME": ""}, "/x/me/.cache/tinygpt"),
        ({"XDG_CACHE_HOME": "~/c"}, "/x/me/.cache/tinygpt"),
        ({"TINYGPT_CACHE": "~/c"}, "/x/me/c"),
        ({"HOME": "elsewhere"}, None),
    ],
)
def test_the_cache_is_in_no_folder_that_depends_on_the_current_one(
    environment: dict[str, str], wanted: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    for name in ("TINYGPT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"HOME": "/x/me"} | environment).items():
        monkeypatch.setenv(name, value)
    expected = Path(wanted) if wanted else folders.private_temp() / "tinygpt"
    assert folders.wanted_cache_dir() == expected


def test_pickles_of_tinygrad_are_kept_as_they_are(path: Path) -> None:
    cache = KernelCache(path)
    cache.put("kernel", {"b": 1, "a": "x"}, pickle.dumps([1, 2]), prepickled=True)
    assert cache.get("kernel", {"a": "x", "b": 1}) == [1, 2]


@pytest.fixture
def own(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That cache, and a token file, as the user's own."""
    monkeypatch.setenv("TINYGPT_CACHE", str(tmp_path))
    monkeypatch.setenv("CACHEDB", str(path.with_suffix("")))
    monkeypatch.setattr(folders, "private_temp", lambda: tmp_path / "temporary")
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "text-1.npy").write_bytes(b"x" * 1_000_000)
    return path


def test_doctor_clears_both_caches_and_nothing_else(
    own: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: [])
    own.with_name("damaged-kernels-9.db").write_bytes(b"old")
    own.with_name("kernels-9.db-wal").touch()
    KernelCache(own.with_name("kernels-9.db.d")).put("kernel", 1, 2)
    foreign = [own.with_name("shakespeare.txt"), own.with_name("tokens") / "mine.txt"]
    for file in foreign:
        file.write_text("text")
    kernels = [*own.iterdir(), *own.with_name("kernels-9.db.d").iterdir()]
    expected = (disk_cache.size_of(kernels) + 1_000_003) / 1e6
    assert main(["doctor", "--clear-cache"]) == 0
    assert f"cleared {expected:.1f} MB" in capsys.readouterr().err
    assert sorted(p for p in own.parent.rglob("*") if p.is_file()) == sorted(foreign)


def test_doctor_empties_a_cache_that_the_user_named(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = own.rename(own.with_name("mine.d"))
    (mine / "notes.txt").touch()
    monkeypatch.setenv("CACHEDB", str(mine.with_suffix("")))
    kernels = disk_cache.size_of(mine.iterdir())
    assert doctor.clear_caches() == (1_000_000 + kernels, [])
    assert [p.name for p in mine.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("wrong", [None, "no folder", "not writable"])
def test_doctor_looks_at_the_kernel_cache(
    wrong: str | None, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if wrong == "no folder":
        shutil.rmtree(own)
        os.mkfifo(own)
    if wrong == "not writable":
        monkeypatch.setattr(os, "access", lambda path, mode: path != own)
    found = {check.name: check for check in doctor._caches()}
    check = found["kernel cache"]
    assert check.ok is (wrong is None) and check.optional
    assert check.cure == (wrong and "tinygpt doctor --clear-cache")
    assert "1.0 MB" in found["token cache"].found and "10.0 GB" in found["token cache"].found
