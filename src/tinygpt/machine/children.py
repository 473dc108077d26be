"""Child processes of this Python and this tinygpt that import nothing from the current folder.

``python -m`` and ``python -c`` put the current folder first on ``sys.path``, and an empty entry in
``PYTHONPATH`` means it too. A folder of texts may hold a ``token.py``, which would then be imported
in place of the standard library's. So a child is started with ``-P`` and gets this process's
``sys.path``, without the current folder, as its first argument.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinygpt.files.strict_json import to_json

# sys.argv of the child: the path as JSON, what to run (code or a module's name), its arguments.
START = (
    "import json, runpy, sys; path, what = sys.argv[1:3]; del sys.argv[1:3]; "
    "sys.path[:] = json.loads(path); "
)
MODULE = START + "runpy.run_module(what, run_name='__main__', alter_sys=True)"
CODE = START + "exec(what)"


def python_module(
    name: str, *arguments: str, environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """What ``subprocess`` needs to run the module ``name`` as a program: ``args`` and ``env``.

    The module finds what this process finds, however that came to be on its path, but for the
    current folder. ``environment`` is added to this process's own.

    >>> subprocess.run(**python_module("tinygpt", "--version"))
    """
    return _python(MODULE, name, *arguments, environment=environment)


def python_code(code: str, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The same for Python code in place of a module."""
    return _python(CODE, code, environment=environment)


def run_code(
    code: str, limit: float, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run Python code to its end, for at most ``limit`` seconds, and keep what it prints.

    Raises OSError where no process can be started, and subprocess.TimeoutExpired.
    """
    return subprocess.run(
        **python_code(code, environment),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=limit,
    )


def _python(*arguments: str, environment: Mapping[str, str] | None) -> dict[str, Any]:
    start, *rest = arguments
    args = [sys.executable, "-P", "-c", start, to_json(_path()), *rest]
    own = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return {"args": args, "env": {**own, "PYTHONSAFEPATH": "1", **(environment or {})}}


def _path() -> list[str]:
    """``sys.path`` without the current folder, unless this tinygpt itself lies in it.

    An entry behind the standard library stays: an installation put it there (a development
    install, for example), and it cannot shadow the standard library.
    """
    home, library = str(Path(__file__).absolute().parents[2]), str(Path(os.__file__).parent)
    path = [place for place in sys.path if place]
    installed = path.index(library) if library in path else len(path)
    kept = [p for i, p in enumerate(path) if i >= installed or p == home or not _is_current(p)]
    return kept if home in kept else [home, *kept]


def _is_current(place: str) -> bool:
    try:
        return Path(place).samefile(os.curdir)
    except OSError:  # a .zip that is not there, or no current folder
        return False
