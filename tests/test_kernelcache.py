"""The kernel cache: whatever happens to its file, work goes on, and is told why once."""

from __future__ import annotations

import logging
import os
import pickle
import shutil
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tinygpt.cli import main
from tinygpt.files import folders
from tinygpt.machine import device, disk_cache, doctor
from tinygpt.machine.disk_cache import KernelCache

Said = Callable[[], list[str]]


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Said:
    """What was said so far."""
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of 100 kernels of 2 kB, closed."""
    path = tmp_path_factory.mktemp("filled") / "kernels-0.db"
    cache = KernelCache(path)
    for i in range(100):
        cache.put("kernel", i, bytes([i]) * 2000)
    cache.disconnect()
    return path


@pytest.fixture
def path(filled: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copy(filled, tmp_path))


def test_what_was_kept_is_found_in_every_thread_and_by_the_next_process(path: Path) -> None:
    cache = KernelCache(path)
    found = [cache.get("kernel", 7)]

    def look() -> None:
        found.append(cache.get("kernel", 7))
        cache.disconnect()

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [bytes([7]) * 2000] * 2
    assert cache.get("kernel", 100) is None and cache.get("other", 7) is None


def test_an_entry_for_another_machine_or_version_is_not_found(path: Path) -> None:
    assert KernelCache(path, "another processor").get("kernel", 7) is None


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "garbage": lambda data: b"garbage\n",
    "head": lambda data: b"\0" * 200 + data[200:],
    "middle": lambda data: data[: len(data) // 3] + b"\xa5" * (len(data) // 3) + data[-9000:],
    "cut": lambda data: data[:9000],
    "other": lambda data: b"",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_set_aside_and_made_again(damage: str, path: Path, said: Said) -> None:
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    if damage == "other":  # a table of that name, but another's
        path.unlink()
        with sqlite3.connect(path) as other:
            other.execute("CREATE TABLE kernels (a)")
    cache = KernelCache(path)
    for i in range(100):
        found = cache.get("kernel", i)
        assert found in (None, bytes([i]) * 2000)
        if found is None:
            cache.put("kernel", i, bytes([i]) * 2000)
    cache.disconnect()
    again = KernelCache(path)
    assert sum(again.get("kernel", i) == bytes([i]) * 2000 for i in range(100)) >= 90
    assert len(said()) == 1 and "damaged" in said()[0] and str(path) in said()[0]
    assert path.with_name("damaged-kernels-0.db").is_file()


def test_a_changed_byte_of_a_kernel_is_never_run(path: Path, said: Said) -> None:
    data = path.read_bytes()
    at = data.index(bytes([9]) * 1500) + 700
    path.write_bytes(data[:at] + b"\x0a" + data[at + 1 :])
    cache = KernelCache(path)
    assert cache.get("kernel", 9) is None
    cache.put("kernel", 9, b"new")
    assert cache.get("kernel", 9) == b"new" and said() == []


def test_a_file_that_the_user_named_is_never_moved(tmp_path: Path, said: Said) -> None:
    mine = tmp_path / "notes.txt"
    mine.write_text("my notes")
    cache = KernelCache(mine)
    cache.put("kernel", 1, "value")
    assert cache.get("kernel", 1) is None
    assert mine.read_text() == "my notes" and list(tmp_path.iterdir()) == [mine]
    assert len(said()) == 1 and "not a database" in said()[0]


@pytest.mark.parametrize("place", ["folder", "file/below", "pipe"])
def test_a_place_that_cannot_hold_it_is_done_without(
    place: str, tmp_path: Path, said: Said
) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / place / "kernels-0.db" if "/" in place else tmp_path / "kernels-0.db"
    if place == "folder":
        path.mkdir()
    if place == "pipe":
        os.mkfifo(path)
    cache = KernelCache(path)
    cache.put("kernel", 1, "value")
    assert cache.get("kernel", 1) is None
    assert len(said()) == 1 and "compiler" not in said()[0]
    assert "goes on without it" in said()[0]


def failing(code: int, message: str) -> sqlite3.OperationalError:
    error = sqlite3.OperationalError(message)
    error.sqlite_errorcode = code
    return error


class Broken:
    """A connection that cannot write."""

    def __init__(self, connection: sqlite3.Connection, error: Exception) -> None:
        self.connection, self.error = connection, error

    def execute(self, statement: str, *rest: object) -> object:
        if statement.startswith(("INSERT", "UPDATE")):
            raise self.error
        return self.connection.execute(statement, *rest)

    def close(self) -> None:
        self.connection.close()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (sqlite3.SQLITE_FULL, "database or disk is full"),
        (sqlite3.SQLITE_READONLY, "attempt to write a readonly database"),
        (sqlite3.SQLITE_BUSY, "database is locked"),
        (sqlite3.SQLITE_PROTOCOL, "locking protocol"),
        (sqlite3.SQLITE_IOERR, "disk I/O error"),
    ],
)
def test_what_cannot_be_written_is_still_read(
    code: int, message: str, path: Path, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = disk_cache.open_database
    error = failing(code, message)
    monkeypatch.setattr(disk_cache, "open_database", lambda *a: Broken(opened(*a), error))
    cache = KernelCache(path)
    for _ in range(3):
        cache.put("kernel", "new", "value")
    assert cache.get("kernel", 3) == bytes([3]) * 2000
    assert cache.get("kernel", "new") is None
    assert len(said()) == 1 and message in said()[0] and "goes on with what is in it" in said()[0]
    assert path.is_file() and not path.with_name("damaged-kernels-0.db").exists()


def test_a_folder_in_which_nothing_can_be_written_is_read(
    path: Path, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = disk_cache.open_database

    def read_only(path: Path, immutable: bool = False) -> sqlite3.Connection:
        if not immutable:
            raise failing(sqlite3.SQLITE_CANTOPEN, "unable to open database file")
        return opened(path, immutable)

    monkeypatch.setattr(disk_cache, "open_database", read_only)
    cache = KernelCache(path)
    assert cache.get("kernel", 3) == bytes([3]) * 2000
    cache.put("kernel", 101, b"new")
    assert cache.get("kernel", 3) == bytes([3]) * 2000
    assert len(said()) == 1 and "readonly" in said()[0]


def test_a_file_of_another_user_is_set_aside(
    path: Path, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    accessible = os.access
    path.chmod(0o400)

    def as_a_user(name: Path, mode: int) -> bool:
        return accessible(name, mode) and not (mode & os.W_OK and not name.stat().st_mode & 0o200)

    monkeypatch.setattr(os, "access", as_a_user)
    cache = KernelCache(path)
    cache.put("kernel", "new", "value")
    assert cache.get("kernel", "new") == "value"
    assert len(said()) == 1 and "not writable" in said()[0]
    assert path.with_name("damaged-kernels-0.db").is_file()


def test_what_cannot_be_pickled_is_not_kept_and_stops_nothing(path: Path) -> None:
    cache = KernelCache(path)
    cache.put("kernel", 7, lambda: None)
    assert cache.get("kernel", 7) == bytes([7]) * 2000


def test_kernels_that_were_not_used_for_longest_go_first(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    today = disk_cache._today()
    monkeypatch.setattr(disk_cache, "_today", lambda: today + 2)
    monkeypatch.setenv("TINYGPT_CACHE_GB", "0.0010")  # a tenth of it: 100 kB for 200 kB
    cache = KernelCache(path)
    assert cache.get("kernel", 0) == bytes([0]) * 2000  # used today
    before = path.stat().st_size
    cache.put("kernel", "new", b"new")
    kept = {i for i in range(100) if cache.get("kernel", i) is not None}
    assert 0 in kept and cache.get("kernel", "new") == b"new"
    assert 30 < len(kept) < 50 and kept - {0} == set(range(101 - len(kept), 100))
    cache.disconnect()
    assert path.stat().st_size < 0.6 * before


def test_files_for_other_processors_go_when_all_exceed_the_limit(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for days, name in enumerate(["kernels-1.db", "damaged-kernels-2.db", "kernels-3.db"]):
        other = path.with_name(name)
        other.write_bytes(b"x" * 100_000)
        other.with_name(name + "-wal").touch()
        for part in disk_cache.parts(other):
            if part.exists():
                os.utime(part, (0, 1000 * days))
    foreign = path.with_name("my.db")
    foreign.write_bytes(b"x" * 1_000_000)
    limit = path.stat().st_size + 150_000
    disk_cache.remove_others(path, limit)
    left = sorted(p.name for p in path.parent.iterdir())
    assert left == ["kernels-0.db", "kernels-3.db", "kernels-3.db-wal", "my.db"]


def test_every_thread_moves_on_to_the_new_file(path: Path, said: Said) -> None:
    """A connection to the file that was set aside must not set its successor aside."""
    cache = KernelCache(path)
    cache.get("kernel", 1)
    turns = [threading.Event() for _ in range(2)]
    found: list[object] = []

    def other() -> None:
        cache.get("kernel", 1)
        turns[0].set()
        turns[1].wait(10)
        found.append(cache.get("kernel", "new"))
        cache.disconnect()

    thread = threading.Thread(target=other)
    thread.start()
    assert turns[0].wait(10)
    cache._failed(failing(sqlite3.SQLITE_CORRUPT, "database disk image is malformed"), True)
    cache.put("kernel", "new", "value")
    turns[1].set()
    thread.join()
    assert found == ["value"] and cache.readable and cache.writable and len(said()) == 1


@pytest.mark.parametrize(
    ("kind", "shared"),
    [("ext4", False), ("tmpfs", False), ("nfs4", True), ("fuse.sshfs", True), ("lustre", True)],
)
def test_equal_machines_have_a_file_each_in_a_folder_they_share(
    kind: str, shared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = tmp_path / "mounts"
    home = str(tmp_path / "my home").replace(" ", "\\040")
    mounts.write_text(f"/dev/sda1 / ext4 rw 0 0\nserver:/x {home} {kind} rw 0 0\n")
    monkeypatch.setattr(folders, "MOUNTS", mounts)
    monkeypatch.setenv("TINYGPT_CACHE", str(tmp_path / "my home" / "cache"))
    monkeypatch.setattr("platform.node", lambda: "node7")
    assert device.kernel_database().name.endswith("-node7.db") is shared


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
    monkeypatch.setenv("CACHEDB", str(path))
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
    own.with_name("kernels-9.db").touch()
    foreign = [own.with_name("shakespeare.txt"), own.with_name("tokens") / "mine.txt"]
    for file in foreign:
        file.write_text("text")
    expected = (own.stat().st_size + 1_000_003) / 1e6
    assert main(["doctor", "--clear-cache"]) == 0
    assert f"cleared {expected:.1f} MB" in capsys.readouterr().err
    assert sorted(p for p in own.parent.rglob("*") if p.is_file()) == sorted(foreign)


def test_doctor_empties_a_cache_that_the_user_named(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = own.rename(own.with_name("mine.db"))
    monkeypatch.setenv("CACHEDB", str(mine))
    assert doctor.clear_caches() == (1_000_000, [])
    assert mine.is_file() and KernelCache(mine).get("kernel", 3) is None


@pytest.mark.parametrize("damage", [None, "garbage", "middle"])
def test_doctor_looks_at_the_kernel_cache(damage: str | None, own: Path) -> None:
    if damage:
        own.write_bytes(DAMAGE[damage](own.read_bytes()))
    found = {check.name: check for check in doctor._caches()}
    check = found["kernel cache"]
    assert check.ok is (damage is None) and check.optional
    assert check.cure == (damage and "tinygpt doctor --clear-cache")
    assert "1.0 MB" in found["token cache"].found and "10.0 GB" in found["token cache"].found
