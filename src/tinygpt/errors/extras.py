"""What tinygpt and its extras consist of, and the command that installs it where tinygpt runs.

No package index has tinygpt, and the ``pip`` that is first on PATH may belong to another Python. So
a command for the user names the running interpreter and the packages themselves.
"""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tinygpt.errors import MissingExtraError


def install_command(*requirements: str) -> str:
    """A shell command that installs ``requirements`` for the running interpreter.

    An environment made by uv has no pip of its own; there uv installs for that interpreter.
    """
    python = sys.executable or "python3"
    pip = [python, "-m", "pip", "install"]
    if find_spec("pip") is None and (uv := shutil.which("uv")):
        pip = [uv, "pip", "install", "--python", python]
    return shlex.join([*pip, *requirements])


def cure(extra: str) -> str:
    """The command that installs an extra's packages: ``…/python -m pip install 'gguf>=0.19'``."""
    try:
        return install_command(*requirements(extra))
    except LookupError:
        return f"see the extra {extra!r} in the pyproject.toml that tinygpt came with"


def need(extra: str, task: str, *modules: str) -> Any:
    """Import modules of an extra for a task; -> the last one.

    Raises MissingExtraError that names the one that is not installed.
    """
    try:
        return [import_module(name) for name in modules][-1]
    except ImportError as error:
        raise missing(extra, f"{task} needs {error.name}, which is not installed.") from error


def missing(extra: str, reason: str) -> MissingExtraError:
    """The error for a package of an extra that is not installed; ``reason`` says what needs it."""
    return MissingExtraError(f"{reason} Install it (the extra {extra!r}): {cure(extra)}")


def requirements(extra: str | None) -> list[str]:
    """What an extra requires, and tinygpt itself for None: ``["tinygrad==0.14.*", ...]``.

    Comes from the metadata of the installed distribution, and from ``pyproject.toml`` in a clone
    that was never installed. Raises LookupError if there is neither.
    """
    return _declared()[extra]


def names() -> list[str]:
    """The extras, in the order in which ``pyproject.toml`` has them."""
    return [extra for extra in _declared() if extra is not None]


def _declared() -> dict[str | None, list[str]]:
    from importlib import metadata  # late: slow to import

    try:
        distribution = metadata.distribution("tinygpt")
    except metadata.PackageNotFoundError:
        return _in_clone()
    found: dict[str | None, list[str]] = {None: []}
    found |= {extra: [] for extra in distribution.metadata.get_all("Provides-Extra") or []}
    for line in distribution.requires or []:
        requirement, _, marker = line.partition(";")
        named = re.search(r"extra == ['\"]([^'\"]+)", marker)
        found.setdefault(named.group(1) if named else None, []).append(requirement.strip())
    return found


def _in_clone() -> dict[str | None, list[str]]:
    import tomllib

    try:
        text = (Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8")
    except OSError as error:
        raise LookupError("tinygpt was copied here without its metadata") from error
    project = tomllib.loads(text)["project"]
    found = {None: project["dependencies"], **project["optional-dependencies"]}
    # as from the metadata: without the markers that say on which systems
    return {extra: [line.partition(";")[0].strip() for line in found[extra]] for extra in found}
