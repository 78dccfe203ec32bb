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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from tpcheck.config.schema import RunConfig
from tpcheck.errors import TpcheckError
from tpcheck.files import result_dir
from tpcheck.files.lock import hold, is_locked
from tpcheck.files.names import LOCAL_JOBS, LOCK, LOG, MANIFEST, RUN
from tpcheck.sweep import conclude, verdict
from tpcheck.sweep.jobs import Job, LocalRunner, Machine, Need, Task
from tpcheck.sweep.live_table import Board
from tpcheck.sweep.spec import Cell, Sweep, load_sweep
from tpcheck.sweep.stored_spec import write_sweep

__all__ = ["command", "is_complete", "only_one", "other_settings"]

TAIL = 15  # lines of a failed cell's log
REFUSED = 2  # the exit code of `tpcheck train` for bad input
CELL_FREE = ("output", "stop_after")  # settings that two runs of the same cell may differ in


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


def is_complete(cell: Cell) -> bool:
    """Whether the cell needs no run any more; refuses a directory that another configuration or process holds."""
    if is_locked(cell.path / LOCK):
        raise TpcheckError(f"cell {cell.name} is being run by another process: wait for it, or end it, then call again")
    if not (cell.path / MANIFEST).exists():
        return False
    if changes := other_settings(cell, result_dir.read_manifest(cell.path)["config"]):
        raise TpcheckError(f"{cell.path} was made with other settings ({changes}): remove it, or add output=DIR")
    return verdict.digests_of(cell) is not None


def other_settings(cell: Cell, config: Mapping[str, Any]) -> str:
    """What is different in `config`, the cell's own at another time; what it did not know had its default."""
    there = {**_flat(RunConfig().model_dump(mode="json")), **_flat(config)}
    now = _flat(cell.config.model_dump(mode="json"))
    differing = [key for key in sorted({*there, *now} - {*CELL_FREE}) if there.get(key) != now.get(key)]
    return ", ".join(f"{key}: {there.get(key)} there, {now.get(key)} now" for key in differing)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _run(sweep: Sweep, todo: Sequence[Cell], console: Console) -> None:
    """Run the cells `todo`; explain the failed ones below the table. Ctrl-C lets the running ones save, then leaves."""
    machine = Machine.here()
    cells = {cell.name: cell for cell in todo}
    tasks = [_task(cell, machine) for cell in todo]
    jobs = sweep.output / LOCAL_JOBS / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    for task in tasks:
        if task.need.memory_gib > machine.memory_gib:
            console.print(
                f"{task.name} may not fit: about {task.need.memory_gib:.0f} GiB, {machine.memory_gib:.0f} free"
            )
    runner = LocalRunner(jobs, machine)
    failed: list[Job] = []
    with Board(sweep.cells, console) as board:
        for cell in sweep.cells:
            if cell.name not in cells:
                board.set(cell.name, "complete")
        try:
            for job in runner.run(tasks, started=lambda job: board.set(job.task.name, "running")):
                board.tick()
                if job and verdict.digests_of(cells[job.task.name]):
                    board.set(job.task.name, "complete")
                elif job:
                    board.set(job.task.name, "failed")
                    failed.append(job)
        except KeyboardInterrupt:
            console.print("stopping: running cells save and exit; call again to go on (Ctrl-C again: kill them)")
            names = [job.task.name for job in runner.running]
            runner.stop()
            for name in names:
                board.set(name, "stopped")
            raise
    for job in failed:
        console.print(_explain(job, cells[job.task.name]), markup=False, highlight=False, soft_wrap=True)
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
    cell.path.mkdir(parents=True, exist_ok=True)
    run = cell.path / RUN
    run.write_text(yaml.safe_dump(cell.config.model_dump(mode="json"), sort_keys=False))
    command = (sys.executable, "-m", "tpcheck", "train", str(run), "--resume")
    need = Need(cell.config.world_size * cell.config.threads, gpus, memory_gib(cell.config))
    return Task(cell.name, command, cell.path / LOCK, need)


def memory_gib(config: RunConfig) -> float:
    """Roughly what a run takes: weights, gradients and Adam's state, logits, and 0.4 GiB a rank for its libraries."""
    model = config.model
    attention = 2 * model.hidden_size * model.head_dim * (model.num_attention_heads + model.num_query_groups)
    mlp = model.hidden_size * model.ffn_hidden_size * (3 if model.activation == "swiglu" else 2)
    embeddings = model.padded_vocab_size * model.hidden_size * (1 if model.tied else 2)
    parameters = model.num_layers * (attention + mlp) + embeddings
    logits = config.micro_batch_size * config.seq_length * model.padded_vocab_size * 12
    return (config.dp * (18 * parameters + logits)) / 2**30 + 0.4 * config.world_size


def _explain(job: Job, cell: Cell) -> str:
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


@contextlib.contextmanager
def only_one(output: Path) -> Iterator[None]:
    """Hold the sweep's own lock, so that no second sweep writes to the same directory."""
    output.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(hold(output / LOCK))
        except BlockingIOError:
            raise TpcheckError(f"another sweep writes to {output}: wait for it, or add output=DIR") from None
        yield


@contextlib.contextmanager
def _sigterm_is_ctrl_c() -> Iterator[None]:
    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
