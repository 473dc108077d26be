"""A checkpoint is whole or refused, says everything of itself, and gives back every bit."""

import json
import pickle

import numpy as np
import pytest
from safetensors.numpy import save_file
from tinygrad import Tensor, TinyJit
from tinygrad.nn import optim

from tinygpt import checkpoint
from tinygpt.api import GPT
from tinygpt.config import GPTConfig, TrainConfig
from tinygpt.errors import CheckpointError
from tinygpt.optim import AdamW

CONFIG = GPTConfig(block_size=4, vocab_size=11, n_layer=1, n_head=2, n_embd=8)


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


def test_another_kind_of_optimizer_says_what_is_missing(saved):
    model, _, path = saved
    sgd = optim.SGD(list(model.parameters().values()), momentum=0.9)
    with pytest.raises(CheckpointError, match=r"optimizer\.b\.wte\.weight"):
        model.load_checkpoint(path, sgd)


def test_every_flipped_byte_is_seen_and_nothing_is_loaded(saved):
    _, _, path = saved
    whole = path.read_bytes()
    other = GPT(CONFIG, seed=2)
    before = weights(other)
    rng = np.random.default_rng(0)
    header = int.from_bytes(whole[:8], "little")
    places = [
        *range(0, 10),
        *rng.integers(10, 8 + header, 40),
        *rng.integers(8 + header, len(whole), 40),
    ]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            checkpoint.verify(path)
    path.write_bytes(whole[:-8] + bytes(8 - len(whole[-8:])) + b"\1" * 8)
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.verify(path)
    for name, value in weights(other).items():
        np.testing.assert_array_equal(value, before[name])


def test_a_damaged_weight_is_named(saved):
    model, _, path = saved
    whole = path.read_bytes()
    value = model.wpe.weight.numpy().tobytes()
    place = whole.index(value)
    path.write_bytes(whole[:place] + b"\0\0\0\0" + whole[place + 4 :])
    with pytest.raises(CheckpointError, match=r"model\.wpe\.weight"):
        GPT(CONFIG).load_checkpoint(path)


def test_a_truncated_file_is_refused(saved):
    _, _, path = saved
    whole = path.read_bytes()
    for length in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="damaged"):
            checkpoint.read_meta(path)


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
    with pytest.raises(CheckpointError, match="pip install --upgrade"):
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

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
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
    checkpoint.mark_best(checkpoint.checkpoint_path(tmp_path, 3), 1.5)
    checkpoint.remove_old(tmp_path, keep_last=1)
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path)] == [
        "ckpt_3.safetensors",
        "ckpt_100.safetensors",
    ]
    assert checkpoint.best_checkpoint(tmp_path) == tmp_path / "ckpt_3.safetensors"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "best.json", "ckpt_100.safetensors", "ckpt_3.safetensors",
    ]  # fmt: skip


def test_what_a_run_adds_is_read_back(tmp_path):
    model = GPT(CONFIG)
    meta = checkpoint.Meta(
        3, CONFIG, TrainConfig(seed=5), {"kind": "byte"}, {"train": "abc"},
        {"best_val_loss": 1.25}, {"seed": 5, "step": 3},
    )  # fmt: skip
    path = checkpoint.save(tmp_path / "ckpt_3.safetensors", model, None, meta)
    assert checkpoint.read_meta(path) == meta
