"""A run that was stopped goes on as if it had not been, or says what keeps it from that."""

import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.run_script import MODEL, TOKENS, TRAIN, make_run
from tinygpt.api import GPT, train
from tinygpt.cli import main, make_app, proving
from tinygpt.cli.proving import compare
from tinygpt.cli.training import _fields, _same_command
from tinygpt.config import GPTConfig
from tinygpt.errors import ChangedRunError, CheckpointError, UsageError
from tinygpt.files.tensor_file import arrange
from tinygpt.runs import checkpoint
from tinygpt.runs.checkpoint import Snapshot
from tinygpt.runs.folder import list_checkpoints, named_step
from tinygpt.runs.history import read
from tinygpt.text.tokenizers import CharTokenizer

ROOT = Path(__file__).parents[1]
EVERY = replace(
    TRAIN, checkpoint_interval=1, grad_accum_steps=2, eval_interval=2, learning_rate=0.2,
    decay="constant",
)  # fmt: skip
"""All there is to remember: dropout, accumulation, best so far, early stopping, samples.

At this rate the eighth step is the best one, so that a run that forgot it would be seen to.
"""
BRIEF = replace(TRAIN, max_iters=2, eval_interval=2, checkpoint_interval=1)
"""For what has nothing to do with learning."""
IMPATIENT = replace(EVERY, learning_rate=3.0, eval_interval=1, early_stop_patience=2, max_iters=30)


def finish(folder, config=EVERY, **options):
    """Resume with a fresh model and go to the end; -> the steps that were taken."""
    return [step.iter for step in make_run(folder, resume=True, config=config, **options)]


def stopped_at(whole, k, folder):
    """The folder of a run as it was after step k, but for rows that were not on the disk yet."""
    folder.mkdir()
    for path in whole.iterdir():
        number = named_step(path)
        if number is None or number <= k:
            shutil.copy(path, folder / path.name)
    return folder


def differing(one, two):
    return [name for row in compare(one, two) for name in row.differing]


def rewrite(path, **changes):
    """Change what a checkpoint says of itself, hashes included: damage that no hash can see."""
    meta, arrays = checkpoint.read(path)
    snapshot = Snapshot(arrange((n, a.dtype, a.shape) for n, a in arrays.items()))
    for name, array in arrays.items():
        snapshot.array(name)[...] = array
    checkpoint.write(path, snapshot, replace(meta, **changes))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of twelve steps that was never stopped."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    steps = list(make_run(folder, config=EVERY))
    assert [step.iter for step in steps] == list(range(1, 13))
    assert [step.iter for step in steps if step.best] == [2, 4, 6, 8]
    return folder


# ---- bit for bit ----


@pytest.mark.parametrize(
    "k", [k if k in (1, 6, 11) else pytest.param(k, marks=pytest.mark.slow) for k in range(1, 12)]
)
def test_resuming_at_every_step_is_bit_identical(whole, tmp_path, k):
    folder = stopped_at(whole, k, tmp_path / "run")
    assert finish(folder) == list(range(k + 1, 13))
    assert differing(whole, folder) == []
    assert (folder / "best.json").read_text() == (whole / "best.json").read_text()


@pytest.mark.parametrize("k", [pytest.param(1, marks=pytest.mark.slow), 7])
def test_a_fresh_process_goes_on_bit_for_bit(whole, tmp_path, k):
    folder = stopped_at(whole, k, tmp_path / "run")
    code = "import sys; from tests.test_resume import finish; print(finish(sys.argv[1]))"
    command = [sys.executable, "-c", code, folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == list(range(k + 1, 13))
    assert differing(whole, folder) == []


def test_early_stopping_comes_at_the_same_step_wherever_the_run_was_stopped(tmp_path):
    whole = tmp_path / "whole"
    steps = [step.iter for step in make_run(whole, config=IMPATIENT)]
    last = steps[-1]
    assert 3 <= last < IMPATIENT.max_iters  # it did lose its patience
    for k in (last - 1, last):
        folder = stopped_at(whole, k, tmp_path / str(k))
        assert finish(folder, IMPATIENT) == list(range(k + 1, last + 1))
        assert differing(whole, folder) == []


def test_the_comparison_sees_a_single_bit(whole, tmp_path):
    for name in ("model.wte.weight", "optimizer.m.wte.weight"):
        folder = stopped_at(whole, 12, tmp_path / name)
        path = folder / "ckpt_12.safetensors"
        meta, arrays = checkpoint.read(path)
        snapshot = Snapshot(arrange((n, a.dtype, a.shape) for n, a in arrays.items()))
        for key, array in arrays.items():
            snapshot.array(key)[...] = array
        snapshot.array(name).view(np.uint8).flat[0] ^= 1
        checkpoint.write(path, snapshot, meta)
        assert differing(whole, folder) == [name]
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    row = {k: v for k, v in json.loads(lines[-1]).items() if k not in proving.VARYING}
    (folder / "metrics.jsonl").write_text("".join(lines[:-1]))
    assert differing(whole, folder) == ["optimizer.m.wte.weight"] + [
        f"step 12: {name} {row[name]!r} and None" for name in row
    ]


# ---- the random state ----


def test_without_the_random_state_the_run_is_another(whole, tmp_path):
    """The negative: were the seed or the step lost, every step after would be seen to differ."""
    folder = stopped_at(whole, 6, tmp_path / "seed")
    config = replace(EVERY, seed=EVERY.seed + 1)
    finish(folder, config, allow_change=("seed",))
    found = differing(whole, folder)
    assert "model.wte.weight" in found and "optimizer.m.wte.weight" in found
    assert any(name.startswith("step 7: train_loss") for name in found)

    folder = stopped_at(whole, 6, tmp_path / "step")
    rewrite(folder / "ckpt_6.safetensors", iter_num=5, random_state={"seed": 11, "step": 5})
    (folder / "ckpt_6.safetensors").rename(folder / "ckpt_5.safetensors")
    finish(folder)
    assert "model.wte.weight" in differing(whole, folder)


@pytest.mark.parametrize(
    "lost", [None, {}, {"seed": 11}, {"seed": 12, "step": 6}, {"seed": 11, "step": 5}]
)
def test_a_lost_random_state_is_refused(whole, tmp_path, lost):
    folder = stopped_at(whole, 6, tmp_path / "run")
    rewrite(folder / "ckpt_6.safetensors", random_state=lost)
    with pytest.raises(CheckpointError, match="lost its random state"):
        make_run(folder, resume=True, config=EVERY)


def test_a_run_from_before_the_order_of_batches_is_told_of_it_once_and_for_all(whole, tmp_path):
    folder = stopped_at(whole, 6, tmp_path / "run")
    rewrite(folder / "ckpt_6.safetensors", random_state={"seed": 11, "step": 6})
    said = "batches (was 'from random places', now 'each token once an epoch')"
    run = make_run(folder, resume=True, config=EVERY)
    assert [f"changed from here on: {said}"] == [n for n in run.take_notices() if "batches" in n]
    next(steps := iter(run))
    steps.close()
    again = make_run(folder, resume=True, config=EVERY)
    assert not any("batches" in notice for notice in again.take_notices())
    assert [change["field"] for change in again.changes] == ["batches"]
    assert "from random places" in (folder / "config.toml").read_text()


# ---- what may change, and what may not ----


def test_every_field_that_differs_is_named_with_what_it_was_and_is(whole):
    config = replace(EVERY, seed=12, batch_size=2)
    model = GPTConfig(**{**MODEL.to_dict(), "dropout": 0.5})
    with pytest.raises(ChangedRunError) as error:
        make_run(
            whole, resume=True, config=config, tokens=TOKENS[::-1], model=model,
        )  # fmt: skip
    said = str(error.value)
    assert error.value.fields == ("dropout", "batch_size", "seed", "data")
    for words in (
        "dropout (was 0.2, now 0.5)", "seed (was 11, now 12)", "batch_size (was 4, now 2)",
        "data (was 'train ", "allow_change=('dropout', 'batch_size', 'seed', 'data')",
    ):  # fmt: skip
        assert words in said


def test_another_tokenizer_is_refused_and_can_be_allowed(whole, tmp_path):
    folder = stopped_at(whole, 6, tmp_path / "run")
    other = CharTokenizer.train(["abc\n"])

    def go_on(**options):
        from tinygpt.runs.run import TrainingRun

        return TrainingRun(
            GPT(MODEL, seed=5), EVERY, TOKENS[:-200], TOKENS[-200:],
            tokenizer=other, folder=folder, resume=True, **options,
        )  # fmt: skip

    with pytest.raises(ChangedRunError, match=r"tokenizer \(was 'byte .*, now 'char "):
        go_on()
    go_on(allow_change=["tokenizer"]).close()


def test_no_validation_where_there_was_some_is_other_data(whole):
    from tinygpt.runs.run import TrainingRun

    with pytest.raises(ChangedRunError) as error:
        TrainingRun(GPT(MODEL, seed=5), EVERY, TOKENS[:-200], folder=whole, resume=True)
    assert error.value.fields == ("data", "tokenizer")


def test_a_finished_run_can_be_made_longer_and_says_so_ever_after(whole, tmp_path):
    folder = stopped_at(whole, 12, tmp_path / "run")
    longer = replace(EVERY, max_iters=14, checkpoint_interval=100, eval_interval=100)
    with pytest.raises(ChangedRunError, match=r"max_iters \(was 12, now 14\)"):
        make_run(folder, resume=True, config=longer)
    run = make_run(folder, resume=True, config=longer, allow_change=["max_iters"])
    steps = list(run)
    assert [step.iter for step in steps] == [13, 14]
    assert any("max_iters (was 12, now 14)" in notice for notice in steps[0].notices)
    assert steps[0].checkpoint is not None  # at once, so that another start needs no permission
    record = {"iter": 12, "field": "max_iters", "was": 12, "now": 14}
    for k in (13, 14):
        meta = checkpoint.read_meta(folder / f"ckpt_{k}.safetensors")
        assert meta.progress["changes"] == [record] and meta.train.max_iters == 14
    text = (folder / "config.toml").read_text()
    assert f"# {json.dumps(record)}" in text and tomllib.loads(text)["train"]["max_iters"] == 14

    once_more = replace(longer, max_iters=15)
    run = make_run(folder, resume=True, config=once_more, allow_change=["max_iters"])
    assert [step.iter for step in run] == [15]
    changes = checkpoint.read_meta(folder / "ckpt_15.safetensors").progress["changes"]
    assert [change["now"] for change in changes] == [14, 15]


def test_what_is_allowed_but_the_same_changes_nothing(whole, tmp_path):
    folder = stopped_at(whole, 11, tmp_path / "run")
    assert finish(folder, allow_change=["seed", "data"]) == [12]
    assert differing(whole, folder) == []


@pytest.mark.parametrize(
    ("allow", "words"),
    [
        (["max_itres"], "Did you mean 'max_iters'"),
        (["n_layer"], "the model's shape"),
        (["vocab_size"], "the model's shape"),
        ([""], "There is no field ''"),
    ],
)
def test_what_cannot_be_allowed_is_refused(whole, allow, words):
    with pytest.raises(UsageError, match=words):
        make_run(whole, resume=True, config=EVERY, allow_change=allow)


def test_a_run_cannot_be_made_shorter_than_it_is(whole):
    shorter = replace(EVERY, max_iters=11)
    with pytest.raises(UsageError, match="max_iters=11 is less than the 12 steps"):
        make_run(whole, resume=True, config=shorter, allow_change=["max_iters"])


def test_allowing_is_for_runs_that_go_on(tmp_path):
    with pytest.raises(UsageError, match="resume=True"):
        make_run(tmp_path / "run", allow_change=["max_iters"])


def test_train_passes_on_what_is_allowed(whole, tmp_path):
    folder = stopped_at(whole, 12, tmp_path / "run")
    from tinygpt.text.tokenizers import ByteTokenizer

    result = train(
        GPT(MODEL, seed=5), replace(EVERY, max_iters=13), TOKENS[:-200], TOKENS[-200:],
        tokenizer=ByteTokenizer(), out_dir=folder, resume=True, show=False,
        allow_change=("max_iters",),
    )  # fmt: skip
    assert result.iter_num == 13


# ---- a run folder that is not as it should be ----


def test_a_run_without_a_checkpoint_starts_from_its_first_step(whole, tmp_path):
    folder = stopped_at(whole, 0, tmp_path / "run")
    (folder / "best.json").unlink()
    run = make_run(folder, resume=True, config=EVERY)
    assert run.take_notices() == (
        f"{folder} has no checkpoint yet: it starts from its first step.",
    )
    assert [step.iter for step in run] == list(range(1, 13))
    assert differing(whole, folder) == []


def test_rows_that_were_lost_are_told_and_the_rest_is_kept(whole, tmp_path):
    folder = stopped_at(whole, 6, tmp_path / "run")
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_bytes(b"".join(lines[:3]) + b"\x00\x00\n" + lines[3][:9])
    run = make_run(folder, resume=True, config=EVERY)
    notices = run.take_notices()
    assert any("1 damaged line" in text for text in notices)
    assert any("lacks 3 of its steps, from 4 to 6" in text for text in notices)
    assert [step.iter for step in run][-1] == 12
    assert [row["iter"] for row in read(folder / "metrics.jsonl")] == [1, 2, 3, *range(7, 13)]


def test_metrics_that_cannot_be_written_stop_nothing(tmp_path, monkeypatch):
    from tinygpt.runs import history as metrics

    opened, notices = metrics._open_for_append, []

    def refuse(path):
        raise OSError(28, "No space left on device")

    run = make_run(tmp_path / "run", config=replace(TRAIN, max_iters=9))
    for step in run:
        notices += step.notices
        if step.iter == 3:
            run.history.close()
            monkeypatch.setattr(metrics, "_open_for_append", refuse)
        if step.iter == 6:
            monkeypatch.setattr(metrics, "_open_for_append", opened)
    history = [text for text in notices if "metrics.jsonl" in text]
    assert [text.split()[0] for text in history] == ["NOT", str(tmp_path / "run/metrics.jsonl")]
    assert "is written again, with the 3 that waited" in history[1]
    assert [row["iter"] for row in read(tmp_path / "run" / "metrics.jsonl")] == list(range(1, 10))


# ---- one writer ----


def test_a_run_that_is_trained_is_not_trained_by_another(tmp_path):
    folder = tmp_path / "run"
    steps = iter(make_run(folder, config=BRIEF))
    next(steps)
    next(steps)  # the first checkpoint is written by now
    with pytest.raises(UsageError, match=f"process {os.getpid()} on this machine"):
        make_run(folder, resume=True, config=BRIEF)
    with pytest.raises(UsageError, match="being trained already"):
        make_run(folder, config=BRIEF)
    reading = list_checkpoints(folder)  # but reading is for everybody
    assert checkpoint.verify(reading[0]).iter_num == 1
    assert main(["info", str(folder)]) == 0
    steps.close()
    make_run(folder, resume=True, config=BRIEF).close()


def test_the_folder_is_free_after_the_end_and_after_an_error(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    run = make_run(folder, config=BRIEF)

    def fail(self, step):
        raise RuntimeError("in the middle")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="in the middle"):
        patch.setattr(type(run), "_record", fail)
        list(run)
    assert not (folder / "run.lock").exists()
    assert len(finish(folder, BRIEF)) == 2
    assert not (folder / "run.lock").exists()
    with pytest.raises(ChangedRunError):
        make_run(folder, resume=True, config=EVERY)
    assert finish(folder, BRIEF) == []


def test_a_run_that_is_iterated_again_takes_its_folder_again(tmp_path):
    run = make_run(tmp_path / "run", config=BRIEF)
    for _ in run:
        break
    assert not (tmp_path / "run" / "run.lock").exists()
    again = iter(run)
    assert next(again).iter == 2
    assert (tmp_path / "run" / "run.lock").exists()
    assert list(again) == []


# ---- the same seed gives the same losses ----

LOSSES = """
import json, sys
import numpy as np
from tinygpt.machine import pool as multicore
from tinygpt.api import GPT
from tinygpt.config import GPTConfig, TrainConfig
from tinygpt.training.loop import train_steps
from tinygpt.training.optim import make_optimizer
import hashlib
model = GPT(GPTConfig(block_size=32, vocab_size=64, n_layer=1, n_head=2, n_embd=64, dropout=0.1))
config = TrainConfig(batch_size=8, max_iters=5, warmup_steps=0, grad_accum_steps=2)
tokens = np.random.default_rng(1).integers(0, 64, 4000)
optimizer = make_optimizer(model.parameters(), config)
losses = [step.train_loss for step in train_steps(model, optimizer, config, tokens)]
weights = b"".join(p.numpy().tobytes() for p in model.parameters().values())
print(json.dumps([multicore.threads(), losses, hashlib.sha256(weights).hexdigest()]))
"""


def losses(threads):
    done = subprocess.run(
        [sys.executable, "-c", LOSSES], env={**os.environ, "TINYGPT_THREADS": str(threads)},
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    used, *rest = json.loads(done.stdout)
    return used, rest


def test_the_same_seed_gives_the_same_run_twice(whole, tmp_path):
    for _ in make_run(tmp_path / "run", config=EVERY):
        pass
    assert differing(whole, tmp_path / "run") == []


@pytest.mark.parametrize("threads", [[1, 2], pytest.param([1, 3, 4], marks=pytest.mark.slow)])
def test_the_same_seed_gives_the_same_losses_on_any_number_of_threads(threads):
    found = [losses(number) for number in threads]
    assert [used for used, _ in found] == threads
    assert all(result == found[0][1] for _, result in found)
    assert all(map(math.isfinite, found[0][1][0]))


# ---- tinygpt verify-resume ----

TINY = shlex.split(
    "--tokenizer char --model.n-layer 1 --model.n-embd 16 --model.n-head 2 --model.block-size 8"
    " --model.dropout 0.2 --train.batch-size 4"
)


@pytest.fixture
def text(tmp_path, monkeypatch):
    """A small text, and a place for temporary files of its own."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cats.txt").write_text("the cat sat on the mat, and the dog on the log.\n" * 40)
    return tmp_path / "cats.txt"


def left(text):
    """What there is besides the text."""
    return [p.name for p in text.parent.iterdir() if p != text and p.name != "temporary"] + list(
        (text.parent / "temporary").iterdir()
    )


def test_the_proof_succeeds_and_leaves_nothing_behind(text, capsys):
    assert main(["verify-resume", str(text), *TINY]) == 0
    out, err = capsys.readouterr()
    assert "Resuming is exact" in out and out.count("identical") == 5
    assert "a fresh process for the other 2" in err
    assert left(text) == []


def test_flags_of_the_proof_count_and_its_length_has_one_name(text, capsys, monkeypatch):
    """The proof shortens a run's own settings, and not what was asked for."""
    seen = []

    def settings_of(settings, material, folder, ranks):
        seen.append(settings.train)
        return [], True

    monkeypatch.setattr(proving, "prove", settings_of)
    given = ["--train.eval-interval", "3", "--train.eval-iters", "7", "--train.warmup-steps", "0"]
    assert main(["verify-resume", str(text), *TINY, *given, "--steps", "8"]) == 0
    [train] = seen
    assert (train.eval_interval, train.eval_iters, train.warmup_steps) == (3, 7, 0)
    assert (train.max_iters, train.sample_interval) == (8, 8)
    capsys.readouterr()
    assert main(["verify-resume", str(text), *TINY, "--train.max-iters", "9"]) == 2
    assert "--steps" in capsys.readouterr().err


def test_a_resumption_without_the_random_state_is_seen_by_the_proof(text, capsys, monkeypatch):
    """The fresh process loses the seed; the verdict blames the program, not the device."""

    def forgetful(folder, ranks):
        config = (folder / "config.toml").read_text()
        (folder / "config.toml").write_text(config.replace("seed = 1337", "seed = 1338"))
        argv = ["train", "--resume", "--out", str(folder), "--allow-change", "seed"]
        assert main(argv) == 0

    monkeypatch.setattr(proving, "go_on", forgetful)
    code = main(["verify-resume", str(text), *TINY, "--json"])
    verdict = json.loads(capsys.readouterr().out)
    assert code == 1 and verdict["exact"] is False and verdict["deterministic"] is True
    by_name = {row["what"]: row["differing"] for row in verdict["compared"]}
    assert "model.wte.weight" in by_name["weights"]
    assert by_name["metrics"][0].startswith("step 3: train_loss")
    assert left(text) == []


@pytest.mark.slow
def test_a_device_that_does_not_repeat_itself_is_told_from_a_fault(text, capsys, monkeypatch):
    trained, noise = proving._train, np.random.default_rng(1)

    def noisy(settings, material, folder, steps):
        train = replace(settings.train, seed=int(noise.integers(1000)))
        trained(replace(settings, train=train), material, folder, steps)

    monkeypatch.setattr(proving, "_train", noisy)
    assert main(["verify-resume", str(text), *TINY]) == 1
    assert "DOES NOT REPEAT ITSELF" in capsys.readouterr().out


@pytest.mark.slow
def test_the_proof_of_a_run_takes_its_settings_and_leaves_it_alone(text, capsys):
    flags = [*TINY, "--train.max-iters", "2", "--train.eval-iters", "1"]
    assert main(["train", str(text), *flags, "--out", "run"]) == 0
    before = {p.name: p.read_bytes() for p in Path("run").iterdir()}
    assert main(["verify-resume", "run", "--json", "--steps", "3"]) == 0
    verdict = json.loads(capsys.readouterr().out)
    assert verdict["exact"] and verdict["steps"] == 3
    assert {p.name: p.read_bytes() for p in Path("run").iterdir()} == before
    assert main(["verify-resume", "run", "--steps", "1"]) == 2


def test_a_longer_run_is_refused_with_the_command_that_allows_it(text, capsys):
    flags = [*TINY, "--train.max-iters", "2", "--train.eval-iters", "1"]
    assert main(["train", str(text), *flags, "--out", "run"]) == 0
    resume = ["train", "--resume", "--out", "run", "--max-iters", "3"]
    capsys.readouterr()
    assert main(resume) == 1
    advice = capsys.readouterr().err.splitlines()[-1].split()
    assert advice == ["tinygpt", *resume, "--allow-change", "max_iters"]
    assert main([*resume, "--allow-change", "max-iter"]) == 2
    assert "Did you mean 'max_iters'" in capsys.readouterr().err
    assert main(advice[1:]) == 0
    assert "done, 3 steps" in capsys.readouterr().err
    assert main(["train", str(text), "--allow-change", "data"]) == 2
    assert main(["train", "--resume", "--out", "run"]) == 0  # and from now on without a word


def test_fields_are_named_as_flags_or_as_fields_by_comma_or_repeated():
    assert _fields(["seed,train.batch-size", " max_iters "]) == ["seed", "batch_size", "max_iters"]
    assert _fields([""]) == []


def test_the_advised_command_repeats_every_kind_of_flag():
    tables = {
        "model": {"bias": False, "tie_embeddings": True, "dropout": 0.5},
        "train": {"max_iters": 7, "sample_prompt": "a b"},
        "data": {"source": "my text.txt", "val_fraction": 0.2},
    }
    words = _same_command(tables, {"--out": Path("a run"), "--preset": None})
    assert list(map(str, words)) == [
        "train", "my text.txt", "--resume", "--out", "a run", "--val-fraction", "0.2",
        "--no-bias", "--tie-embeddings", "--dropout", "0.5",
        "--max-iters", "7", "--sample-prompt", "a b",
    ]  # fmt: skip
    app, kept = make_app("tinygpt", "train"), words[:3] + words[5:]
    _, bound, _ = app.parse_args([str(word) for word in kept], exit_on_error=False)
    assert bound.arguments["model"] == tables["model"]
    assert bound.arguments["train"] == tables["train"]
