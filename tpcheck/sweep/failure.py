"""Why a cell that ran on this machine failed, for its user."""

from __future__ import annotations

import signal

from tpcheck.files.names import LOG
from tpcheck.sweep.jobs import Job
from tpcheck.sweep.spec import Cell

__all__ = ["explain"]

TAIL = 15  # lines of a failed cell's log
REFUSED = 2  # the exit code of `tpcheck train` for bad input


def explain(job: Job, cell: Cell) -> str:
    """Why a cell failed: the line that says it, and the end of its log unless bad input was refused."""
    log = cell.path / LOG
    output = [line for line in job.output().splitlines() if not line.startswith("submitit ")]
    said = [line.removeprefix("tpcheck: ").removeprefix("error: ") for line in output if line.startswith("tpcheck: ")]
    why = f"cell {cell.name} failed: {said[-1] if said else _ending(job.exit_code)}"
    if said and job.exit_code == REFUSED:
        return why
    lines = log.read_text(errors="replace").splitlines() if log.exists() else output
    where = log if log.exists() else job.submitted.paths.stdout
    return "\n".join([why, f"  the end of {where}:", *(f"  | {line}" for line in lines[-TAIL:])])


def _ending(code: int | None) -> str:
    if code is None:
        return "it was killed"
    if code < 0:
        return f"it was killed by {signal.Signals(-code).name}"
    return f"exit code {code}" if code else "it left before its last step"
