"""The layout's one rule: a module imports only modules that stand earlier in ORDER."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ORDER = [
    *("errors", "untrusted", "files", "config"),
    *("text", "machine", "kernels", "model", "training", "generation", "runs", "pages", "interop"),
    *("api", "server", "cli"),
    *("__init__", "__main__"),
]
"""The ground, the rooms in the order in which the data flows, the face, and what people meet."""

WITHOUT_TINYGRAD = [
    *("errors", "untrusted", "files", "config", "text", "runs.checkpoint", "runs.display"),
    *("runs.lock", "runs.interrupts", "runs.plots", "training.metrics", "cli"),
    *("machine.device", "machine.resources", "machine.doctor", "machine.children"),
]
"""Modules that answer before tinygrad is loaded: `tinygpt --help` must not wait for it."""

PACKAGE = Path(__file__).parents[1] / "src" / "tinygpt"
FILES = sorted(PACKAGE.rglob("*.py"))


def first_level(path: Path) -> str:
    """The module a file belongs to: kernels/attention.py is part of kernels."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """(line, full name) of every import below tree; package is where relative ones start from."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = parts[: len(parts) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{origin}.{alias.name}"


def ours(name: str) -> str | None:
    """The module of tinygpt that an import needs: None for other packages.

    A name that is no module, as in ``from tinygpt import GPT``, comes from __init__.
    """
    root, *rest = name.split(".")
    if root != "tinygpt":
        return None
    is_module = rest and (rest[0] in ORDER or (PACKAGE / f"{rest[0]}.py").exists())
    return rest[0] if is_module else "__init__"


def violations(path: Path, source: str) -> list[str]:
    """What is wrong with the imports of a file, in sentences."""
    here = first_level(path)
    advice = "Give it its place in ORDER in tests/test_layers.py and in the architecture's list."
    if here not in ORDER:
        return [f"{path.name}: the module {here!r} is not in the import order. {advice}"]
    package = ".".join(["tinygpt", *path.relative_to(PACKAGE).parts[:-1]])
    found = []
    for line, name in imported(ast.parse(source), package):
        needed = ours(name)
        if needed is None or needed == here:
            continue
        if needed not in ORDER:
            found.append(f"{path.name}:{line}: {needed!r} is not in the import order. {advice}")
        elif ORDER.index(needed) > ORDER.index(here):
            found.append(
                f"{path.name}:{line}: {here} imports {needed}, which stands after it. "
                f"Move what is needed upstream, or move the function that needs it downstream."
            )
    return found


def at_module_level(tree: ast.Module) -> ast.Module:
    """The tree without the bodies of its functions and of ``if TYPE_CHECKING``."""

    class Outer(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        visit_AsyncFunctionDef = visit_Lambda = visit_FunctionDef  # noqa: N815

        def visit_If(self, node: ast.If) -> ast.AST | None:
            typing_only = ast.unparse(node.test).endswith("TYPE_CHECKING")
            return None if typing_only else self.generic_visit(node)

    return Outer().visit(tree)  # type: ignore[no-any-return]


def needs_tinygrad(source: str) -> bool:
    names = imported(at_module_level(ast.parse(source)), "tinygpt")
    return any(name.split(".")[0] == "tinygrad" for _, name in names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_modules_import_only_upstream(path: Path) -> None:
    assert not violations(path, path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "source",
    [
        "import tinygpt.cli",
        "import tinygpt",
        "from tinygpt import cli",
        "from tinygpt import GPT",
        "from tinygpt.cli import main",
        "from . import cli",
        "from .cli import main",
        "from .. import cli",
        "def late():\n    from tinygpt.training.loop import train_steps",
        "class A:\n    def f(self):\n        import numpy, tinygpt.api as api",
    ],
)
def test_an_import_from_downstream_is_found(source: str) -> None:
    folder = "kernels" if source.startswith("from ..") else "."
    assert len(violations(PACKAGE / folder / "config.py", source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "import os, numpy as np\nfrom __future__ import annotations",
        "from tinygpt import errors, config",
        "from tinygpt.errors import DataError",
        "from ..errors import DataError",
        "from tinygpt.config import __version__",
        "import tinygptzero, cli",
    ],
)
def test_imports_from_upstream_and_of_other_packages_are_fine(source: str) -> None:
    assert not violations(PACKAGE / "text" / "corpus.py", source)


def test_files_of_one_package_may_import_each_other() -> None:
    path = PACKAGE / "kernels" / "linear.py"
    assert not violations(path, "from . import phases\nfrom tinygpt.kernels import dispatch")
    assert violations(path, "from ..model.transformer import Transformer")


def test_a_module_without_a_place_is_refused_with_advice() -> None:
    [message] = violations(PACKAGE / "helpers.py", "import os")
    assert "'helpers'" in message and "ORDER" in message


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def without_types(tree: ast.AST) -> ast.AST:
    """The tree without what stands below ``if TYPE_CHECKING``, which is never run."""

    class Run(ast.NodeTransformer):
        def visit_If(self, node: ast.If) -> ast.AST | None:
            typing_only = ast.unparse(node.test).endswith("TYPE_CHECKING")
            return None if typing_only else self.generic_visit(node)

    return Run().visit(tree)  # type: ignore[no-any-return]


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules each of which imports the next, and the last the first; empty if there are none."""
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_modules_import_each_other_in_a_circle() -> None:
    modules = {module_of(path): path for path in FILES}
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        package = ".".join(["tinygpt", *path.relative_to(PACKAGE).parts[:-1]])
        tree = without_types(ast.parse(path.read_text(encoding="utf-8")))
        names = (name for _, name in imported(tree, package))
        needed = {name if name in modules else name.rpartition(".")[0] for name in names}
        graph[module] = (needed & set(modules)) - {module}
    assert circle(graph) == []
    assert len(circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})) == 4


def test_no_two_modules_have_one_name() -> None:
    names = Counter(path.stem for path in FILES if not path.stem.startswith("__"))
    assert [name for name, count in names.items() if count > 1] == []
    libraries = sys.stdlib_module_names | {"tinygrad", "numpy", "requests", "tiktoken", "rich"}
    assert {"inspect", "requests"} <= libraries and not set(names) & libraries


def test_the_top_of_the_package_shows_twenty_entries_at_most() -> None:
    assert len([path for path in PACKAGE.iterdir() if path.name != "__pycache__"]) <= 20


def test_every_early_module_leaves_tinygrad_alone() -> None:
    for path in FILES:
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if {".".join(parts[:n]) for n in (1, 2)} & set(WITHOUT_TINYGRAD):
            assert not needs_tinygrad(path.read_text(encoding="utf-8")), path


def test_a_tinygrad_import_at_module_level_is_found() -> None:
    assert needs_tinygrad("from tinygrad import Tensor")
    assert needs_tinygrad("try:\n    import tinygrad.helpers\nfinally:\n    pass")
    assert not needs_tinygrad("def f():\n    import tinygrad")
    assert not needs_tinygrad("if TYPE_CHECKING:\n    from tinygrad import Tensor")


def test_early_modules_do_not_load_tinygrad_by_way_of_others() -> None:
    names = ", ".join(f"tinygpt.{name}" for name in WITHOUT_TINYGRAD)
    code = f"import sys, {names}\nsys.exit('tinygrad' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
