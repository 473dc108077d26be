"""No child process takes code from the current folder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tinygpt
from tinygpt.machine.children import python_module

ROOT = Path(tinygpt.__file__).parents[1]
TRAPS = ("tinygpt/__init__.py", "token.py", "json.py", "runpy.py", "sitecustomize.py", "numpy.py")


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """The current folder, where whatever is imported leaves a file behind."""
    for name in TRAPS:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"open({str(tmp_path / 'sprung')!r}, 'a').write(__name__ + ' ')")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words: str, environment: dict[str, str] | None = None) -> str:
    program = python_module(*words, environment=environment)
    done = subprocess.run(**program, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", [None, "", os.pathsep, f"{os.pathsep}{ROOT}", "."])
def test_a_child_takes_nothing_from_the_current_folder(trap, monkeypatch, path):
    if path is None:
        monkeypatch.delenv("PYTHONPATH", raising=False)
    else:
        monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setattr(sys, "path", ["", str(trap), *sys.path])  # as python -m and -c leave it
    assert run("tinygpt", "--version") == f"tinygpt {tinygpt.__version__}\n"
    assert not (trap / "sprung").exists()


def test_a_child_finds_what_this_process_finds(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("import sys, tinygpt; print(sys.argv[1:], tinygpt.__file__)")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert run("mine", "a b", "-c") == f"['a b', '-c'] {tinygpt.__file__}\n"


def paths(monkeypatch, *path: str) -> list[str]:
    """The path that a child is given by a process that has this one."""
    monkeypatch.setattr(sys, "path", list(path))
    return json.loads(python_module("tinygpt")["args"][4])


def test_what_is_installed_in_the_current_folder_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    library, root, here = str(Path(os.__file__).parent), str(ROOT), str(tmp_path)
    assert paths(monkeypatch, here, library, root, here) == [library, root, here]
    assert paths(monkeypatch, "", here, library) == [root, library]
    monkeypatch.chdir(ROOT)
    assert paths(monkeypatch, "", library) == [root, library]
    assert paths(monkeypatch, root, library) == [root, library]


def test_a_current_folder_that_is_gone_is_no_trouble(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert str(ROOT) in json.loads(python_module("tinygpt")["args"][4])


def test_the_processes_of_tinygrads_own_pool_do_neither(monkeypatch):
    from tinygpt.machine import kernel_store, pool

    monkeypatch.setattr(kernel_store, "PARALLEL", 2)
    monkeypatch.setattr(pool, "threads", lambda: 2)
    monkeypatch.setattr(kernel_store, "_own_workers", lambda: os.environ.get("PYTHONSAFEPATH"))
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    monkeypatch.delenv("PYTHONSAFEPATH")
    monkeypatch.setattr(sys, "platform", "linux")  # where nothing changes the environment
    assert isinstance(kernel_store._workers(), kernel_store.Forks)
    assert "PYTHONSAFEPATH" not in os.environ
    monkeypatch.setattr(sys, "platform", "darwin")
    assert kernel_store._workers() == "1"
    del os.environ["PYTHONSAFEPATH"]


def test_nothing_else_in_the_package_starts_a_python():
    """doctor.py starts compilers, and says which Python is running; children.py starts them."""
    texts = {path.name: path.read_text(encoding="utf-8") for path in ROOT.rglob("tinygpt/**/*.py")}
    starting = {name for name, text in texts.items() if "import subprocess" in text}
    assert {n for n in starting if "sys.executable" in texts[n]} <= {"children.py", "doctor.py"}
    others = (
        r"import multiprocessing|from multiprocessing|os\.(system|popen|exec|spawn|posix_spawn)"
    )
    assert [name for name, text in texts.items() if re.search(others, text)] == []
