"""A page starts, whatever its run went through; one that would not start is never handed out."""

from __future__ import annotations

import base64
import json
import math
import re
import zlib
from contextlib import closing
from pathlib import Path

import pytest

from tests.test_strict_json import strict
from tests.test_web import SMALL, make, needs_node, node
from tinygpt import ByteTokenizer, pages
from tinygpt.cli import main
from tinygpt.errors import InteropError
from tinygpt.interop.web import export_web
from tinygpt.interop.web.finished import check_finished
from tinygpt.pages.run_card import run_card
from tinygpt.runs.history import History


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose second step was skipped, and whose last loss is no number."""
    folder = tmp_path_factory.mktemp("skipped") / "run"
    make(SMALL).save_checkpoint(4, None, folder, tokenizer=ByteTokenizer())
    with closing(History(folder / "metrics.jsonl")) as history:
        history.append({"iter": 1, "train_loss": 5.0})
        history.append({"iter": 2, "train_loss": math.nan, "skipped": "loss nan"})
        history.append({"iter": 3, "train_loss": 4.0, "val_loss": math.inf})
        history.append({"iter": 4, "train_loss": 9.0, "skipped": "loss 9.0, above 5.0"})
    return folder


def test_a_skipped_step_is_a_gap_in_the_curve(run: Path):
    found = strict(json.dumps(run_card(next(run.glob("*.safetensors")))))["curves"]
    assert found == {"train": [[1, 5.0], [2, None], [3, 4.0], [4, None]], "val": [[3, None]]}


@needs_node
def test_a_gap_interrupts_the_line():
    script = """const { stretches } = await load('../shared/chart.js');
    const { isCurve } = await load('../playground/card.js');
    const both = [isCurve(given), isCurve([[1, null], [2, 3]])];
    return [stretches(given.map(([, loss]) => loss)), ...both];"""
    points = [[1, 5], [2, None], [3, 4], [4, 4]]
    assert node(script, points) == [[[0, 1], [2, 4]], True, False]


@pytest.mark.parametrize("entry", ["local/page.js", "local/worker.mjs"])
def test_a_bundle_has_each_module_once_behind_those_that_it_imports(entry: str):
    script = pages.bundle(entry)
    assert not re.search(r"^(import|export)\b", script, re.MULTILINE)
    order = re.findall(r'^modules\["(.+?)"\] = ', script, re.MULTILINE)
    assert order[-1] == entry and len(order) == len(set(order)) > 3
    for needed, at in [(m[1], m.start()) for m in re.finditer(r'= modules\["(.+?)"\];', script)]:
        assert 0 <= script.index(f'modules["{needed}"] = ') < at


def test_no_string_of_a_script_goes_over_several_lines():
    """The bundle leaves indentation and lines that look like comments out."""
    for path in pages.FOLDER.glob("*/*js"):
        if path.name != "load.mjs":  # which is in no bundle
            for line in path.read_text(encoding="utf-8").splitlines():
                assert line.count("`") % 2 == 0, (path, line)


@pytest.fixture(scope="module")
def page(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    assert main(["export", "web", str(run), "--out", str(path)]) == 0
    return path


def test_a_run_with_a_skipped_step_can_be_given_away(page: Path):
    about = re.search(r'id="about">(.*?)</script>', page.read_text(), re.DOTALL)
    assert about is not None
    assert strict(about[1])["card"]["curves"]["train"][1] == [2, None]


DAMAGES = {
    "NaN": (b'"card":{', b'"card":{"x":NaN,', "NaN"),
    "a bracket": (b'id="about">{', b'id="about">', "page would not start"),
    "the module": (b'id="module">', b'id="module">AAAA', "its module"),
    "a chunk": (b'class="weights"', b'class="weight"', "chunks"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_no_browser_reads_is_refused(page: Path, tmp_path: Path, damage: str):
    before, after, said = DAMAGES[damage]
    content, damaged = page.read_bytes(), tmp_path / "page.html"
    element = re.search(rb'id="module">(.*?)</script>', content, re.DOTALL)
    assert element is not None
    module, chunks = (
        zlib.decompress(base64.b64decode(element[1])),
        content.count(b'class="weights" data'),
    )
    check_finished(page, module, chunks, node=False)
    damaged.write_bytes(content.replace(before, after, 1))
    with pytest.raises(InteropError, match=said):
        check_finished(damaged, module, chunks, node=False)


@needs_node
def test_a_worker_that_does_not_start_leaves_no_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    bundle = pages.bundle
    monkeypatch.setattr(
        pages,
        "bundle",
        lambda name: bundle(name) + "throw new Error('broken');" * ("worker" in name),
    )
    with pytest.raises(InteropError, match=r"does not start in node: .*broken"):
        export_web(make(SMALL), ByteTokenizer(), tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []
