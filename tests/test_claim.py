"""Nothing foreign is touched, and nothing of ours is lost: folders, temporaries, older branches."""

import fcntl
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tinygrad import Tensor

from tests.run_script import MODEL, TOKENS, TRAIN, make_run
from tinygpt.api import GPT, load, train
from tinygpt.cli import main
from tinygpt.cli.options import file_tables
from tinygpt.config import GPTConfig, TrainConfig, to_toml
from tinygpt.errors import CheckpointError, TokenizerError, UsageError
from tinygpt.files import atomic
from tinygpt.files.atomic import building, remove_stale, replacing
from tinygpt.runs import checkpoint
from tinygpt.runs import folder as folders
from tinygpt.runs.folder import (
    best_checkpoint,
    checkpoint_path,
    latest_checkpoint,
    list_checkpoints,
)
from tinygpt.runs.history import read
from tinygpt.text.tokenizers import BPETokenizer, ByteTokenizer, load_tokenizer
from tinygpt.untrusted import parse_toml

EVERY = replace(TRAIN, max_iters=6, eval_interval=2, checkpoint_interval=2)
"""Checkpoints 2, 4 and 6."""


def state(folder: Path) -> dict[str, tuple[object, ...]]:
    """Every byte and time of a folder, its own included."""
    found = {}
    for path in [folder, *folder.rglob("*")]:
        status = path.lstat()
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        found[str(path)] = (status.st_mtime_ns, status.st_mode, content)
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("claims") / "whole"
    for _ in make_run(folder, config=EVERY):
        pass
    return folder


@pytest.fixture
def run(whole, tmp_path):
    """The same run, to be changed."""
    return shutil.copytree(whole, tmp_path / "run")


# A folder that is not a run's -------------------------------------------------------------------

FOREIGN = {
    "config.toml": "x = 1\n",
    "best.json": '{"score": 3}',
    "tokenizer.json": '{"version": "1.0", "model": {}}',
    "metrics.jsonl": '{"loss": 1}\n',
    "samples.jsonl": '{"text": "mine"}\n',
    "run.json": '{"run": "my marathon"}',
    "run.lock": "locked by my own program",
    "notes.md": "mine",
    ".hidden": "mine",
    ".report.2024.tmp": "mine",
    "left-after-2": None,
}


@pytest.fixture(params=FOREIGN)
def foreign(request, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    text = FOREIGN[request.param]
    (folder / request.param).mkdir() if text is None else (folder / request.param).write_text(text)
    return folder


@pytest.mark.parametrize("resume", [None, True])
def test_a_folder_that_is_not_a_runs_is_refused_and_stays_as_it_was(foreign, resume):
    before = state(foreign)
    name = next(foreign.iterdir()).name
    with pytest.raises((UsageError, CheckpointError)) as error:
        make_run(foreign, resume=resume)
    assert name in str(error.value) or resume, error.value
    assert state(foreign) == before


def test_train_in_python_refuses_it_too(foreign):
    before = state(foreign)
    with pytest.raises(UsageError, match="is not the folder of a run"):
        train(GPT(MODEL), TRAIN, TOKENS, out_dir=foreign, show=False)
    assert state(foreign) == before


@pytest.mark.parametrize(
    "words",
    [
        "train {text} --out {folder}",
        "train {text} --out {folder}/config.toml",
        "train --resume --out {folder}",
        "train {text} --resume --out {folder}",
        "train {text} --init {run} --out {folder}",
        "train --resume {run}/ckpt_2 --out {folder}",
        "tokenizer train {text} --out {text}",
        "tokenizer train {text} --out {folder}/tokenizer.json",
        "tokenizer train {text} --out {run}/tokenizer.json",
        "import hf {folder} --out {folder}",
        "export hf {run} --out {folder}",
        "export gguf {run} --out {folder}/model.gguf",
        "export web {run} --out {folder}/page.html",
        "plot {run} --out {folder}/photo.png",
    ],
)
def test_every_command_leaves_what_is_not_its_own(words, run, tmp_path, capsys):
    folder = tmp_path / "mine"
    folder.mkdir()
    text = folder / "samples.jsonl"
    text.write_text('{"text": "the cat sat on the mat."}\n' * 40)
    for name, line in (
        ("config.toml", to_toml({"model": MODEL})),
        ("tokenizer.json", '{"version": "1.0", "model": {"type": "BPE"}}'),
        ("model.gguf", "GGUF of somebody else"),
        ("page.html", "<!doctype html><title>About TinyGPT</title>"),
        ("photo.png", "\x89PNG Software Gimp"),
    ):
        (folder / name).write_text(line)
    before = state(folder), state(run)
    arguments = [w.format(text=text, folder=folder, run=run) for w in words.split()]
    assert main(arguments) in (1, 2)
    assert "Traceback" not in capsys.readouterr().err
    assert (state(folder), state(run)) == before


def test_what_is_empty_missing_or_marked_takes_a_run(tmp_path):
    for folder in (tmp_path / "missing" / "too", tmp_path / "empty", tmp_path / "link"):
        if folder.name == "empty":
            folder.mkdir()
        if folder.name == "link":
            (tmp_path / "target").mkdir()
            folder.symlink_to(tmp_path / "target")
        make_run(folder).close()
        make_run(folder).close()  # it is marked now, though it has no checkpoint yet
        assert folders.run_of(folder) is not None


def test_what_a_killed_start_leaves_is_empty(tmp_path):
    (tmp_path / "run.lock").write_text("")
    (tmp_path / ".run.json.tinygpt-0123456789ab.tmp").write_text("{")
    make_run(tmp_path).close()
    assert not list(tmp_path.glob(".*"))


def test_a_lost_mark_is_found_again_from_the_settings(run):
    number = folders.run_of(run)
    (run / "run.json").unlink()
    make_run(run, resume=True, config=EVERY).close()
    assert folders.run_of(run) == number


def test_what_is_refused_changes_nothing_in_a_run(run):
    (run / "run.lock").write_text("")
    before = state(run)
    with pytest.raises(UsageError, match="holds a run already"):
        make_run(run)
    with pytest.raises(CheckpointError, match="learning_rate"):
        make_run(run, resume=True, config=replace(EVERY, learning_rate=0.5))
    with pytest.raises(UsageError):
        make_run(run, resume=True, config=replace(EVERY, sample_prompt="." * 70_000))
    with (run / "run.lock").open() as file:  # another process trains
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="being trained already"):
            make_run(run, resume=True, config=EVERY)
    assert state(run) == before


def test_the_rows_of_a_run_whose_checkpoints_are_gone_are_kept(run):
    rows = (run / "metrics.jsonl").read_bytes()
    for path in list_checkpoints(run):
        path.unlink()
    new = make_run(run, config=EVERY)
    assert any("set aside" in notice for notice in new.take_notices())
    new.close()
    assert (run / "left-after-0" / "metrics.jsonl").read_bytes() == rows
    assert list(read(run / "metrics.jsonl")) == []


def test_a_checkpoint_may_lie_among_files_of_the_users(tmp_path):
    (tmp_path / "config.toml").write_text("x = 1\n")
    (tmp_path / ".report.2024.tmp").write_text("mine")
    before = state(tmp_path)
    GPT(MODEL).save_checkpoint(3, None, tmp_path)
    GPT(MODEL).save_checkpoint(3, None, tmp_path)
    after = state(tmp_path)
    del after[str(tmp_path / "ckpt_3.safetensors")], after[str(tmp_path)], before[str(tmp_path)]
    assert after == before
    (tmp_path / "ckpt_4.safetensors").write_text("something else")
    with pytest.raises(UsageError, match=r"ckpt_4.*is not a checkpoint that TinyGPT wrote"):
        GPT(MODEL).save_checkpoint(4, None, tmp_path)


# Temporaries ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [".report.2024.tmp", ".notes.1.tmp", ".ckpt_3.safetensors.0123456789ab.tmp", ".x.tinygpt.tmp",
     ".x.tinygpt-0123456789AB.tmp", "x.tinygpt-0123456789ab.tmp", ".x.tinygpt-0123456789ab.tmp2",
     ".x.tinygpt-0123456789.tmp"],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_somebody_else_made_is_not_swept_away(name, kind, tmp_path):
    path = tmp_path / name
    path.write_text("mine") if kind == "file" else path.mkdir()
    remove_stale(tmp_path)
    with building(tmp_path / "x"):
        pass
    assert path.exists()


def test_links_and_folders_of_such_a_name_are_left(tmp_path):
    (tmp_path / "target").write_text("mine")
    (tmp_path / ".x.tinygpt-0123456789ab.tmp").symlink_to("target")
    (tmp_path / ".y.tinygpt-0123456789ab.tmp").mkdir()
    remove_stale(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_sweep_at_any_moment_does_not_make_a_save_fail(tmp_path, monkeypatch):
    """Before and after each call of the system that a writer makes."""

    def sweeping(function):
        def call(*args, **kwargs):
            remove_stale(tmp_path)
            monkeypatch.setattr(atomic, "remove_stale", lambda _: None)
            result = function(*args, **kwargs)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(os, "open", really["open"])
                patch.setattr(fcntl, "flock", really["flock"])
                remove_stale(tmp_path)
            return result

        return call

    really = {"open": os.open, "flock": fcntl.flock}
    monkeypatch.setattr(atomic, "sync", sweeping(atomic.sync))
    monkeypatch.setattr(Path, "replace", sweeping(Path.replace))
    swept = []

    def opened(path, *args, **kwargs):
        handle = really["open"](path, *args, **kwargs)
        if not swept and str(path).endswith(".tmp"):  # before it could be locked
            swept.append(path)
            remove_stale(tmp_path)
        return handle

    monkeypatch.setattr(os, "open", opened)
    with replacing(tmp_path / "file") as file:
        file.write(b"whole")
    assert swept and [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"whole"


@pytest.mark.parametrize(("age", "stays"), [(0, True), (2 * atomic.ABANDONED, False)])
def test_where_there_are_no_locks_only_what_is_old_goes(tmp_path, monkeypatch, age, stays):
    def unsupported(*_):
        raise OSError(os.strerror(95))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    path = tmp_path / ".x.tinygpt-0123456789ab.tmp"
    path.write_text("half")
    os.utime(path, (path.stat().st_mtime - age,) * 2)
    remove_stale(tmp_path)
    assert path.exists() == stays


# Going back -------------------------------------------------------------------------------------


def test_going_back_sets_the_later_checkpoints_aside(run):
    rows, last = list(read(run / "metrics.jsonl")), (run / "ckpt_6.safetensors").read_bytes()
    best = (run / "best.json").read_bytes()
    result = train(
        GPT(MODEL, seed=5), replace(EVERY, max_iters=5, keep_last=1), TOKENS[:-200], TOKENS[-200:],
        tokenizer=ByteTokenizer(), out_dir=run, resume=run / "ckpt_2",
        allow_change=("max_iters",), show=False,
    )  # fmt: skip
    assert result.checkpoint == run / "ckpt_5.safetensors" and result.checkpoint.is_file()
    assert checkpoint.newest_good(run) == (result.checkpoint, [])
    aside = run / "left-after-2"
    assert [p.name for p in list_checkpoints(aside)] == [
        "ckpt_4.safetensors", "ckpt_6.safetensors",
    ]  # fmt: skip
    assert (aside / "ckpt_6.safetensors").read_bytes() == last
    assert list(read(aside / "metrics.jsonl")) == rows
    assert (aside / "best.json").read_bytes() == best
    assert [row["iter"] for row in read(run / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert make_run(aside, resume=True, config=EVERY).iter_num == 6  # a run of its own
    assert load(aside)[0].config == MODEL


def test_it_is_set_aside_before_the_first_step_and_said(run):
    best = json.loads((run / "best.json").read_text())["checkpoint"]
    assert best != "ckpt_2.safetensors"
    back = make_run(run, resume=run / "ckpt_2.safetensors", config=EVERY)
    assert any("left-after-2" in notice for notice in back.take_notices())
    back.close()
    assert [p.name for p in list_checkpoints(run)] == ["ckpt_2.safetensors"]
    assert best_checkpoint(run) == run / "ckpt_2.safetensors"
    meta = checkpoint.read_meta(run / "ckpt_2.safetensors")
    found = json.loads((run / "best.json").read_text())["val_loss"]
    assert found == meta.progress["best_val_loss"]
    again = make_run(run, resume=True, config=EVERY)
    assert again.iter_num == 2 and again.take_notices() == ()
    again.close()
    assert not (run / "left-after-2-2").exists()


def test_going_back_twice_keeps_both_branches(run):
    for name in ("left-after-2", "left-after-2-2"):
        make_run(run, resume=run / "ckpt_2.safetensors", config=EVERY).close()
        assert (run / name / "ckpt_6.safetensors").is_file()
        shutil.copy(run / name / "ckpt_6.safetensors", run)  # as if it had come so far again


def test_what_was_just_written_is_never_removed(tmp_path):
    model = GPT(MODEL)
    for step in (4, 6, 5):
        model.save_checkpoint(step, None, tmp_path)
    written = checkpoint_path(tmp_path, 5)
    checkpoint.remove_old(tmp_path, 1, written=written)
    assert [p.name for p in list_checkpoints(tmp_path)] == [
        "ckpt_5.safetensors", "ckpt_6.safetensors",
    ]  # fmt: skip


def test_a_run_does_not_go_on_in_the_folder_of_another(run, tmp_path):
    other = tmp_path / "other"
    for _ in make_run(other, config=replace(EVERY, max_iters=2)):
        pass
    before = state(other)
    with pytest.raises(UsageError, match="holds another run"):
        make_run(other, resume=run / "ckpt_4.safetensors", config=EVERY)
    assert state(other) == before


@pytest.fixture
def said(tmp_path, capsys):
    """The command line, on a run of characters with checkpoints 2, 4 and 6."""
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat.\n" * 40)
    flags = (
        "--tokenizer char --model.n-layer 1 --model.n-embd 8 --model.n-head 1 --model.block-size 8 "
        "--train.batch-size 2 --train.eval-iters 1 --train.max-iters 6 --train.eval-interval 2 "
        "--train.sample-interval 9"
    )

    def call(*words):
        code = main([str(word) for word in words])
        return code, capsys.readouterr().err

    assert call("train", text, "--out", tmp_path / "cli", *flags.split())[0] == 0
    return call


def test_the_command_line_goes_on_from_the_checkpoint_that_is_named(said, tmp_path):
    run = tmp_path / "cli"
    code, err = said("train", "--resume", run / "ckpt_4")
    assert code == 0 and "from step 4" in err and "left-after-4" in err
    assert (run / "left-after-4" / "ckpt_6.safetensors").is_file()
    before = state(run)
    code, err = said(
        "train", "--resume", run / "ckpt_2.safetensors", "--out", tmp_path / "new",
        "--train.max-iters", 4, "--allow-change", "max_iters",
    )  # fmt: skip
    assert code == 0 and state(run) == before
    assert list_checkpoints(tmp_path / "new")[-1].name == "ckpt_4.safetensors"
    code, err = said("train", "--resume", run)  # as --out would
    assert code == 0 and "from step 6" in err
    code, err = said("train", "--resume", run / "ckpt_3")
    assert code == 1 and "There is no checkpoint at" in err


def test_a_checkpoint_is_named_without_its_suffix_in_one_way(said, tmp_path):
    run, own = tmp_path / "cli", tmp_path / "cli" / "mine.safetensors"
    shutil.copy(run / "ckpt_4.safetensors", own)
    for word, meant in (
        (run / "mine", own),
        (own, own),
        (run, run / "ckpt_6.safetensors"),
        (run / "ckpt_2", run / "ckpt_2.safetensors"),
    ):
        assert latest_checkpoint(word) == meant
    said("train", "--resume", run / "mine", "--out", tmp_path / "new")
    assert list_checkpoints(tmp_path / "new")[-1].name == "ckpt_6.safetensors"
    shutil.copy(own, tmp_path / "cli.safetensors")  # a folder is what is there under its own name
    assert latest_checkpoint(run) == run / "ckpt_6.safetensors"
    for missing in (run / "ckpt_3", tmp_path / "none"):
        with pytest.raises(CheckpointError, match="There is no checkpoint in"):
            latest_checkpoint(missing)


# What is written is read ------------------------------------------------------------------------


SPECIAL = ".[]{}\"'\\#\n=,"
"""What the grammar of TOML is made of."""


@settings(max_examples=60)
@given(
    st.text(st.characters(codec="utf-8"), max_size=200) | st.text(".[]{}\"'\\#\n=,", max_size=999)
)
def test_whatever_the_prompt_the_settings_are_read_back(prompt):
    config = TrainConfig(sample_prompt=prompt)
    tables = parse_toml(to_toml({"train": config, "data": {"source": prompt}}).encode())
    assert TrainConfig.from_dict(tables["train"]) == config
    assert tables["data"]["source"] == prompt


@pytest.mark.parametrize("prompt", ["." * 300, "[{" * 2000, '{"a": [1.5, "x"]}' * 600])
def test_a_run_with_any_prompt_can_be_resumed(prompt, tmp_path):
    make_run(tmp_path, config=replace(TRAIN, sample_prompt=prompt)).close()
    assert file_tables(tmp_path / "config.toml")["train"]["sample_prompt"] == prompt


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"config": replace(TRAIN, sample_prompt="x" * 70_000)}, "65,536"),
        ({"config": replace(TRAIN, sample_prompt="caf\udce9")}, "not UTF-8"),
        ({"source": {"source": "caf\udce9.txt"}}, "not UTF-8"),
        ({"source": {"names": ["a", {"b": 1}]}}, "cannot be read back"),
    ],
)  # fmt: skip
def test_what_could_not_be_read_is_refused_before_anything_is_written(options, words, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(UsageError, match=words):
        make_run(folder, **options)
    assert not folder.exists()


def test_a_shape_that_no_loader_believes_is_refused_before_anything_is_written(tmp_path):
    deep = GPTConfig(vocab_size=256, n_layer=70, n_embd=1, n_head=1, block_size=5000)
    tokens = np.tile(TOKENS, 10)
    with pytest.raises(UsageError, match=r"would need .* could not be read again"):
        train(GPT(deep, seed=None), TRAIN, tokens, out_dir=tmp_path / "run", show=False)
    assert not (tmp_path / "run").exists()


class Upper(ByteTokenizer):
    kind = "upper"


def test_a_tokenizer_that_could_not_be_loaded_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TokenizerError, match="cannot keep Upper"):
        train(GPT(MODEL), TRAIN, TOKENS, tokenizer=Upper(), out_dir=tmp_path / "run", show=False)
    with pytest.raises(TokenizerError, match="cannot keep Upper"):
        GPT(MODEL).save_checkpoint(1, None, tmp_path / "run", tokenizer=Upper())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("step", [True, -1, 2**63, 1.0, np.int64(3)])
def test_a_step_that_no_checkpoint_can_have_is_refused(step, tmp_path):
    with pytest.raises(UsageError, match="not a step number"):
        GPT(MODEL).save_checkpoint(step, None, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_is_saved_over_a_tokenizer_only(tmp_path):
    ByteTokenizer().save(tmp_path / "t.json")
    ByteTokenizer().save(tmp_path / "t.json")
    (tmp_path / "text.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not a tokenizer that TinyGPT wrote"):
        ByteTokenizer().save(tmp_path / "text.txt")
    assert (tmp_path / "text.txt").read_text() == "mine"


def test_a_text_without_merges_makes_no_vocabulary():
    with pytest.raises(TokenizerError, match="nothing to merge"):
        BPETokenizer.train("a", 300)


@settings(max_examples=25)
@given(st.text(st.characters(codec="utf-8"), min_size=2, max_size=60), st.integers(257, 400))
def test_whatever_the_text_its_vocabulary_is_read_back(text, size):
    import tempfile

    try:
        made = BPETokenizer.train(text, size)
    except TokenizerError as error:
        assert "nothing to merge" in str(error)
        return
    with tempfile.TemporaryDirectory() as folder:
        assert load_tokenizer(made.save(Path(folder) / "tokenizer.json")) == made


def test_a_sample_of_very_long_tokens_is_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(ByteTokenizer, "decode", lambda *_: "\x00" * 3_000_000)
    config = replace(TRAIN, max_iters=1, eval_interval=1, checkpoint_interval=1)
    for _ in make_run(tmp_path, config=config):
        pass
    [row] = read(tmp_path / "samples.jsonl")
    assert row["text"].startswith("\x00" * 1000)


# Where weights are from -------------------------------------------------------------------------


def test_where_weights_are_from_is_true_or_not_said(tmp_path):
    one, two = GPT(MODEL, seed=1), GPT(MODEL, seed=2)
    first = one.save_checkpoint(1, None, tmp_path / "one")
    second = two.save_checkpoint(2, None, tmp_path / "two")
    model, _ = load(first)
    assert model.origin == checkpoint.origin(first)
    model.load_checkpoint(second)
    assert model.origin == checkpoint.origin(second)
    weight = model.wte.weight
    weight.assign(weight + 1).realize()
    assert model.origin is None  # of no checkpoint
    weight.assign(Tensor(two.wte.weight.numpy())).realize()
    assert model.origin == checkpoint.origin(second)
    assert GPT(MODEL).origin is None


def test_a_run_says_which_weights_it_began_with(tmp_path):
    first = GPT(MODEL, seed=1).save_checkpoint(1, None, tmp_path / "one")
    second = GPT(MODEL, seed=2).save_checkpoint(2, None, tmp_path / "two")
    model, _ = load(first)
    model.load_checkpoint(second)
    config = replace(TRAIN, max_iters=1, eval_interval=1, checkpoint_interval=1)
    result = train(model, config, TOKENS, out_dir=tmp_path / "run", show=False)
    init = checkpoint.read_meta(result.checkpoint).init
    assert init == checkpoint.origin(second)
    assert model.origin is None  # it has learned
    result = train(model, config, TOKENS, out_dir=tmp_path / "again", show=False)
    assert checkpoint.read_meta(result.checkpoint).init is None


def test_a_shorter_block_and_merged_adapters_keep_their_origin(tmp_path):
    config = replace(TRAIN, max_iters=1, eval_interval=1, checkpoint_interval=1, lora_rank=2)
    result = train(GPT(MODEL), config, TOKENS, out_dir=tmp_path / "run", show=False)
    model, _ = load(result.checkpoint)
    assert model.origin == checkpoint.origin(result.checkpoint)
    short = GPT(GPTConfig(**{**MODEL.to_dict(), "block_size": 4}))
    found = checkpoint.start_from(result.checkpoint, short)
    assert short.origin == found
