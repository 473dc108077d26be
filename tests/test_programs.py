"""Lowered kernels: kept on disk, made by several processes, and the same as ever."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from tinygrad import codegen

from tinygpt.machine import kernel_store
from tinygpt.machine.kernel_store import WORTH_A_FORK, Forks

SCRIPT = """
import sys
from tinygpt import kernels, machine
from tinygrad import Tensor, codegen
machine.start()

lowered, lower = [], codegen.do_to_program
def counted(ast, renderer):
    lowered.append(ast)
    return lower(ast, renderer)
codegen.do_to_program = counted

x = Tensor([[1.0, 2.0, 4.0], [3.0, 5.0, 9.0]])
y = kernels.layer_norm(x, Tensor.ones(3).contiguous(), Tensor.zeros(3).contiguous())
z = kernels.gelu(kernels.linear(y, x)).sum(1).tolist()
print(len(lowered), z)
"""


def run(database, **environment):
    """-> (kernels that this process lowered itself, what they computed)"""
    ours = {**os.environ, "CACHEDB": str(database), "TINYGPT_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=ours, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count, _, values = done.stdout.partition(" ")
    return int(count), values


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A cache that one process has filled, and what that process found."""
    database = tmp_path_factory.mktemp("kernels") / "cache"
    return database, *run(database)


def test_a_second_process_lowers_nothing_and_computes_the_same(kept):
    database, count, values = kept
    assert count > 2
    assert run(database) == (0, values)


def test_other_settings_make_other_programs(kept):
    database, count, values = kept
    found, same = run(database, TRANSCENDENTAL="2")
    assert found == count and same[:8] == values[:8]


def test_variables_that_the_code_generator_reads_are_in_the_key(kept):
    database, count, values = kept
    found, same = run(database, EXPAND_SSA="1")
    assert found == count and same[:8] == values[:8]


def test_every_variable_of_the_code_generator_is_known():
    """What a newer tinygrad reads besides is found here."""
    folder = Path(codegen.__file__).parents[1]
    read = set()
    for part in ("codegen", "renderer"):
        for path in sorted((folder / part).rglob("*.py")):
            read |= set(re.findall(r"getenv\([\"'](\w+)", path.read_text()))
    harmless = {
        *("DEBUG_LINEARIZE", "BEAM_DEBUG", "BEAM_LOG_SURPASS_MAX"),  # what is printed
        *("NOSKIP", "SQTT_EVENT"),  # of a tool that shows traces
    }
    assert read - harmless == set(kernel_store.READ)


def test_without_a_cache_everything_is_lowered_anew(kept):
    database, count, values = kept
    assert run(database, CACHELEVEL="0") == (count, values)


def test_a_damaged_entry_is_made_again(kept, tmp_path):
    database, count, values = kept
    damaged = tmp_path / "damaged"
    for entry in Path(shutil.copytree(f"{database}.d", f"{damaged}.d")).iterdir():
        entry.write_bytes(entry.read_bytes()[:-1] + b"\0")
    assert run(damaged) == (count, values)
    assert run(damaged) == (0, values)


def test_several_processes_find_the_same(kept, tmp_path):
    _, count, values = kept
    found, same = run(tmp_path / "cache", TINYGPT_THREADS="2")
    assert found <= count and same == values
    assert run(tmp_path / "cache", TINYGPT_THREADS="2") == (0, values)


# ---- the forks by themselves ----


def tasks(count):
    return [(i, None, {}) for i in range(count)]


def gone(pid):
    """Whether a process was a child of this one and has been said farewell to."""
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return True
    return False


def whoami(task):
    return task[0], os.getpid()


def test_forks_share_the_work_out_and_are_gone_afterwards():
    made = dict(Forks(3).imap_unordered(whoami, tasks(3 * WORTH_A_FORK + 1)))
    assert sorted(made) == list(range(3 * WORTH_A_FORK + 1))
    pids = set(made.values())
    assert len(pids) == 3 and os.getpid() in pids
    assert all(map(gone, pids - {os.getpid()}))


def test_little_work_is_not_shared_out():
    made = dict(Forks(3).imap_unordered(whoami, tasks(2 * WORTH_A_FORK - 1)))
    assert set(made.values()) == {os.getpid()}


def test_what_a_child_fails_to_make_is_made_here():
    here = os.getpid()

    def make(task):
        if os.getpid() != here:
            raise MemoryError
        return whoami(task)

    made = dict(Forks(2).imap_unordered(make, tasks(2 * WORTH_A_FORK)))
    assert len(made) == 2 * WORTH_A_FORK and set(made.values()) == {here}


@pytest.mark.parametrize("handler", ["ignored", "reaped"])
def test_a_program_that_does_not_wait_for_its_children_is_no_obstacle(handler):
    """With SIGCHLD ignored, or where each child is reaped at once, there is nothing to wait for."""

    def reap(*_):
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass

    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN if handler == "ignored" else reap)
    try:
        made = dict(Forks(3).imap_unordered(whoami, tasks(3 * WORTH_A_FORK)))
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert len(set(made.values())) == 3


def test_an_error_of_the_work_itself_is_raised_and_children_are_stopped(tmp_path):
    def make(task):
        if task[0] == 0:
            while not any(tmp_path.iterdir()):  # until the child is at work
                time.sleep(0.01)
            raise ValueError("cannot be lowered")
        (tmp_path / str(os.getpid())).touch()
        os.read(silent, 1)  # for ever
        return whoami(task)

    silent, held = os.pipe()
    with pytest.raises(ValueError, match="cannot be lowered"):
        list(Forks(2).imap_unordered(make, tasks(2 * WORTH_A_FORK)))
    assert [gone(int(path.name)) for path in tmp_path.iterdir()] == [True]
    os.close(silent)
    os.close(held)
