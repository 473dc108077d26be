import json
import math
import os
import re
import subprocess
import sys

import pytest

from tinygpt.errors import DataError, MissingExtraError, UsageError, extras
from tinygpt.runs import plots
from tinygpt.runs.plots import MAX_POINTS, draw, read_curves, save_plot, terminal_plot


def write_run(folder, steps=60, offset=0.0):
    folder.mkdir(parents=True)
    with (folder / "metrics.jsonl").open("w") as file:
        for i in range(1, steps + 1):
            row = {"iter": i, "train_loss": offset + 1 + 3 / i, "lr": 1e-3 * i / steps}
            if i % 10 == 0:
                row |= {"val_loss": offset + 1.2 + 3 / i + (i == 60), "best": i < 60}
            file.write(json.dumps(row) + "\n")
    return folder


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "runs" / "one")


def test_curves_hold_steps_and_values_and_the_best_of_them(run):
    curves = read_curves(run)
    assert len(curves.train) == len(curves.lr) == 60 and len(curves.val) == 6
    assert curves.train[0] == (1, 4.0)
    assert curves.best == (50, pytest.approx(1.26))
    assert read_curves(run / "metrics.jsonl").train == curves.train


def test_values_that_are_not_numbers_are_left_out(tmp_path):
    rows = [
        {"iter": 1, "train_loss": None, "nonfinite": {"train_loss": "nan"}},
        {"iter": 2, "train_loss": 2.0, "val_loss": None},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    curves = read_curves(tmp_path)
    assert curves.train == [(2, 2.0)] and curves.val == [] and curves.best is None


def test_long_runs_are_thinned_to_their_means(tmp_path):
    run = write_run(tmp_path / "long", steps=3 * MAX_POINTS - 1)
    curves = read_curves(run)
    assert len(curves.train) == MAX_POINTS
    assert curves.train[1] == (5, pytest.approx(1 + (3 / 4 + 3 / 5 + 3 / 6) / 3))


def test_the_smoothed_curve_does_not_lag_behind(tmp_path):
    rows = ({"iter": i, "train_loss": 10 - 0.01 * i} for i in range(1, 601))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    curves = read_curves(tmp_path)
    middle = slice(200, 400)
    for (x, smoothed), (_, y) in zip(
        curves.smooth_train[middle], curves.train[middle], strict=True
    ):
        assert math.isclose(smoothed, y, abs_tol=0.005), x


@pytest.mark.parametrize(
    "suffix, start", [("png", b"\x89PNG"), ("svg", b"<?xml"), ("PNG", b"\x89")]
)
def test_a_plot_is_a_file_of_the_kind_its_name_says(run, tmp_path, suffix, start):
    out = tmp_path / "new" / f"plot.{suffix}"
    assert save_plot([run], out) == out
    assert out.read_bytes().startswith(start)


def test_the_figure_says_what_it_shows(run):
    figure = draw([read_curves(run)])
    loss, rate = figure.axes
    legend = [text.get_text() for text in loss.get_legend().get_texts()]
    assert legend == ["train", "validation", "best 1.2600 at step 50"]
    assert loss.get_ylabel() == "loss (nats per token)"
    assert rate.get_ylabel() == "learning rate" and rate.get_xlabel() == "step"
    assert loss.get_title(loc="left") == str(run)


def test_curves_are_drawn_over_tokens_and_time_and_in_bits_per_byte(run):
    (run / "config.toml").write_text("[model]\nblock_size = 4\n[train]\nbatch_size = 2500\n")
    (run / "run.json").write_text('{"run": "0123456789abcdef", "bytes_per_token": 2}')
    lines = (run / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) | {"elapsed": 60 * i} for i, line in enumerate(lines, 1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for x, place, title, last in (
        ("tokens", 10_000, "tokens", "600,000"),
        ("time", 60, "time of training", "1h 00m"),
    ):
        curves = read_curves(run, x, "bits")
        assert curves.train[0] == (place, pytest.approx(4 / 2 / math.log(2)))
        assert curves.lr[0] == (place, pytest.approx(1e-3 / 60))
        assert curves.best == (50 * place, pytest.approx(1.26 / 2 / math.log(2)))
        loss, rate = draw([curves], x, "bits").axes
        assert loss.get_ylabel() == "loss (bits per byte)" and rate.get_xlabel() == title
        assert loss.get_legend().get_texts()[-1].get_text() == "best 0.9089 at step 50"
        assert rate.xaxis.get_major_formatter()(60 * place) == last
        text = terminal_plot([run], 80, 20, False, x, "bits")
        assert title in text and "bits per byte" in text


def test_what_a_run_does_not_say_cannot_be_drawn(run):
    for x, y, said in (
        ("tokens", "loss", "how many tokens its steps have. Draw it over --x step"),
        ("time", "loss", "how many seconds its steps took. Draw it over --x step"),
        ("step", "bits", "how many bytes its tokens stand for. Draw --y loss"),
    ):
        with pytest.raises(UsageError, match=said):
            read_curves(run, x, y)


def test_several_runs_are_drawn_over_each_other_in_colours_of_their_own(run, tmp_path):
    other = write_run(tmp_path / "runs" / "$x_1$\udce9", offset=0.5)
    figure = draw([read_curves(run), read_curves(other)])
    loss, _ = figure.axes
    assert len(loss.get_legend().get_texts()) == 6
    assert len({line.get_color() for line in loss.lines}) == 2
    save_plot([run, other], tmp_path / "both.png")  # dollar signs in a name are no mathematics
    assert save_plot([other], tmp_path / "both.png").is_file()  # nor must it be UTF-8


@pytest.mark.parametrize("name", ["_hidden", "诗和远方", "caf\u00e9", "\u0001"])
def test_every_name_stands_in_title_and_legend(run, tmp_path, name):
    other = write_run(tmp_path / "runs" / name, offset=0.5)
    figure = draw([read_curves(other), read_curves(run)])
    texts = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert len(texts) == 6
    [train] = [text for text in texts if text.endswith(": train") and str(run) not in text]
    known = set().union(*plots._fonts(name).values())
    escaped = "".join(c if ord(c) in known else f"\\u{ord(c):04x}" for c in name)
    assert train == f"{other.parent}/{escaped}: train"
    save_plot([other, run], tmp_path / "both.png")  # a character without a shape is a warning
    assert save_plot([other], tmp_path / "one.svg")


def test_a_font_that_has_the_characters_is_taken(monkeypatch):
    from matplotlib import font_manager

    sans = font_manager.findfont("DejaVu Sans")
    symbols = font_manager.findfont("STIXSizeOneSym")  # stands for a font of Chinese
    entries = [font_manager.FontEntry(fname=path) for path in (sans, symbols)]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", entries)
    only = set(font_manager.get_font(symbols).get_charmap()) - set(
        font_manager.get_font(sans).get_charmap()
    )
    fonts = plots._fonts("abc")
    assert list(fonts) == ["DejaVu Sans"]
    if only:
        assert len(plots._fonts("abc" + chr(min(only)))) == 2


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "nonsense"])
def test_the_backend_of_a_notebook_is_of_no_concern(run, tmp_path, backend):
    """matplotlib reads it as it is imported."""
    code = "import sys; from tinygpt.runs import plots; plots.save_plot([sys.argv[1]], sys.argv[2])"
    command = [sys.executable, "-c", code, str(run), str(tmp_path / "plot.png")]
    done = subprocess.run(command, env={**os.environ, "MPLBACKEND": backend}, timeout=100)
    assert done.returncode == 0 and (tmp_path / "plot.png").stat().st_size


def test_the_terminal_plot_fits_its_size_and_says_what_it_shows(run, tmp_path):
    other = write_run(tmp_path / "runs" / "two", offset=0.5)
    text = terminal_plot([run, other], width=90, height=20, color=False)
    lines = text.splitlines()
    assert len(lines) == 20
    assert max(map(len, lines[:-2])) <= 90
    assert "\x1b" not in text and "●" in text
    assert f"{run}  ⠤ train " in lines[-2] and "best 1.2600 at step 50" in lines[-2]
    assert "best 1.7600" in lines[-1]
    assert "\x1b[" in terminal_plot([run], width=60, height=15)


def test_a_run_without_evaluations_can_be_drawn(tmp_path):
    run = write_run(tmp_path / "short", steps=3)
    save_plot([run], tmp_path / "a.png")
    assert "train" in terminal_plot([run], width=60, height=15, color=False)


def test_a_missing_run_is_wrong_use(tmp_path):
    with pytest.raises(UsageError, match=r"There is no run at .*nowhere"):
        read_curves(tmp_path / "nowhere")


def test_a_run_without_metrics_says_so(tmp_path):
    with pytest.raises(DataError, match="holds no losses yet"):
        read_curves(tmp_path)


def test_other_formats_are_refused_before_anything_is_drawn(run, tmp_path):
    with pytest.raises(UsageError, match=r"does not end in \.png or \.svg"):
        save_plot([run], tmp_path / "plot.jpg")
    assert not (tmp_path / "plot.jpg").exists()


@pytest.mark.parametrize("package", ["matplotlib", "plotext"])
def test_a_missing_extra_is_named_with_its_cure(run, tmp_path, monkeypatch, package):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=f"{package}.*{re.escape(extras.cure('plots'))}"):
        if package == "matplotlib":
            save_plot([run], tmp_path / "plot.png")
        else:
            terminal_plot([run], width=60, height=15)
