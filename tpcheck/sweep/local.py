"""`tpcheck sweep`: the cells of a sweep file, run on this machine, and the verdict on them.

    sweep file ─ cells ─┬─ complete already: kept
                        ├─ interrupted: resumed from its last checkpoint
                        └─ new: started             ─ verdict.json, loss.png, index.html

Everything is checked before anything runs. A cell that fails does not stop the others. Nothing that is
complete is ever run again, and nothing is overwritten: a cell made with other settings is an error.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from tpcheck.cost.memory import memory
from tpcheck.errors import TpcheckError
from tpcheck.files.names import LOCAL_JOBS, LOCK
from tpcheck.sweep import conclude
from tpcheck.sweep.completeness import digests_of, is_complete, only_one
from tpcheck.sweep.failure import explain
from tpcheck.sweep.jobs import Job, LocalRunner, Machine, Resources, Task
from tpcheck.sweep.live_table import LiveTable
from tpcheck.sweep.spec import Cell, Sweep, load_sweep
from tpcheck.sweep.stored_spec import write_run, write_sweep

__all__ = ["command"]


def command(path: Path, overrides: Sequence[str] = ()) -> int:
    """Run what is not complete of the sweep at `path`, print the verdict, return its exit code."""
    sweep = load_sweep(path, overrides, anywhere=True)
    console = conclude.console()
    if sweep.archs:
        console.print(f"arch: {', '.join(sweep.archs)} are for a cluster; here every cell runs once, on this machine")
    with only_one(sweep.output), _sigterm_is_ctrl_c():
        todo = [cell for cell in sweep.cells if not is_complete(cell)]
        write_sweep(sweep)
        _run(sweep, todo, console)
        return conclude.conclude(sweep, console)


def _run(sweep: Sweep, todo: Sequence[Cell], console: Console) -> None:
    """Run the cells `todo`; explain the failed ones below the table. Ctrl-C lets the running ones save, then leaves."""
    machine = Machine.here()
    cells = {cell.name: cell for cell in todo}
    tasks = [_task(cell, machine) for cell in todo]
    jobs = sweep.output / LOCAL_JOBS / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    for task in tasks:
        if task.resources.memory_gib > machine.memory_gib:
            console.print(
                f"{task.name} may not fit: about {task.resources.memory_gib:.0f} GiB, {machine.memory_gib:.0f} free"
            )
    runner = LocalRunner(jobs, machine)
    failed: list[Job] = []
    with LiveTable(sweep.cells, console) as table:
        for cell in sweep.cells:
            if cell.name not in cells:
                table.set(cell.name, "complete")
        try:
            for job in runner.run(tasks, started=lambda job: table.set(job.task.name, "running")):
                table.tick()
                if job and digests_of(cells[job.task.name]):
                    table.set(job.task.name, "complete")
                elif job:
                    table.set(job.task.name, "failed")
                    failed.append(job)
        except KeyboardInterrupt:
            console.print("stopping: running cells save and exit; call again to go on (Ctrl-C again: kill them)")
            names = [job.task.name for job in runner.running]
            runner.stop()
            for name in names:
                table.set(name, "stopped")
            raise
    for job in failed:
        console.print(explain(job, cells[job.task.name]), markup=False, highlight=False, soft_wrap=True)
    if not failed:
        shutil.rmtree(jobs.parent, ignore_errors=True)


def _task(cell: Cell, machine: Machine) -> Task:
    """The cell as a command, with its resolved configuration beside its results."""
    gpus = cell.config.world_size if machine.gpus else 0
    if gpus > len(machine.gpus):
        raise TpcheckError(
            f"cell {cell.name} needs {gpus} GPUs, this machine has {len(machine.gpus)}: "
            "exclude it, or set CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    run = write_run(cell, cell.path)
    command = (sys.executable, "-m", "tpcheck", "train", str(run), "--resume")
    ranks = cell.config.world_size
    memory_gib = ranks * memory(cell.config, on_gpu=False).likely  # beside GPUs, the most that it can be
    return Task(cell.name, command, cell.path / LOCK, Resources(ranks * cell.config.threads, gpus, memory_gib))


@contextlib.contextmanager
def _sigterm_is_ctrl_c() -> Iterator[None]:
    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
