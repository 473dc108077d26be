"""A disk that fails keeps nobody from training: it is said, tried again, and the old file stays."""

import contextlib
import errno
import importlib
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from tests.crash_script import CONFIG as SMALL
from tests.crash_script import snapshot
from tests.run_script import TRAIN, make_run
from tinygpt.cli import main
from tinygpt.config import GPTConfig, TrainConfig
from tinygpt.errors import CheckpointError
from tinygpt.files import atomic
from tinygpt.machine.transfer import write
from tinygpt.runs import checkpoint
from tinygpt.runs import run as runs
from tinygpt.runs.checkpoint import background
from tinygpt.runs.folder import list_checkpoints
from tinygpt.training.loop import Step

CONFIG = TrainConfig(
    **{**TRAIN.to_dict(), "max_iters": 8, "checkpoint_interval": 1, "keep_last": 2}
)
MODEL = GPTConfig(block_size=8, vocab_size=256, n_layer=1, n_head=2, n_embd=16)
SIZE = MODEL.num_params() * 12
"""Bytes of a checkpoint, roughly."""


def steps(model, optimizer, config, *_, start=0, **__):
    """Stands in for training: step n leaves n in the positions, and takes no time."""
    for done in range(start + 1, config.max_iters + 1):
        write(model.wpe.weight, np.full((8, 16), done))
        yield Step(done, 1.0, 0.1, 0.1, 1.0, 0.1)


def replace_training(setattr):
    setattr(runs, "train_steps", steps)
    setattr(runs.TrainingRun, "_sample", lambda *_: None)


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    replace_training(monkeypatch.setattr)
    monkeypatch.setattr(background, "PAUSES", (0, 0, 0))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def begin(folder, resume=None, **changes):
    config = TrainConfig(**{**CONFIG.to_dict(), **changes})
    return make_run(folder, resume, config, model=MODEL)


def follow(run, at=()):
    """Take all steps, doing ``at[step]`` after some of them; -> what was noticed"""
    noticed = []
    for step in run:
        run.output.saver.wait()  # so that what went wrong is noticed with the very next step
        noticed += step.notices
        dict(at).get(step.iter, lambda: None)()
    return noticed


def state(path):
    meta, arrays = checkpoint.read(path)
    assert (arrays["model.wpe.weight"] == meta.iter_num).all()
    return meta.iter_num


class Faulty:
    """Stands in for ``os`` where files are written; ``operation`` fails on checkpoints while on."""

    def __init__(self, operation, number):
        self.operation, self.number, self.on, self.failures = operation, number, False, 0

    def __getattr__(self, name):
        original = getattr(os, name)
        return self.fail if self.on and name == self.operation else original

    def fail(self, *args, **_):
        self.failures += 1
        raise OSError(self.number, os.strerror(self.number))

    def turn(self, on):
        self.on = on


NUMBERS = [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.ENOENT]


@pytest.mark.parametrize("number", NUMBERS, ids=errno.errorcode.get)
@pytest.mark.parametrize("operation", ["open", "write", "fsync", "replace"])
def test_a_run_goes_on_when_a_save_fails_and_saves_again(tmp_path, monkeypatch, operation, number):
    faulty = Faulty(operation, number)
    monkeypatch.setattr(atomic, "os", faulty)
    if operation == "replace":
        original = Path.replace
        monkeypatch.setattr(
            Path, "replace", lambda *args: faulty.fail() if faulty.on else original(*args)
        )
    run = begin(tmp_path / "run")
    kept = []

    def look():
        kept.append([state(path) for path in list_checkpoints(tmp_path / "run")])
        faulty.turn(on=False)

    noticed = follow(run, {3: lambda: faulty.turn(on=True), 5: look})
    assert kept == [[2, 3]]
    failed = [line for line in noticed if "NOT SAVED" in line]
    assert len(failed) == 2 == faulty.failures
    assert "ckpt_4" in failed[0] and os.strerror(number) in failed[0]
    assert sum("works again" in line for line in noticed) == 1
    assert [state(path) for path in list_checkpoints(tmp_path / "run")] == [7, 8]
    assert not list((tmp_path / "run").glob(".*"))
    assert [row["iter"] for row in run.history] == list(range(1, 9))


def test_the_last_save_is_tried_more_than_once(tmp_path, monkeypatch):
    tried = []

    def write(*args):
        tried.append(args)
        if len(tried) < 3:
            raise OSError(errno.EIO, "no")
        return original(*args)

    original = background.write
    monkeypatch.setattr(background, "write", write)
    run = begin(tmp_path / "run", max_iters=1)
    assert [step.iter for step in run] == [1]
    assert run.result.checkpoint == tmp_path / "run" / "ckpt_1.safetensors"
    assert len(tried) == 3


def test_weights_that_nothing_else_holds_are_rescued_to_another_place(tmp_path, monkeypatch):
    faulty = Faulty("write", errno.ENOSPC)
    monkeypatch.setattr(atomic, "os", faulty)
    monkeypatch.setattr(
        tempfile, "mkdtemp", lambda original=tempfile.mkdtemp, **how: (faulty.turn(on=False),
                                                                      original(**how))[1]
    )  # fmt: skip
    run = begin(tmp_path / "run")
    with pytest.raises(CheckpointError) as error:
        follow(run, {4: lambda: faulty.turn(on=True)})
    message = str(error.value)
    [rescued] = tmp_path.glob("tinygpt-rescued-*/ckpt_8.safetensors")
    assert state(rescued) == 8
    assert f"mv {rescued} {tmp_path / 'run'}/" in message and "No space left" in message
    assert run.result.checkpoint == tmp_path / "run" / "ckpt_4.safetensors"
    shutil.move(rescued, tmp_path / "run")
    resumed = begin(tmp_path / "run", resume=True, max_iters=8)
    assert resumed.iter_num == 8 and list(resumed) == []


def test_where_nothing_can_be_written_the_loss_is_said(tmp_path, monkeypatch):
    faulty = Faulty("open", errno.EROFS)
    monkeypatch.setattr(atomic, "os", faulty)
    monkeypatch.setenv("HOME", str(tmp_path))
    run = begin(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"step 8 .*is lost\. .*ckpt_4"):
        follow(run, {4: lambda: faulty.turn(on=True)})


@pytest.mark.parametrize("refuge", ["temp", "home", "here"])
def test_the_last_state_is_rescued_to_the_one_place_that_there_is(tmp_path, monkeypatch, refuge):
    (tmp_path / "here").mkdir()
    (tmp_path / refuge).mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temp"))  # there, or not
    if refuge == "home":
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
    else:  # as a container runs a number that is no user
        monkeypatch.delenv("HOME")
        monkeypatch.setattr(pwd, "getpwuid", lambda number: {}[number])
    if refuge == "here":
        monkeypatch.setattr(tempfile, "tempdir", None)
        monkeypatch.setattr(tempfile, "_candidate_tempdir_list", list)
    saver = background.Saver(tmp_path / "run", keep_last=1)
    meta = checkpoint.Meta(8, SMALL)
    message = saver._rescue(background._Job(snapshot(8), meta, None, again=True))
    [rescued] = (tmp_path / refuge).glob("tinygpt-rescued-*/ckpt_8.safetensors")
    assert f"step 8 was written to {rescued} instead" in message
    assert checkpoint.read_meta(rescued).iter_num == 8


def test_an_error_keeps_its_name_and_tells_where_the_weights_are(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "os", faulty := Faulty("write", errno.ENOSPC))
    monkeypatch.setenv("HOME", str(tmp_path))

    def stop():
        raise ZeroDivisionError

    def broken(*args, **kwargs):
        for step in steps(*args, **kwargs):
            yield step
            if step.iter == 5:
                stop()

    monkeypatch.setattr(runs, "train_steps", broken)
    with pytest.raises(ZeroDivisionError) as error:
        follow(begin(tmp_path / "run"), {4: lambda: faulty.turn(on=True)})
    assert "step 5" in error.value.__notes__[0]


def test_rows_that_cannot_be_written_wait(tmp_path, monkeypatch):
    metrics = importlib.import_module("tinygpt.runs.history")
    broken = []

    def fail(*args):
        if broken:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*args)

    original = metrics._write_whole
    monkeypatch.setattr(metrics, "_write_whole", fail)
    run = begin(tmp_path / "run")
    noticed = follow(run, {3: lambda: broken.append(1), 6: broken.clear})
    assert sum("NOT WRITTEN" in line and "metrics.jsonl" in line for line in noticed) == 1
    assert [row["iter"] for row in run.history] == list(range(1, 9))


# Damage -----------------------------------------------------------------------------------------


def damage(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_resume_goes_on_from_the_newest_whole_checkpoint_and_names_the_damaged(tmp_path):
    folder = tmp_path / "run"
    follow(begin(folder, max_iters=6, keep_last=0))
    damage(folder / "ckpt_6.safetensors")
    (folder / "ckpt_4.safetensors").rename(folder / "ckpt_5.safetensors")
    run = begin(folder, resume=True, max_iters=6, keep_last=0)
    assert run.iter_num == 3
    assert (run.model.wpe.weight.numpy() == 3).all()
    noticed = follow(run)
    told = [line for line in noticed if f"Going on from {folder / 'ckpt_3.safetensors'}" in line]
    assert "ckpt_6.safetensors is damaged" in told[0]
    assert "ckpt_5.safetensors is not what its name says" in told[1]
    assert [row["iter"] for row in run.history] == [1, 2, 3, 4, 5, 6]
    assert state(folder / "ckpt_6.safetensors") == 6


def test_a_damaged_checkpoint_that_was_asked_for_by_name_is_an_error(tmp_path):
    folder = tmp_path / "run"
    follow(begin(folder, max_iters=3))
    damage(folder / "ckpt_3.safetensors")
    with pytest.raises(CheckpointError, match=r"ckpt_3\.safetensors is damaged"):
        begin(folder, resume=folder / "ckpt_3.safetensors", max_iters=3)


def test_a_run_without_a_whole_checkpoint_is_not_resumed(tmp_path):
    folder = tmp_path / "run"
    follow(begin(folder, max_iters=3))
    for path in list_checkpoints(folder):
        damage(path)
    with pytest.raises(CheckpointError, match=r"No checkpoint is whole(.|\n)*ckpt_3(.|\n)*ckpt_2"):
        begin(folder, resume=True, max_iters=3)


def test_a_checkpoint_that_is_damaged_during_the_run_does_not_count_as_kept(tmp_path):
    folder = tmp_path / "run"
    noticed = follow(begin(folder, keep_last=1), {7: lambda: damage(folder / "ckpt_7.safetensors")})
    assert [path.name[5] for path in list_checkpoints(folder)] == ["7", "8"]
    noticed = follow(begin(tmp_path / "b", keep_last=2),
                     {6: lambda: damage(tmp_path / "b" / "ckpt_6.safetensors")})  # fmt: skip
    assert [path.name[5] for path in list_checkpoints(tmp_path / "b")] == ["6", "7", "8"]
    assert sum("ckpt_6" in line and "is left there" in line for line in noticed) == 1


# Room on the disk -------------------------------------------------------------------------------


def free(monkeypatch, count):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=count))


def test_a_disk_without_room_for_one_checkpoint_is_said_before_the_run(tmp_path, monkeypatch):
    free(monkeypatch, SIZE // 2)
    wanted = rf"{SIZE / 1e6:.1f} MB are needed, and {SIZE // 2 / 1e6:.1f} MB are free"
    with pytest.raises(CheckpointError, match=wanted):
        begin(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_disk_that_will_be_full_is_said_with_the_first_step(tmp_path, monkeypatch):
    free(monkeypatch, SIZE * 3)
    assert any(
        "will take" in line and "keep_last" in line for line in follow(begin(tmp_path / "a"))
    )
    free(monkeypatch, SIZE * 5)
    assert follow(begin(tmp_path / "b")) == []


def test_a_save_for_which_there_is_no_room_is_not_begun(tmp_path, monkeypatch):
    run = begin(tmp_path / "run")
    noticed = follow(run, {4: lambda: free(monkeypatch, 100), 6: monkeypatch.undo})
    assert sum("NOT SAVED" in line and "MB are needed" in line for line in noticed) == 2
    assert state(tmp_path / "run" / "ckpt_8.safetensors") == 8


# Folders that go away ---------------------------------------------------------------------------


def test_a_folder_that_vanishes_is_made_again(tmp_path):
    folder = tmp_path / "run"
    noticed = follow(begin(folder), {4: lambda: shutil.rmtree(folder)})
    assert sum("VANISHED" in line for line in noticed) == 1
    assert [state(path) for path in list_checkpoints(folder)] == [7, 8]
    resumed = begin(folder, resume=True)
    assert resumed.iter_num == 8
    names = {path.name for path in folder.iterdir()}
    assert {"config.toml", "tokenizer.json", "metrics.jsonl", "run.json"} <= names


def test_a_folder_that_may_not_be_written_is_said(tmp_path):
    """As an ordinary user, in a process of its own: root may write everywhere."""
    (tmp_path / "locked").mkdir(mode=0o555)
    code = f"""
import os, sys
from pathlib import Path
from tests.crash_script import CONFIG, snapshot
from tinygpt.runs import checkpoint
from tinygpt.errors import CheckpointError
if os.geteuid() == 0:
    os.seteuid(65534)
try:
    checkpoint.write(Path({str(tmp_path / "locked" / "ckpt_1.safetensors")!r}), snapshot(1),
                     checkpoint.Meta(1, CONFIG))
except CheckpointError as error:
    print(error)
"""
    for folder in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        folder.chmod(folder.stat().st_mode | 0o055)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert "You may not write there" in done.stdout, done.stderr


# A real disk of 1 MB ----------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1 MB in memory, and a way to mount it anew."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options):
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size=1m,{options}", "tmpfs", place],
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise OSError(done.stderr.strip())

    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("mounting a disk of 1 MB takes root")
    try:
        mount("rw")
    except OSError as error:
        pytest.skip(f"mounting is not permitted here: {error}")
    try:
        yield place, mount
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def test_a_full_disk_of_1_mb(small_disk, monkeypatch):
    place, _ = small_disk
    monkeypatch.setattr("tinygpt.files.disk.free_space", lambda _: None)  # nobody warns
    folder, filler = place / "run", place / "filler"

    def fill():
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    kept = []

    def look():
        kept.append([state(path) for path in list_checkpoints(folder)])
        filler.unlink()

    run = begin(folder)
    noticed = follow(run, {3: fill, 6: look})
    assert kept == [[2, 3]]
    failed = [line for line in noticed if "NOT SAVED" in line]
    assert len(failed) == 3 and all("No space left" in line for line in failed)
    assert [state(path) for path in list_checkpoints(folder)] == [7, 8]
    assert [row["iter"] for row in run.history] == list(range(1, 9))
    assert main(["verify", str(folder)]) == 0


def test_a_full_disk_at_the_end_leaves_the_old_checkpoint_and_a_rescued_one(small_disk, tmp_path):
    place, _ = small_disk
    folder = place / "run"

    def fill():
        with contextlib.suppress(OSError), (place / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    with pytest.raises(CheckpointError, match="MB are needed"):
        follow(begin(folder), {3: fill})
    assert [state(path) for path in list_checkpoints(folder)] == [2, 3]
    [rescued] = tmp_path.glob("tinygpt-rescued-*/ckpt_8.safetensors")
    assert state(rescued) == 8


def test_a_disk_that_becomes_read_only(small_disk):
    place, mount = small_disk
    with checkpoint.Saver(place, keep_last=2) as saver:
        for step, options in ((1, "rw"), (2, "ro"), (3, "ro"), (4, "rw")):
            mount(f"remount,size=8m,{options}")
            saver.save_snapshot(snapshot(step), checkpoint.Meta(step, SMALL))
            saver.wait()
            [*news] = saver.news()
            assert [("only be read" in line) for line in news] == [options == "ro"] * len(news)
            assert bool(news) == (step > 1)  # the last says that it works again
    steps = [checkpoint.verify(path).iter_num for path in list_checkpoints(place)]
    assert steps == [1, 4]
