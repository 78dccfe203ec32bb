"""All that a process prints, sent to the run's log.txt."""

from __future__ import annotations

import contextlib
import faulthandler
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

__all__ = ["to_log"]


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
    display = os.fdopen(os.dup(saved[0]), "w", buffering=1)
    try:
        yield display
    finally:
        with contextlib.suppress(BrokenPipeError):  # its reader has gone
            display.close()
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
