"""Standard streams that are closed, full, gone or do not wait."""

from __future__ import annotations

import io
import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tinygpt.cli import generating, main
from tinygpt.cli.streams import _Descriptor, _text, standard_streams
from tinygpt.errors import StreamError
from tinygpt.runs import checkpoint, run
from tinygpt.runs.folder import list_checkpoints
from tinygpt.runs.history import read
from tinygpt.training import preflight
from tinygpt.training.loop import Step

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
SETTINGS = """
model = {n_layer = 1, n_embd = 8, n_head = 1, block_size = 8}
train = {batch_size = 2, eval_iters = 1, max_iters = 6, eval_interval = 3}
data = {tokenizer = "char"}
"""


@pytest.fixture
def pipe():
    """-> a standard stream on one end of a pipe that does not block, and the other end."""
    opened = []

    def make(number):
        ends = os.pipe()
        opened.extend(ends)
        ours, theirs = ends if number == 0 else ends[::-1]
        os.set_blocking(ours, False)
        return _Descriptor(number, handle=ours), theirs

    yield make
    for handle in opened:
        os.close(handle)


def test_a_pipe_that_does_not_wait_gets_every_byte(pipe):
    stream, theirs = pipe(1)
    sent, received = bytes(range(256)) * 2000, b""

    def write():
        with io.TextIOWrapper(stream, encoding="latin-1", newline="\n") as text:
            text.write(sent.decode("latin-1"))

    thread = threading.Thread(target=write)
    thread.start()
    while len(received) < len(sent):
        received += os.read(theirs, 4096)
    thread.join()
    assert received == sent


def test_a_pipe_that_does_not_wait_is_read_to_its_end(pipe):
    stream, theirs = pipe(0)

    def feed():
        for word in (b"one ", b"two"):
            time.sleep(0.01)
            os.write(theirs, word)
        os.dup2(os.open(os.devnull, os.O_RDONLY), theirs)

    thread = threading.Thread(target=feed)
    thread.start()
    assert io.BufferedReader(stream).read() == b"one two"
    thread.join()


def test_a_reader_that_is_gone_is_told_once_and_to_no_child(pipe):
    stream, theirs = pipe(2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), theirs)
    with pytest.raises(BrokenPipeError):
        stream.write(b"a")
    assert stream.write(b"more") == 4
    assert stat.S_ISCHR(os.fstat(stream.fileno()).st_mode)  # /dev/null, which a child inherits


@needs_full
def test_what_is_wrong_is_said_by_its_name():
    with FULL.open("wb", buffering=0) as file:
        with pytest.raises(StreamError, match="stdout cannot be written: No space left"):
            _Descriptor(1, handle=file.fileno()).write(b"a")
        with pytest.raises(StreamError, match="stdin cannot be read: Bad file descriptor"):
            _Descriptor(0, handle=file.fileno()).read(1)


def test_what_the_encoding_does_not_hold_is_escaped(pipe):
    stream, theirs = pipe(1)
    before = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with _text(stream, before) as text:
        text.write("na\u00efve \udcff")
    assert os.read(theirs, 99) == b"na\\xefve \\udcff"


# The program ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("closed", "words", "message"),
    [
        ("stdin", ["tokenizer", "encode", "byte"], "stdin is closed, so there is nothing to read"),
        ("stdin", ["tokenizer", "decode", "byte"], "stdin is closed"),
        ("stdin", ["generate", "run", "--prompt", "-"], "stdin is closed"),
        ("stdout", ["tokenizer", "encode", "byte", "a"], "stdout is closed, so there is nowhere"),
        ("stdout", ["tokenizer", "encode", "byte", "a", "--json"], "stdout is closed"),
        ("stdout", ["--help"], "stdout is closed"),
    ],
)
def test_a_closed_stream_is_one_clear_line(monkeypatch, capsys, closed, words, message):
    monkeypatch.setattr(sys, closed, None)
    assert main(words) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("tinygpt: error: ") and message in line
    assert getattr(sys, closed) is None


def test_a_talk_ends_when_nobody_can_hear_it(monkeypatch):
    def write(*_):
        raise StreamError("stdout is closed")

    monkeypatch.setattr(generating, "_stream", write)
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    with pytest.raises(StreamError):
        generating._converse(None, echo=True, count=1)


def test_a_closed_stderr_keeps_messages_out_of_the_results(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["tokenizer", "encode", "byte", "a"]) == 0
    assert main(["nonsense"]) == 2
    assert capsys.readouterr().out == "97\n"


def test_a_host_keeps_its_own_streams(monkeypatch):
    own = io.StringIO()
    monkeypatch.setattr(sys, "stdout", own)
    monkeypatch.setattr(sys, "stdin", own)
    with standard_streams():
        assert sys.stdout is own and sys.stdin is own


def test_no_file_is_opened_in_the_place_of_a_closed_stream(tmp_path):
    """What a library writes to 2 would go into it."""
    code = """if True:
        import os, sys
        from tinygpt.cli.streams import standard_streams
        os.closerange(0, 3)
        with standard_streams(), open(sys.argv[1], "w") as file:
            os.write(2, b"a warning of the compiler")
            file.write(f"{file.fileno() > 2} {os.get_inheritable(2)}")
    """
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "file"], timeout=60)
    assert done.returncode == 0 and (tmp_path / "file").read_text() == "True True"


def steps(model, optimizer, config, *_, start=0, **__):
    """Stands in for training, and takes no time."""
    for done in range(start + 1, config.max_iters + 1):
        yield Step(done, 1.0, 0.1, 0.1, 1.0, 0.1)


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Train for six steps with a stderr of one's own; -> the exit code, and the steps done."""
    monkeypatch.setattr(run, "train_steps", steps)
    monkeypatch.setattr(run.TrainingRun, "_sample", lambda *_: None)
    monkeypatch.setattr(preflight, "measured_rate", lambda: 1e9)
    (tmp_path / "a.txt").write_text("the cat sat on the mat, and the dog sat on the log.\n" * 40)
    (tmp_path / "c.toml").write_text(SETTINGS)
    monkeypatch.chdir(tmp_path)

    def call(stderr, *words):
        monkeypatch.setattr(sys, "stderr", stderr)
        code = main(["train", "a.txt", "--config", "c.toml", "--out", "run", *words])
        last = list_checkpoints(Path("run"))[-1]
        checkpoint.verify(last)
        steps = [row["iter"] for row in read("run/metrics.jsonl")]
        assert steps == list(range(1, checkpoint.read_meta(last).iter_num + 1))
        return code, len(steps)

    return call


@needs_full
def test_a_full_log_is_no_reason_to_stop(train):
    with io.TextIOWrapper(FULL.open("wb", buffering=0), write_through=True) as stderr:
        assert train(stderr) == (0, 6)


def test_no_log_at_all_is_no_reason_to_stop(train):
    assert train(None) == (0, 6)


def test_a_reader_that_goes_away_stops_a_run_as_a_closed_terminal_does(train):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb", buffering=0) as binary:
        stderr = io.TextIOWrapper(binary, write_through=True)
        assert train(stderr) == (141, 1)
        assert train(stderr, "--resume") == (141, 2)
    assert train(io.StringIO(), "--resume") == (0, 6)
