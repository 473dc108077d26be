"""The dashboard: what it reads of runs, what it answers and to whom, and what asks a training."""

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("starlette", reason="needs the extra serve")
pytest.importorskip("uvicorn", reason="needs the extra serve")
pytest.importorskip("httpx2", reason="the tests' HTTP client is not installed")

import httpx2 as httpx
from starlette.testclient import TestClient

from tests.dashboard_runs import LAYERS, add, lines, make_run, rows
from tests.fuzz.making import fifo, link_to, sparse
from tests.fuzz.making import folder as a_folder
from tests.run_script import make_run as make_training
from tests.serving import PATIENCE, fake_service, until
from tinygpt import pages
from tinygpt.cli import main
from tinygpt.cli.serving import dashboard_beside
from tinygpt.errors import UsageError, extras
from tinygpt.runs.history import History, Tail, decode_all
from tinygpt.runs.lock import FolderLock, Holder, holder
from tinygpt.server.app import make_app as make_server
from tinygpt.server.dashboard import board as board_module
from tinygpt.server.dashboard import curves as curves_module
from tinygpt.server.dashboard import steering, watch, watched
from tinygpt.server.dashboard.board import Board, make_app
from tinygpt.server.dashboard.curves import POINTS, Curves, stride_for
from tinygpt.server.dashboard.steering import ByLock, Here
from tinygpt.server.dashboard.watch import Watch, parse_cursor, write_cursor
from tinygpt.server.http.listening import url
from tinygpt.server.http.thread import ServerThread, listen_nearby

NODE = Path("/usr/bin/node")
KEY = "a-key-for-the-tests"
RIGHT = {"authorization": f"Bearer {KEY}"}


@pytest.fixture(autouse=True)
def looks_are_whole(monkeypatch):
    """A look follows the last one at once, and has time for all files on a busy machine too."""
    monkeypatch.setattr(watch, "PAUSE", 0.0)
    monkeypatch.setattr(watch, "READING", 60.0)


def board_of(*places, **options):
    board = Board(Watch(places), KEY, **options)
    board.watch.refresh()
    return board


def client(board, headers=RIGHT, **options):
    return TestClient(make_app(board, **options), base_url="http://localhost", headers=headers)


def only(board):
    [run] = board.watch.runs.values()
    return run


def steps(found):
    return [row["iter"] for row in found]


# ---- reading files that grow ----


def test_rows_come_as_they_are_written_and_a_torn_line_when_it_is_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.look() == []
    path.write_text('{"iter": 1}\n{"iter": 2}\n{"iter": 3, "tr')
    assert steps(tail.look()) == [1, 2] and tail.look() == []
    with path.open("a") as file:
        file.write('ain_loss": 2.5}\nnonsense\n{"iter": 4}\n')
    assert steps(tail.look()) == [3, 4]
    assert (tail.restarts, tail.damaged) == (0, 1)


@pytest.mark.parametrize(
    "after", [lines(rows(1, 5)), lines(rows(1, 5)) + lines(rows(6, 40, seed=1))]
)
def test_a_file_that_was_cut_is_read_again_even_if_it_has_grown_beyond(tmp_path, after):
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(rows(1, 20)))
    tail = Tail(path)
    tail.look()
    path.write_text(after)
    assert lines(tail.look()) == after and tail.restarts == 1
    path.unlink()
    assert tail.look() == [] and tail.restarts == 2


def test_what_is_no_ordinary_file_is_not_read(tmp_path):
    (tmp_path / "secret").write_text('{"iter": 1}\n')
    (tmp_path / "link").symlink_to(tmp_path / "secret")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    with (tmp_path / "hole").open("wb") as file:
        file.truncate(1 << 40)
    for name in ("link", "pipe", "folder", "hole"):
        assert Tail(tmp_path / name).look() == []
    assert len(Tail(tmp_path / "secret").look()) == 1


def test_a_line_without_end_is_passed_over_piece_by_piece(tmp_path, monkeypatch):
    monkeypatch.setattr("tinygpt.runs.history.CHUNK", 1 << 20)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"x" * (3 << 20) + b'\n{"iter": 7}\n')
    tail, found = Tail(path), []
    for _ in range(5):
        found += tail.look()
    assert steps(found) == [7]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (b'{"a": 1}\n{"b": 2}\n', [{"a": 1}, {"b": 2}]),
        (b'{"a": 1}, {"a": 2}\n', []),
        (b'{}],[{}\n{"a": 1}\n', [{"a": 1}]),
        (b'[1]\n3\nnull\n{"a": 1}\n', [{"a": 1}]),
        (b'{"a": 1\n}\n', []),
        (b"[" * 100_000 + b'\n{"a": 1}\n', [{"a": 1}]),
        (b'{"a": ' + b"9" * 10_000 + b'}\n{"a": 1}\n', [{"a": 1}]),
        (b'\xff\n\n  \n{"a": 1}\n', [{"a": 1}]),
    ],
)
def test_all_lines_at_once_are_the_lines_one_by_one(text, wanted):
    found, damaged = decode_all(text)
    assert found == wanted
    assert len(found) + damaged == len([line for line in text.split(b"\n") if line.strip()])


# ---- few points for many rows ----


def test_a_bucket_has_the_lowest_the_highest_and_the_mean_of_its_rows():
    losses = np.random.default_rng(0).normal(3, 1, 10_001)
    losses[5000:5040] = math.nan
    found = Curves()
    for part in np.array_split(np.arange(10_001), 7):
        found.add([{"iter": int(i) + 1, "train_loss": losses[i]} for i in part])
    answer = found.overview()
    stride = answer["stride"]
    assert stride == 16 and len(answer["x"]) == 626 <= POINTS
    curve = answer["train_loss"]
    for i in range(len(answer["x"])):
        part = losses[i * stride : (i + 1) * stride]
        part = part[~np.isnan(part)]
        values = [curve[key][i] for key in ("low", "high", "mean")]
        if len(part):
            np.testing.assert_allclose(values, [part.min(), part.max(), part.mean()], rtol=1e-5)
        else:
            assert values == [None, None, None]
    assert None in curve["mean"]


@pytest.mark.parametrize("count", [0, 1, 2, 1023, 1024, 1025, 100_000])
def test_the_points_of_a_run_of_any_length_are_bounded(count):
    found = Curves()
    found.add(
        [
            {"iter": i, "train_loss": 1.0, "val_loss": 2.0, "grad_norms": {"wte": 1.0}}
            for i in range(count)
        ]
    )
    answer = found.overview()
    lengths = [len(answer["x"]), len(answer["val_loss"]["x"]), len(answer["layers"]["norms"] or "")]
    assert max(lengths) <= POINTS and len(answer["layers"]["x"]) <= 256
    assert bool(answer["x"]) == (count > 0)
    assert json.dumps(answer, allow_nan=False)
    half = found.overview(low=count / 4, high=count / 2)
    assert len(half["x"]) <= POINTS and half["stride"] <= answer["stride"]


def test_a_closer_look_is_finer_and_of_the_steps_that_were_asked_for():
    found = Curves()
    found.add([{"iter": i, "train_loss": float(i)} for i in range(1, 10_001)])
    answer = found.overview(low=4000, high=4500)
    assert answer["stride"] == 1
    assert answer["x"][0] in (3999, 4000) and answer["x"][-1] in (4500, 4501)
    assert answer["train_loss"]["mean"] == answer["x"]


def test_the_lowest_validation_loss_is_never_left_out():
    losses = np.random.default_rng(1).normal(3, 1, 5000)
    found = Curves()
    found.add([{"iter": i, "val_loss": loss} for i, loss in enumerate(losses)])
    assert min(found.overview()["val_loss"]["y"]) == pytest.approx(losses.min(), rel=1e-5)
    assert found.best() == (int(losses.argmin()), losses.min())


def test_what_is_no_number_becomes_a_gap():
    odd = ["1e5x", [1], {}, True, None, 10**400, math.inf, -math.inf, math.nan, 1e31, [[1], [2]]]
    found = Curves()
    found.add([{"iter": i, "train_loss": value} for i, value in enumerate([2.5, *odd])])
    values = found["train_loss"].tolist()
    assert values[0] == 2.5 and found.rows == 1 + len(odd)
    assert all(math.isnan(v) for i, v in enumerate(values) if i not in (0, 4))
    found.add([{"iter": step} for step in ("7", None, -1, 1e13, math.nan, [1])])
    found.add([{"train_loss": 1.0}])
    assert found.rows in (len(odd) + 1, len(odd) + 2)  # "7" may count as a number
    assert json.dumps(found.overview(), allow_nan=False)


def test_layers_that_appear_later_and_old_runs_without_any_are_shown():
    found = Curves()
    found.add([{"iter": i} for i in range(3)])
    assert found.overview()["layers"]["names"] == []
    found.add([{"iter": 3, "grad_norms": {"wte": 0.5}}, {"iter": 4, "grad_norms": {"wte": None}}])
    layers = found.overview()["layers"]
    assert (layers["names"], layers["norms"]) == (["wte"], [[None, None, None, 0.5, None]])


def test_skipped_steps_are_counted_and_the_last_ones_named():
    found = Curves()
    found.add([{"iter": i, "skipped": "x" * 1000} for i in range(2000)])
    answer = found.overview()
    assert answer["skips"] == 2000 and len(answer["skipped"]) == curves_module.MAX_SKIPPED
    assert answer["skipped"][-1] == (1999.0, "x" * 200)


def test_rows_beyond_the_most_are_left_out(monkeypatch):
    monkeypatch.setattr(curves_module, "MAX_ROWS", 100)
    found = Curves()
    found.add([{"iter": i} for i in range(90)])
    found.add([{"iter": i} for i in range(90, 500)])
    assert found.rows == 100


@pytest.mark.parametrize("points", [1, 2, 100, 1024])
def test_a_stride_is_the_smallest_power_of_two_that_does(points):
    for count in [1, 2, 3, points, points + 1, 5 * points, 10**6]:
        stride = stride_for(count, points)
        assert stride & (stride - 1) == 0 and math.ceil(count / stride) <= points
        assert stride == 1 or math.ceil(count / (stride // 2)) > points


@pytest.mark.skipif(not NODE.exists(), reason="needs node")
def test_rows_that_the_page_adds_give_the_curves_that_the_server_gives(tmp_path):
    everything = list(rows(1, 3000, every=7))
    begun, whole = Curves(), Curves()
    begun.add(everything[:700])
    whole.add(everything)
    events = []
    for start, end in ((650, 900), (900, 901), (901, 1000), (1000, 1999), (1999, 3000)):
        so_far = Curves()
        so_far.add(everything[:end])
        events.append([start, so_far.tail(start), so_far.mark(end), end])
    script = f"""
        import {{ Series }} from {json.dumps((pages.FOLDER / "shared" / "series.js").as_uri())};
        import {{ readFileSync }} from "node:fs";
        const [begun, events] = JSON.parse(readFileSync(0, "utf8"));
        const series = new Series(begun);
        const taken = events.map((event) => series.append(...event));
        const curves = Object.fromEntries(Object.entries(series.curves).map(
          ([name, {{ mean, low, high, stride }}]) => [name, {{ mean, low, high, stride }}]));
        const layers = [...series.layers].map(([name, {{ mean }}]) => [name, mean]);
        const gap = series.append(series.rows + 5, events[0][1], "", 0);
        console.log(JSON.stringify([taken, gap, curves, layers, series.validation, series.mark]));
    """
    (tmp_path / "add.mjs").write_text(script)
    found = subprocess.run(
        [NODE, tmp_path / "add.mjs"], check=True, capture_output=True, text=True, timeout=60,
        input=json.dumps([begun.overview(), events]),
    )  # fmt: skip
    taken, gap, shown, layers, validation, mark = json.loads(found.stdout)
    wanted = whole.overview()
    assert taken == [True] * 5 and gap is False and mark == wanted["mark"]
    assert wanted["stride"] == 4 == shown["lr"]["stride"]

    def same(a, b):  # the norms of layers are sent in four digits
        np.testing.assert_allclose(np.array(a, float), np.array(b, float), rtol=1e-3)

    same(shown["x"]["mean"], wanted["x"])
    for key in ("train_loss", "grad_norm", "tokens_per_second", "lr", "memory", "elapsed"):
        for kind, values in wanted[key].items():
            same(shown[key][kind], values)
    assert [name for name, _ in layers] == list(LAYERS)
    for (_, mine), theirs in zip(layers, wanted["layers"]["norms"], strict=True):
        same(mine, theirs)
    same(validation["x"], [row["iter"] for row in everything if "val_loss" in row])


# ---- runs and their state ----


def test_states_are_those_of_the_runs(tmp_path):
    for name, done in (("finished", 100), ("stopped", 60), ("training", 60), ("empty", 0)):
        make_run(tmp_path / name, done, planned=100)
    held = FolderLock(tmp_path / "training")
    held.acquire()
    (tmp_path / "no run").mkdir()
    cards = {card["name"]: card for card in board_of(tmp_path).watch.changes({})}
    assert {name: card["state"] for name, card in cards.items()} == {n: n for n in cards}
    assert next(iter(cards)) == "training" and len(cards) == 4
    assert str(os.getpid()) in cards["training"]["holder"] and cards["empty"]["train_loss"] is None
    assert (cards["stopped"]["iter"], cards["stopped"]["max_iters"]) == (60, 100)
    assert cards["stopped"]["steps_per_second"] == pytest.approx(10, rel=0.05)
    held.release()
    assert board_of(tmp_path / "training").watch.changes({})[0]["state"] == "stopped"


def test_a_lock_that_a_crash_left_behind_is_no_training(tmp_path):
    folder = make_run(tmp_path / "run", 10, planned=100)
    gone = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True
    )
    for pid, birth in ((int(gone.stdout), None), (os.getpid(), "another boot 1")):
        words = {"pid": pid, "host": socket.gethostname(), "since": "1970", "birth": birth}
        (folder / "run.lock").write_text(json.dumps(words))
        assert holder(folder) is None
    for text in ("", "{", '{"pid": -1, "host": "", "since": ""}', "[" * 10_000):
        (folder / "run.lock").write_text(text)
        assert holder(folder) is None
    (folder / "run.lock").unlink()
    (folder / "run.lock").mkdir()
    assert holder(folder) is None and only(board_of(folder)).state == "stopped"


def test_looking_at_a_lock_neither_takes_nor_hinders_it(tmp_path):
    held = FolderLock(tmp_path)
    held.acquire()
    assert holder(tmp_path) == Holder.me() or holder(tmp_path).pid == os.getpid()
    held.release()
    assert holder(tmp_path) is None and not (tmp_path / "run.lock").exists()
    assert held.acquire() is None


def test_new_runs_appear_vanished_ones_go_and_links_out_are_not_followed(tmp_path):
    outside = make_run(tmp_path / "outside", 10)
    runs = tmp_path / "runs"
    make_run(runs / "a", 10)
    (runs / "link").symlink_to(outside)
    watching = Watch([runs])
    watching.refresh()
    assert [run.name for run in watching.listed()] == ["a"]
    make_run(runs / "b", 10)
    (runs / "b" / "config.toml").unlink()
    (runs / "b" / "config.toml").symlink_to(outside / "config.toml")
    watching.refresh()
    by_name = {run.name: run for run in watching.listed()}
    assert by_name.keys() == {"a", "b"} and not by_name["b"].settings and by_name["a"].settings
    shutil.rmtree(runs / "a")
    watching.refresh()
    assert [run.name for run in watching.listed()] == ["b"]


def test_runs_of_one_name_are_told_apart(tmp_path):
    folders = [make_run(tmp_path / place / "run", 5) for place in ("mine", "yours")]
    names = {run.name for run in board_of(*folders, folders[0]).watch.listed()}
    assert names == {"mine/run", "yours/run"}


def test_a_place_that_is_no_folder_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no folder"):
        Watch([tmp_path / "nowhere"])


@pytest.mark.parametrize(
    "text", ["x = [" * 500, "a." * 400 + "b = 1", "\xff", "[train", "x" * 70_000]
)
def test_a_config_that_cannot_be_read_is_no_obstacle(tmp_path, text):
    folder = make_run(tmp_path / "run", 5)
    (folder / "config.toml").write_text(text)
    run = only(board_of(folder))
    assert run.settings == {} and run.curves.rows == 5 and run.state == "stopped"


def test_samples_are_bounded_and_the_newest_stays(tmp_path):
    folder = make_run(tmp_path / "run", 5)
    many = [{"iter": i, "text": "x" * 5000} for i in range(5000)]
    odd = [{"iter": "1", "text": "x"}, {"iter": 1}, {"iter": 2, "text": 3}, {"text": "x"}]
    (folder / "samples.jsonl").write_text(lines(many + odd))
    board = board_of(folder)
    samples = client(board).get(f"/dashboard/runs/{only(board).id}/samples").json()["samples"]
    assert samples[-1]["iter"] == 4999 and 100 < len(samples) <= watched.MAX_SAMPLES
    assert sum(len(sample["text"]) for sample in samples) <= board_module.SAMPLES_BYTES
    assert steps(samples) == sorted(steps(samples))


def test_real_training_is_shown_with_its_gradient_norms_by_layer(tmp_path):
    run = make_training(tmp_path / "run")
    for _ in run:
        pass
    found = list(History(tmp_path / "run" / "metrics.jsonl"))
    assert [list(row["grad_norms"]) for row in found] == [["wte", "wpe", "h.0", "ln_f"]] * 12
    for row in found:
        assert math.hypot(*row["grad_norms"].values()) == pytest.approx(row["grad_norm"], rel=1e-3)
    shown = only(board_of(tmp_path / "run"))
    assert shown.state == "finished" and shown.card["checkpoint"] == "ckpt_12.safetensors"
    assert shown.curves["grad_norm"].tolist() == [row["grad_norm"] for row in found]
    assert shown.card["samples"] == len(shown.samples) > 0


# ---- odd folders ----


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def instead(name, make):
    """Another thing in the place of a file."""

    def change(folder):
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return change


def row(**values):
    """One more row, in JSON as Python alone writes it."""
    return lambda folder: add(folder, json.dumps({"iter": 21, "elapsed": 2.1, **values}) + "\n")


LOCK = {"pid": 1, "host": "far away\ud800", "since": "\udfff", "birth": None}
ODD = {
    "lock": (write("run.lock", json.dumps(LOCK).encode()), "run.lock: It holds half a character"),
    "sample": (
        write("samples.jsonl", b'{"iter": 1, "text": "a \\udc00 cat"}\n'),
        "samples.jsonl: It holds half a character",
    ),
    "layer": (row(grad_norms={"\ud800": 1.0}), "The name of a layer holds half a character"),
    "long layer": (row(grad_norms={"x" * 10_000: 1.0}), "Layers with names of more than 100"),
    "many layers": (
        row(grad_norms={str(i): 1.0 for i in range(5000)}),
        "Layers after the first 128 are not shown",
    ),
    "fast": (
        write("metrics.jsonl", b'{"iter": 1, "elapsed": 0}\n{"iter": 2, "elapsed": 5e-324}\n'),
        "pace: The steps and times in metrics.jsonl give none.",
    ),
    "infinite": (row(iter=22, elapsed=math.inf, memory=-math.inf, train_loss=math.nan), None),
    "backwards": (row(iter=3, elapsed=-1e9), "pace: The steps and times"),
    "steps backwards": (row(iter=0, elapsed=1e9), "pace: The steps and times"),
    "skipped": (row(skipped={"a": [["\ud800"]]}), None),
    "rubbish": (write("metrics.jsonl", b"\xff" * 3_000_000 + b'\n{"iter": 20}\n'), None),
    "config": (write("config.toml", b"x = \xff"), "config.toml: Its settings cannot be read: "),
    "long config": (write("config.toml", b"#" * 70_000), "config.toml: Its settings cannot"),
    "config link": (
        instead("config.toml", link_to("config.toml")),
        "config.toml: Its settings cannot be read: it is a link",
    ),
    "metrics link": (
        instead("metrics.jsonl", link_to("/dev/zero")),
        "metrics.jsonl: It is a link, and links are not followed",
    ),
    "pipe": (instead("metrics.jsonl", fifo), "metrics.jsonl: It is no ordinary file"),
    "hole": (
        instead("samples.jsonl", sparse(1 << 40)),
        "samples.jsonl: Nearly all of it was never written",
    ),
    "folder": (instead("metrics.jsonl", a_folder), "metrics.jsonl: Is a directory"),
    "best": (write("best.json", b'{"checkpoint": [1e999], "val_loss": NaN}'), None),
    "run": (write("run.json", b'[{"run": 7}]'), None),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_folder_is_shown_as_odd_and_the_others_stay(tmp_path, name):
    change, reason = ODD[name]
    make_run(tmp_path / "good", 30)
    change(make_run(tmp_path / "odd", 20))
    board = board_of(tmp_path)
    answer = client(board).get("/dashboard/runs")
    assert answer.status_code == 200
    cards = {
        card["name"]: card
        for card in json.loads(answer.content.decode(), parse_constant=pytest.fail)["runs"]
    }
    assert cards["good"]["iter"] == 30 and cards["good"]["odd"] == []
    assert reason is None or any(reason in why for why in cards["odd"]["odd"])
    assert str(tmp_path) not in str(cards["odd"]["odd"])
    for card in cards.values():
        for what in ("curves", "samples"):
            assert client(board).get(f"/dashboard/runs/{card['id']}/{what}").status_code == 200
    cursor = {card["id"]: (0, "") for card in cards.values()}
    assert len(board.watch.changes(cursor)) == 2
    assert (cards["odd"]["steps_per_second"] or 0) >= 0


def test_a_name_that_is_no_utf8_is_spelled_and_names_are_told_apart(tmp_path):
    for name in (b"caf\xe9", b"caf\xe8", "caf\u00e9".encode()):
        make_run(tmp_path / os.fsdecode(name), 5)
    board = board_of(tmp_path)
    cards = client(board).get("/dashboard/runs").json()["runs"]
    names = {card["name"]: card["odd"] for card in cards}
    odd = ["Its path is not UTF-8."]
    assert names == {r"caf\xe9": odd, r"caf\xe8": odd, "caf\u00e9": []}
    assert len({card["id"] for card in cards}) == 3


def test_whatever_goes_wrong_with_one_run_is_its_own(tmp_path, monkeypatch):
    folders = [make_run(tmp_path / name, 10, planned=20) for name in ("good", "odd")]
    board = board_of(tmp_path)

    def broken(rows):
        raise ZeroDivisionError("a \ud800 mistake")

    [odd] = [run for run in board.watch.runs.values() if run.name == "odd"]
    odd.curves.add = broken
    for folder in folders:
        add(folder, lines(rows(11, 12)))
    board.watch.refresh()
    cards = {card["name"]: card for card in client(board).get("/dashboard/runs").json()["runs"]}
    assert (cards["good"]["iter"], cards["good"]["odd"]) == (12, [])
    [reason] = cards["odd"]["odd"]
    assert reason.startswith("metrics.jsonl: It cannot be read: ZeroDivisionError: a ")


def test_a_folder_that_may_not_be_entered_is_shown_with_the_reason(tmp_path, monkeypatch):
    make_run(tmp_path / "good", 10)
    make_run(tmp_path / "shut", 10)
    lstat = Path.lstat

    def refusing(look):
        def refused(path, *rest):
            if "shut" in str(path) and path != tmp_path / "shut":
                raise PermissionError(13, "Permission denied", str(path))
            return look(path, *rest)

        return refused

    monkeypatch.setattr(Path, "lstat", refusing(lstat))
    monkeypatch.setattr("tinygpt.runs.history.open_regular", refusing(lambda path: path.open("rb")))
    cards = {card["name"]: card for card in board_of(tmp_path).watch.cards()}
    assert (cards["good"]["iter"], cards["good"]["odd"]) == (10, [])
    assert cards["shut"]["iter"] is None
    assert any("Permission denied" in why for why in cards["shut"]["odd"])


def test_a_folder_that_vanishes_in_the_middle_of_a_look_takes_nothing_along(tmp_path, monkeypatch):
    make_run(tmp_path / "good", 10)
    gone = make_run(tmp_path / "gone", 10)
    board = board_of(tmp_path)
    find = Watch._find

    def find_and_lose(self):
        find(self)
        shutil.rmtree(gone, ignore_errors=True)

    monkeypatch.setattr(Watch, "_find", find_and_lose)
    board.watch.refresh()
    assert {card["name"] for card in board.watch.cards()} == {"good", "gone"}
    board.watch.refresh()
    assert [card["name"] for card in board.watch.cards()] == ["good"]


def test_the_root_of_all_folders_has_a_name_too():
    watching = Watch(["/"])
    run = watched.Run(Path("/"))
    watching.runs = {run.id: run}
    assert list(watch._names([run])) == ["/"]


class Held:
    """A lock that counts the bytes taken in between its taking and its release."""

    def __init__(self):
        self.most = self.now = self.depth = 0

    def __enter__(self):
        self.depth += 1

    def __exit__(self, *rest):
        self.depth -= 1
        self.most, self.now = max(self.most, self.now), 0


def test_a_look_at_many_runs_holds_the_lock_for_one_slice_at_a_time(tmp_path, monkeypatch):
    size = 1 << 12
    monkeypatch.setattr("tinygpt.runs.history.CHUNK", size)
    for i in range(6):
        make_run(tmp_path / f"run-{i}", 60)  # about 20 KB each
    watching = Watch([tmp_path])
    watching.lock = held = Held()
    taken = Curves.add

    def add_counted(self, rows):
        assert held.depth, "rows are taken in under the lock"
        held.now += len(lines(rows))
        taken(self, rows)

    monkeypatch.setattr(Curves, "add", add_counted)
    look = Tail.look

    def look_without_it(self):
        assert not held.depth, "files are read before the lock is taken"
        return look(self)

    monkeypatch.setattr(Tail, "look", look_without_it)
    watching.refresh()
    assert [run.curves.rows for run in watching.runs.values()] == [60] * 6
    assert 0 < held.most <= size


def test_a_look_ends_when_its_time_is_over_and_the_next_goes_on_from_there(tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "READING", -1.0)  # over before it begins: one slice is all
    for i in range(5):
        make_run(tmp_path / f"run-{i}", 10)
    watching = Watch([tmp_path])
    for done in range(1, 6):
        watching.refresh()
        assert sum(run.curves.rows for run in watching.runs.values()) == 10 * done
        assert len(watching.cards()) == 5  # all of them are there from the first look on


# ---- what is new ----


def test_a_cursor_comes_back_as_it_went():
    cursor = {"0123456789ab": (500, "00c0ffee"), "ba9876543210": (0, "")}
    assert parse_cursor(write_cursor(cursor)) == cursor
    for text in ("", "x", "0123456789ab:5", "0123456789ab:-1:00c0ffee", "a:b:c," * 10_000):
        assert parse_cursor(text) == {}


def test_changes_are_the_rows_since_the_cursor_or_else_the_word_to_reload(tmp_path):
    folder = make_run(tmp_path / "run", 100)
    board = board_of(folder)
    run = only(board)
    at = run.curves.rows, run.curves.mark(100)
    assert "new" not in board.watch.changes({run.id: at})[0]
    add(folder, lines(rows(101, 130)))
    board.watch.refresh()
    [entry] = board.watch.changes({run.id: at})
    assert entry["from"] == 100 and entry["new"]["iter"] == list(range(101, 131))
    assert entry["rows"] == 130 and entry["mark"] == run.curves.mark(130)
    for stale in ((131, "00000000"), (130, "00000000"), (50, at[1])):
        assert board.watch.changes({run.id: stale})[0]["reload"]
    (folder / "metrics.jsonl").write_text(lines(rows(1, 80)) + lines(rows(81, 140, seed=1)))
    board.watch.refresh()
    assert board.watch.changes({run.id: at})[0]["reload"]  # row 100 is another one now
    assert board.watch.changes({run.id: (80, Curves_mark(80))})[0]["new"]["iter"][0] == 81
    add(folder, lines(rows(141, 2000)))
    board.watch.refresh()
    assert board.watch.changes({run.id: (80, Curves_mark(80))})[0]["reload"]  # too many to be told


def Curves_mark(count):  # noqa: N802
    found = Curves()
    found.add(list(rows(1, count)))
    return found.mark(count)


@pytest.fixture
def served(tmp_path):
    """A board of one run, and a real server for it."""
    board = board_of(make_run(tmp_path / "run", 100, planned=1000))
    listener = listen_nearby("127.0.0.1", 0)
    with listener, ServerThread(make_app(board), listener):
        yield board, url(listener, "127.0.0.1")


def events_of(address, cursor=""):
    """The events of a stream: (id, data)."""
    headers = {"Last-Event-ID": cursor, **RIGHT}
    with httpx.stream(
        "GET", f"{address}/dashboard/events", headers=headers, timeout=PATIENCE
    ) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        number = ""
        for line in stream.iter_lines():
            if line.startswith("id: "):
                number = line.removeprefix("id: ")
            elif line.startswith("data: "):
                yield number, json.loads(line.removeprefix("data: "))


def test_events_bring_what_was_missed_and_then_what_comes(served):
    board, address = served
    run = only(board)
    cursor = write_cursor({run.id: (90, run.curves.mark(90))})
    stream = events_of(address, cursor)
    number, first = next(stream)
    assert first["runs"][0]["new"]["iter"] == list(range(91, 101)) and first["order"] == [run.id]
    add(run.folder, lines(rows(101, 105)))
    number, second = next(stream)
    assert second["runs"][0]["new"]["iter"] == [101, 102, 103, 104, 105]
    stream.close()
    until(lambda: board.streams == 0)
    add(run.folder, lines(rows(106, 107)))
    _, third = next(events_of(address, number))  # as a page does that has lost the connection
    assert third["runs"][0]["new"]["iter"] == [106, 107]
    (run.folder / "metrics.jsonl").write_text(lines(rows(1, 50)))
    _, fourth = next(events_of(address, number))
    assert fourth["runs"][0]["reload"] and "new" not in fourth["runs"][0]


def test_pages_that_listen_are_not_too_many(served, monkeypatch):
    board, address = served
    monkeypatch.setattr(board_module, "STREAMS", 1)
    stream = events_of(address)
    next(stream)
    assert httpx.get(f"{address}/dashboard/events", headers=RIGHT).status_code == 503
    stream.close()
    until(lambda: board.streams == 0)


# ---- who may ask for what ----


@pytest.mark.parametrize(
    "name", ["..", "%2e%2e", "..%2f..%2fetc", "0" * 12, "run", "%00", "a" * 4000]
)
@pytest.mark.parametrize("what", ["curves", "samples"])
def test_nothing_but_the_runs_can_be_reached(tmp_path, name, what):
    board = board_of(make_run(tmp_path / "run", 5))
    answer = client(board).get(f"/dashboard/runs/{name}/{what}")
    assert answer.status_code == 404 and str(tmp_path) not in answer.text


@pytest.mark.parametrize("query", ["from=x", "to=nan", "points=", "from=inf", "points=1e999"])
def test_what_is_no_number_is_refused(tmp_path, query):
    board = board_of(make_run(tmp_path / "run", 5))
    answer = client(board).get(f"/dashboard/runs/{only(board).id}/curves?{query}")
    assert answer.status_code == 400 and "must be a number" in answer.text
    good = client(board).get(f"/dashboard/runs/{only(board).id}/curves?points=1e9&from=-5&to=1e300")
    assert len(good.json()["x"]) == 5


class Asked:
    """Notes what it is asked."""

    def __init__(self):
        self.heard = []

    def save(self):
        self.heard.append("save")

    def stop(self):
        self.heard.append("stop")


def asking(tmp_path):
    folder, asked = make_run(tmp_path / "run", 5), Asked()
    board = board_of(folder, steering={folder: asked})
    return client(board, headers=None), f"/dashboard/runs/{only(board).id}", asked


def test_asking_needs_the_key(tmp_path):
    http, run, asked = asking(tmp_path)
    for given in (
        None,
        "",
        KEY,
        "Bearer",
        "Bearer wrong",
        f"Basic {KEY}",
        f"Bearer {KEY}x",
        "Bearer ü",
    ):
        headers = {} if given is None else {"authorization": given.encode()}
        for what in ("save", "stop"):
            answer = http.post(f"{run}/{what}", headers=headers)
            assert answer.status_code == 401 and KEY not in answer.text
    assert http.get(f"{run}/stop", headers={"authorization": f"Bearer {KEY}"}).status_code == 405
    assert asked.heard == []
    for what in ("save", "stop"):
        answer = http.post(f"{run}/{what}", headers={"authorization": f"Bearer {KEY}"})
        assert (answer.status_code, answer.json()) == (202, {"asked": what})
    assert asked.heard == ["save", "stop"]


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"sec-fetch-site": "cross-site"},
        {"host": "evil.example"},
    ],
)
def test_pages_of_others_cannot_ask_even_with_the_key(tmp_path, headers):
    http, run, asked = asking(tmp_path)
    answer = http.post(f"{run}/stop", headers={**RIGHT, **headers})
    assert answer.status_code == 403 and asked.heard == []
    wrong = {**RIGHT, "host": "evil.example"}
    assert http.get("/dashboard/runs", headers=wrong).status_code == 403


def test_reading_needs_the_key_unless_the_board_is_open(tmp_path):
    folder = make_run(tmp_path / "run", 5)
    board = board_of(folder)
    http, run = client(board, headers=None), f"/dashboard/runs/{only(board).id}"
    for path in ("/dashboard/runs", "/dashboard/events", f"{run}/curves", f"{run}/samples"):
        assert http.get(path).status_code == http.head(path).status_code == 401
        assert http.get(path, headers={"authorization": "Bearer wrong"}).status_code == 401
    assert http.get("/dashboard/runs", headers=RIGHT).json()["runs"][0]["name"] == "run"
    without = client(board_of(folder, is_open=True), headers=None)
    assert without.get(f"{run}/samples").status_code == 200
    assert without.post(f"{run}/save").status_code == 401
    page = http.get("/dashboard")
    assert page.status_code == 200 and "run</" not in page.text
    assert "script-src 'self'" in page.headers["content-security-policy"]


def test_beside_a_model_the_dashboard_is_behind_the_same_gate(tmp_path):
    board = board_of(make_run(tmp_path / "run", 5), playground=True)
    app = make_server(fake_service(), api_key=KEY, board=board)
    http = TestClient(app, base_url="http://localhost")
    assert http.get("/dashboard").status_code == 200
    assert http.get("/dashboard/runs").status_code == 401
    found = http.get("/dashboard/runs", headers=RIGHT).json()
    assert found["playground"] is True and found["runs"][0]["name"] == "run"
    free = TestClient(make_server(fake_service(), board=board), base_url="http://localhost")
    assert free.get("/v1/models").status_code == 200  # on this machine the model needs no key
    assert free.get("/dashboard/runs").status_code == 401
    without = TestClient(make_server(fake_service()), base_url="http://localhost")
    assert without.get("/dashboard").status_code == 404


def test_keys_are_random_unless_given():
    keys = {Board(Watch([])).key for _ in range(20)}
    assert len(keys) == 20 and all(len(key) >= 20 for key in keys)


# ---- asking a training ----


def test_a_run_of_this_process_is_asked_directly():
    heard = []
    here = Here(lambda: heard.append("save"), lambda: heard.append("stop"))
    here.save()
    assert not here.stopped
    here.stop()
    assert here.stopped and heard == ["save", "stop"]


TRAINER = """
import signal, sys, time
from pathlib import Path
from tinygpt.runs.lock import FolderLock
folder = Path(sys.argv[1])
held = FolderLock(folder)
held.acquire()
def hear(number, frame):
    with (folder / "heard").open("a") as file:
        file.write(signal.Signals(number).name + chr(10))
if sys.argv[2] == "hears":
    signal.signal(signal.SIGUSR1, hear)
    signal.signal(signal.SIGTERM, hear)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def trainer(tmp_path):
    """Starts a process that holds the lock of tmp_path/run."""
    folder = make_run(tmp_path / "run", 5)
    started = []

    def start(manner):
        words = [sys.executable, "-c", TRAINER, str(folder), manner]
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "ready\n"
        return folder, process

    yield start
    for process in started:
        process.kill()
        process.communicate()


needs_pidfd = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs Linux")


@needs_pidfd
def test_a_run_of_another_process_is_sent_the_signals_and_stop_only_once(trainer):
    folder, process = trainer("hears")
    ask = ByLock(folder)
    for _ in range(2):
        ask.save()
    ask.stop()
    with pytest.raises(UsageError, match="asked to stop already"):
        ask.stop()
    until(lambda: (folder / "heard").exists() and "SIGTERM" in (folder / "heard").read_text())
    time.sleep(0.1)  # for a second one, which must not come
    assert (folder / "heard").read_text().split().count("SIGTERM") == 1
    assert "SIGUSR1" in (folder / "heard").read_text() and process.poll() is None


@needs_pidfd
def test_a_process_that_a_signal_would_kill_is_sent_none(trainer):
    folder, process = trainer("is deaf")
    for ask in (ByLock(folder).save, ByLock(folder).stop):
        with pytest.raises(UsageError, match="does not listen"):
            ask()
    assert process.poll() is None


@needs_pidfd
def test_a_lock_that_names_any_process_reaches_none(trainer, monkeypatch):
    folder, process = trainer("hears")
    words = json.loads((folder / "run.lock").read_text())
    sent = []
    monkeypatch.setattr(signal, "pidfd_send_signal", lambda *given: sent.append(given))
    for wrong, why in (
        ({"birth": None}, "cannot tell"),
        ({"birth": "another boot 7"}, "Nobody trains"),
        ({"host": "elsewhere"}, "another machine"),
        ({"pid": 1}, "Nobody trains|does not listen|somebody else"),
        ({"pid": 0}, "Nobody trains"),
    ):
        (folder / "run.lock").write_text(json.dumps(words | wrong))
        with pytest.raises(UsageError, match=why):
            ByLock(folder).stop()
    (folder / "run.lock").unlink()
    with pytest.raises(UsageError, match="Nobody trains"):
        ByLock(folder).save()
    assert sent == [] and process.poll() is None
    (folder / "run.lock").write_text(json.dumps(words))
    ByLock(folder).stop()
    assert len(sent) == 1


def test_what_cannot_be_asked_is_a_conflict(tmp_path):
    board = board_of(make_run(tmp_path / "run", 5))
    answer = client(board).post(
        f"/dashboard/runs/{only(board).id}/stop", headers={"authorization": f"Bearer {KEY}"}
    )
    assert answer.status_code == 409 and "Nobody trains" in answer.json()["error"]["message"]


@needs_pidfd
def test_hearing_is_what_the_kernel_says():
    before = signal.signal(signal.SIGUSR2, lambda number, frame: None)
    assert steering.hears(os.getpid(), signal.SIGUSR2)
    for deaf in (signal.SIG_IGN, signal.SIG_DFL):
        signal.signal(signal.SIGUSR2, deaf)
        assert not steering.hears(os.getpid(), signal.SIGUSR2)
    signal.signal(signal.SIGUSR2, before)
    assert not steering.hears(2**22 + 1, signal.SIGUSR2)


# ---- the commands ----


def wait_for_address(process):
    """The address and key that a command says, and all lines before."""
    said = []
    for line in process.stderr:
        said.append(line)
        if found := re.search(r"dashboard: (http://127\.0\.0\.1:\d+)/#key=(\S+)", line):
            return found[1], found[2], "".join(said)
    raise AssertionError("".join(said))


def start(environment, *words, **options):
    command = [sys.executable, "-X", "importtime", "-m", "tinygpt", *map(str, words)]
    command = command if options.pop("times", False) else [command[0], *command[3:]]
    return subprocess.Popen(
        command,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def test_the_command_shows_runs_without_tinygrad_and_takes_the_next_port(
    tmp_path, child_environment
):
    make_run(tmp_path / "run", 20)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = start(child_environment, "dashboard", tmp_path, "--port", port, times=True)
        try:
            address, key, said = wait_for_address(process)
            assert f"port {port} is taken" in said and not address.endswith(f":{port}")
            assert not re.search(r"\| +tinygrad", said) and "tinygpt.server.dashboard.board" in said
            right = {"authorization": f"Bearer {key}"}
            [run] = httpx.get(f"{address}/dashboard/runs", headers=right).json()["runs"]
            assert run["name"] == "run" and run["iter"] == 20
            stop = f"{address}/dashboard/runs/{run['id']}/stop"
            assert httpx.post(stop, headers=right).status_code == 409
            process.send_signal(signal.SIGINT)
            _, rest = process.communicate(timeout=PATIENCE)
            assert process.returncode == 130 and "Traceback" not in rest
            assert not re.search(r"\| +tinygrad", rest)
        finally:
            process.kill()
            process.communicate()


def test_wrong_places_and_keys_are_refused_with_advice(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words, wanted in (
        (["dashboard"], "no folder runs"),
        (["dashboard", "nowhere"], "nowhere is no folder"),
        (["dashboard", ".", "--host", "0.0.0.0"], "needs a key"),
        (["dashboard", ".", "--api-key", "short"], "at least"),
        (["dashboard", ".", "--no-token", "--host", "0.0.0.0", "--api-key", KEY], "--no-token is"),
        (["dashboard", ".", "--allow-host", "a b"], "not the name of a host"),
    ):
        assert main(words) == 2
        assert wanted in capsys.readouterr().err


def test_without_the_extra_training_does_not_begin(tmp_path, capsys, monkeypatch):
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 200)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    for words in (["train", tmp_path / "text.txt", "--dashboard", "--out", tmp_path / "run"],
                  ["dashboard", tmp_path]):  # fmt: skip
        assert main([str(word) for word in words]) == 1
        assert extras.cure("serve") in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


TINY = [
    *("--model.n-layer", "1", "--model.n-embd", "16", "--model.n-head", "2"),
    *("--model.block-size", "8", "--train.batch-size", "2", "--train.eval-iters", "1"),
    *("--train.eval-interval", "50", "--tokenizer", "char", "--dashboard-port", "0"),
]


def test_a_training_is_watched_saved_and_stopped_from_its_page(tmp_path):
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 200)
    words = ["train", tmp_path / "text.txt", "--out", tmp_path / "run", "--dashboard", *TINY]
    process = start(dict(os.environ), *words, "--train.max-iters", 1_000_000)
    try:
        address, key, _ = wait_for_address(process)
        headers = {"authorization": f"Bearer {key}"}

        def card():
            return httpx.get(f"{address}/dashboard/runs", headers=headers).json()["runs"][0]

        until(lambda: (card()["iter"] or 0) > 3)
        assert card()["state"] == "training"
        run = f"{address}/dashboard/runs/{card()['id']}"
        assert httpx.post(f"{run}/stop").status_code == 401
        assert httpx.post(f"{run}/save", headers=headers).status_code == 202
        until(lambda: card()["checkpoint"] is not None)
        assert httpx.post(f"{run}/stop", headers=headers).status_code == 202
        _, said = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, said
        assert re.search(r"stopped at step .*all of it kept", said) and "--resume" in said
        assert list((tmp_path / "run").glob("ckpt_*.safetensors"))
    finally:
        process.kill()
        process.communicate()


def test_a_training_may_show_itself_without_a_key_to_those_on_this_machine(tmp_path, capsys):
    run = make_run(tmp_path / "run", 5)
    here = SimpleNamespace(folder=run, save_soon=lambda: None, stop=lambda: None)
    for is_open, status in ((False, 401), (True, 200)):
        with (
            listen_nearby("127.0.0.1", 0) as listener,
            dashboard_beside(here, listener, 0, is_open),
        ):
            said = capsys.readouterr().err
            assert ("key for saving and stopping" in said) is is_open
            address = url(listener, "127.0.0.1")
            assert httpx.get(f"{address}/dashboard/runs").status_code == status
    code = main(["train", "text.txt", "--no-token", "--out", str(tmp_path / "new")])
    assert code == 2 and "give --dashboard too" in capsys.readouterr().err


def test_the_server_thread_ends_with_its_block_and_holds_up_no_exit(tmp_path):
    board = board_of(make_run(tmp_path / "run", 5))
    with listen_nearby("127.0.0.1", 0) as listener:
        with ServerThread(make_app(board), listener):
            [thread] = [t for t in threading.enumerate() if t.name == "tinygpt-dashboard"]
            assert thread.daemon
            stream = events_of(url(listener, "127.0.0.1"))
            next(stream)
        assert not thread.is_alive()


@pytest.mark.parametrize("port", [-1, 65536, 99999])
def test_a_port_that_cannot_be_is_not_said_to_be_taken(port):
    with pytest.raises(UsageError, match=f"^--port {port} is not a port"):
        listen_nearby("127.0.0.1", port)


def test_a_dashboard_that_cannot_be_leaves_no_run_behind(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("once upon a time " * 200)
    out = tmp_path / "run"
    words = ["train", str(text), "--out", str(out), "--dashboard", "--dashboard-port", "99999"]
    assert main(words) == 2
    assert "--dashboard-port 99999 is not a port" in capsys.readouterr().err
    assert not out.exists()
