"""`tpcheck sweep FILE --cluster NAME`: the cells that need a run, handed to Slurm as arrays.

    sweep file ─ cells ─┬─ complete: kept
                        ├─ pending or running: left alone
                        └─ others: one array per shape ── ledger ── sbatch ── ledger

Everything that can be refused here is, before anything is handed in: an unknown machine, too many nodes, too little
memory. Before and after every sbatch the ledger is written, so an interrupted call can simply be made again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import io
import os
import secrets
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import submitit
from rich.console import Console
from submitit.core.utils import FailedJobError, FailedSubmissionError

from slurm import preflight, submissions
from slurm.allocation import by_shape
from slurm.plan import prepare
from slurm.profile import Profile, load_profile
from slurm.queue import states
from slurm.script import Script
from slurm.snapshot import Snapshot
from slurm.status import follow
from slurm.submissions import Submission
from tpcheck.config import load_run
from tpcheck.errors import TpcheckError
from tpcheck.files.lock import is_locked
from tpcheck.files.names import LOG, RUN, SLURM_JOBS
from tpcheck.sweep import conclude
from tpcheck.sweep.completeness import is_complete, only_one, other_settings
from tpcheck.sweep.spec import Cell, Sweep, load_sweep
from tpcheck.sweep.stored_spec import write_sweep

__all__ = ["command"]

# What these say in the environment goes before the script, and would spoil it; so does what names one of its options.
SBATCH_VARIABLES = "JOB_NAME ARRAY_INX OPEN_MODE REQUEUE NO_REQUEUE SIGNAL TIMELIMIT EXPORT WAIT CLUSTERS".split()
# A job inherits these from a job that submits it, where it has none of its own.
SLURM_VARIABLES = ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT")


def command(path: Path, overrides: Sequence[str], cluster: str, dry_run: bool = False, wait: bool = False) -> int:
    """Submit what is neither complete nor pending nor running of the sweep at `path` to `cluster`."""
    sweep, profile, console = load_sweep(path, overrides), load_profile(cluster), conclude.console()
    snapshot = Snapshot.now()
    for line in preflight.check(sweep.cells, profile):
        print(line, file=sys.stderr)
    if dry_run:
        todo = [cell for cell in sweep.cells if not is_complete(cell)]
        for script in _scripts(sweep, todo, profile, snapshot):
            print(script.text())
        return 0
    _need_slurm()
    with only_one(sweep.output):
        todo = _todo(sweep, console)
        scripts = _scripts(sweep, todo, profile, snapshot)
        write_sweep(sweep)
        snapshot.write(sweep.output)
        for script in scripts:
            submission = _submit(script, sweep, cluster)
            console.print(f"job {submission.job}: {', '.join(submission.cells)}", soft_wrap=True, highlight=False)
    if wait:
        follow(sweep, console)
        return conclude.conclude(sweep, console)
    console.print(f"look with: tpcheck status {sweep.output}", markup=False, soft_wrap=True, highlight=False)
    return 0


def _need_slurm() -> None:
    for program in ("sbatch", "srun"):
        if not shutil.which(program):
            raise TpcheckError(
                f"{program} is not installed here: call from a machine that submits to the cluster, "
                "or leave --cluster out to run the sweep on this one"
            )


def _todo(sweep: Sweep, console: Console) -> list[Cell]:
    """The cells that nobody has run to their end and no job will."""
    every = submissions.read(sweep.output)
    known = states(every, waiting=lambda why: console.print(f"{why}; asking again", markup=False))
    incomplete = [cell for cell in sweep.cells if not is_complete(cell)]  # after Slurm: what has ended left its digests
    active = set()
    for each in every:
        found = {cell: state for place, cell in enumerate(each.cells) if (state := known.get((each.job_name, place)))}
        active |= {cell for cell, state in found.items() if state.active}
        if found and each.job is None:  # a call that was interrupted between sbatch and the ledger
            submissions.record(sweep.output, dataclasses.replace(each, job=next(iter(found.values())).job))
    # Trained by something that no ledger knows: train.sbatch, a lost node.
    active |= {cell.name for cell in incomplete if is_locked(cell.path / LOG)}
    kept, left = len(sweep.cells) - len(incomplete), [cell for cell in incomplete if cell.name in active]
    for cell in left:
        _refuse_other_settings(cell)
    if kept or left:
        console.print(f"{kept} cells are complete, {len(left)} are pending or running", highlight=False)
    return [cell for cell in incomplete if cell not in left]


def _refuse_other_settings(cell: Cell) -> None:
    """Else the job would train what it was submitted with, and be taken for what the sweep says now."""
    run = cell.path / RUN
    if run.exists() and (changes := other_settings(cell, load_run(run).model_dump(mode="json"))):
        raise TpcheckError(
            f"cell {cell.name} is pending or running with other settings ({changes}): "
            f"call tpcheck cancel {cell.path.parent} {cell.name} first, or add output=DIR"
        )


def _scripts(sweep: Sweep, todo: Sequence[Cell], profile: Profile, snapshot: Snapshot) -> list[Script]:
    """An array for every shape; what a script cannot hold is refused before the first is handed in."""
    scripts = []
    for cells, shape in by_shape(todo, profile):
        name = f"{sweep.name}.{secrets.token_hex(4)}"
        logs = Path(profile.logs).expanduser() if profile.logs else sweep.output / SLURM_JOBS
        names, folder = tuple(cell.name for cell in cells), (logs / name).absolute()
        place = snapshot.place(sweep.output)
        scripts.append(Script(profile, shape, name, names, sweep.output.absolute(), place, folder, Path.cwd()))
        scripts[-1].text()
    return scripts


def _submit(script: Script, sweep: Sweep, cluster: str) -> Submission:
    for cell in sweep.cells:
        if cell.name in script.cells:
            prepare(cell)
    script.folder.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    submission = Submission(now, cluster, script.name, None, script.cells, script.folder)
    submissions.record(sweep.output, submission)
    with _uninterrupted(), _without_variables(script):
        job = _sbatch(script)
        submission = dataclasses.replace(submission, job=job)
        submissions.record(sweep.output, submission)
    return submission


class CellExecutor(submitit.SlurmExecutor):
    """submitit's, with our command in the script instead of one that unpickles a function."""

    def __init__(self, folder: Path, command: str) -> None:
        super().__init__(folder)
        self.command = command

    @property
    def _submitit_command_str(self) -> str:
        return self.command


def _nothing(cell: str) -> None:
    """submitit wants a function; the script never calls it."""


def _sbatch(script: Script) -> str:
    """Hand the script in; the number that Slurm gives it."""
    executor = CellExecutor(script.folder, script.command())
    executor.update_parameters(**script.parameters())
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit repeats what its error says
            first = executor.map_array(_nothing, script.cells)[0]
    except (FailedJobError, FailedSubmissionError) as error:
        raise TpcheckError(f"sbatch refuses {', '.join(script.cells)}: {error}") from error
    for pickle in script.folder.glob("*.pkl"):
        pickle.unlink()
    return str(first.job_id).partition("_")[0]


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits: what sbatch has handed in must come into the ledger."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _without_variables(script: Script) -> Iterator[None]:
    """Nothing in the environment decides what the script says: a cell named after an H100 must run on one."""
    options = [option.upper().replace("-", "_") for option in script.parameters()["additional_parameters"]]
    names = [*SLURM_VARIABLES, *(f"SBATCH_{name}" for name in (*SBATCH_VARIABLES, *options))]
    before = {name: os.environ.pop(name, None) for name in names}
    try:
        yield
    finally:
        os.environ.update({name: value for name, value in before.items() if value is not None})
