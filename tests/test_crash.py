"""A process that is killed at any instant leaves the checkpoint before or the new one, whole."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.run_script import make_run
from tinygpt.files.atomic import remove_stale, replacing
from tinygpt.runs import checkpoint
from tinygpt.runs.folder import list_checkpoints

ROOT = Path(__file__).parents[1]


@pytest.fixture
def memory():
    """A folder in memory where there is one: thousands of fsyncs are then done in a moment."""
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    yield folder
    shutil.rmtree(folder)


def crash_script(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "tests.crash_script", *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    return json.loads(last), lines


@pytest.mark.parametrize("kills", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_a_kill_at_any_moment_leaves_the_old_checkpoint_or_the_new_one(memory, kills):
    found, _ = crash_script(memory / "run", "random", kills)
    print(found)
    assert found["kills"] == kills
    assert found["checkpoints"] > 2  # so they were killed at work
    assert kills < 200 or found["left a temporary"] > 0


def test_a_kill_after_each_file_operation_of_a_save_does_so_too(memory):
    found, operations = crash_script(memory, "operations", 0)
    print(found)
    assert found["kills"] == len(operations) > 40
    assert 0 < found["left the new one"] < found["kills"]
    assert {"open", "half a write", "write", "fsync", "replace", "unlink"} <= set(operations)


# The order that a power cut asks for ------------------------------------------------------------


@pytest.fixture
def trace(monkeypatch):
    """The file operations that follow, as (name, file name)."""
    calls, names = [], {}

    def note(name, pick):
        original = getattr(os, name)

        def wrapped(*args, **kwargs):
            result = original(*args, **kwargs)
            if name == "open":
                names[result] = Path(os.fsdecode(args[0])).name
            calls.append((name, *pick(args)))
            return result

        monkeypatch.setattr(os, name, wrapped)

    note("open", lambda args: [Path(os.fsdecode(args[0])).name])
    note("write", lambda args: [names.get(args[0], "?")])
    note("fsync", lambda args: [names.get(args[0], "?")])
    note("replace", lambda args: [Path(path).name for path in args])
    note("mkdir", lambda args: [Path(args[0]).name])
    return calls


def check_order(calls, folder, name):
    """The data is synced, then gets its name, then the folder is synced."""
    [at] = [i for i, call in enumerate(calls) if call[0] == "replace" and call[2] == name]
    temporary = calls[at][1]
    assert temporary.startswith(".") and temporary.endswith(".tmp")
    assert calls[at - 1] == ("fsync", temporary)
    after = [call for call in calls[at + 1 :] if call[0] != "open"]
    assert after[0] == ("fsync", folder)
    touched = [i for i, call in enumerate(calls) if temporary in call[1:]]
    assert touched[-1] == at, "nothing more happens to the file"


def test_whatever_a_run_writes_is_synced_before_it_gets_its_name(tmp_path, trace):
    folder = tmp_path / "run"
    run = make_run(folder)
    for name in ("config.toml", "tokenizer.json"):
        check_order(trace, "run", name)
    saver = checkpoint.Saver(folder, keep_last=1)
    meta = checkpoint.Meta(1, run.model.config)
    saver.save(run.model, run.optimizer, meta, best_loss=1.0)
    saver.wait()
    run.close()
    for name in ("ckpt_1.safetensors", "best.json", "run.json"):
        check_order(trace, "run", name)
    writes = [call for call in trace if call[0] == "write" and "ckpt_1" in call[1]]
    assert len(writes) == 2  # the header and the data
    replaced = [call[2] for call in trace if call[0] == "replace"]
    assert replaced.index("run.json") < replaced.index("ckpt_1.safetensors")
    assert replaced.index("ckpt_1.safetensors") < replaced.index("best.json")


def test_a_new_folder_is_synced_into_the_one_above(tmp_path, trace):
    with replacing(tmp_path / "a" / "b" / "file") as file:
        file.write(b"1")
    steps = [call for call in trace if call[0] in ("mkdir", "fsync")]
    assert steps[:4] == [
        ("mkdir", "a"), ("fsync", tmp_path.name), ("mkdir", "b"), ("fsync", "a"),
    ]  # fmt: skip


# Stale files ------------------------------------------------------------------------------------


def test_what_a_killed_process_left_is_removed_by_the_next_save(tmp_path):
    model = make_run(None).model
    (tmp_path / ".ckpt_3.safetensors.tinygpt-0123456789ab.tmp").write_bytes(b"half")
    (tmp_path / ".mine.tmp").write_bytes(b"not ours")
    model.save_checkpoint(4, None, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {".mine.tmp", "ckpt_4.safetensors"}


def test_a_temporary_that_somebody_is_writing_is_left_alone(tmp_path):
    with replacing(tmp_path / "file") as file:
        file.write(b"whole")
        remove_stale(tmp_path)
    assert (tmp_path / "file").read_bytes() == b"whole"


def test_a_block_that_fails_leaves_no_temporary(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "file") as file:
        file.write(b"new")
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


# Whole runs -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_that_is_killed_after_any_file_operation_is_resumed_to_its_end(memory):
    """Settings, rows, locks and all; only the arithmetic of the steps is left out."""
    found, _ = crash_script(memory, "runs", 0)
    print(found)
    assert found["kills"] > 30


@pytest.mark.slow
def test_a_training_that_is_killed_again_and_again_ends_as_if_it_had_not_been(tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    command = [sys.executable, "-m", "tests.run_script"]
    subprocess.run([*command, whole, "12"], check=True, cwd=ROOT, timeout=600)
    chance = random.Random(0)
    kills = 0
    while not (folder / "ckpt_12.safetensors").exists():
        resume = ["resume"] if (folder / "config.toml").exists() else []
        process = subprocess.Popen([*command, folder, "12", *resume], cwd=ROOT)
        seen = set(list_checkpoints(folder))
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            if set(list_checkpoints(folder)) != seen:  # it got on, so it may die
                time.sleep(chance.uniform(0, 0.1))
                break
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        assert checkpoint.newest_good(folder)[1] == []
    print({"kills": kills})
    assert kills >= 2
    run = make_run(folder, resume=True)
    assert list(run) == []
    one, two = (load_file(f / "ckpt_12.safetensors") for f in (whole, folder))
    assert [name for name in one if one[name].tobytes() != two[name].tobytes()] == []
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iter"] for line in lines] == list(range(1, 13))
