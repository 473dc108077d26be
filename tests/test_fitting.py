"""What --batch-size auto chooses fits, is the largest that does, and keeps a step's tokens."""

import re
import tomllib
from dataclasses import replace

import pytest

from tinygpt.cli import main
from tinygpt.config import GPTConfig, TrainConfig
from tinygpt.errors import DeviceError, UsageError
from tinygpt.machine import resources
from tinygpt.training import fitting, preflight
from tinygpt.training.fitting import cuts, fit

MB = 1_000_000
SHAPE = GPTConfig(vocab_size=256, n_layer=6, n_embd=192, n_head=6, block_size=512)
TRAIN = TrainConfig(batch_size=12, grad_accum_steps=2)
FLAGS = "--n-layer 1 --n-embd 16 --n-head 2 --block-size 8 --max-iters 2 --eval-iters 1"


def free(monkeypatch, megabytes):
    monkeypatch.setattr(resources, "available_memory", lambda: megabytes * MB)


def foreseen(shape, train):
    return preflight.preflight(shape, train).needed


def test_a_step_is_cut_into_equal_parts_the_largest_first():
    found = [(t.batch_size, t.grad_accum_steps) for t in cuts(TRAIN)]
    assert found == [(24, 1), (12, 2), (8, 3), (6, 4), (4, 6), (3, 8), (2, 12), (1, 24)]
    assert [t.batch_size for t in cuts(replace(TRAIN, devices=2))] == [24, 12, 8, 6, 4, 2]


def test_the_largest_that_fits_is_taken(monkeypatch):
    for megabytes in (10_000, 700, 400):
        free(monkeypatch, megabytes)
        found = fit(SHAPE, TRAIN, measure=foreseen)
        room = preflight.ROOM * megabytes * MB
        assert found.taken == foreseen(SHAPE, found.train) <= room
        larger = [t for t in cuts(TRAIN) if t.batch_size > found.train.batch_size]
        assert all(foreseen(SHAPE, t) > room for t in larger)
        assert found.train.batch_size * found.train.grad_accum_steps == 24
    assert found.train.batch_size < 12


def test_what_did_not_fit_when_it_was_tried_is_not_taken(monkeypatch):
    free(monkeypatch, 10_000)
    tried = []

    def measure(_, train):
        tried.append(train.batch_size)
        return {24: None, 12: 9_500 * MB}.get(train.batch_size, 8_000 * MB)

    assert fit(SHAPE, TRAIN, measure=measure).train.batch_size == 8
    assert tried == [24, 12, 8]


def test_where_nothing_fits_that_is_said_with_what_would(monkeypatch):
    free(monkeypatch, 150)
    with pytest.raises(UsageError, match=r"Not even micro-batches of 1 fit.*--model"):
        fit(SHAPE, TRAIN, measure=foreseen)
    free(monkeypatch, 0)
    with pytest.raises(UsageError, match="how much memory is free"):
        fit(SHAPE, TRAIN, measure=foreseen)


def test_a_try_reports_its_peak_and_a_failed_one_its_error(monkeypatch):
    shape = GPTConfig(vocab_size=13, n_layer=1, n_head=2, n_embd=16, block_size=8)
    taken = fitting.measured(shape, TrainConfig(batch_size=2, lora_rank=2))
    assert 5 * MB < taken < 300 * MB
    monkeypatch.setattr(fitting, "TRY", "import os; os.kill(os.getpid(), 9)")
    assert fitting.measured(shape, TRAIN) is None
    monkeypatch.setattr(fitting, "TRY", "raise ValueError('odd')")
    with pytest.raises(DeviceError, match="odd"):
        fitting.measured(shape, TRAIN)


def test_the_command_writes_plain_numbers_and_goes_on_with_them(tmp_path, monkeypatch, capsys):
    text, run = tmp_path / "text.txt", tmp_path / "run"
    text.write_text("to be or not to be, that is the question. " * 60)
    tried = []

    def measure(_, train):
        tried.append(train.batch_size)
        return MB if len(tried) > 1 else None

    monkeypatch.setattr(fitting, "measured", measure)
    words = ["train", str(text), "--out", str(run), *FLAGS.split(), "--tokenizer", "byte"]
    assert main([*words, "--grad-accum-steps", "3", "--batch-size", "auto"]) == 0
    told = capsys.readouterr().err
    assert tried == [24, 12]
    assert re.search(r"batch: 12 sequences at a time, 2 times a step", told)
    config = tomllib.loads((run / "config.toml").read_text())["train"]
    assert (config["batch_size"], config["grad_accum_steps"]) == (12, 2)
    more = ["--max-iters", "4", "--allow-change", "max_iters"]
    assert main(["train", "--resume", "--out", str(run), *more]) == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--batch-size", "auto"], "--minutes"),
        (["--resume", "--out", "run", "--batch-size", "auto"], "goes on"),
        (["--max-iters", "2", "--batch-size", "many"], "--batch-size"),
    ],
)
def test_what_auto_does_not_go_with_is_said(tmp_path, monkeypatch, capsys, words, told):
    (tmp_path / "text.txt").write_text("to be or not to be")
    monkeypatch.chdir(tmp_path)
    assert main(["train", "text.txt", *words]) == 2
    error = capsys.readouterr().err
    assert told in error and "Traceback" not in error
