"""What the documents say is so: snippets run, commands parse, links lead somewhere, lists agree."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from cyclopts import CycloptsError

from tests.test_layers import ORDER
from tinygpt.cli import VERBS, make_app
from tinygpt.config import PRESETS, GPTConfig, TrainConfig

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md"), *ROOT.glob("benchmarks/*.md")])
WRITTEN = [page for page in PAGES if page.name != "cli.md"]
"""The pages that people write."""


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


def fenced(page: Path, *languages: str) -> list[str]:
    """The code blocks of a page in one of the languages."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
    return [code for language, code in blocks if language in languages]


def run_python(code: str) -> str:
    """Run a snippet as a reader would, in the repository's folder; -> what it prints."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


# Snippets ---------------------------------------------------------------------------------------


def test_the_readme_snippet_prints_what_the_readme_shows() -> None:
    [code] = fenced(README, "python")
    shown = fenced(README, "text")[0]
    assert run_python(code).strip() == shown.strip()


@pytest.mark.slow
def test_the_snippets_of_the_tour_run_one_after_the_other() -> None:
    printed = run_python("\n".join(fenced(DOCS / "tour.md", "python")))
    assert [line.split()[0] for line in printed.splitlines()[:2]] == ["10", "20"]


@pytest.mark.parametrize("page", WRITTEN, ids=page_id)
def test_every_snippet_is_python_and_takes_names_that_exist(page: Path) -> None:
    for code in fenced(page, "python"):
        compile(code, page.name, "exec")
        for module, names in re.findall(
            r"^from (tinygpt\S*|gpt|minimiggy) import (.+)$", code, re.M
        ):
            found = importlib.import_module(module)
            for name in names.split(","):
                assert hasattr(found, name.strip()), f"{module} has no {name}"


# Commands ---------------------------------------------------------------------------------------


def commands(page: Path) -> Iterator[str]:
    """The lines of a page that call the program, in blocks and within sentences."""
    for block in fenced(page, "sh", "console", "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if found := re.match(r"(?:\$ )?((?:\.venv/bin/)?(?:tinygpt|minimiggy) .*)", line):
                yield found[1]
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for span in re.findall(r"`((?:tinygpt|minimiggy) [^`]+)`", prose):
        if "|" not in span:  # a list of verbs
            yield span.replace("…", "TEXT.txt").replace("RUN", "runs/x")


def check_command(line: str) -> None:
    """Let the program's own parser read the line, without running it."""
    program, *words = shlex.split(line, comments=True)
    if {"--help", "--version"} & set(words):
        return
    verb = next(word for word in words if not word.startswith("-"))
    assert verb in VERBS, f"{line}: there is no {verb!r}"
    app = make_app(Path(program).name, verb)
    _, everywhere, _ = app.meta.parse_args(words, exit_on_error=False, print_error=False)
    _, bound, _ = app.parse_args(everywhere.args, exit_on_error=False, print_error=False)
    given = bound.arguments
    if verb == "train":
        GPTConfig.from_dict(given.get("model") or {})
        train = given.get("train") or {}
        TrainConfig.from_dict({name: value for name, value in train.items() if value != "auto"})
        assert given.get("preset") in {None, *PRESETS}


@pytest.mark.parametrize("page", WRITTEN, ids=page_id)
def test_every_command_in_the_documents_is_understood_by_the_program(page: Path) -> None:
    for line in commands(page):
        check_command(line)


def test_commands_are_found_and_wrong_ones_are_refused() -> None:
    assert len(list(commands(README))) >= 3
    assert len(list(commands(DOCS / "quickstart.md"))) >= 20
    for wrong in ("tinygpt trian x.txt", "tinygpt train x.txt --max-iter 5"):
        with pytest.raises((AssertionError, CycloptsError)):
            check_command(wrong)


def test_scripts_that_are_named_exist() -> None:
    for page in WRITTEN:
        for name in re.findall(r"(?<![\w/])scripts/(\w+)", page.read_text(encoding="utf-8")):
            assert os.access(ROOT / "scripts" / name, os.X_OK), f"{page.name} names {name}"


def test_the_reference_is_what_the_help_says(tmp_path: Path) -> None:
    kept = (DOCS / "cli.md").read_text(encoding="utf-8")
    if f"cyclopts {version('cyclopts')}:" not in kept:
        pytest.skip("docs/cli.md was made with another version of cyclopts, which words it its way")
    subprocess.run([sys.executable, DOCS / "cli_page.py", tmp_path / "cli.md"], check=True)
    assert kept == (tmp_path / "cli.md").read_text(encoding="utf-8"), "run scripts/docs"


# Lists ------------------------------------------------------------------------------------------


def tree(text: str) -> dict[str, set[str]]:
    """A drawn file tree as what each folder holds, '' being the top."""
    folders: dict[str, set[str]] = {"": set()}
    above: list[str] = []
    for line in text.splitlines():
        drawn, name = re.match(r"([│ ├└─]*)(\S+)", line).groups()  # type: ignore[union-attr]
        above[len(drawn) // 4 :] = [name]
        folder = "".join(above[:-1])
        folders.setdefault(folder, set()).add(name)
    return folders


def test_the_file_tree_of_the_readme_is_the_repository() -> None:
    [drawn] = [block for block in fenced(README, "text") if "├──" in block]
    folders = tree(drawn)
    assert set(folders) == {"", "src/", "src/tinygpt/"}
    for folder in ("src/", "src/tinygpt/"):
        assert folders[folder] == contents(ROOT / folder) - {"__init__.py", "__main__.py"}
    ignored = set((ROOT / ".gitignore").read_text().split())
    there = {name for name in contents(ROOT) if name.endswith("/")} - ignored
    assert folders[""] >= there
    assert all((ROOT / name).is_dir() for name in folders[""])


def contents(folder: Path) -> set[str]:
    """The modules and folders in a folder, but for what Python and others leave there."""
    here = [p for p in folder.iterdir() if not p.name.startswith((".", "__pycache__"))]
    modules = {p.name for p in here if p.suffix == ".py"}
    return modules | {f"{p.name}/" for p in here if p.is_dir() and any(p.rglob("*.*"))}


def test_the_design_lists_the_modules_in_the_order_that_is_kept() -> None:
    assert fenced(DOCS / "design.md", "text")[0].split() == [m for m in ORDER if m[0] != "_"]


def test_the_quickstart_describes_the_presets_as_they_are() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| (.+ layers, .*?) \|", (DOCS / "quickstart.md").read_text(), re.M
    )
    assert [name for name, _ in rows] == list(PRESETS)
    for (_, told), preset in zip(rows, PRESETS.values(), strict=True):
        assert told.startswith(f"{preset.model['n_layer']} layers, {preset.model['n_embd']} wide, ")
        if preset.tokenizer.startswith("bpe:"):
            assert told.endswith(f"{preset.tokenizer[4:]} byte pairs")


def test_the_changelog_has_a_place_for_what_comes_next() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## \[Unreleased\]$", text, re.M)


# Links and paths --------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """What a link can lead to within a page: its headings, as GitHub and MyST spell them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_relative_link_leads_to_something(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        there = page.parent / name if name else page
        assert there.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(there), f"{page.name} links to {target}"


MACHINE_PATHS = re.compile(rb"(?<![\w.~$}])/(?:work|root|home|Users|tmp)/[\w.]")
"""Folders of one machine: the repository must mean the same everywhere."""


def repository() -> list[Path]:
    """The files that belong to the repository, or in a copy without git all that could."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if listed.returncode == 0:
        return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    folders = ("src", "tests", "docs", "examples", "scripts", "benchmarks")
    below = [p for folder in folders for p in (ROOT / folder).rglob("*") if p.is_file()]
    top = [p for p in ROOT.iterdir() if p.is_file() and not p.name.startswith(".")]
    return [p for p in [*top, *below] if "__pycache__" not in p.parts]


def test_no_file_names_a_path_of_one_machine() -> None:
    files = repository()
    assert README in files and len(files) > 50
    for path in files:
        for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
            assert not MACHINE_PATHS.search(line), f"{path.relative_to(ROOT)}:{number}: {line!r}"
