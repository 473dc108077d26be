"""``tinygpt compare``: what runs have in common and what not, from their folders alone."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from tinygpt.cli import main
from tinygpt.cli.comparing import differences, loss_table, read_run
from tinygpt.errors import MissingExtraError
from tinygpt.runs import plots
from tinygpt.runs.folder import bytes_per_token_of
from tinygpt.server.dashboard.watched import Run

TEXT = "the cat sat on the mat, and the dog sat on the log.\n" * 40


def trained(folder: Path, *flags: str, tokenizer: str = "char") -> Path:
    text = folder.parent / "cats.txt"
    text.write_text(TEXT, encoding="utf-8")
    size = "--model.n-layer 1 --model.n-embd 8 --model.n-head 1 --model.block-size 8"
    steps = (
        f"--tokenizer {tokenizer} --train.batch-size 2 --train.max-iters 6 --train.eval-interval 2 "
        "--train.eval-iters 1 --train.warmup-steps 0"
    )
    arguments = ["train", text, *size.split(), *steps.split(), *flags, "--out", folder]
    assert main([str(a) for a in arguments]) == 0
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    a = trained(folder / "a")
    b = trained(folder / "b", "--train.learning-rate", "0.01", "--train.seed", "5")
    return [a, b]


def compare(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["compare", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err


def test_settings_that_differ_and_no_others_are_shown(
    runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = compare(capsys, *runs)
    assert code == 0
    settings = out.split("[figures]")[0]
    assert "train.learning_rate  0.001" in settings and "0.01" in settings
    assert "train.seed" in settings and "n_layer" not in settings
    for word in ("parameters", "best loss", "tokens per second", "[losses]"):
        assert word in out
    assert "[samples at step 2]" in out and "[samples at step 6]" in out


def test_runs_that_are_the_same_say_so(
    runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "They are the same." in compare(capsys, runs[0], runs[0])[1]


def test_json_holds_figures_losses_and_samples(
    runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = compare(capsys, *runs, "--json")
    assert code == 0
    found = json.loads(out)
    assert set(found["differences"]) == {"train.learning_rate", "train.seed"}
    assert found["differences"]["train.seed"] == [1337, 5]
    rows = [json.loads(line) for line in (runs[1] / "metrics.jsonl").read_text().splitlines()]
    losses = {row["iter"]: row["val_loss"] for row in rows if "val_loss" in row}
    figures = found["runs"][1]["figures"]
    assert figures["steps"] == 6 and figures["best_loss"] == min(losses.values())
    assert figures["train_loss"] == rows[-1]["train_loss"]
    assert figures["seconds"] == rows[-1]["elapsed"] and figures["tokens_per_second"] > 0
    assert found["losses"]["kind"] == "val"
    assert [row["iter"] for row in found["losses"]["steps"]] == [2, 4, 6]
    assert [row["loss"][1] for row in found["losses"]["steps"]] == list(losses.values())
    assert [row["iter"] for row in found["samples"]] == [2, 4, 6]
    sample = json.loads((runs[0] / "samples.jsonl").read_text().splitlines()[-1])
    assert found["samples"][-1]["texts"][0] == sample["text"]


def made(folder: Path, losses: list[float], *, seconds: float = 1.0, size: float = 2.0) -> Path:
    """A run that was evaluated every ten steps of 8 tokens, with so many seconds a step."""
    folder.mkdir()
    settings = "[model]\nblock_size = 4\nvocab_size = 9\n[train]\nbatch_size = 2\n"
    (folder / "config.toml").write_text(settings)
    (folder / "run.json").write_text(
        json.dumps({"run": "0123456789abcdef", "program": "tinygpt", "bytes_per_token": size})
    )
    rows = [
        {"iter": 10 * i, "val_loss": loss, "train_loss": loss, "elapsed": 10 * i * seconds}
        for i, loss in enumerate(losses, 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_which_run_learned_more_is_the_mean_of_its_loss_where_both_have_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The slow run is better at each step; in the same time the other one has come further."""
    slow = made(tmp_path / "slow", [4.0, 3.0, 2.0], seconds=2.0)
    fast = made(tmp_path / "fast", [4.2, 3.2, 2.2, 1.2])
    learned = json.loads(compare(capsys, slow, fast, "--json")[1])["learned"]
    assert learned["tokens"] == {
        "key": "val_loss", "start": 80, "end": 240,
        "mean": [pytest.approx(3.0), pytest.approx(3.2)], "last": [2.0, 2.2],
    }  # fmt: skip
    assert learned["time"] == {
        "key": "val_loss", "start": 20, "end": 40,
        "mean": [pytest.approx(3.5), pytest.approx(2.2)], "last": [3.0, 1.2],
    }  # fmt: skip
    out = compare(capsys, slow, fast)[1]
    minute, token = (out.split(f"[learned per {what}]\n")[1] for what in ("minute", "token"))
    assert minute.startswith(
        f"{fast} learned most: from 20s to 40s its validation loss was 2.2000 nats per token on "
        f"average, and 1.2000 at the end ({slow}: 3.5000 and 3.0000)."
    )
    assert token.startswith(f"{slow} learned most: from 80 to 240 tokens its validation loss was")
    assert "All of them learned alike" in compare(capsys, slow, slow)[1]


def test_runs_of_different_vocabularies_are_compared_in_bits_per_byte(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The loss per token of the longer tokens is higher, and that per byte lower."""
    long = made(tmp_path / "long", [4.0, 3.0], size=4.0)
    short = made(tmp_path / "short", [2.4, 2.0], size=2.0)
    found = json.loads(compare(capsys, long, short, "--json")[1])
    assert found["losses"]["unit"] == "bits per byte"
    bits = [[4 / 4, 2.4 / 2], [3 / 4, 2 / 2]]
    for row, wanted in zip(found["losses"]["steps"], bits, strict=True):
        assert row["loss"] == pytest.approx([each / math.log(2) for each in wanted])
    assert found["runs"][0]["figures"]["best_bits_per_byte"] == pytest.approx(row["loss"][0])
    out = compare(capsys, long, short)[1]
    assert "In bits per byte:" in out and f"{long} learned most" in out
    (long / "run.json").unlink()
    assert "In bits per byte:" not in compare(capsys, long, short)[1]


def test_runs_without_a_common_time_or_number_of_tokens_are_not_ranked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = made(tmp_path / "one", [4.0, 3.0])
    late = made(tmp_path / "late", [4.0, 3.0], seconds=99.0)
    (late / "config.toml").write_text("[model]\nvocab_size = 9\n[train]\nbatch_size = 2\n")
    out = compare(capsys, one, late)[1]
    assert "There is no time at which all of them have a loss." in out
    assert "There is no number of tokens at which all of them have a loss." in out


def test_every_command_says_the_same_bits_per_byte(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of the best step in the rows, to the digit, with tokens of several bytes."""
    run = trained(tmp_path / "bpe", tokenizer="bpe:270")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    best = min((row for row in rows if "val_loss" in row), key=lambda row: row["val_loss"])
    bits, size = best["val_bits_per_byte"], bytes_per_token_of(run)
    assert size is not None and size > 2
    assert bits == pytest.approx(best["val_loss"] / size / math.log(2))
    for words, keys in (
        (["info", run], ["best_bits_per_byte"]),
        (["runs", tmp_path], [0, "best_bits_per_byte"]),
        (["compare", run, run], ["runs", 1, "figures", "best_bits_per_byte"]),
    ):
        capsys.readouterr()
        assert main([*map(str, words), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        for key in keys:
            found = found[key]
        assert found == bits
    card = Run(run)
    card.glance()
    card.read(nullcontext())
    assert card.card["best_val_loss"] * card.card["bits_per_nat"] == pytest.approx(bits, rel=1e-14)
    assert main(["eval", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bits_per_byte"] / found["loss"] == pytest.approx(bits / best["val_loss"], 1e-14)


def test_curves_that_look_alike_without_colours_come_with_their_numbers(
    runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    shown = compare(capsys, *runs, "--samples", "0")[1]
    drawn = shown.split("[losses]")[1].split("\n\n[learned")[0]
    assert "┤" in drawn
    table = drawn.split("validation, step")[1].splitlines()[1:]
    rows = [[float(number) for number in line.split()] for line in table]
    found = json.loads(compare(capsys, *runs, "--json")[1])["losses"]["steps"]
    assert len(rows) == len(found)
    for row, wanted in zip(rows, found, strict=True):
        assert row == pytest.approx([wanted["iter"], *wanted["loss"]], abs=1e-4)


def test_without_plotext_there_is_a_table_of_losses(
    runs: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object, **__: object) -> str:
        raise MissingExtraError("no plotext")

    monkeypatch.setattr(plots, "terminal_plot", missing)
    code, out, _ = compare(capsys, *runs, "--samples", "0")
    assert code == 0 and "[samples" not in out
    table = out.split("[losses]")[1].split()
    assert table[:2] == ["validation,", "step"]
    for step in ("2", "4", "6"):
        assert step in table
    rows = [json.loads(line) for line in (runs[0] / "metrics.jsonl").read_text().splitlines()]
    assert f"{rows[-1]['val_loss']:.4f}" in table


def test_training_losses_are_compared_where_there_is_no_validation(
    runs: list[Path], tmp_path: Path
) -> None:
    other = trained(tmp_path / "c", "--val-fraction", "0")
    kind, rows = loss_table([read_run(runs[0]), read_run(other)])
    assert kind == "train" and [step for step, _ in rows] == [1, 2, 3, 4, 5, 6]


def test_a_run_that_is_being_trained_and_one_without_metrics_are_compared(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    running = tmp_path / "running"
    shutil.copytree(runs[0], running)
    for checkpoint in running.glob("ckpt_*"):
        checkpoint.unlink()
    torn = (running / "metrics.jsonl").read_bytes()[:-20]
    (running / "metrics.jsonl").write_bytes(torn)
    imported = tmp_path / "imported"
    imported.mkdir()
    shutil.copy(runs[1] / "ckpt_6.safetensors", imported)
    code, out, _ = compare(capsys, running, imported, runs[0] / "ckpt_6.safetensors")
    assert code == 0
    line = next(line for line in out.splitlines() if line.startswith("steps"))
    assert line.split() == ["steps", "5", "6", "6"]
    bare = json.loads(compare(capsys, running, imported, "--json")[1])
    assert bare["losses"]["steps"] == [] and bare["samples"] == []
    assert bare["runs"][1]["figures"]["tokens_per_second"] is None


def test_two_imported_models_have_no_losses_to_draw(
    runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    files = [run / "ckpt_6.safetensors" for run in runs]
    code, out, _ = compare(capsys, *files)
    assert code == 0 and "None of them has any." in out


def test_chinese_and_control_characters_in_samples_do_no_harm(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(runs[0], other)
    rows = [{"iter": 6, "text": "\n床前明月光\x1b[2J" * 40}, {"iter": "six", "text": 7}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (other / "samples.jsonl").write_text(lines, encoding="utf-8")
    code, out, _ = compare(capsys, runs[0], other)
    assert code == 0 and "床前明月光" in out and "\x1b" not in out
    assert max(map(len, out.split("[samples")[1].splitlines())) <= 100


def test_numbers_from_elsewhere_that_cannot_be_are_left_out(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(runs[0], other)
    with (other / "metrics.jsonl").open("a", encoding="utf-8") as file:
        for row in ({"iter": 1e300, "val_loss": 1}, {"iter": True}, {"iter": 7, "val_loss": "low"}):
            file.write(json.dumps(row) + "\n")
    figures = json.loads(compare(capsys, runs[0], other, "--json")[1])["runs"][1]["figures"]
    assert figures["steps"] == 7
    wanted = json.loads(compare(capsys, *runs, "--json")[1])["runs"][0]["figures"]["best_loss"]
    assert figures["best_loss"] == wanted


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["A"], "from 2 to 6"),
        (["A"] * 7, "from 2 to 6"),
        (["A", "nowhere"], "nowhere"),
        (["A", "EMPTY"], "EMPTY"),
        (["A", "TEXT"], "TEXT"),
        (["A", "A", "--samples", "-1"], "--samples"),
    ],
)
def test_what_cannot_be_compared_is_said(
    runs: list[Path],
    words: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("EMPTY").mkdir()
    Path("TEXT").write_text("no checkpoint")
    arguments = [runs[0] if word == "A" else word for word in words]
    code, _, err = compare(capsys, *arguments)
    assert code != 0 and said in err


def test_differences_are_those_of_any_pair() -> None:
    settings = [{"m.a": 1, "m.b": 2}, {"m.a": 1, "m.b": 3}, {"m.a": 1}]
    assert differences(settings) == {"m.b": [2, 3, None]}
    assert differences(settings[:1] * 3) == {}


def test_comparing_does_not_load_tinygrad(
    runs: list[Path], child_environment: dict[str, str]
) -> None:
    code = (
        "import sys; from tinygpt.cli import main; code = main(sys.argv[1:]);"
        "sys.exit(code or 'tinygrad' in sys.modules)"
    )
    command = [sys.executable, "-c", code, "compare", *map(str, runs), "--json"]
    done = subprocess.run(command, env=child_environment, capture_output=True, timeout=60)
    assert done.returncode == 0
