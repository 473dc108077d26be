"""A checkpoint that was whole is not hashed at each start, and one that has changed is."""

import os

import numpy as np
import pytest

from tinygpt.api import GPT, load
from tinygpt.config import GPTConfig
from tinygpt.errors import CheckpointError
from tinygpt.files.folders import cache_dir
from tinygpt.machine.transfer import unwritten
from tinygpt.runs import checkpoint
from tinygpt.runs.checkpoint import reader, stamps
from tinygpt.training.optim import AdamW

CONFIG = GPTConfig(block_size=4, vocab_size=11, n_layer=1, n_head=2, n_embd=8)


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A model and its checkpoint, which is old enough for a mark; marks are kept apart."""
    monkeypatch.setenv("TINYGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(stamps, "TICK", -60)
    model = GPT(CONFIG, seed=1)
    return model, model.save_checkpoint(7, AdamW(model.parameters()), tmp_path)


@pytest.fixture
def hashed(monkeypatch):
    """Grows with each tensor that is hashed."""
    found = []
    for name in ("_sha256", "_hash"):
        real = getattr(reader, name)
        monkeypatch.setattr(reader, name, lambda *a, real=real: found.append(1) or real(*a))
    return found


def marks():
    return list((cache_dir() / "verified").glob("*"))


def equal(model, other):
    pairs = zip(model.parameters().values(), other.parameters().values(), strict=True)
    return all(np.array_equal(a.numpy(), b.numpy()) for a, b in pairs)


def write_in_place(path, content):
    """Write until the file's times differ: they have ticks."""
    before = path.stat().st_ctime_ns
    while path.stat().st_ctime_ns == before:
        with path.open("r+b") as file:
            file.write(content)


def test_a_file_that_was_whole_is_read_without_hashing_until_it_is_written_to(saved, hashed):
    model, path = saved
    assert equal(load(path)[0], model)
    assert len(hashed) == len(checkpoint.describe(path)["tensors"])
    hashed.clear()
    assert equal(load(path)[0], model)
    assert not hashed
    checkpoint.verify(path)  # reads all, whatever the marks say
    GPT(CONFIG).load_checkpoint(path)  # so does a run that goes on
    assert len(hashed) == 2 * len(checkpoint.describe(path)["tensors"])

    whole, before = path.read_bytes(), path.stat()
    write_in_place(path, whole[:-1] + bytes([whole[-1] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(CheckpointError, match="damaged"):
        load(path)
    write_in_place(path, whole)
    hashed.clear()
    assert equal(load(path)[0], model) and hashed


def test_a_file_that_was_just_written_is_not_marked(saved, monkeypatch):
    monkeypatch.setattr(stamps, "TICK", 10**6)
    load(saved[1])
    assert not marks()


def test_a_mark_holds_for_a_week(saved, hashed):
    _, path = saved
    load(path)
    (mark,) = marks()
    then = mark.stat().st_mtime - stamps.WEEK - 60
    os.utime(mark, (then, then))
    hashed.clear()
    load(path)
    assert hashed and [m.stat().st_mtime > then for m in marks()] == [True]


def test_a_known_file_that_changes_while_it_is_read_is_refused(saved, monkeypatch):
    _, path = saved
    load(path)
    whole, real = path.read_bytes(), reader._read_array

    def read_and_write(file, place, room=None):
        write_in_place(path, whole)
        return real(file, place, room)

    monkeypatch.setattr(reader, "_read_array", read_and_write)
    with pytest.raises(CheckpointError, match="written to while it was read"):
        load(path)


def test_a_cache_that_cannot_be_written_costs_only_the_time(saved, hashed):
    model, path = saved
    cache_dir().joinpath("verified").write_text("a file, no folder")
    for _ in range(2):
        hashed.clear()
        assert equal(load(path)[0], model) and hashed


def test_weights_are_read_into_memory_that_holds_nothing_yet_and_only_there(saved):
    model, path = saved
    fresh = GPT(CONFIG, seed=None)
    assert all(unwritten(p) is not None for p in fresh.parameters().values())
    assert all(unwritten(p) is None for p in fresh.parameters().values())  # it has memory now
    assert all(unwritten(p) is None for p in model.parameters().values())
    assert unwritten(model.parameters()["wte.weight"] + 1) is None
    assert equal(load(path)[0], model)
