"""Ends a test cluster: a process that waits until whoever started the cluster closes its stdin, or dies.

    python slurm_keeper.py FOLDER < pipe

Jobs are cancelled, then exactly the processes noted in FOLDER are ended, then FOLDER is removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

__all__ = ["name_nodes", "note", "power_off"]

HOSTS = Path("/etc/hosts")
PROCESSES = "processes"
GRACE_SECONDS = 10.0
ORDER = ("slurmd-", "slurmctld", "slurmdbd", "mariadbd", "munged")


def note(folder: Path, name: str, pid: int) -> None:
    """Have daemon `name` ended with the cluster."""
    with open(folder / PROCESSES, "a", encoding="utf-8") as file:
        print(json.dumps([name, pid, psutil.Process(pid).create_time()]), file=file)


def power_off(log: Path) -> None:
    """Kill the steps of the node whose slurmd writes to `log`, with all that they started; nobody is told."""
    steps = [process for process in psutil.process_iter() if _is_step(process, log)]
    below = [child for step in steps for child in step.children(recursive=True)]
    for process in [*steps, *below]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _is_step(process: psutil.Process, log: Path) -> bool:
    """Steps outlive their slurmd and are nobody's children, but they write to its log."""
    with contextlib.suppress(psutil.Error, OSError):
        if any("slurmstepd" in word for word in process.cmdline()[:1]):
            files = Path(f"/proc/{process.pid}/fd").iterdir()
            return str(log) in (os.readlink(file) for file in files)
    return False


def name_nodes(folder: Path, names: Sequence[str]) -> None:
    """As root, make the nodes' names resolve to this machine: ranks look for MASTER_ADDR by name."""
    with _hosts() as hosts:
        if hosts:
            lines = "".join(f"127.0.0.1 {name} # {folder}\n" for name in names)
            HOSTS.write_text(hosts.rstrip("\n") + "\n" + lines)


def _forget_names(folder: Path) -> None:
    with _hosts() as hosts:
        if hosts:
            HOSTS.write_text("".join(line for line in hosts.splitlines(True) if not line.endswith(f"# {folder}\n")))


@contextlib.contextmanager
def _hosts() -> Iterator[str]:
    """/etc/hosts, held against other clusters; nothing where it cannot be written."""
    if not os.access(HOSTS, os.W_OK):
        yield ""
        return
    with HOSTS.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file.read()


def _stop(folder: Path) -> None:
    _cancel_jobs(folder)
    noted = [json.loads(line) for line in (folder / PROCESSES).read_text().splitlines()]
    for prefix in ORDER:
        _end([(pid, began) for name, pid, began in noted if name.startswith(prefix)])
    for log in (folder / "log").glob("slurmd-*.log"):
        power_off(log)
    _forget_names(folder)
    shutil.rmtree(folder, ignore_errors=True)


def _cancel_jobs(folder: Path) -> None:
    """So that steps end and say so, while there is a controller to hear it."""
    environment = {**os.environ, "SLURM_CONF": str(folder / "etc/slurm.conf")}
    with contextlib.suppress(subprocess.SubprocessError):
        mine = ["scancel", "--signal=KILL", "--full", "--me"], ["scancel", "--me"]
        for command in mine:
            subprocess.run(command, env=environment, timeout=15, capture_output=True, check=True)


def _is_alive(pid: int, began: float) -> bool:
    """Whether process `pid` is still the one that was noted; a zombie waits for its parent, not for us."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return abs(process.create_time() - began) < 0.5 and process.status() != psutil.STATUS_ZOMBIE
    return False


def _end(noted: list[tuple[int, float]]) -> None:
    """Ask politely, wait, then kill."""
    _signal(noted, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    while any(_is_alive(*process) for process in noted) and time.monotonic() < deadline:
        time.sleep(0.05)
    _signal(noted, signal.SIGKILL)


def _signal(noted: list[tuple[int, float]], number: int) -> None:
    for pid, began in noted:
        if _is_alive(pid, began):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


if __name__ == "__main__":
    sys.stdin.read()
    _stop(Path(sys.argv[1]))
