import errno
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import closing

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tinygpt.runs.history as module
from tinygpt.errors import DataError
from tinygpt.runs.history import Cut, History, read
from tinygpt.training.metrics import bits_per_byte, perplexity, smooth

quick = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
values = (
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats() | st.text(max_size=8)
)
rows = st.lists(
    st.dictionaries(st.text(max_size=6).filter(lambda k: k != "nonfinite"), values, max_size=5),
    max_size=6,
)


def same(left, right):
    return repr(left) == repr(right)  # repr, because NaN differs from itself


def test_perplexity_is_exp_of_the_loss_and_never_overflows():
    assert perplexity(0.0) == 1.0
    assert perplexity(math.log(65)) == pytest.approx(65)
    assert perplexity(1e6) == math.inf
    assert math.isnan(perplexity(math.nan))


def test_bits_per_byte_of_a_uniform_byte_model_is_eight():
    assert bits_per_byte(math.log(256), bytes_per_token=1.0) == pytest.approx(8)
    assert bits_per_byte(None, 1.0) is bits_per_byte(1.0, None) is bits_per_byte(1.0, 0.0) is None


def test_smoothing_keeps_a_constant_and_bridges_gaps():
    assert smooth([3.0] * 5) == pytest.approx([3.0] * 5)
    assert smooth([3.0, math.nan, None, 3.0]) == pytest.approx([3.0] * 4)
    assert smooth([1.0, 5.0, 2.0], weight=0.0) == [1.0, 5.0, 2.0]
    assert math.isnan(smooth([None])[0])
    assert smooth([]) == []


@quick
@given(rows)
def test_rows_come_back_as_they_were_written(tmp_path, written):
    path = tmp_path / "m.jsonl"
    path.unlink(missing_ok=True)
    with closing(History(path)) as history:
        for row in written:
            history.append(row)
        assert same(history.rows, written)
    assert same(list(read(path)), written)


@quick
@given(rows, st.data())
def test_a_torn_last_line_costs_only_that_line(tmp_path, written, data):
    path = tmp_path / "m.jsonl"
    path.unlink(missing_ok=True)
    with closing(History(path)) as history:
        for row in written:
            history.append(row)
    whole = path.read_bytes() if written else b""
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    survived = list(read(path))
    assert same(survived, written[: len(survived)])
    assert len(survived) >= whole[:cut].count(b"\n")
    with closing(History(path)) as history:
        history.append({"iter": 99})
    assert same(list(read(path)), [*survived, {"iter": 99}])


def test_every_line_is_strict_json_also_for_a_loss_that_is_not_a_number(tmp_path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    path = tmp_path / "m.jsonl"
    with closing(History(path)) as history:
        history.append({"iter": 1, "train_loss": math.nan, "grad_norm": -math.inf, "lr": 0.1})
    line = json.loads(path.read_text(), parse_constant=refuse)
    assert line["train_loss"] is None
    assert line["nonfinite"] == {"train_loss": "nan", "grad_norm": "-inf"}
    row = next(read(path))
    assert math.isnan(row["train_loss"]) and row["grad_norm"] == -math.inf and row["lr"] == 0.1


def test_each_row_is_in_the_file_before_the_next_step(tmp_path):
    path = tmp_path / "run" / "m.jsonl"
    history = History(path)
    for step in range(3):
        history.append({"iter": step})
        assert path.read_text().count("\n") == step + 1
    history.close()


def test_numpy_numbers_are_written_as_plain_ones(tmp_path):
    with closing(History(tmp_path / "m.jsonl")) as history:
        history.append({"train_loss": np.float32(0.5), "iter": np.int64(3)})
    assert history.rows == [{"train_loss": 0.5, "iter": 3}]


@pytest.mark.parametrize("in_memory", [True, False])
def test_truncating_drops_the_steps_beyond_a_checkpoint(tmp_path, in_memory):
    history = History(None if in_memory else tmp_path / "m.jsonl")
    for step in range(5):
        history.append({"iter": step})
    history.truncate_after(2)
    assert [row["iter"] for row in history] == [0, 1, 2]
    history.append({"iter": 3})
    assert [row["iter"] for row in history.rows] == [0, 1, 2, 3]
    history.close()
    assert [path.name for path in tmp_path.iterdir()] == ([] if in_memory else ["m.jsonl"])


def test_a_history_that_was_never_written_is_empty(tmp_path):
    history = History(tmp_path / "none.jsonl")
    assert history.rows == []
    history.truncate_after(0)
    assert not (tmp_path / "none.jsonl").exists()


def test_damage_in_the_middle_names_the_line(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"iter": 1}\n{"iter": \n{"iter": 3}\n')
    with pytest.raises(DataError, match=r"line 2: not a JSON object.*delete"):
        list(read(path))


def test_a_very_long_torn_line_is_mended(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"iter": 1}\n{"text": "' + "x" * 20_000)
    with closing(History(path)) as history:
        history.append({"iter": 2})
    assert history.rows == [{"iter": 1}, {"iter": 2}]


# A run that is killed, again and again ----------------------------------------------------------


def iters(path):
    return [row["iter"] for row in read(path)]


@quick
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 120)), max_size=5))
def test_whatever_is_torn_off_behind_a_checkpoint_no_step_is_missing_or_doubled(tmp_path, deaths):
    """Each time some steps are taken, then as many bytes are lost as were not synced."""
    path = tmp_path / "m.jsonl"
    path.unlink(missing_ok=True)
    saved = synced = 0
    for steps, lost in [*deaths, (0, 0)]:
        history = History(path)
        assert history.truncate_after(saved, every_step=True) == Cut()
        assert iters(path) == list(range(1, saved + 1))
        for step in range(saved + 1, saved + 1 + steps):
            history.append({"iter": step, "train_loss": 1 / step})
            if step % 4 == 0:  # a checkpoint
                history.sync()
                saved, synced = step, path.stat().st_size
        history.close()
        if path.exists():
            os.truncate(path, max(synced, path.stat().st_size - lost))


@quick
@given(st.integers(0, 400), st.binary(max_size=9))
def test_rows_that_are_gone_are_told_and_rubbish_is_dropped(tmp_path, cut, rubbish):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b"".join(b'{"iter": %d}\n' % step for step in range(1, 21)))
    os.truncate(path, min(cut, path.stat().st_size))
    whole = iters(path)
    with path.open("ab") as file:
        file.write(rubbish.replace(b"\n", b"") + b"\x00\n" if rubbish else b"")
    history = History(path)
    found = history.truncate_after(20, every_step=True)
    left = iters(path)
    assert left == whole or left == whole[:-1]  # the last one may have lost but its newline
    assert found.missing == tuple(range(len(left) + 1, 21))
    assert found.damaged == bool(rubbish)


def test_a_history_that_is_gone_lacks_every_step(tmp_path):
    history = History(tmp_path / "none.jsonl")
    assert history.truncate_after(3, every_step=True) == Cut(missing=(1, 2, 3))
    assert history.truncate_after(3) == Cut()


def test_a_step_that_was_written_twice_stays_once(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"iter": 1}\n{"iter": 2, "a": 1}\n{"iter": 2, "a": 2}\n{"note": 1}\n')
    History(path).truncate_after(9)
    assert list(read(path)) == [{"iter": 1}, {"iter": 2, "a": 1}, {"note": 1}]


def test_what_stays_is_not_written_again(tmp_path):
    """A cut needs no room on a full disk, and a crash in it loses nothing."""
    path = tmp_path / "m.jsonl"
    path.write_text('{"iter": 1}\n{"iter": 2}\n{"ite')
    before = path.stat().st_ino
    History(path).truncate_after(1)
    assert path.read_text() == '{"iter": 1}\n'
    assert path.stat().st_ino == before


WRITER = """
import itertools, os, sys
from pathlib import Path
from tinygpt.runs.history import History
path, mark = Path(sys.argv[1]), Path(sys.argv[2])
saved = int(mark.read_text()) if mark.exists() else 0
history = History(path)
cut = history.truncate_after(saved, every_step=True)
assert not cut.missing and not cut.damaged, cut
print("go", flush=True)
for step in itertools.count(saved + 1):
    history.append({"iter": step, "text": "x" * (step % 3000)})
    if step % 7 == 0:
        mark.with_suffix(".new").write_text(str(step))
        os.replace(mark.with_suffix(".new"), mark)
"""


def test_no_step_is_missing_or_doubled_after_many_kills(tmp_path):
    path, mark = tmp_path / "m.jsonl", tmp_path / "saved"
    wait = random.Random(7)
    for _ in range(10):
        command = [sys.executable, "-c", WRITER, path, mark]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "go\n"
            time.sleep(wait.random() / 50)
            process.send_signal(signal.SIGKILL)
    found = iters(path)
    assert found == list(range(1, len(found) + 1))
    assert len(found) >= int(mark.read_text()) > 0


class FullDisk:
    """Stands in for ``write``: takes the next ``room`` bytes and not one more."""

    def __init__(self, room):
        self.room = room

    def open(self, path):
        file = OPEN(path)
        disk = self

        class File:
            def write(self, data):
                taken = min(len(data), disk.room)
                disk.room -= taken
                if data and not taken:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return file.write(data[:taken])

            def __getattr__(self, name):
                return getattr(file, name)

        return File()


OPEN = module._open_for_append


@pytest.mark.parametrize("room", [0, 1, 5, 11, 12, 13, 20])
def test_rows_wait_while_the_disk_is_full(tmp_path, monkeypatch, room):
    disk = FullDisk(room)
    monkeypatch.setattr(module, "_open_for_append", disk.open)
    history = History(tmp_path / "m.jsonl")
    failed = 0
    for step in range(1, 6):
        try:
            history.append({"iter": step})
        except OSError:
            failed += 1
    assert history.waiting == failed == 5 - room // len(b'{"iter": 1}\n')
    assert [row["iter"] for row in history] == [1, 2, 3, 4, 5]
    text = (tmp_path / "m.jsonl").read_bytes()
    assert text == b"".join(b'{"iter": %d}\n' % i for i in range(1, 6 - failed))
    disk.room = 10**6
    history.append({"iter": 6})
    assert history.waiting == 0
    history.close()
    assert iters(tmp_path / "m.jsonl") == [1, 2, 3, 4, 5, 6]


def test_a_row_that_cannot_be_taken_back_is_mended_later(tmp_path, monkeypatch):
    """Neither the rest of a row can be written nor its beginning cut off."""
    disk = FullDisk(15)
    monkeypatch.setattr(module, "_open_for_append", disk.open)
    history = History(tmp_path / "m.jsonl")
    history.append({"iter": 1})
    history._file.truncate = lambda size: (_ for _ in ()).throw(OSError(errno.EIO, "no"))
    with pytest.raises(OSError):
        history.append({"iter": 2})
    assert (tmp_path / "m.jsonl").read_bytes() == b'{"iter": 1}\n{"i'
    disk.room = 10**6
    history.append({"iter": 3})
    history.close()
    assert iters(tmp_path / "m.jsonl") == [1, 2, 3]


@pytest.mark.parametrize(
    "line",
    [b'{"nonfinite": 3}', b'{"nonfinite": {"a": {}}}', b"[" * 100_000, b"\x00" * 50, b"1", b"null"],
)
def test_a_line_that_is_no_row_is_named(tmp_path, line):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"iter": 1}\n' + line + b"\n")
    with pytest.raises(DataError, match="line 2"):
        list(read(path))
