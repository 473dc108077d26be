from __future__ import annotations

import importlib
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest

import tinygpt

ROOT = Path(__file__).parents[1]
SCRIPTS = [*sorted((ROOT / "scripts").iterdir()), ROOT / ".ci" / "run"]


@pytest.mark.parametrize("name", ["gpt", "minimiggy"])
def test_both_import_names_give_the_whole_public_api(name: str) -> None:
    module = importlib.import_module(name)
    assert tinygpt.__all__
    for public in tinygpt.__all__:
        assert getattr(module, public) is getattr(tinygpt, public)
    star: dict[str, object] = {}
    exec(f"from {name} import *", star)
    assert set(tinygpt.__all__) <= set(star)


def test_importing_tinygpt_does_not_import_tinygrad() -> None:
    code = "import sys, tinygpt; sys.exit('tinygrad' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_the_version_is_written_once() -> None:
    assert metadata.version("tinygpt") == tinygpt.__version__


def test_both_commands_are_the_same_program() -> None:
    found = metadata.entry_points(group="console_scripts")
    ours = {e.name: e.value for e in found if e.dist and e.dist.name == "tinygpt"}
    assert ours == {"tinygpt": "tinygpt.cli:main", "minimiggy": "tinygpt.cli:main"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_can_be_run_and_are_valid(script: Path) -> None:
    assert os.access(script, os.X_OK)
    first, _, rest = script.read_text().partition("\n")
    if first == "#!/usr/bin/env python3":
        compile(rest, script, "exec")
    else:
        assert first == "#!/usr/bin/env bash"
        subprocess.run(["bash", "-n", script], check=True)


def test_lines_of_code_are_counted_without_comments_and_docstrings(tmp_path: Path) -> None:
    count = runpy.run_path(str(ROOT / "scripts" / "count"))
    source = tmp_path / "source.py"
    lines = ['"""Two', 'lines."""', "", 'x = """a', 'b"""  # one', "# none", "def f():"]
    source.write_text("\n".join([*lines, '    "no"', "    f(", "1)", ""]))
    assert count["code_lines"](source) == 5


PROGRAM = f"""#!/bin/sh
[ "$1" = -c ] && exec {shlex.quote(sys.executable)} "$@"
echo "$(basename "$0") $*" >>calls
[ "$1" = train ] || exit 0
mkdir -p runs/demo
! [ -e interrupt ] || exit 130
! [ -e slow ] || {{ rm slow; exit 2; }}
"""
"""Stands for everything in .venv/bin: writes down how it is called."""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The scripts in a folder with an awkward name, and a .venv that only writes down calls."""
    clone = tmp_path / "my clone's $HOME"
    shutil.copytree(ROOT / "scripts", clone / "scripts")
    shutil.copy(ROOT / "pyproject.toml", clone)
    programs = clone / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name in ("python", "tinygpt"):
        (programs / name).write_text(PROGRAM)
        (programs / name).chmod(0o755)
    return clone


def calls(clone: Path, script: str, *arguments: str, expect: int = 0) -> list[str]:
    """What a script starts, without the options that never change."""
    (clone / "calls").unlink(missing_ok=True)
    command = [clone / "scripts" / script, *arguments]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=60)
    assert done.returncode == expect, done.stderr
    written = clone / "calls"
    return written.read_text().splitlines() if written.exists() else []


def installs(lines: list[str]) -> list[str]:
    """What pip was told to install."""
    return [
        re.sub(r".* install (--editable )?(\S+) .*", r"\2", s) for s in lines if " install " in s
    ]


def test_setup_installs_each_extra_once_until_pyproject_changes(clone: Path) -> None:
    assert installs(calls(clone, "setup", "offline", "plots")) == [".[offline,plots]"]
    assert calls(clone, "setup", "offline") == []
    assert installs(calls(clone, "setup", "offline", "test")) == [".[test]"]
    assert installs(calls(clone, "setup", "oracle")) == ["torch==2.13.0", ".[oracle]"]
    with (clone / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    assert installs(calls(clone, "setup", "offline")) == [".[offline]"]


def test_demo_trains_once_then_only_generates(clone: Path) -> None:
    first = calls(clone, "demo")
    assert [line.split()[1] for line in first[-2:]] == ["train", "generate"]
    assert "--resume" not in first[-2]
    assert [line.split()[1] for line in calls(clone, "demo")] == ["generate"]


def test_a_machine_that_compiles_for_too_long_gives_the_demo_more_time(clone: Path) -> None:
    (clone / "slow").touch()
    trains = [line for line in calls(clone, "demo") if " train " in line]
    assert [line.split()[4] for line in trains] == ["45s", "5"]


def test_an_interrupted_demo_goes_on_where_it_was(clone: Path) -> None:
    (clone / "interrupt").touch()
    calls(clone, "demo", expect=130)
    (clone / "runs" / "demo" / "ckpt_100.safetensors").touch()
    (clone / "interrupt").unlink()
    train, generate = calls(clone, "demo")
    assert train == "tinygpt train --resume --out runs/demo"
    assert generate.startswith("tinygpt generate runs/demo The")


def test_a_demo_interrupted_before_its_first_checkpoint_starts_over(clone: Path) -> None:
    (clone / "interrupt").touch()
    calls(clone, "demo", expect=130)
    (clone / "runs" / "demo" / "metrics.jsonl").touch()
    (clone / "interrupt").unlink()
    assert calls(clone, "demo")[0] == "tinygpt train auto --minutes 45s --out runs/demo"
    assert not (clone / "runs" / "demo" / "metrics.jsonl").exists()


def test_scripts_test_leaves_out_the_slow_unless_asked_and_passes_the_rest_on(clone: Path) -> None:
    lines = calls(clone, "test", "-k", "two words")
    tools = [line.split()[2] for line in lines if " pip " not in line]
    assert tools == ["ruff", "ruff", "mypy", "pytest"]
    run = "python -m pytest --numprocesses 2 --dist loadfile --max-worker-restart 0"
    assert lines[-1] == f"{run} -m not slow -k two words"
    assert calls(clone, "test", "--slow", "-x")[-1] == f"{run} -x"
    assert installs(calls(clone, "test", "--oracle"))[-1] == ".[oracle]"


def test_setup_without_a_recent_python_says_what_is_wanted(clone: Path, tmp_path: Path) -> None:
    shutil.rmtree(clone / ".venv")
    old = tmp_path / "bin"
    old.mkdir()
    (old / "python3").write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.1 || exit 1\n')
    (old / "python3").chmod(0o755)
    for name in ("bash", "dirname"):
        (old / name).symlink_to(str(shutil.which(name)))
    command = [clone / "scripts" / "setup", "offline"]
    done = subprocess.run(command, env={"PATH": str(old)}, capture_output=True, text=True)
    assert done.returncode == 1
    assert "needs Python 3.11 or newer" in done.stderr and "Python 3.9.1" in done.stderr


def test_setup_that_has_nothing_to_do_is_quick(clone: Path) -> None:
    calls(clone, "setup", "offline")
    start = time.perf_counter()
    calls(clone, "setup", "offline")
    assert time.perf_counter() - start < 2
