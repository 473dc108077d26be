"""JSON is written by one function, which writes what every reader can read."""

from __future__ import annotations

import ast
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinygpt.files.strict_json import to_json, write_json

PACKAGE = Path(__file__).parents[1] / "src" / "tinygpt"
LEGACY = ("runs/checkpoint/format.py", "_first_digest")
"""Hashes what older versions wrote, NaN included; the text is never written."""


def strict(text: str | bytes) -> Any:
    """What a reader makes of a text that knows no NaN."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_numbers_that_are_not_finite_are_null_wherever_they_stand():
    odd = [
        math.nan,
        math.inf,
        -math.inf,
        np.float32("nan"),
        np.float64("inf"),
        np.array([math.nan]),
    ]
    text = to_json({"odd": odd, "deep": [{"x": (math.nan, 1.5)}]}, indent=2)
    assert strict(text) == {"odd": [None] * 5 + [[None]], "deep": [{"x": [None, 1.5]}]}


def test_numpy_and_paths_are_plain():
    value = {
        "n": np.int32(3),
        "b": np.bool_(True),
        "a": np.arange(2),
        "p": Path("a/b"),
        "e": np.empty(0),
    }
    assert strict(to_json(value)) == {"n": 3, "b": True, "a": [0, 1], "p": "a/b", "e": []}
    assert strict(to_json({**value, "x": math.nan}))["a"] == [0, 1]


def test_anything_else_is_an_error_unless_its_form_is_said():
    with pytest.raises(TypeError, match="set has no form in JSON"):
        to_json({1})
    assert to_json({1}, other=sorted) == "[1]"


@pytest.mark.parametrize("unicode", [False, True])
def test_half_a_character_can_be_encoded_and_comes_back(unicode: bool):
    text = "é😀\ud800\udfff"
    assert strict(to_json(text, unicode=unicode).encode()) in (text, "é😀" + "\U000103ff")


def test_a_file_is_whole_or_not_there(tmp_path: Path):
    write_json(tmp_path / "a.json", {"x": math.nan})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})
    assert (tmp_path / "a.json").read_text() == '{"x": null}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def writers(path: Path) -> list[str]:
    """Functions of a file that call ``json.dump`` or ``json.dumps``, and imports that hide it."""
    found = []
    for function in ast.walk(ast.parse(path.read_text())):
        if isinstance(function, ast.FunctionDef):
            calls = {
                ast.unparse(node) for node in ast.walk(function) if isinstance(node, ast.Attribute)
            }
            found += [function.name] * bool(calls & {"json.dump", "json.dumps"})
        elif isinstance(function, ast.ImportFrom):
            names = {f"{function.module}.{alias.name}" for alias in function.names}
            hidden = {"json.dump", "json.dumps", "starlette.responses.JSONResponse"}
            found += sorted(names & hidden)
    return found


def test_nobody_else_writes_json():
    found = {
        (str(path.relative_to(PACKAGE)), function)
        for path in PACKAGE.rglob("*.py")
        for function in writers(path)
        if path.name != "strict_json.py"
    }
    assert found == {LEGACY}, "use tinygpt.files.strict_json, or server.http.answers.JSONResponse"
