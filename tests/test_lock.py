"""One writer a folder, whatever became of the one before."""

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest

from tinygpt.errors import UsageError
from tinygpt.files import atomic
from tinygpt.runs.folder import LOCK
from tinygpt.runs.lock import FolderLock, Holder

HOLD = """
import sys, time
from pathlib import Path
from tinygpt.runs.lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
time.sleep(60)
"""

RACE = """
import os, random, sys, time
from pathlib import Path
from tinygpt.errors import UsageError
from tinygpt.runs.lock import FolderLock
folder, rounds = Path(sys.argv[1]), 0
end = time.monotonic() + 60
while rounds < 60 and time.monotonic() < end:
    lock = FolderLock(folder)
    try:
        lock.acquire()
    except UsageError:
        continue
    os.close(os.open(folder / "alone", os.O_CREAT | os.O_EXCL))  # fails if anybody else is here
    time.sleep(random.random() / 1000)
    (folder / "alone").unlink()
    lock.release()
    rounds += 1
print(rounds)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of tmp_path."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def held_by(**changes):
    """What a lock file says."""
    return json.dumps({**vars(Holder.me()), **changes})


def test_a_second_process_is_refused_and_told_who_the_first_is(tmp_path, holder):
    with pytest.raises(UsageError) as error:
        FolderLock(tmp_path).acquire()
    assert f"process {holder.pid} on this machine, since 2" in str(error.value)
    assert f"kill {holder.pid}" in str(error.value)


def test_a_killed_holder_blocks_nobody(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / LOCK).exists()
    second = FolderLock(tmp_path)
    assert second.acquire() is None
    assert Holder(**json.loads((tmp_path / LOCK).read_text())).pid == os.getpid()
    second.release()


def test_within_a_process_too_there_is_one(tmp_path):
    first, second = FolderLock(tmp_path / "run"), FolderLock(tmp_path / "run")
    first.acquire()
    with pytest.raises(UsageError, match="being trained already"):
        second.acquire()
    assert first.held and not second.held
    assert first.acquire() is None  # again, by the same
    first.release()
    first.release()
    assert second.acquire() is None
    second.release()
    assert list((tmp_path / "run").iterdir()) == []


def test_of_many_threads_one_gets_it(tmp_path):
    winners, refused, start = [], [], threading.Barrier(16)

    def run():
        lock = FolderLock(tmp_path)
        start.wait()
        try:
            lock.acquire()
            winners.append(lock)
        except UsageError:
            refused.append(lock)

    threads = [threading.Thread(target=run) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(winners), len(refused)) == (1, 15)
    winners[0].release()


def test_processes_that_come_and_go_are_never_there_together(tmp_path):
    """The file is removed and made again all the time: the race that lock files are known for."""
    command = [sys.executable, "-c", RACE, tmp_path]
    racers = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    results = [racer.communicate(timeout=120) for racer in racers]
    assert [(out.strip(), err) for out, err in results] == [("60", "")] * 3


def test_a_lock_that_nobody_holds_any_more_is_let_go(tmp_path):
    lock = FolderLock(tmp_path)
    lock.acquire()
    del lock
    gc.collect()
    again = FolderLock(tmp_path)
    again.acquire()
    again.release()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_copied_process_does_not_let_go_of_its_parents_lock(tmp_path):
    lock = FolderLock(tmp_path)
    lock.acquire()
    if (child := os.fork()) == 0:
        lock.release()
        os._exit(0)
    os.waitpid(child, 0)
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    lock.release()


@pytest.mark.parametrize(
    "left", ["", "{", "[]", '{"pid": "x"}', "[" * 4000, "x" * 10**6, held_by(pid=2**70)]
)
def test_whatever_stands_in_the_file_it_is_the_kernel_that_counts(tmp_path, left):
    (tmp_path / LOCK).write_text(left)
    lock = FolderLock(tmp_path)
    assert lock.acquire() is None
    lock.release()


def test_a_holder_on_another_machine_is_told(tmp_path):
    (tmp_path / LOCK).write_text(held_by(host="elsewhere", pid=7))
    lock = FolderLock(tmp_path)
    assert "process 7 on elsewhere" in lock.acquire()
    lock.release()


def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize(
    ("left", "free"),
    [
        (lambda: "", True),
        (lambda: held_by(pid=dead_pid()), True),
        (lambda: held_by(birth="another boot"), True),
        (lambda: held_by(), False),
        (lambda: held_by(pid=os.getppid(), birth=None), False),
        (lambda: held_by(host="elsewhere", pid=dead_pid()), False),
    ],
    ids=["empty", "dead", "pid used again", "alive", "alive, unknown birth", "other machine"],
)
def test_where_the_kernel_has_no_locks_the_word_of_the_file_counts(
    tmp_path, monkeypatch, left, free
):
    monkeypatch.setattr(atomic, "lock", lambda handle: None)
    (tmp_path / LOCK).write_text(left())
    mine = FolderLock(tmp_path)
    if free:
        mine.acquire()
        mine.release()
    else:
        with pytest.raises(UsageError, match=f"delete {tmp_path / LOCK}"):
            mine.acquire()


def test_errors_that_mean_no_locks_are_known(tmp_path, monkeypatch):
    import errno
    import fcntl

    def refuse(code):
        def flock(handle, how):
            raise OSError(code, os.strerror(code))

        return flock

    for code, answer in [(errno.ENOLCK, None), (errno.EWOULDBLOCK, False), (errno.ENOSYS, None)]:
        monkeypatch.setattr(fcntl, "flock", refuse(code))
        assert atomic.lock(0) is answer


def test_the_holder_says_who_and_where(tmp_path):
    mine = FolderLock(tmp_path)
    mine.acquire()
    told = json.loads((tmp_path / LOCK).read_text())
    assert (told["pid"], told["host"]) == (os.getpid(), socket.gethostname())
    mine.release()
