"""A checkpoint is whole or refused, says everything of itself, and gives back every bit."""

import hashlib
import json
import os
import pickle
import re
import shutil
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tinygrad import Tensor, TinyJit, dtypes
from tinygrad.nn import optim

from tinygpt.api import GPT
from tinygpt.cli import main
from tinygpt.config import GPTConfig, TrainConfig
from tinygpt.errors import CheckpointError, UsageError
from tinygpt.files.tensor_file import arrange
from tinygpt.machine.transfer import write
from tinygpt.runs import checkpoint
from tinygpt.runs.checkpoint import background, keeping
from tinygpt.runs.checkpoint import copier as copier_module
from tinygpt.runs.folder import best_checkpoint, checkpoint_path, list_checkpoints, mark_best
from tinygpt.training.optim import AdamW

CONFIG = GPTConfig(block_size=4, vocab_size=11, n_layer=1, n_head=2, n_embd=8)
SIZE = CONFIG.num_params()
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""Where many small files are written in no time."""


@pytest.fixture
def saved(tmp_path):
    model = GPT(CONFIG, seed=1)
    optimizer = AdamW(model.parameters())
    optimizer.m[0].assign(Tensor.full(optimizer.m[0].shape, 0.5)).realize()
    return model, optimizer, model.save_checkpoint(7, optimizer, tmp_path)


def weights(model):
    return {name: p.numpy() for name, p in model.parameters().items()}


def test_every_bit_comes_back(saved):
    model, optimizer, path = saved
    other = GPT(CONFIG, seed=2)
    restored = AdamW(other.parameters(), lr=0.5)
    assert other.load_checkpoint(path, restored) == 7
    for name, value in weights(model).items():
        np.testing.assert_array_equal(weights(other)[name], value)
    np.testing.assert_array_equal(restored.m[0].numpy(), optimizer.m[0].numpy())
    np.testing.assert_array_equal(restored.lr.numpy(), optimizer.lr.numpy())


@pytest.mark.parametrize("kind", [optim.Adam, optim.AdamW, optim.SGD])
def test_tinygrads_own_optimizers_are_kept_too(kind, tmp_path):
    def make():
        model = GPT(CONFIG)
        extra = {"momentum": 0.9} if kind is optim.SGD else {}
        return model, kind(list(model.parameters().values()), lr=0.01, **extra)

    model, optimizer = make()
    moments = optimizer.b if kind is optim.SGD else optimizer.m
    moments[1].assign(Tensor.full(moments[1].shape, 0.25)).realize()
    path = model.save_checkpoint(1, optimizer, tmp_path)
    other, restored = make()
    other.load_checkpoint(path, restored)
    again = restored.b if kind is optim.SGD else restored.m
    np.testing.assert_array_equal(again[1].numpy(), moments[1].numpy())


def test_a_function_jitted_before_sees_the_loaded_weights(saved):
    model, _, path = saved
    other = GPT(CONFIG, seed=2).eval()
    first = TinyJit(lambda: (other.wte.weight.sum() * 1).realize())
    for _ in range(3):
        before = first().item()
    other.load_checkpoint(path)
    assert first().item() == pytest.approx(model.wte.weight.sum().item())
    assert first().item() != pytest.approx(before)


def test_the_file_describes_itself(saved):
    _, _, path = saved
    described = checkpoint.describe(path)
    assert described["iter_num"] == 7
    assert described["model"] == CONFIG.to_dict()
    assert described["tensors"]["model.wte.weight"] == {"dtype": "F32", "shape": [11, 8]}
    assert path.name == "ckpt_7.safetensors"
    assert path.stat().st_mode & 0o400


def test_a_model_with_another_config_names_the_fields(saved):
    _, _, path = saved
    other = GPT(GPTConfig(block_size=4, vocab_size=11, n_layer=2, n_head=1, n_embd=8))
    with pytest.raises(CheckpointError, match=r"n_layer=1 \(this model: 2\), n_head=2"):
        other.load_checkpoint(path)


def test_weights_without_optimizer_say_so(tmp_path):
    model = GPT(CONFIG)
    path = model.save_checkpoint(1, None, tmp_path)
    with pytest.raises(CheckpointError, match="no optimizer state"):
        model.load_checkpoint(path, AdamW(model.parameters()))


def test_an_optimizer_of_another_model_is_said_to_be_one(saved, tmp_path):
    model, optimizer, path = saved
    stranger = AdamW(GPT(model.config).parameters())
    before = stranger.m[0].numpy()
    with pytest.raises(UsageError, match="it was made for another one"):
        model.load_checkpoint(path, stranger)
    with pytest.raises(UsageError, match="it was made for another one"):
        model.save_checkpoint(8, stranger, tmp_path)
    assert np.array_equal(stranger.m[0].numpy(), before)
    assert not (tmp_path / "ckpt_8.safetensors").exists()
    assert model.load_checkpoint(path, optimizer) == 7


def test_another_kind_of_optimizer_says_what_is_missing(saved):
    model, _, path = saved
    sgd = optim.SGD(list(model.parameters().values()), momentum=0.9)
    with pytest.raises(CheckpointError, match=r"optimizer\.b\.wte\.weight"):
        model.load_checkpoint(path, sgd)


# Damage -----------------------------------------------------------------------------------------


def flipped(whole, place, bits):
    damaged = bytearray(whole)
    damaged[place] ^= bits
    return bytes(damaged)


def header_end(whole):
    return 8 + int.from_bytes(whole[:8], "little")


def test_every_byte_of_the_header_counts(tmp_path):
    path = GPT(CONFIG, seed=1).save_checkpoint(7, None, tmp_path)
    whole = path.read_bytes()
    with path.open("r+b", buffering=0) as file:
        for place in range(header_end(whole)):
            file.seek(place)
            file.write(bytes([whole[place] ^ 1 << place % 8]))
            with pytest.raises(CheckpointError, match=re.escape(str(path))):
                checkpoint.read_meta(path)
            file.seek(place)
            file.write(whole[place : place + 1])
    assert checkpoint.read_meta(path).iter_num == 7


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory):
    model = GPT(CONFIG, seed=1)
    path = model.save_checkpoint(7, AdamW(model.parameters()), tmp_path_factory.mktemp("whole"))
    return path, path.read_bytes()


@given(place=st.floats(0, 1, exclude_max=True), bits=st.integers(1, 255))
def test_every_other_value_of_any_byte_is_seen(whole_file, place, bits):
    path, whole = whole_file
    path.write_bytes(flipped(whole, int(place * len(whole)), bits))
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        checkpoint.verify(path)


@given(length=st.integers(0, 20_000), more=st.binary(min_size=1, max_size=20))
def test_a_file_that_is_shorter_or_longer_is_seen(whole_file, length, more):
    path, whole = whole_file
    for damaged in (whole[: min(length, len(whole) - 1)], whole + more):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="damaged"):
            checkpoint.verify(path)


def test_nothing_of_a_damaged_file_is_loaded_not_even_what_is_whole(saved):
    """Damage in the optimizer's state, and only the weights are wanted."""
    _, _, path = saved
    whole = path.read_bytes()
    described = checkpoint.describe(path)["tensors"]
    place = whole.index(np.full(described["optimizer.m.wte.weight"]["shape"], 0.5, "f4").tobytes())
    path.write_bytes(flipped(whole, place, 1))
    other = GPT(CONFIG, seed=2)
    before = weights(other)
    with pytest.raises(CheckpointError, match=r"optimizer\.m\.wte\.weight"):
        other.load_checkpoint(path)
    for name, value in weights(other).items():
        np.testing.assert_array_equal(value, before[name])


def test_a_checkpoint_under_the_name_of_another_step_is_refused(saved):
    model, optimizer, path = saved
    swapped = path.rename(path.with_name("ckpt_20.safetensors"))
    with pytest.raises(CheckpointError, match=r"ckpt_20.*holds step 7.*ckpt_7\.safetensors"):
        model.load_checkpoint(swapped, optimizer)
    free = swapped.rename(path.with_name("final.safetensors"))
    assert model.load_checkpoint(free, optimizer) == 7


def run_of(folder, steps=(1,), **options):
    """Checkpoints such as a run writes."""
    model = GPT(CONFIG, seed=1)
    with checkpoint.Saver(folder, keep_last=0) as saver:
        for step in steps:
            saver.save(model, None, checkpoint.Meta(step, CONFIG), **options)
    return model


def test_a_checkpoint_of_another_run_is_refused_in_this_ones_folder(tmp_path):
    model = run_of(tmp_path / "a", (1, 2))
    run_of(tmp_path / "b", (1, 2))
    shutil.copy(tmp_path / "b" / "ckpt_2.safetensors", tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"a/ckpt_2.*another run"):
        model.load_checkpoint(tmp_path / "a" / "ckpt_2.safetensors")
    path, problems = checkpoint.newest_good(tmp_path / "a")
    assert path.name == "ckpt_1.safetensors" and len(problems) == 1
    shutil.copytree(tmp_path / "b", tmp_path / "moved")
    assert checkpoint.newest_good(tmp_path / "moved")[1] == []


def test_a_lost_run_number_is_taken_from_the_newest_checkpoint(tmp_path):
    run_of(tmp_path, (1,))
    before = checkpoint.read_meta(tmp_path / "ckpt_1.safetensors").run
    (tmp_path / "run.json").write_text("{")
    run_of(tmp_path, (2,))
    assert checkpoint.read_meta(tmp_path / "ckpt_2.safetensors").run == before
    assert checkpoint.newest_good(tmp_path)[1] == []


def test_the_newest_whole_checkpoint_is_found_and_the_damage_named(tmp_path):
    run_of(tmp_path, (1, 2, 3, 10))
    damage(tmp_path / "ckpt_10.safetensors")
    (tmp_path / "ckpt_3.safetensors").write_bytes(b"")
    path, problems = checkpoint.newest_good(tmp_path)
    assert path.name == "ckpt_2.safetensors"
    assert ["ckpt_10" in str(problems[0]), "ckpt_3" in str(problems[1])] == [True, True]


def damage(path):
    whole = path.read_bytes()
    time.sleep(0.02)  # more than a tick of the clock that files are stamped with
    path.write_bytes(flipped(whole, len(whole) - 1, 1))


def test_format_version_1_is_still_read(tmp_path):
    model = GPT(CONFIG, seed=1)
    arrays = {f"model.{name}": value for name, value in weights(model).items()}
    described = {
        "format_version": 1, "iter_num": 3, "model": CONFIG.to_dict(), "train": None,
        "tokenizer": None, "data": None, "progress": {}, "random_state": None,
        "sha256": {n: hashlib.sha256(a.tobytes()).hexdigest() for n, a in arrays.items()},
    }  # fmt: skip
    layout = {name: ["F32", list(array.shape)] for name, array in arrays.items()}
    text = json.dumps(
        {"description": described, "layout": layout}, sort_keys=True, separators=(",", ":")
    )
    described["digest"] = hashlib.sha256(text.encode()).hexdigest()
    path = tmp_path / "ckpt_3.safetensors"
    save_file(arrays, path, {"tinygpt": json.dumps(described)})
    assert checkpoint.verify(path) == checkpoint.Meta(3, CONFIG)
    assert GPT(CONFIG, seed=2).load_checkpoint(path) == 3
    described["iter_num"] = 4
    save_file(arrays, path, {"tinygpt": json.dumps(described)})
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.read_meta(path)


def test_any_safetensors_reader_opens_it(saved):
    model, _, path = saved
    arrays = load_file(path)
    for name, value in weights(model).items():
        np.testing.assert_array_equal(arrays[f"model.{name}"], value)


def test_verify_names_what_is_damaged_and_exits_with_1(tmp_path, capsys):
    run_of(tmp_path, (1, 2), best_loss=1.0)
    assert main(["verify", str(tmp_path)]) == 0
    assert capsys.readouterr().err == "3 files, all whole\n"
    damage(tmp_path / "ckpt_2.safetensors")
    whole = str(tmp_path / "ckpt_1.safetensors")
    assert main(["verify", str(tmp_path), whole]) == 1
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == ["ok", "DAMAGED", "ok", "ok"]
    assert "ckpt_2.safetensors" in out.splitlines()[1] and "model." in out.splitlines()[1]
    assert err == "4 files, 1 of them damaged\n"
    assert main(["verify", str(tmp_path), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is False and [file["ok"] for file in found["files"]] == [True, False, True]
    assert main(["verify", str(tmp_path / "nothing")]) == 1
    assert main(["verify"]) == 2
    (tmp_path / "empty").mkdir()
    assert main(["verify", str(tmp_path / "empty")]) == 1


def test_a_damaged_weight_is_named(saved):
    model, _, path = saved
    whole = path.read_bytes()
    value = model.wpe.weight.numpy().tobytes()
    place = whole.index(value)
    path.write_bytes(whole[:place] + b"\0\0\0\0" + whole[place + 4 :])
    with pytest.raises(CheckpointError, match=r"model\.wpe\.weight"):
        GPT(CONFIG).load_checkpoint(path)


def test_a_header_bomb_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "ckpt_1.safetensors"
    path.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="announces"):
        checkpoint.read_meta(path)


def test_pickles_are_refused(tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(CheckpointError, match="pickle"):
        checkpoint.read_meta(path)


def test_a_header_whose_length_looks_like_a_pickles_first_byte_is_none(tmp_path):
    model = GPT(CONFIG)
    first_bytes = set()
    for length in range(0, 256, 4):  # the header's length is padded to a multiple of 8
        meta = checkpoint.Meta(1, CONFIG, tokenizer={"kind": "x" * length})
        path = checkpoint.save(tmp_path / "ckpt_1.safetensors", model, None, meta)
        first_bytes.add(path.read_bytes()[0])
        assert checkpoint.read_meta(path) == meta
    assert 0x80 in first_bytes


def test_foreign_safetensors_are_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"x": np.zeros(3, np.float32)}, path)
    with pytest.raises(CheckpointError, match="not a TinyGPT checkpoint"):
        checkpoint.read_meta(path)


def test_a_newer_format_says_to_update(tmp_path):
    path = tmp_path / "ckpt_1.safetensors"
    description = json.dumps({"format_version": checkpoint.FORMAT_VERSION + 1})
    save_file({"x": np.zeros(3, np.float32)}, path, {"tinygpt": description})
    with pytest.raises(CheckpointError, match="a newer one"):
        checkpoint.read_meta(path)


def test_a_missing_file_lists_what_is_there(saved):
    _, _, path = saved
    with pytest.raises(CheckpointError, match=r"ckpt_7\.safetensors"):
        checkpoint.read_meta(path.with_name("ckpt_8.safetensors"))


def test_a_failed_save_keeps_the_old_file_and_leaves_no_other(saved, monkeypatch):
    model, optimizer, path = saved
    whole = path.read_bytes()

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tinygpt.runs.checkpoint.writer.write_all", full_disk)
    with pytest.raises(CheckpointError, match="No space left"):
        model.save_checkpoint(7, optimizer, path.parent)
    assert path.read_bytes() == whole
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_folder_that_is_a_file_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not be written"):
        GPT(CONFIG).save_checkpoint(1, None, tmp_path / "file")


def test_the_newest_and_the_best_are_kept(tmp_path):
    model = GPT(CONFIG)
    for step in (100, 20, 3):
        model.save_checkpoint(step, None, tmp_path)
    mark_best(checkpoint_path(tmp_path, 3), 1.5)
    checkpoint.remove_old(tmp_path, keep_last=1)
    assert [p.name for p in list_checkpoints(tmp_path)] == [
        "ckpt_3.safetensors",
        "ckpt_100.safetensors",
    ]
    assert best_checkpoint(tmp_path) == tmp_path / "ckpt_3.safetensors"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "best.json", "ckpt_100.safetensors", "ckpt_3.safetensors",
    ]  # fmt: skip


def names(folder):
    return [path.name.removesuffix(".safetensors") for path in list_checkpoints(folder)]


def test_damaged_checkpoints_neither_count_as_kept_nor_are_deleted(tmp_path):
    run_of(tmp_path, (1, 2, 3, 4))
    damage(tmp_path / "ckpt_4.safetensors")
    damage(tmp_path / "ckpt_3.safetensors")
    problems = checkpoint.remove_old(tmp_path, keep_last=1)
    assert names(tmp_path) == ["ckpt_2", "ckpt_3", "ckpt_4"]
    assert len(problems) == 2


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=12))
def test_whatever_is_damaged_the_newest_whole_checkpoints_stay(steps):
    """Retention against its own description, for any pattern of damaged and best ones."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        folder, keep_last = Path(name), 2
        whole, damaged, best = [], [], None
        for step, (is_whole, is_best) in enumerate(steps, start=1):
            path = checkpoint_path(folder, step)
            made = checkpoint.Snapshot(arrange([("model.w", np.dtype("f4"), (SIZE,))]))
            made.memory[:] = step
            checkpoint.write(path, made, checkpoint.Meta(step, CONFIG))
            if is_best:
                best = path
                mark_best(path, 1.0)
            if is_whole:
                whole.append(path)
            else:
                path.write_bytes(path.read_bytes()[:-1])
                damaged.append(path)
            checkpoint.remove_old(folder, keep_last)
            there = set(list_checkpoints(folder))
            assert set(whole[-keep_last:]) | set(damaged) | {best} - {None} <= there
            assert len(there) <= keep_last + len(damaged) + 1


def test_a_file_is_not_read_again_unless_it_changes(tmp_path, monkeypatch):
    run_of(tmp_path, (1, 2))
    read, verify = [], keeping.verify
    monkeypatch.setattr(keeping, "verify", lambda path: (read.append(path.name), verify(path)))
    verified = keeping.Verified()
    for _ in range(2):
        assert checkpoint.remove_old(tmp_path, 2, verified) == []
    assert read == ["ckpt_2.safetensors", "ckpt_1.safetensors"]
    damage(tmp_path / "ckpt_2.safetensors")
    assert len(checkpoint.remove_old(tmp_path, 2, verified)) == 1


def test_a_file_that_is_gone_is_forgotten(tmp_path):
    """Or a run that saves every so many steps would keep a name for each of them, for ever."""
    verified = keeping.Verified()
    for step in range(1, 6):
        run_of(tmp_path, (step,))
        checkpoint.remove_old(tmp_path, 1, verified)
    assert len(list_checkpoints(tmp_path)) == 1 and len(verified._known) <= 2


def test_what_a_run_adds_is_read_back(tmp_path):
    model = GPT(CONFIG)
    meta = checkpoint.Meta(
        3, CONFIG, TrainConfig(seed=5), {"kind": "byte"}, {"train": "abc"},
        {"best_val_loss": 1.25}, {"seed": 5, "step": 3},
    )  # fmt: skip
    path = checkpoint.save(tmp_path / "ckpt_3.safetensors", model, None, meta)
    assert checkpoint.read_meta(path) == meta


# Saving in the background ------------------------------------------------------------------------


@pytest.fixture
def held(monkeypatch):
    """Writing waits for ``go``; what is written, in which thread, is noted when it is done."""

    class Held:
        go, written, threads = threading.Event(), [], []

        def write(self, path, snapshot, meta):
            assert self.go.wait(60)
            original(path, snapshot, meta)
            self.written.append(path.name)
            self.threads.append(threading.current_thread())

    held, original = Held(), background.write
    held.go.clear()
    monkeypatch.setattr(background, "write", held.write)
    return held


def test_the_file_is_the_state_of_the_moment_whatever_happens_then(tmp_path, held):
    model = GPT(CONFIG, seed=1)
    optimizer = AdamW(model.parameters())
    before = weights(model)
    with checkpoint.Saver(tmp_path, 3) as saver:
        path = saver.save(model, optimizer, checkpoint.Meta(1, CONFIG))
        assert not path.exists() and saver.newest is None  # the run goes on meanwhile
        for p in (*model.parameters().values(), *optimizer.m):
            write(p, np.full(p.shape, 9.0))
        held.go.set()
        saver.wait()
        assert saver.newest == path
    _, arrays = checkpoint.read(path)
    for name, value in before.items():
        np.testing.assert_array_equal(arrays[f"model.{name}"], value)
        assert (arrays[f"optimizer.m.{name}"] == 0).all()
    assert held.threads != [threading.main_thread()]


def test_a_save_waits_for_the_one_before(tmp_path, held):
    model = GPT(CONFIG, seed=1)
    saver = checkpoint.Saver(tmp_path, 1)
    saver.save(model, None, checkpoint.Meta(1, CONFIG), best_loss=2.0)
    second = threading.Thread(
        target=saver.save_snapshot, args=(checkpoint.Copier(model, None).copy(),
                                          checkpoint.Meta(2, CONFIG)),
    )  # fmt: skip
    second.start()
    second.join(0.2)
    assert second.is_alive() and held.written == []
    held.go.set()
    second.join(60)
    saver.wait()
    assert held.written == ["ckpt_1.safetensors", "ckpt_2.safetensors"]
    assert names(tmp_path) == ["ckpt_1", "ckpt_2"]  # the best one and the last one
    assert best_checkpoint(tmp_path).name == "ckpt_1.safetensors"


def test_the_end_waits_for_what_is_being_written_an_error_too(tmp_path, held):
    threading.Timer(0.2, held.go.set).start()
    with pytest.raises(ZeroDivisionError), checkpoint.Saver(tmp_path, 1) as saver:
        saver.save(GPT(CONFIG), None, checkpoint.Meta(1, CONFIG))
        raise ZeroDivisionError
    assert held.written == ["ckpt_1.safetensors"]


def test_the_writing_thread_never_touches_tinygrad(tmp_path):
    modules = set()
    model = GPT(CONFIG)
    saver = checkpoint.Saver(tmp_path, 1)
    threading.setprofile(lambda frame, *_: modules.add(frame.f_globals.get("__name__", "")))
    try:
        for step in (1, 2):
            saver.save(model, AdamW(model.parameters()), checkpoint.Meta(step, CONFIG), 1 / step)
        saver.wait()
    finally:
        threading.setprofile(None)
    assert {
        "tinygpt.runs.checkpoint.writer",
        "tinygpt.runs.checkpoint.keeping",
        "tinygpt.files.atomic",
    } <= modules
    assert not [name for name in modules if name.startswith("tinygrad")]


def test_an_error_nobody_foresaw_is_news_and_not_lost_with_the_thread(tmp_path, monkeypatch):
    saver = checkpoint.Saver(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(background, "write", lambda *_: 1 / 0)
        saver.save(GPT(CONFIG), None, checkpoint.Meta(1, CONFIG))
        saver.wait()
    assert ["NOT SAVED" in news and "division" in news for news in saver.news()] == [True]
    assert saver.news() == [] and saver.newest is None


class Odd:
    """Tensors of every kind that a copy may meet."""

    config, quantized = CONFIG, False

    def __init__(self):
        base = Tensor(np.arange(12, dtype=np.float32).reshape(3, 4)).realize()
        self.tensors = {
            "plain": base,
            "reshaped": base.reshape(4, 3),
            "transposed": base.T,
            "part": base[1:, 1:3],
            "lazy": base + 1,
            "half": base.cast(dtypes.float16).contiguous().realize(),
            "bfloat16": base.cast(dtypes.bfloat16).contiguous().realize(),
            "small": Tensor(np.arange(3, dtype=np.int8)).realize(),
            "single": Tensor(np.array(2.5, np.float32)).realize(),
            "two devices": base.pad(((0, 1), (0, 0))).shard(("CPU", "CPU:1"), axis=0).realize(),
        }

    def parameters(self):
        return self.tensors


@pytest.mark.parametrize("in_reach", [True, False])
def test_tensors_of_every_kind_are_copied(in_reach, monkeypatch):
    """Not in reach: as from a device with memory of its own."""
    if not in_reach:
        monkeypatch.setattr(copier_module, "_memory", lambda *_: None)
    odd = Odd()
    copier = checkpoint.Copier(odd, None)
    memory = copier.snapshot.memory
    snapshot = copier.copy()
    for name, tensor in odd.tensors.items():
        np.testing.assert_array_equal(snapshot.array(f"model.{name}"), tensor.numpy(), name)
    write(odd.tensors["plain"], np.full((3, 4), 7.0))
    assert snapshot.array("model.plain")[0, 1] == 1  # a copy, not a view
    assert copier.copy().memory is memory
    assert (snapshot.array("model.plain") == 7).all()
    assert (snapshot.array("model.transposed") == 7).all()


def test_a_tensor_that_takes_the_place_of_another_is_copied():
    odd = Odd()
    copier = checkpoint.Copier(odd, None)
    copier.copy()
    odd.tensors["half"].replace(odd.tensors["half"].full_like(3).contiguous().realize())
    assert (copier.copy().array("model.half") == 3).all()
    odd.tensors["plain"] = Tensor(np.full((2, 2), 5.0, np.float32)).realize()
    assert copier.copy().array("model.plain").tolist() == [[5, 5], [5, 5]]
