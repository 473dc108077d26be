"""What happens around the first import of tinygrad, without importing it now."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from tinygpt.machine.environment import importing, to_stderr

Change = Callable[[ModuleType], None]

PACKAGE = "tinygrad"


def after_import(name: str, change: Change) -> None:
    """Call ``change(module)`` once a module of tinygrad is imported: now, if it is already.

    The same change of the same module is made once, however often it is asked for.
    """
    if (module := sys.modules.get(name)) is not None:
        change(module)
    elif change not in (changes := _hook().changes.setdefault(name, [])):
        changes.append(change)


class _Hook(MetaPathFinder):
    """Finds nothing itself: it wraps the loaders that the other finders give for tinygrad."""

    def __init__(self) -> None:
        self.changes: dict[str, list[Change]] = {}

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.partition(".")[0] != PACKAGE:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            self._wrap(spec.loader, spec)
        return spec

    def _wrap(self, loader: object, spec: ModuleSpec) -> None:
        execute = loader.exec_module  # type: ignore[attr-defined]

        def exec_module(module: ModuleType) -> None:
            module.__dict__["print"] = to_stderr
            with importing(spec) if spec.name == PACKAGE else nullcontext():
                execute(module)
            for change in self.changes.get(spec.name, ()):
                change(module)

        loader.exec_module = exec_module  # type: ignore[attr-defined]


@cache
def _hook() -> _Hook:
    """The one hook of the process, which is put in its place when it is first asked for."""
    sys.meta_path.insert(0, hook := _Hook())
    return hook
