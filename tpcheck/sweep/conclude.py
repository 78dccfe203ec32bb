"""How a sweep ends: verdict.json, loss.png and index.html beside the cells, table and sentence on the screen.

`tpcheck verdict DIR` gives it at any time, from what is there: it says what is missing.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from rich.console import Console

from tpcheck.errors import TpcheckError
from tpcheck.sweep import report, verdict
from tpcheck.sweep.spec import Sweep
from tpcheck.sweep.stored_spec import read_sweep

__all__ = ["command", "conclude", "console"]


def command(output: Path, verify: bool = False) -> int:
    """Judge the sweep whose results are in `output`; to verify, by digests computed anew from its checkpoints."""
    to = console()
    code = conclude(read_sweep(output), to, verify)
    if to.reader_is_gone:
        raise BrokenPipeError
    return code


class ReportConsole(Console):
    """A console whose reader may go away, as `head` does: what is under way goes on without one."""

    reader_is_gone = False

    def on_broken_pipe(self) -> None:
        """rich would end the process with exit code 1, which says that a promise is broken."""
        self.quiet = self.reader_is_gone = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def console() -> ReportConsole:
    """Where a sweep reports to; a pipe has no width, lines of a table need one."""
    return ReportConsole(width=None if sys.stdout.isatty() else 120)


def conclude(sweep: Sweep, to: Console, verify: bool = False) -> int:
    """Print and write the verdict on what the cells have left; its exit code."""
    judged = verdict.judge(sweep, verify=verify)
    to.print(judged.table())
    for line in judged.details():
        to.print(line, markup=False, soft_wrap=True)
    to.print(judged.sentence(), markup=False, soft_wrap=True)
    to.print(judged.evidence(), markup=False, soft_wrap=True)
    try:
        made = [verdict.write(judged, sweep.output), *report.write(sweep, judged)]
    except OSError as error:  # a directory of somebody else's, a full disk: the verdict stands
        print(f"not written: {error.filename or sweep.output}: {error.strerror}", file=sys.stderr)
        return judged.exit_code
    except TpcheckError as error:  # a record of steps that is damaged: there is no picture of it
        print(f"not drawn: {error}", file=sys.stderr)
        return judged.exit_code
    for file in made[1:]:
        to.print(f"{file}", markup=False, soft_wrap=True)
    return judged.exit_code
