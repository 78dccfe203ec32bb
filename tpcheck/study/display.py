"""How far a study is: a progress bar on a terminal, one line per part elsewhere."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from tpcheck.study.study import Progress

__all__ = ["Display"]


class Display(contextlib.AbstractContextManager["Display"]):
    """Shows `parts` parts, one after the other, on standard error."""

    def __init__(self, parts: int) -> None:
        self.parts, self.begun = parts, 0
        columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[what]}"), TimeElapsedColumn()
        self.bar = Bar(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty())
        self.bar.start()

    @contextlib.contextmanager
    def part(self, name: str, on_record: bool) -> Iterator[Progress]:
        """Show one part while this lasts; yields where it says how far it is."""
        self.begun += 1
        title = f"[{self.begun}/{self.parts}] {name}"
        if self.bar.disable:
            print(f"{title}{': on record' if on_record else ''}", file=sys.stderr, flush=True)
        task = self.bar.add_task(title, total=1.0, what="on record" if on_record else "")

        def progress(done: float, what: str = "") -> None:
            self.bar.update(task, completed=done, what=what)

        yield progress
        self.bar.update(task, completed=1.0, what="on record" if on_record else "")

    def __exit__(self, *reason: object) -> None:
        self.bar.stop()
