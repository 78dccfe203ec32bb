"""What a run prints: a progress bar on a terminal, one line per step elsewhere, everything else to log.txt."""

from __future__ import annotations

import contextlib
import faulthandler
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["Steps", "to_log"]


@contextlib.contextmanager
def to_log(log: Path, rank: int) -> Iterator[TextIO]:
    """Send all that this process prints to `log`, each line with its rank; yields the former stdout.

    Lines of C++ libraries, which write past Python, arrive without the rank.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    streams = sys.stdout, sys.stderr
    sys.stdout = sys.stderr = _Prefixed(f"[{rank}] ")
    faulthandler.enable(2)
    try:
        with os.fdopen(os.dup(saved[0]), "w", buffering=1) as display:
            yield display
    finally:
        sys.stdout.flush()
        faulthandler.disable()
        sys.stdout, sys.stderr = streams
        for number, original in enumerate(saved, 1):
            os.dup2(original, number)
            os.close(original)


class _Prefixed(io.TextIOBase):
    """Writes whole lines to file descriptor 1, each in one call so that ranks do not mix within a line."""

    def __init__(self, prefix: str) -> None:
        self.prefix, self.pending = prefix, ""

    def write(self, text: str) -> int:
        *lines, self.pending = (self.pending + text).split("\n")
        for line in lines:
            os.write(1, f"{self.prefix}{line}\n".encode(errors="replace"))
        return len(text)

    def flush(self) -> None:
        if self.pending:
            self.write("\n")

    def fileno(self) -> int:
        return 1


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
            print(line, file=self.display, flush=True)
        if self.display is not None:
            print(line)

    def __exit__(self, *reason: object) -> None:
        if self.bar:
            self.bar.stop()
