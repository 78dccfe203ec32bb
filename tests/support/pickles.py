"""Objects that do something when they are unpickled the ordinary way: each leaves a file behind."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any


class Touch:
    """Creates a file when it is unpickled the ordinary way."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


class Shell(Touch):
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


class Exec(Touch):
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"open({str(self.marker)!r}, 'w')",)


class SetState(Touch):
    """Gets hold of an attribute and sets the state of what it finds."""

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (argparse.Namespace, "__class__"), {"marker": self.marker}
