"""`tpcheck status DIR`: every cell of a sweep, from the files in DIR and from what Slurm says, at any time.

    digests.json is there        complete, whatever Slurm says
    Slurm knows the job          its state in our words: pending, running, requeued, timed-out, …
    Slurm has forgotten it       cancelled by `tpcheck cancel`, else failed when it had started, missing when not
    never submitted              missing

A Slurm that does not answer leaves the states unknown, and the table says so.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from slurm import submissions
from slurm.queue import JobState, job_states
from slurm.submissions import Submission
from tpcheck.errors import TpcheckError
from tpcheck.files.json_files import readable_lines
from tpcheck.files.lock import is_locked
from tpcheck.files.names import CANCELLED, EXIT_REASONS, LOCK, LOG
from tpcheck.files.records import EndRecord
from tpcheck.sweep import conclude
from tpcheck.sweep.completeness import digests_of
from tpcheck.sweep.live_table import progress
from tpcheck.sweep.spec import Cell, Sweep
from tpcheck.sweep.stored_spec import read_sweep

__all__ = ["Row", "command", "follow", "look"]

CellState = Literal[
    "pending", "running", "requeued", "preempted", "timed-out", "node-failed", "failed", "cancelled",
    "complete", "missing", "unknown",
]  # fmt: skip
# By what Slurm says; a job in any other state is running, or about to.
CELL_STATES: dict[str, CellState] = {
    "PENDING": "pending",
    "PREEMPTED": "preempted",
    "TIMEOUT": "timed-out",
    "DEADLINE": "timed-out",
    "NODE_FAIL": "node-failed",
    "BOOT_FAIL": "node-failed",
    "CANCELLED": "cancelled",
    "REVOKED": "cancelled",
    "FAILED": "failed",
    "OUT_OF_MEMORY": "failed",
    "COMPLETED": "failed",  # or there were digests
}
ACTIVE: set[CellState] = {"pending", "running", "requeued", "unknown"}
STYLE: dict[CellState, str] = {"complete": "green", "running": "yellow", "failed": "bold red", "unknown": "magenta"}
HEADINGS = ("cell", "job", "state", "nodes", "step", "tokens/s", "retries", "log")
REFRESH_SECONDS = 5.0
REASON = 300  # letters of it


@dataclass(frozen=True)
class Row:
    """One cell, as it is now. `why` is Slurm's reason for waiting, or what a failed cell said last."""

    cell: str
    job: str
    state: CellState
    nodes: str
    step: str
    speed: str
    retries: int
    log: Path | None
    why: str

    @property
    def active(self) -> bool:
        """Whether the cell may still change by itself."""
        return self.state in ACTIVE


def command(output: Path, watch: bool = False) -> int:
    """Show the table once, or until nothing in it can change."""
    sweep, console = read_sweep(output), conclude.console()
    if watch:
        follow(sweep, console)
    else:
        rows, unknown = look(sweep)
        console.print(_table(rows, output))
        _explain(rows, unknown, console)
    return 0


def follow(sweep: Sweep, console: Console) -> list[Row]:
    """Show the cells until none is pending or running: a live table, or in a pipe a line per change; the last rows."""
    live = Live(console=console, auto_refresh=False) if console.is_terminal else None
    shown: dict[str, tuple[str, ...]] = {}
    with live or contextlib.nullcontext():
        while True:
            rows, unknown = look(sweep)
            if live:
                live.update(_table(rows, sweep.output), refresh=True)
            else:
                _print_changes(rows, shown, console)
            if not any(row.active for row in rows):
                break
            if unknown:
                console.print(unknown, markup=False, soft_wrap=True)
            time.sleep(REFRESH_SECONDS)
    _explain(rows, "", console)
    return rows


def look(sweep: Sweep) -> tuple[list[Row], str]:
    """A row for every cell; when Slurm can't be asked, also why."""
    latest = submissions.latest(submissions.read(sweep.output))
    unfinished = [cell.name for cell in sweep.cells if not digests_of(cell)]
    asked = {latest[name].job_name: latest[name] for name in unfinished if name in latest}
    known: Mapping[tuple[str, int], JobState] | None = None
    unknown = ""
    try:
        known = job_states(list(asked.values()), patience=0)
    except TpcheckError as error:
        unknown = str(error)
    return [_row(cell, latest.get(cell.name), known) for cell in sweep.cells], unknown


def _row(cell: Cell, submission: Submission | None, known: Mapping[tuple[str, int], JobState] | None) -> Row:
    job, tried, job_state = "", [], None
    if submission:
        tried = [each for each in submissions.attempts(cell.path) if each.job_name == submission.job_name]
        job_state = known.get((submission.job_name, submission.cells.index(cell.name))) if known is not None else None
        job = submission.element(cell.name) or (job_state.job if job_state else "")
    state = _state(cell, submission, job_state, bool(tried), asked=known is not None)
    step, _, speed = progress(cell)
    nodes = (job_state.nodes if job_state else "") or (tried[-1].nodes if tried else "")
    log = _log(cell, submission, job, bool(tried))
    why = _why(state, job, job_state, _said(cell, log))
    return Row(cell.name, job, state, nodes, step, speed, tried[-1].restart if tried else 0, log, why)


def _state(
    cell: Cell, submission: Submission | None, job_state: JobState | None, started: bool, asked: bool
) -> CellState:
    if digests_of(cell):
        return "complete"
    if submission is None:
        return "running" if is_locked(cell.path / LOCK) or is_locked(cell.path / LOG) else "missing"
    if not asked:
        return "unknown"
    if job_state is None:
        cancelled = (cell.path / CANCELLED).exists()
        return "cancelled" if cancelled else "failed" if started else "missing"
    state = CELL_STATES.get(job_state.name, "running")
    return "requeued" if state == "pending" and started else state


def _log(cell: Cell, submission: Submission | None, job: str, started: bool) -> Path | None:
    """The run's log; what the job itself has printed, where that did not come to the run."""
    log = cell.path / LOG if (cell.path / LOG).exists() else None
    if submission and not (log and started):
        return next(iter(_job_logs(submission, job)), log)
    return log


def _job_logs(submission: Submission, job: str) -> list[Path]:
    return sorted(submission.folder.glob(f"{job}_*log.*"), key=lambda log: log.stat().st_mtime, reverse=True)


def _why(state: CellState, job: str, job_state: JobState | None, said: str) -> str:
    if state in ("pending", "requeued"):
        return job_state.reason if job_state else ""
    if state == "missing" and job:
        return f"Slurm knows nothing of job {job}, which never started: cancelled while it was pending, or long ago"
    if state != "failed":
        return ""
    ended = job_state.name.lower() if job_state else "Slurm has forgotten the job"
    return ", ".join(part for part in (ended, said) if part)


def _said(cell: Cell, log: Path | None) -> str:
    """Why a run failed: what the rank that failed first has left, or else the last line of the log."""
    ends = readable_lines(cell.path / EXIT_REASONS, EndRecord)
    failed = [end["why"] for end in ends if end["kind"] == "failed" and "why" in end]
    if failed:
        return str(failed[0])[:REASON]
    lines = log.read_text(errors="replace").splitlines() if log and log.exists() else []
    return ([line.strip() for line in lines if line.strip()] or [""])[-1][:REASON]


def _cells(row: Row, output: Path) -> tuple[str, ...]:
    state = f"{row.state}: {row.why}" if row.why and row.state in ("pending", "requeued") else row.state
    log = str(row.log.absolute()).removeprefix(f"{output.absolute()}/") if row.log else ""
    return row.cell, row.job, state, row.nodes, row.step, row.speed, str(row.retries), log


def _table(rows: Sequence[Row], output: Path) -> Table:
    table = Table(title=escape(str(output)), title_justify="left")
    for heading in HEADINGS:
        right = heading in ("step", "tokens/s", "retries")
        table.add_column(heading, justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, _cells(row, output)), style=STYLE.get(row.state, ""))
    return table


def _print_changes(rows: Sequence[Row], shown: dict[str, tuple[str, ...]], console: Console) -> None:
    for row in rows:
        line = (row.cell, row.job, row.state, row.nodes)
        if shown.get(row.cell) != line:
            shown[row.cell] = line
            step = f"step {row.step}" if row.step else ""
            console.print(
                f"{row.cell:<24} {row.state:<11} {row.job} {row.nodes} {step}".rstrip(), markup=False, soft_wrap=True
            )


def _explain(rows: Sequence[Row], unknown: str, console: Console) -> None:
    """Below the table: what went wrong, and where to read about it."""
    for row in rows:
        if row.why and row.state not in ("pending", "requeued"):
            where = f"; see {row.log}" if row.log else ""
            console.print(f"{row.cell} {row.state}: {row.why}{where}", markup=False, highlight=False, soft_wrap=True)
    if unknown:
        console.print(unknown, markup=False, soft_wrap=True)
