"""`tpcheck sweep FILE --cluster NAME`: the cells that need a run, submitted to Slurm as arrays.

    sweep file ─ cells ─┬─ complete: kept
                        ├─ pending or running: left alone
                        └─ others: an array per allocation ── record ── sbatch ── record

Everything that can be refused here is, before anything is submitted: an unknown machine, too many nodes, too little
memory. Every submission is recorded before and after its sbatch, so an interrupted call can simply be made again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import secrets
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console

from slurm import preflight, sbatch, submissions
from slurm.allocation import Allocation, allocation_of
from slurm.commands import max_array_size
from slurm.profile import Profile, load_profile
from slurm.queue import job_states
from slurm.script import Script
from slurm.snapshot import Snapshot
from slurm.status import follow
from slurm.submissions import Submission
from tpcheck.config.load import load_run
from tpcheck.errors import TpcheckError
from tpcheck.files import result_dir
from tpcheck.files.lock import is_locked
from tpcheck.files.names import LOG, MANIFEST, RUN, SLURM_JOBS
from tpcheck.sweep import conclude
from tpcheck.sweep.completeness import is_complete, only_one, other_settings
from tpcheck.sweep.spec import Cell, Sweep, load_sweep
from tpcheck.sweep.stored_spec import prepare_job, write_sweep

__all__ = ["command"]


def command(path: Path, overrides: Sequence[str], cluster: str, dry_run: bool = False, wait: bool = False) -> int:
    """Submit what is neither complete nor pending nor running of the sweep at `path` to `cluster`."""
    sweep, profile, console = load_sweep(path, overrides), load_profile(cluster), conclude.console()
    snapshot, largest = Snapshot.now(), max_array_size()
    allocations = {cell.name: allocation_of(cell, profile) for cell in sweep.cells}
    for line in preflight.check(sweep.cells, allocations, profile):
        print(line, file=sys.stderr)
    if dry_run:
        todo = [cell for cell in sweep.cells if not is_complete(cell)]
        for script in _scripts(sweep, todo, allocations, profile, snapshot, largest):
            print(script.text)
        return 0
    _need_slurm()
    with only_one(sweep.output):
        todo = _todo(sweep, console)
        scripts = _scripts(sweep, todo, allocations, profile, snapshot, largest)
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
    known = job_states(every, waiting=lambda why: console.print(f"{why}; asking again", markup=False))
    active = set()
    for each in every:
        found = {cell: state for place, cell in enumerate(each.cells) if (state := known.get((each.job_name, place)))}
        active |= {cell for cell, state in found.items() if state.active}
        if found and each.job is None:  # a call that was interrupted after sbatch
            submissions.record(sweep.output, dataclasses.replace(each, job=next(iter(found.values())).job))
    names = {cell.name for cell in sweep.cells}
    if dropped := sorted(active - names):
        console.print(
            f"pending or running, but no longer in the sweep: {', '.join(dropped)}; "
            f"tpcheck cancel {sweep.output} ends {'it' if len(dropped) == 1 else 'them'}, by name",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip
    # Trained by something that was not submitted from here: train.sbatch, a lost node.
    active |= {cell.name for cell in sweep.cells if is_locked(cell.path / LOG)}
    for cell in sweep.cells:
        if cell.name in active:
            _refuse_other_settings(cell)
    incomplete = [cell for cell in sweep.cells if not is_complete(cell)]  # after Slurm: what has ended left its digests
    kept, left = len(sweep.cells) - len(incomplete), [cell for cell in incomplete if cell.name in active]
    if kept or left:
        console.print(f"{kept} cells are complete, {len(left)} are pending or running", highlight=False)
    return [cell for cell in incomplete if cell not in left]


def _refuse_other_settings(cell: Cell) -> None:
    """Else the job would train what it was submitted with, and be taken for what the sweep says now."""
    run = cell.path / RUN
    there = load_run(run).model_dump(mode="json") if run.exists() else {}
    if not there and (cell.path / MANIFEST).exists():  # not submitted from here
        there = result_dir.read_manifest(cell.path)["config"]
    if there and (changes := other_settings(cell, there)):
        raise TpcheckError(
            f"cell {cell.name} is pending or running with other settings ({changes}): "
            f"call tpcheck cancel {cell.path.parent} {cell.name} first, or add output=DIR"
        )


def _scripts(
    sweep: Sweep,
    todo: Sequence[Cell],
    allocations: Mapping[str, Allocation],
    profile: Profile,
    snapshot: Snapshot,
    largest: int | None,
) -> list[Script]:
    """An array for every allocation, several where one would be larger than the `largest` that Slurm takes.

    What a script cannot hold is refused before the first is submitted.
    """
    alike: dict[Allocation, list[str]] = {}
    for cell in todo:
        alike.setdefault(allocations[cell.name], []).append(cell.name)
    arrays = [
        (allocation, cells[start : start + (largest or len(cells))])
        for allocation, cells in alike.items()
        for start in range(0, len(cells), largest or len(cells))
    ]
    logs = Path(profile.logs) if profile.logs else sweep.output / SLURM_JOBS
    output, code = sweep.output.absolute(), snapshot.place(sweep.output)
    scripts = []
    for allocation, cells in arrays:
        name = f"{sweep.name}.{secrets.token_hex(4)}"
        folder = (logs / name).absolute()
        scripts.append(Script(profile, allocation, name, tuple(cells), output, code, folder, Path.cwd()))
        _ = scripts[-1].text  # laid out now
    return scripts


def _submit(script: Script, sweep: Sweep, cluster: str) -> Submission:
    """Submit the script, and note it before and after."""
    for cell in sweep.cells:
        if cell.name in script.cells:
            prepare_job(cell)
    script.folder.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    submission = Submission(now, cluster, script.name, None, script.cells, script.folder)
    submissions.record(sweep.output, submission)
    with _uninterrupted():
        job = sbatch.submit(script.text, script.folder, script.cells, script.options)
        submission = dataclasses.replace(submission, job=job)
        submissions.record(sweep.output, submission)
    return submission


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits: what sbatch has submitted must be recorded."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
