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
    return _FINDER.wait(name, action)


class _Finder(MetaPathFinder):
    """Finds nothing itself; makes modules that the other finders find act after they have run."""

    def __init__(self) -> None:
        self.waiting: dict[str, list[Action]] = {}

    def wait(self, name: str, action: Action) -> Callable[[], None]:
        actions = self.waiting.setdefault(name, [])
        actions.append(action)
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)

        def call_off() -> None:
            if action in actions:
                actions.remove(action)
            if not any(self.waiting.values()) and self in sys.meta_path:
                sys.meta_path.remove(self)

        return call_off

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not self.waiting.get(fullname):
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            run = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                actions = self.waiting.get(fullname, [])
                while actions:
                    actions.pop(0)(module)

            loader.exec_module = exec_module
        return spec


_FINDER = _Finder()
