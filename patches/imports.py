"""Acting on a module when it is imported, for those that a script brings along and nobody can name a place of yet."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["when_imported"]

Action = Callable[[ModuleType], None]


def when_imported(name: str, action: Action) -> Callable[[], None]:
    """Call `action(module)` right after the module `name` has run, or now if it has; the answer calls that off.

    What `action` raises goes to whoever imports the module.
    """
    if name in sys.modules:
        action(sys.modules[name])
        return lambda: None
    waiting = _Waiting(name, action)
    sys.meta_path.insert(0, waiting)
    return waiting.call_off


class _Waiting(MetaPathFinder):
    """Finds nothing itself; makes the module that the other finders find act after it has run."""

    def __init__(self, name: str, action: Action) -> None:
        self.name, self.action, self.off = name, action, False

    def call_off(self) -> None:
        self.off = True
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        later = sys.meta_path[sys.meta_path.index(self) + 1 :]
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in later)), None)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            run = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                if not self.off:
                    self.call_off()
                    self.action(module)

            loader.exec_module = exec_module
        return spec
