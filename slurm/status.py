"""`tpcheck status DIR`: every cell of a sweep, from the files in DIR and from what Slurm says, at any time.

    digests.json is there        complete, whatever Slurm says; of another run, too, which is told
    Slurm knows the job          its state in our words: pending, running, requeued, timed-out, …
    Slurm has forgotten it       cancelled by `tpcheck cancel`, else failed when it had started, missing when not
    never submitted              missing
    no longer in the sweep       left out, unless its job is pending or running

A Slurm that does not answer leaves the states unknown, and the table says so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.live import Live

from slurm import submissions
from slurm.last_words import last_words
from slurm.queue import JobState, job_states
from slurm.status_table import WAITING, CellState, Row, explain, print_changes, table
from slurm.submissions import Submission
from tpcheck.config.load import load_run
from tpcheck.config.schema import RunConfig
from tpcheck.errors import TpcheckError
from tpcheck.files.json_files import readable_lines
from tpcheck.files.lock import is_locked
from tpcheck.files.names import CANCELLED, EXIT_REASONS, LOCK, LOG, RUN
from tpcheck.files.records import EndRecord
from tpcheck.files.result_dir import read_manifest
from tpcheck.sweep import conclude
from tpcheck.sweep.completeness import digests_of, other_settings
from tpcheck.sweep.live_table import progress
from tpcheck.sweep.spec import Cell, Sweep
from tpcheck.sweep.stored_spec import read_sweep

__all__ = ["Row", "command", "follow", "look"]

# States of jobs that somebody has to release; their reasons do not always say so.
HELD = ("SPECIAL_EXIT", "REQUEUE_HOLD", "RESV_DEL_HOLD")
# By what Slurm says; a job in any other state is running, or about to.
CELL_STATES: dict[str, CellState] = {
    **dict.fromkeys(HELD, "pending"),
    "PENDING": "pending",
    "SUSPENDED": "suspended",
    "STOPPED": "suspended",
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
REFRESH_SECONDS = 5.0
REASON = 300  # letters of it


def command(output: Path, watch: bool = False) -> int:
    """Show the table once, or until nothing in it can change."""
    sweep, console = read_sweep(output), conclude.console()
    if watch:
        follow(sweep, console)
    else:
        rows, unknown = look(sweep)
        console.print(table(rows, output, console.width))
        _explain(rows, output, unknown, console)
    return 0


def follow(sweep: Sweep, console: Console) -> list[Row]:
    """Show the cells until none is pending or running: a live table, or in a pipe a line per change; the last rows."""
    live = Live(console=console, auto_refresh=False) if console.is_terminal else None
    shown: dict[str, tuple[str, ...]] = {}
    with live or contextlib.nullcontext():
        while True:
            rows, unknown = look(sweep)
            if live:
                live.update(table(rows, sweep.output, console.width), refresh=True)
            else:
                print_changes(rows, shown, console)
            if not any(row.active and not row.dropped for row in rows):
                break
            if unknown:
                console.print(unknown, markup=False, soft_wrap=True)
            time.sleep(REFRESH_SECONDS)
    _explain(rows, sweep.output, "", console)
    return rows


def _explain(rows: Sequence[Row], output: Path, unknown: str, console: Console) -> None:
    explain(rows, output, console)
    if unknown:
        console.print(unknown, markup=False, soft_wrap=True)


def look(sweep: Sweep) -> tuple[list[Row], str]:
    """A row for every cell, and for those whose job goes on though the sweep has them no more.

    When Slurm can't be asked, also why.
    """
    latest = submissions.latest(submissions.read(sweep.output))
    cells = {cell.name: cell for cell in sweep.cells}
    unfinished = [name for name in [*cells, *latest] if name not in cells or not digests_of(cells[name])]
    asked = {latest[name].job_name: latest[name] for name in unfinished if name in latest}
    known: Mapping[tuple[str, int], JobState] | None = None
    unknown = ""
    try:
        known = job_states(list(asked.values()), patience=0)
    except TpcheckError as error:
        unknown = str(error)
    rows = [_row(cell, latest.get(cell.name), known) for cell in sweep.cells]
    for name, submission in latest.items():
        job_state = (known or {}).get((submission.job_name, submission.cells.index(name)))
        if name not in cells and job_state and job_state.active:
            row = _row(_as_submitted(sweep.output, name), submission, known)
            rows.append(dataclasses.replace(row, dropped=True))
    return rows, unknown


def _as_submitted(output: Path, name: str) -> Cell:
    """A cell that the sweep no longer has."""
    try:
        config = load_run(output / name / RUN)
    except TpcheckError:  # all that it is for is the step that the cell has come to
        config = RunConfig()
    return Cell(name, {}, {}, config.model_copy(update={"output": str(output / name)}))


def _row(cell: Cell, submission: Submission | None, known: Mapping[tuple[str, int], JobState] | None) -> Row:
    job, tried, job_state = "", [], None
    if submission:
        tried = [each for each in submissions.attempts(cell.path) if each.job_name == submission.job_name]
        job_state = known.get((submission.job_name, submission.cells.index(cell.name))) if known is not None else None
        job = submission.element(cell.name) or (job_state.job if job_state else "")
    state = _state(cell, submission, job_state, bool(tried), asked=known is not None)
    step, _, speed = progress(cell)
    nodes = (job_state.nodes if job_state else "") or (tried[-1].nodes if tried else "")
    logs = _logs(cell, submission, job, bool(tried))
    why, log = _why(state, job, job_state), next(iter(logs), None)
    if state == "failed":
        said, log = _said(cell, logs)
        why = _failure(job_state, said, submission)
    elif state == "complete":
        why = _other_run(cell)
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
    cancelled = (cell.path / CANCELLED).exists()
    if job_state is None:
        return "cancelled" if cancelled else "failed" if started else "missing"
    if job_state.name == "COMPLETED" and cancelled:  # the script found the mark when it started
        return "cancelled"
    state = CELL_STATES.get(job_state.name, "running")
    return "requeued" if state == "pending" and started else state


def _logs(cell: Cell, submission: Submission | None, job: str, started: bool) -> list[Path]:
    """The run's log, then what the job itself has printed; the other way round where that did not come to the run."""
    run = [cell.path / LOG] if (cell.path / LOG).exists() else []
    printed = submission.folder.glob(f"{job}_*log.*") if submission else ()
    jobs = sorted(printed, key=lambda log: log.stat().st_mtime, reverse=True)
    return [*run, *jobs] if started else [*jobs, *run]


def _why(state: CellState, job: str, job_state: JobState | None) -> str:
    """Slurm's reason for waiting, or what is known of a job that Slurm does not know."""
    if job_state and state in WAITING:
        word = job_state.name.lower().replace("_", " ") if job_state.name in HELD else ""
        return ", ".join(part for part in (word, job_state.reason) if part)
    if state == "missing" and job:
        return f"Slurm knows nothing of job {job}, which never started: cancelled while it was pending, or long ago"
    return ""


def _other_run(cell: Cell) -> str:
    """Why no verdict would count a complete cell, as one that was copied here from elsewhere."""
    try:
        changes = other_settings(cell, read_manifest(cell.path)["config"])
    except TpcheckError as error:
        return str(error)
    return f"was made with other settings ({changes}), no verdict counts it" if changes else ""


def _failure(job_state: JobState | None, said: str, submission: Submission | None) -> str:
    """What is known of a failed cell: how Slurm calls its end, unless that is no news, and what it said itself."""
    ended = job_state.name.lower().replace("_", " ") if job_state else "Slurm has forgotten the job"
    if said and ended == "failed":
        return said
    if said:
        return f"{ended}, {said}"
    where = f" to {submission.folder}" if submission else ""
    reason = f" ({job_state.reason})" if job_state and job_state.reason else ""
    return f"{ended}{reason}, and it has written nothing{where}: can its nodes write there?"


def _said(cell: Cell, logs: Sequence[Path]) -> tuple[str, Path | None]:
    """Why a run failed, and where to read on: what the rank that failed first has left, or else a line of the logs."""
    ends = readable_lines(cell.path / EXIT_REASONS, EndRecord)
    failed = [end["why"] for end in ends if end["kind"] == "failed" and "why" in end]
    if failed:
        return str(failed[0])[:REASON], next(iter(logs), None)
    for log in sorted(logs, key=lambda log: log.parent == cell.path):  # the job's own first: it tells of killed ranks
        if words := last_words(log):
            return words[:REASON], log
    return "", next(iter(logs), None)
