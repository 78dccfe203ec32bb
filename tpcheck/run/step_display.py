"""What a run shows of its steps: a progress bar on a terminal, one line per step elsewhere."""

from __future__ import annotations

import contextlib
import os
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["Steps"]


class Steps(contextlib.AbstractContextManager["Steps"]):
    """Shows the steps of a run on `display`; a rank that shows nothing has `display=None`."""

    def __init__(self, display: TextIO | None, first: int, last: int) -> None:
        self.display, self.last = display, last
        self.bar: Progress | None = None
        if display is not None and display.isatty():
            columns = [
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(),
            ]
            self.bar = Progress(*columns, console=Console(file=display))
            self.task = self.bar.add_task("steps", total=last, completed=first, numbers="")
            self.bar.start()

    def show(self, record: dict[str, Any]) -> None:
        numbers = (
            f"loss {record['loss']:.6f}  grad norm {record['grad_norm']:.4f}  "
            f"{record['tokens'] / record['seconds']:,.0f} tokens/s"
        )
        if self.bar:
            self.bar.update(self.task, completed=record["step"], numbers=numbers)
        else:
            self.say(f"step {record['step']}/{self.last}  {numbers}")

    def say(self, line: str) -> None:
        if self.bar:
            self.bar.console.print(line, markup=False, highlight=False)
        elif self.display is not None:
            try:
                print(line, file=self.display, flush=True)
            except BrokenPipeError:  # the reader has gone; the run goes on, and the log has it all
                self.display = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
        if self.display is not None:
            print(line)

    def __exit__(self, *reason: object) -> None:
        if self.bar:
            self.bar.stop()
