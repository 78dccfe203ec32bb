"""How a sweep ends: verdict.json, loss.png and index.html beside the cells, table and sentence on the screen.

`tpcheck verdict DIR` gives it at any time, from what is there: it says what is missing.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from tpcheck.sweep import report, verdict
from tpcheck.sweep.spec import Sweep
from tpcheck.sweep.stored_spec import read_sweep

__all__ = ["command", "conclude", "console"]


def command(output: Path) -> int:
    """Judge the sweep whose results are in `output`."""
    return conclude(read_sweep(output), console())


def console() -> Console:
    """Where a sweep reports to; a pipe has no width, lines of a table need one."""
    return Console(width=None if sys.stdout.isatty() else 120)


def conclude(sweep: Sweep, to: Console) -> int:
    """Write and print the verdict on what the cells have left; its exit code."""
    judged = verdict.judge(sweep)
    verdict.write(judged, sweep.output)
    to.print(judged.table())
    for line in judged.details():
        to.print(line, markup=False, soft_wrap=True)
    to.print(judged.sentence(), markup=False, soft_wrap=True)
    for made in report.write(sweep, judged):
        to.print(f"{made}", markup=False, soft_wrap=True)
    return judged.exit_code
