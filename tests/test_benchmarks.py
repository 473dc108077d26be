"""What the benchmarks share; the benchmarks themselves are run by hand."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tinygpt.config import GPTConfig, TrainConfig

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def common(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    yield from benchmark("common", monkeypatch)


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    yield from benchmark("texts", monkeypatch)


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    yield from benchmark("peers", monkeypatch)


def benchmark(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A module of the benchmarks, for as long as a test lasts; so are those that it imports."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module(name)
    ours = {path.stem for path in FOLDER.glob("*.py")}
    for own in ours & (set(sys.modules) - before):
        del sys.modules[own]


def test_a_result_replaces_a_result_and_nothing_else(
    common: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser, out = common.arguments("A benchmark."), tmp_path / "out.json"
    for loss in (1.5, float("nan")):
        path = parser.parse_args(["--json", str(out)]).json
        common.write_json(path, {"spread": common.Spread(1, 0, 2), "loss": loss})
    found = json.loads(out.read_text("utf-8"))
    assert found["spread"] == {"median": 1, "low": 0, "high": 2} and found["loss"] is None
    common.write_json(parser.parse_args([]).json, {})  # nowhere
    notes = tmp_path / "notes.json"
    notes.write_text('{"mine": 1}')
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--json", str(notes)])
    assert ended.value.code == 2 and "is not overwritten" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parser.parse_args(["--json", str(tmp_path)])
    assert notes.read_text() == '{"mine": 1}'


def test_every_benchmark_takes_its_result_file_from_there() -> None:
    for path in FOLDER.glob("*.py"):
        text = path.read_text("utf-8")
        own = re.search(r'add_argument\(\s*"--json"', text)
        assert (path.name == "common.py") == bool(own), path.name


def test_a_text_of_the_benchmark_may_lie_elsewhere_or_be_missing(
    texts: ModuleType, tmp_path: Path
) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("to be " * 50, "utf-8")
    for word in (str(mine), f"shakespeare={mine}"):
        text = texts.read(word)
        assert text.text == "to be " * 50 and text.cut == 270
    for word in (f"chinese={tmp_path}", f"shakespeare={tmp_path}/none.txt", str(tmp_path / "no")):
        with pytest.raises(texts.MissingError, match=r"apt-get install|There is no file"):
            texts.read(word)


def test_the_chinese_text_holds_each_entry_once(texts: ModuleType, tmp_path: Path) -> None:
    poem = "床前明月光疑是地上霜\n举头望明月低头思故乡"
    quoted = "床前明月光疑是地上霜\n    --李白"
    entries = [f"\x1b[33m{poem}\x1b[m", quoted, "只有敬亭山", "mostly English 中文", "只有敬亭山"]
    path = tmp_path / "chinese"
    path.write_text("\n%\n".join(entries), "utf-8")
    found = texts.read(f"chinese={path}").text
    assert found.count("床前明月光") == 1 and found.count("敬亭山") == 1
    assert "English" not in found and "\x1b" not in found


def test_recipes_of_the_peers_are_settings(peers: ModuleType) -> None:
    for recipe in peers.RECIPES.values():
        assert GPTConfig(vocab_size=1000, **recipe.model).tie_embeddings
        assert TrainConfig(**recipe.train).decay in ("cosine", "linear")
