"""What the benchmarks share; the benchmarks themselves are run by hand."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def common(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(FOLDER))
    import common

    yield common
    del sys.modules["common"]


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
        assert path.name == "common.py" or '"--json"' not in text, path.name
