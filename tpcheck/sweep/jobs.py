"""Jobs on this machine: one command per cell through submitit's local executor, at most as many as fit.

    sweep ── submitit's controller ── run_cell ── python -m tpcheck train … ── ranks
                                          └─ a session of its own; they all hold the cell's lock

A cell is alive as long as somebody holds its lock, whoever started it and whatever became of that process.
Only files carry results: submitit pickles the call of `run_cell`, and nothing is ever unpickled here.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import submitit

from tpcheck.errors import TpcheckError
from tpcheck.files.lock import hold, is_locked

A_MONTH = 30 * 24 * 60  # minutes; a local job has no time limit, submitit wants one
POLL_SECONDS = 0.25


@dataclass(frozen=True)
class Resources:
    """What one cell takes of a machine while it runs."""

    cpus: int
    gpus: int
    memory_gib: float


@dataclass(frozen=True)
class Machine:
    """What this machine has to give; GPUs by the numbers that CUDA_VISIBLE_DEVICES takes."""

    cpus: int
    gpus: tuple[int, ...]
    memory_gib: float

    @classmethod
    def here(cls) -> Machine:
        return cls(len(os.sched_getaffinity(0)), visible_gpus(), psutil.virtual_memory().available / 2**30)

    def fits(self, resources: Resources, beside: Sequence[Resources]) -> bool:
        """Whether a task can start beside the running ones. Alone it always can: slow is better than never."""
        if not beside:
            return True
        return (
            resources.cpus + sum(other.cpus for other in beside) <= self.cpus
            and resources.gpus + sum(other.gpus for other in beside) <= len(self.gpus)
            and resources.memory_gib + sum(other.memory_gib for other in beside) <= self.memory_gib
        )


def visible_gpus() -> tuple[int, ...]:
    """The GPUs that a process started from here would see, without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        devices = (path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*"))
        return tuple(sorted(int(device) for device in devices if device.isdigit()))
    entries = [entry.strip() for entry in visible.split(",") if entry.strip()]
    if not all(entry.lstrip("-").isdigit() for entry in entries):
        raise TpcheckError(f"CUDA_VISIBLE_DEVICES={visible}: a local sweep shares out GPUs by number, as in 0,1")
    return tuple(int(entry) for entry in entries if int(entry) >= 0)


@dataclass(frozen=True)
class Task:
    """One cell to run: its command, and the file whose lock says that the cell is alive."""

    name: str
    command: tuple[str, ...]
    lock: Path
    resources: Resources


@dataclass
class Job:
    """A task that has been started."""

    task: Task
    submitted: submitit.Job[None]
    files: Path  # <files>.pid and <files>.exit, written by `run_cell`
    gpus: tuple[int, ...]

    @property
    def exit_code(self) -> int | None:
        """The command's exit code; None while it runs, and for ever when it never came to an end of its own."""
        return _read_int(_beside(self.files, "exit"))

    @property
    def pid(self) -> int | None:
        """The command's process, which leads its own session and process group."""
        return _read_int(_beside(self.files, "pid"))

    @property
    def running(self) -> bool:
        return not self.submitted.done() or is_locked(self.task.lock)

    def output(self) -> str:
        """What the command itself wrote to stdout and stderr."""
        paths = (self.submitted.paths.stdout, self.submitted.paths.stderr)
        return "".join(path.read_text(errors="replace") for path in paths if path.exists())


class LocalRunner:
    """Runs tasks, always the first that fits.

    Args:
        folder: for submitit's files and the jobs' own output; must be new, for job ids are process ids.
        machine: what may be used at once.
    """

    def __init__(self, folder: Path, machine: Machine) -> None:
        self.machine = machine
        self.folder = folder.absolute()
        self.executor = submitit.LocalExecutor(self.folder)
        self.running: list[Job] = []

    def run(self, tasks: Iterable[Task], started: Callable[[Job], None]) -> Iterator[Job | None]:
        """Yields every job that has ended, and None at every look at the clock in between."""
        waiting = list(tasks)
        while waiting or self.running:
            while fitting := self._first_that_fits(waiting):
                waiting.remove(fitting)
                started(self._start(fitting))
            for job in [job for job in self.running if not job.running]:
                self.running.remove(job)
                yield job
            yield None
            time.sleep(POLL_SECONDS)

    def stop(self, grace: float = 60.0) -> None:
        """End what runs: SIGTERM, on which a run saves and exits; SIGKILL to what is left after `grace` seconds."""
        deadline = time.monotonic() + grace
        asked: set[int] = set()
        try:
            while self.running and time.monotonic() < deadline:
                for pid in {job.pid for job in self.running if job.pid is not None} - asked:
                    _signal(os.kill, pid, signal.SIGTERM)
                    asked.add(pid)
                time.sleep(POLL_SECONDS)
                self.running = [job for job in self.running if job.running]
        finally:
            for job in self.running:
                if job.pid is not None:
                    _signal(os.killpg, job.pid, signal.SIGKILL)
                job.submitted.cancel(check=False)

    def _first_that_fits(self, waiting: Sequence[Task]) -> Task | None:
        taken = [job.task.resources for job in self.running]
        return next((task for task in waiting if self.machine.fits(task.resources, taken)), None)

    def _start(self, task: Task) -> Job:
        taken = {gpu for job in self.running for gpu in job.gpus}
        gpus = tuple(gpu for gpu in self.machine.gpus if gpu not in taken)[: task.resources.gpus]
        self.executor.update_parameters(
            timeout_min=A_MONTH, gpus_per_node=len(gpus), visible_gpus=gpus, stderr_to_stdout=True
        )
        files = self.folder / task.name
        submitted = self.executor.submit(run_cell, task.command, task.lock, files)
        self.running.append(Job(task, submitted, files, gpus))
        return self.running[-1]


def run_cell(command: Sequence[str], lock: Path, files: Path) -> None:
    """The job: run `command` holding `lock`, write its process id and its exit code.

    Ctrl-C in a terminal reaches this process too; only the sweep decides what it means for the command.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with hold(lock) as held:
        process = subprocess.Popen(command, start_new_session=True, pass_fds=[held.fileno()])
        _write_int(_beside(files, "pid"), process.pid)
        _write_int(_beside(files, "exit"), process.wait())


def _beside(files: Path, suffix: str) -> Path:
    return files.with_name(f"{files.name}.{suffix}")


def _signal(send: Callable[[int, int], None], pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        send(pid, number)


def _write_int(path: Path, value: int) -> None:
    partial = _beside(path, "tmp")
    partial.write_text(str(value))
    partial.rename(path)


def _read_int(path: Path) -> int | None:
    return int(path.read_text()) if path.exists() else None
