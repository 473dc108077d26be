"""``tinygpt compare``: what runs have in common and what not, from their folders alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tinygpt.cli import main
from tinygpt.cli.comparing import differences, loss_table, read_run
from tinygpt.errors import MissingExtraError
from tinygpt.runs import plots

TEXT = "the cat sat on the mat, and the dog sat on the log.\n" * 40


def trained(folder: Path, *flags: str) -> Path:
    text = folder.parent / "cats.txt"
    text.write_text(TEXT, encoding="utf-8")
    size = "--model.n-layer 1 --model.n-embd 8 --model.n-head 1 --model.block-size 8"
    steps = (
        "--tokenizer char --train.batch-size 2 --train.max-iters 6 --train.eval-interval 2 "
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


def test_curves_that_look_alike_without_colours_come_with_their_numbers(
    runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = compare(capsys, *runs, "--samples", "0")[1].split("[losses]")[1]
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
