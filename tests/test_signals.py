"""Signals set a flag, whatever is going on, and nothing is lost; the second one ends it at once."""

import fcntl
import os
import pty
import random
import shlex
import signal
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest

from tinygpt.cli import main
from tinygpt.cli.signals import run_signals
from tinygpt.machine.device import compiler
from tinygpt.runs import checkpoint
from tinygpt.runs.folder import list_checkpoints
from tinygpt.runs.history import read

ROOT = Path(__file__).parents[1]
TINY = shlex.split(
    "--tokenizer char --model.n-layer 1 --model.n-embd 8 --model.n-head 1 --model.block-size 8"
    " --train.batch-size 2 --train.eval-iters 1 --train.warmup-steps 0 --train.eval-interval 2"
)
CC = """#!/bin/sh
if [ -s "$ARMED" ]; then
    read -r name < "$ARMED"
    : > "$ARMED"
    kill -s "${name#SIG}" 0
fi
exec "$REAL_CC" "$@"
"""
"""A compiler that sends the signal to everybody, itself included, and then goes on."""


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "cats.txt"
    path.write_text("the cat sat on the mat, and the dog sat on the log.\n" * 40)
    return path


def start(source, moments, *arguments, env=None, **options):
    """The program in a session of its own, as a shell or Slurm starts it."""
    folder = source.parent
    (folder / "clang").write_text(CC)
    (folder / "clang").chmod(0o700)
    ours = {"CC": folder / "clang", "REAL_CC": compiler(), "ARMED": folder / "armed"}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.signal_script", moments, *map(str, arguments)], cwd=ROOT,
        env={**os.environ, **ours, **(env or {})}, start_new_session=True,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options},
    )  # fmt: skip


def new_kernel():
    """Flags that make one kernel of the step different from any that was compiled before."""
    return ["--train.eps", f"{random.SystemRandom().uniform(1e-8, 2e-8):.15e}"]


def check_whole_and_going_on(folder, steps):
    """All checkpoints are whole, and --resume takes the steps that are left."""
    for path in list_checkpoints(folder):
        checkpoint.verify(path)
    assert main(["train", "--resume", "--out", str(folder)]) == 0
    assert [row["iter"] for row in read(folder / "metrics.jsonl")] == list(range(1, steps + 1))


@pytest.mark.parametrize(
    ("moments", "code", "reached"),
    [
        ("compile:1:SIGTERM", 143, 1),
        ("step:1:SIGUSR1,step:3:SIGINT", 130, 3),
        ("evaluation:2:SIGTERM", 143, 4),
        # SIGINT twice: some wrappers pass on what the terminal has sent already
        ("save:1:SIGINT,save:1:SIGINT", 130, None),
    ],
    ids=["compile", "step", "evaluation", "save"],
)
def test_a_signal_to_the_whole_group_costs_nothing(text, capsys, moments, code, reached):
    folder = text.parent / "run"
    flags = [*TINY, *new_kernel(), "--train.max-iters", "8", "--train.checkpoint-interval", "2"]
    with start(text, moments, "train", text, *flags, "--out", folder) as process:
        _, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    assert "Traceback" not in err and "stopping after this step" in err
    assert f"tinygpt train --resume --out {folder}" in err
    if "compile" in moments:
        assert (text.parent / "armed").read_text() == ""  # the compiler was there
    last = list_checkpoints(folder)[-1]
    done = checkpoint.read_meta(last).iter_num
    assert done == reached if reached else done < 8
    if "SIGUSR1" in moments:
        assert "SIGUSR1: a checkpoint after this step" in err
        assert (folder / "ckpt_1.safetensors").exists()
    check_whole_and_going_on(folder, 8)


def test_the_closing_of_a_terminal_is_a_reason_to_save(text, capsys):
    """Its processes get SIGHUP from the kernel, and what they write from then on is an error."""
    folder = text.parent / "run"
    ours, theirs = pty.openpty()
    flags = [*TINY, *new_kernel(), "--train.max-iters", "4", "--out", folder]
    process = start(
        *(text, "step:1:AWAITED", "train", text, *flags), text=False,
        stdin=theirs, stdout=theirs, stderr=theirs, env={"TERM": "xterm"},
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(theirs)
    seen = b""
    while b"compiling the first step" not in seen:
        seen += os.read(ours, 4096)
    os.close(ours)
    assert process.wait(timeout=300) == 129
    assert [p.name for p in list_checkpoints(folder)] == ["ckpt_1.safetensors"]
    check_whole_and_going_on(folder, 4)


# ---- without a run ----

BUSY = """
import ctypes, json, os, signal, sys, time
from tinygpt.cli.signals import run_signals
first, second, pause = signal.Signals[sys.argv[1]], signal.Signals[sys.argv[2]], float(sys.argv[3])
def stop():
    print("stop", flush=True)
import threading
for _ in range(40):  # as a library starts threads that block nothing
    threading.Thread(target=time.sleep, args=(10_000,), daemon=True).start()
with run_signals(stop, lambda: print("save", flush=True), lambda text: None) as received:
    child = os.fork()
    if child == 0:
        time.sleep(pause / 2)
        os.kill(os.getppid(), first)
        time.sleep(pause)
        os.kill(os.getppid(), second)
        os._exit(0)
    ctypes.CDLL(None).sleep(int(sys.argv[4]))  # as a kernel keeps the main thread busy
    os.waitpid(child, 0)
print("went on", [s.name for s in received], flush=True)
"""


def busy(first, second, pause, seconds):
    command = [sys.executable, "-W", "ignore", "-c", BUSY, first, second, str(pause), str(seconds)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


@pytest.mark.parametrize(
    ("first", "second", "code"), [("SIGINT", "SIGINT", 130), ("SIGTERM", "SIGTERM", 143)]
)
def test_the_second_signal_ends_it_even_in_the_middle_of_a_kernel(first, second, code):
    done = busy(first, second, 0.6, seconds=10_000)
    assert (done.returncode, done.stdout) == (code, "stop\n")
    assert "stopped at once" in done.stderr and "Traceback" not in done.stderr


def test_a_signal_to_save_is_no_reason_to_stop():
    done = busy("SIGUSR1", "SIGUSR1", 0.5, seconds=2)
    assert (done.returncode, done.stdout) == (0, "save\nsave\nwent on []\n")


def test_the_same_signal_at_once_again_is_its_echo():
    done = busy("SIGTERM", "SIGTERM", 0.01, seconds=2)
    assert (done.returncode, done.stdout) == (0, "stop\nwent on ['SIGTERM']\n")


def wait_for(condition):
    end = time.monotonic() + 30
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)


def test_afterwards_signals_are_as_before():
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1]
    before = [signal.getsignal(number) for number in numbers]
    mask, threads = signal.pthread_sigmask(signal.SIG_BLOCK, []), threading.active_count()
    stopped, notices = [], []
    with run_signals(lambda: stopped.append(1), lambda: None, notices.append) as received:
        os.kill(os.getpid(), signal.SIGINT)
        wait_for(lambda: notices)
    assert received == [signal.SIGINT] and stopped == [1]
    assert notices == ["tinygpt: stopping after this step; once more stops at once"]
    assert [signal.getsignal(number) for number in numbers] == before
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask
    assert threading.active_count() == threads
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(30)


def test_what_cannot_be_shown_does_not_keep_it_from_stopping():
    def broken(message):
        raise BrokenPipeError

    stopped = []
    with run_signals(lambda: stopped.append(1), lambda: None, broken):
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(lambda: stopped)
    assert stopped == [1]


def test_signals_that_nohup_ignores_stay_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with run_signals(lambda: None, lambda: None, lambda _: None) as received:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.05)
        assert received == []
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_signals_are_left_alone_outside_the_main_thread():
    before, seen = signal.getsignal(signal.SIGINT), []

    def work():
        with run_signals(lambda: None, lambda: None, lambda _: None):
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
