import io
import math
import re
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from tinygpt.config import TrainConfig
from tinygpt.runs.display import follow, make_display
from tinygpt.runs.display.forgiving import Forgiving, hung_up
from tinygpt.runs.display.live import LiveDisplay
from tinygpt.runs.display.plain import PlainDisplay
from tinygpt.runs.display.text import Curve, duration, printable, sparkline
from tinygpt.training.loop import Step

CONFIG = TrainConfig(max_iters=40)
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def step(number, **extra):
    return Step(number, 4.0 / number, 1e-3, 0.5, 1234.5, number / 10, **extra)


def live(width=100, **options):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=width, height=40)
    return LiveDisplay(CONFIG, console=console, **options), stream


def view(display, width=100):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(display.render())
    return console.file.getvalue()


def test_a_stream_that_is_no_terminal_gets_plain_lines():
    assert isinstance(make_display(CONFIG, stream=io.StringIO()), PlainDisplay)


def test_a_terminal_gets_the_live_view(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert isinstance(make_display(CONFIG, stream=stream), LiveDisplay)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(make_display(CONFIG, stream=stream), PlainDisplay)


def test_plain_lines_have_a_stable_form():
    stream = io.StringIO()
    with PlainDisplay(CONFIG, stream=stream) as display:
        for number in range(1, 6):
            found = {"val_loss": 2.5, "val_bits_per_byte": 3.6067, "best": True}
            display.update(step(number, **(found if number == 5 else {})))
    assert stream.getvalue().splitlines() == [
        "step 1/40  train loss 4.0000  lr 1.00e-03  grad norm 0.500  1234 tokens/s  0.1 s",
        "step 2/40  train loss 2.0000  lr 1.00e-03  grad norm 0.500  1234 tokens/s  0.2 s",
        "step 4/40  train loss 1.0000  lr 1.00e-03  grad norm 0.500  1234 tokens/s  0.4 s",
        "step 5/40  train loss 0.8000  val loss 2.5000  bits per byte 3.6067  perplexity 12.18  "
        "lr 1.00e-03  grad norm 0.500  1234 tokens/s  0.5 s  best",
    ]


def test_plain_samples_cannot_send_control_codes():
    stream = io.StringIO()
    PlainDisplay(CONFIG, stream=stream).update(step(1, sample="a\x1b[2Jb\rc\u202ed\nsecond [bold]"))
    text = stream.getvalue()
    assert not CONTROL.search(text.replace("\n", ""))
    assert "  | a␛[2Jb␍c\ufffdd\n  | second [bold]\n" in text


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(codec=None)))
def test_printable_text_holds_nothing_a_terminal_obeys(text):
    shown = printable(text)
    assert not CONTROL.search(shown)
    assert len(shown) == len(text)
    assert printable(shown) == shown


def test_ordinary_text_is_printed_as_it_is():
    text = "Zażółć gęślą jaźń — 漢字 👩‍👩‍👧 naïve\n\tx"
    assert printable(text) == text


def test_the_live_view_shows_every_number_and_the_sample():
    display, _ = live(title="runs/[red]x")
    assert "compiling" in view(display)
    sample = "To be [bold]or\x1b[31m not"
    display.update(step(10, val_loss=math.log(8), val_bits_per_byte=1.5, best=True, sample=sample))
    for number in range(11, 31):
        display.update(step(number))
    text = view(display)
    for part in [
        "runs/[red]x",
        "30/40",
        "75%",
        "train loss 0.1333",
        "val loss 2.0794",
        "best 2.0794 at 10",
        "bits/byte 1.5000",
        "perplexity 8.00",
        "lr 1.00e-03",
        "grad norm 0.500",
        "tokens/s 1,234",
        "memory",
        "left",
        "sample at 10",
        "To be [bold]or␛[31m not",
        "█",
    ]:
        assert part in text
    assert "compiling" not in text


def test_the_live_view_fits_a_narrow_terminal():
    display, _ = live(width=40)
    display.update(step(10, sample="word " * 200))
    display.update(step(11))
    lines = view(display, width=40).splitlines()
    assert max(map(len, lines)) <= 40
    assert len(lines) < 25


def test_the_live_view_survives_losses_that_are_not_numbers():
    display, _ = live()
    display.update(Step(1, math.nan, 1e-3, math.inf, 0.0, 0.0, val_loss=1e9))
    assert "train loss nan" in view(display) and "perplexity inf" in view(display)


def test_the_cursor_comes_back_when_training_fails():
    display, stream = live()
    with pytest.raises(RuntimeError), display:
        display.update(step(1))
        raise RuntimeError
    assert stream.getvalue().rstrip().endswith("\x1b[?25h")


def test_a_notice_is_shown():
    display, _ = live()
    display.notice("stopping")
    assert "stopping" in view(display)


def test_a_plain_notice_is_there_at_once_whatever_the_stream(tmp_path):
    with (tmp_path / "log").open("w") as stream:
        PlainDisplay(CONFIG, stream=stream).notice("stopping")
        assert (tmp_path / "log").read_text() == "stopping\n"
    stream = io.StringIO()  # which has no file behind it, as that of a notebook
    PlainDisplay(CONFIG, stream=stream).update(step(1, notices=("NOT SAVED: no room",)))
    assert stream.getvalue().startswith("NOT SAVED: no room\nstep 1/40")


class Run(list):
    """Steps in the place of a run."""

    config, iter_num, folder, taken = CONFIG, 0, None, False
    stop = save_soon = None

    def __iter__(self):
        for step in super().__iter__():
            self.taken = step
            yield step

    def take_notices(self):
        return ("saving works again\x1b",)


def test_following_takes_every_step_and_tells_what_comes_after_the_last(capsys):
    run = Run([step(1), step(2)])
    follow(run)
    err = capsys.readouterr().err
    assert run.taken.iter == 2
    assert err.startswith("step 1/40") and err.endswith("saving works again␛\n")
    follow(run, show=False)
    assert capsys.readouterr().err == ""


# Streams that fail ------------------------------------------------------------------------------


class Failing(io.StringIO):
    """A stream on which one operation always fails."""

    def __init__(self, operation, error):
        super().__init__()
        self.error = error
        setattr(self, operation, self.fail)

    def fail(self, *_):
        raise self.error


ERRORS = [
    OSError(28, "full"),
    BrokenPipeError(),
    ValueError("closed"),
    KeyError("a bug of its own"),
]


@pytest.mark.parametrize("operation", ["write", "flush", "isatty", "fileno"])
@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_no_run_ends_because_of_its_messages(operation, error):
    stream = Forgiving(Failing(operation, error))
    with make_display(CONFIG, stream=stream) as display:
        for number in range(1, 5):
            display.update(step(number, notices=("careful",), sample="a"))
        display.notice("stopping")
    gone = isinstance(error, BrokenPipeError) and operation != "fileno"
    assert hung_up(stream) is gone
    assert ("step 4/40" in stream.stream.getvalue()) is (operation != "write" and not gone)


@pytest.mark.parametrize("stream", [None, io.StringIO()])
def test_a_program_without_stderr_can_train(monkeypatch, capsys, stream):
    monkeypatch.setattr(sys, "stderr", stream)
    follow(run := Run([step(1), step(2)]))
    assert run.taken.iter == 2
    assert capsys.readouterr().out == ""  # where print(file=None) would go
    assert stream is None or "saving works again" in stream.getvalue()


def test_what_an_encoding_does_not_hold_is_escaped():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    PlainDisplay(CONFIG, stream=stream).notice("naïve")
    assert stream.buffer.getvalue() == b"na\\xefve\n"


def test_a_notice_in_the_middle_of_a_write_goes_past_the_stream(tmp_path):
    """As a signal handler's does: the buffer of a file refuses to be entered twice."""
    with (tmp_path / "log").open("w") as file:
        stream = Failing("write", RuntimeError("reentrant call"))
        stream.fileno = file.fileno
        PlainDisplay(CONFIG, stream=stream).notice("stopping")
    assert (tmp_path / "log").read_text() == "stopping\n"


def test_a_sparkline_follows_its_values():
    assert sparkline([4.0, 3.0, 2.0, 1.0], 4) == "█▆▃▁"
    assert sparkline([1.0] * 9, 3) == "▁▁▁"
    assert sparkline([math.nan, None, 2.0, 1.0], 8) == "█▁"
    assert sparkline([], 8) == sparkline([1.0], 0) == ""
    assert len(sparkline(list(range(1000)), 37)) == 37


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 10), max_size=300))
def test_a_curve_is_bounded_and_keeps_the_mean_of_what_it_shows(values):
    curve = Curve(size=4)
    for value in values:
        curve.add(value)
    assert len(curve.points) < 8
    if curve.points:
        shown = values[: len(values) - len(curve._pending)]
        assert math.isclose(
            sum(curve.points) / len(curve.points), sum(shown) / len(shown), abs_tol=1e-9
        )


def test_durations_are_short():
    shown = [duration(s) for s in (-1, 0, 59.9, 60, 200, 7500, 273600)]
    assert shown == ["0s", "0s", "59s", "1m 00s", "3m 20s", "2h 05m", "3d 4h"]
