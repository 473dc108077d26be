"""Commands without a run take the newest one, a prompt may be an argument, and runs are listed."""

import json
import os
import shlex
import shutil
import subprocess

import pytest

from tinygpt.api import GPT
from tinygpt.cli import main
from tinygpt.cli.generating import _is_path
from tinygpt.config import GPTConfig
from tinygpt.text.tokenizers import CharTokenizer

TEXT = "the cat sat on the mat, and the dog sat on the log.\n" * 40
TINY = shlex.split(
    "--tokenizer char --n-layer 1 --n-embd 8 --n-head 1 --block-size 8 --batch-size 2"
    " --eval-iters 1 --warmup-steps 0 --max-iters 4 --eval-interval 2"
)


def save(folder, changed, letters="abc"):
    """A run with one checkpoint, which changed so many seconds after 1970."""
    model = GPT(GPTConfig(block_size=8, vocab_size=len(letters), n_layer=1, n_head=1, n_embd=8))
    model.save_checkpoint(0, folder=folder, tokenizer=CharTokenizer(letters))
    row = {"iter": 7, "train_loss": 2.5, "val_loss": 2.25}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    os.utime(folder / "metrics.jsonl", (changed, changed))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with two runs of different letters, the newer one of which writes x, y and z."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "runs" / "older", 1_000_000_000)
    save(tmp_path / "runs" / "newer", 1_100_000_000, "xyz")
    return tmp_path


@pytest.fixture
def call(capsys):
    def call(*words):
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out, captured.err

    return call


def test_the_newest_run_is_taken_and_named_on_stderr(here, call):
    code, out, err = call("generate", "xy", "--max-tokens", 4)
    assert code == 0 and out.startswith("xy") and set(out.strip()) <= set("xyz")
    assert err == "run: runs/newer (the newest in runs/)\n"
    code, out, err = call("info")
    assert code == 0 and "runs/newer/ckpt_0.safetensors" in out and "runs/newer" in err
    assert call("verify")[2].startswith("run: runs/newer ")
    assert call("plot")[2] == "run: runs/newer (the newest in runs/)\n"
    code, out, err = call("compare", "--json")
    assert code == 0 and "run: runs/newer, runs/older" in err and len(json.loads(out)["runs"]) == 2


def test_the_newest_is_the_one_that_changed_last(here, call):
    os.utime(here / "runs" / "older" / "metrics.jsonl")
    assert call("info")[2] == "run: runs/older (the newest in runs/)\n"


def test_a_run_without_a_checkpoint_cannot_write_yet(here, call):
    (here / "runs" / "begun").mkdir()
    (here / "runs" / "begun" / "config.toml").write_text("[train]\nseed = 1\n")
    assert call("info")[2] == "run: runs/newer (the newest in runs/)\n"


@pytest.mark.parametrize("verb", ["generate", "info", "eval", "verify", "plot", "memorization"])
def test_where_there_is_no_run_that_is_said(tmp_path, monkeypatch, call, verb):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(verb)
    assert (code, out) == (2, "") and "Say which run" in err and err.count("\n") == 1


def test_a_prompt_can_follow_the_run_or_stand_alone(here, call):
    words = ("--max-tokens", 4, "--seed", 1)
    code, out, err = call("generate", "runs/older", "ab", *words)
    assert (code, err) == (0, "") and out.startswith("ab")
    assert call("generate", "runs/older", "--prompt", "ab", *words)[1] == out
    assert call("generate", "runs/older/ckpt_0", "ab", *words)[1] == out
    assert call("generate", "--prompt", "xy", *words)[1].startswith("xy")


def test_what_looks_like_a_path_is_never_a_prompt(here, call):
    for word in ("runs/oldr", "~/nothing", "a/b", "./x", "runs", str(here / "none")):
        assert _is_path(word), word
        code, out, err = call("generate", word)
        assert (code, out) == (1, "") and "There is no checkpoint in" in err
    for word in ("ROMEO:", "to be / not to be", "诗", "a\nb/c", "x" * 5000, "a\0"):
        assert not _is_path(word), word


def test_two_prompts_are_wrong_use(here, call):
    for words in (["runs/older", "a", "--prompt", "b"], ["runs/older", "a", "-i"]):
        code, out, err = call("generate", *words)
        assert (code, out) == (2, "") and "leave 'a' out" in err


def test_runs_are_listed_with_what_is_known_of_them(here, call):
    (here / "runs" / "odd").mkdir()
    (here / "runs" / "odd" / "metrics.jsonl").write_bytes(b'{"iter": 1}\nno row\n{"iter": 2}\n')
    (here / "runs" / "no run").mkdir()
    code, out, err = call("runs")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].split()[:3] == ["run", "steps", "train"]
    assert [line.split()[0] for line in lines[1:]] == ["runs/odd", "runs/newer", "runs/older"]
    assert "runs/odd/metrics.jsonl" in lines[1]
    assert lines[2].split()[1:7] == ["7", "2.5000", "2.2500", "2.2500", "-", "7"]
    assert " 2004-11-" in lines[2] and lines[2].endswith(" MB")
    found = json.loads(call("runs", "runs", "--json")[1])
    assert found[1]["best_val_loss"] == 2.25 and found[1]["changed"] == 1_100_000_000
    assert call("runs", "nowhere")[0] == 2
    shutil.rmtree(here / "runs")
    assert call("runs") == (
        0,
        "",
        "There is no run in runs. To train one: tinygpt train TEXT.txt\n",
    )


def test_a_dry_run_says_what_would_happen_and_writes_nothing(tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cats.txt").write_text(TEXT)
    code, out, err = call("train", "cats.txt", *TINY, "--dry-run")
    assert (code, out) == (0, "")
    for part in ("text: cats.txt", "tokens: 1,872 for", "parameters", "memory: ", "time: "):
        assert part in err
    assert "nothing was written" in err
    assert [path.name for path in tmp_path.iterdir()] == ["cats.txt"]


def test_resuming_without_a_folder_goes_on_with_the_newest_run(tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cats.txt").write_text(TEXT)
    assert call("train", "cats.txt", *TINY)[0] == 0
    code, out, err = call("train", "--resume", "--json")
    assert code == 0 and "(the newest in runs/)" in err and json.loads(out)["iter"] == 4


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_can_complete_commands_and_flags(call, shell):
    code, out, err = call("completion", shell)
    assert (code, err) == (0, "")
    assert all(word in out for word in ("generate", "learning-rate", "max-tokens", "gguf"))
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=out, text=True, check=True)
