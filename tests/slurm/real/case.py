"""A sweep on the test cluster, as a user has it: a sweep file, a cluster profile, and the `tpcheck` commands."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from slurm import submissions
from slurm.queue import ENDED
from tests.support import ROOT
from tests.support.slurm_cluster import Cluster
from tests.support.waiting import wait_for
from tpcheck.files import result_dir
from tpcheck.files.names import DIGESTS

__all__ = ["CELL", "PROFILE", "RUN", "Case", "Digests", "digests", "need_node_names", "together", "train_here"]

Digests = tuple[str, str]

STEPS = 24
PATIENCE = 400.0  # seconds for anything that trains; a shared machine may be slow
CELL = "tree-tp1-h100"  # the only one of a sweep without a matrix of its own
RUN: dict[str, Any] = {
    "model": {"preset": "qwen3-tiny", "hidden_size": 64, "head_dim": 8, "ffn_hidden_size": 88},
    "data": {"kind": "synthetic"},
    "steps": STEPS,
    "seq_length": 16,
    "checkpoint_every": 6,
}
PROFILE: dict[str, Any] = {
    "time": "00:10:00",
    "save_before_end": 120,
    "cpus_per_rank": 1,
    "env": {
        "OMP_NUM_THREADS": 1,
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": str(ROOT / "tests" / "support" / "slow_steps"),  # see `slowed`
    },
    "architectures": {
        "h100": {"constraint": "h100", "nodes": 2, "ranks_per_node": 2, "memory_gib": 16},
        "b300": {"constraint": "b300", "nodes": 2, "ranks_per_node": 1, "memory_gib": 16},
    },
}


class Case:
    """One sweep and its directory `out`; every wait has a deadline."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster = cluster
        self.folder = folder
        self.out = folder / "out"
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, matrix: dict[str, Any] | None = None, **profile: Any) -> None:
        """Write the sweep file and the profile; without a matrix, CELL alone."""
        matrix = matrix or {"strategy": ["tree"], "tp": [1], "arch": ["h100"]}
        sweep = {"name": self.folder.name, "base": RUN, "matrix": matrix, "output": str(self.out)}
        (self.folder / "sweep.yaml").write_text(yaml.safe_dump(sweep, sort_keys=False))
        (self.folder / "cluster.yaml").write_text(yaml.safe_dump({**PROFILE, **profile}, sort_keys=False))

    def submit(self, *options: str) -> str:
        """What `tpcheck sweep` prints, which must succeed."""
        done = self.try_to_submit(*options)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def try_to_submit(self, *options: str, path: str = "") -> subprocess.CompletedProcess[str]:
        """`tpcheck sweep`, with `path` before everything else on the PATH."""
        return self.tpcheck("sweep", "sweep.yaml", "--cluster", "./cluster.yaml", *options, path=path)

    def tpcheck(self, *arguments: str, path: str = "", timeout: float = 240.0) -> subprocess.CompletedProcess[str]:
        environment = {**self.cluster.environment, "PYTHONPATH": str(ROOT)}
        if path:
            environment["PATH"] = f"{path}:{environment['PATH']}"
        command = [sys.executable, "-m", "tpcheck", *arguments]
        return subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=timeout
        )

    def jobs(self, cell: str) -> list[str]:
        """What Slurm calls the jobs that `cell` was ever submitted with."""
        submitted = [each for each in submissions.read(self.out) if cell in each.cells]
        return [element for each in submitted if (element := each.element(cell))]

    def attempts(self, cell: str) -> int:
        return len(submissions.attempts(self.out / cell))

    def wait_for_step(self, cell: str, step: int) -> None:
        wait_for(lambda: self._step(cell) >= step, PATIENCE, f"step {step} of {cell}")

    def wait_for_attempt(self, cell: str, number: int) -> None:
        wait_for(lambda: self.attempts(cell) >= number, PATIENCE, f"start {number} of {cell}")

    def wait_until_complete(self, cell: str) -> None:
        done = self.out / cell / DIGESTS
        wait_for(lambda: done.exists() or self._given_up(cell), PATIENCE, f"{cell} to be complete")
        assert done.exists(), f"{cell} ended without digests"
        assert [record["step"] for record in result_dir.read_steps(self.out / cell)] == list(range(1, STEPS + 1))

    def ranks(self, cell: str) -> list[psutil.Process]:
        """The Python processes that train `cell` here, whichever node they are on."""
        run = str(self.out / cell / "run.yaml")
        found = []
        for process in psutil.process_iter(["name", "cmdline"]):
            words = process.info["cmdline"] or []
            if run in words and process.info["name"].startswith("python"):
                found.append(process)
        return found

    @contextmanager
    def slowed(self, cell: str, seconds: float = 2.0) -> Iterator[None]:
        """While this lasts, every step of `cell` takes `seconds` more, however fast or slow the machine is.

        To be begun before the cell is submitted, and left when what is done to it has had its effect.
        """
        slow = self.out / cell / "slow"
        slow.parent.mkdir(parents=True, exist_ok=True)
        slow.write_text(str(seconds))
        try:
            yield
        finally:
            slow.unlink()

    def _step(self, cell: str) -> int:
        records = result_dir.read_steps(self.out / cell)
        return int(records[-1]["step"]) if records else 0

    def _given_up(self, cell: str) -> bool:
        """Whether Slurm answers, and will never run `cell` again."""
        queue = ["squeue", "--noheader", "--states=all", "--format=%T", "--jobs", self.jobs(cell)[-1]]
        done = subprocess.run(queue, env=self.cluster.environment, capture_output=True, text=True, timeout=60)
        if done.returncode:
            return "Invalid job id" in done.stderr
        return set(done.stdout.split()) <= ENDED

    def report(self) -> str:
        """All there is to know when something went wrong."""
        parts = []
        if (self.out / "sweep.json").exists():
            parts.append(self.tpcheck("status", str(self.out)).stdout)
        for file in sorted(self.out.rglob("*")):
            if file.is_file() and file.suffix in (".txt", ".out", ".err", ".jsonl", ".sh") and "code" not in file.parts:
                parts.append(f"--- {file.relative_to(self.out)}\n{file.read_text(errors='replace')[-3000:]}")
        for log in sorted((self.cluster.folder / "log").glob("*.log")):
            parts.append(f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}")
        return "\n".join(parts)


def need_node_names() -> None:
    """Skip a test whose ranks look for each other by the names of nodes, where those mean nothing."""
    try:
        socket.gethostbyname("h1")
    except OSError:
        pytest.skip("node h1 does not resolve, and only root can write it to /etc/hosts")


def digests(cell: Path) -> Digests:
    """The digests of a complete cell's model and optimizer."""
    found = result_dir.read_digests(cell)
    assert found, f"{cell} is not complete"
    return found["model"], found["optimizer"]


def together(scenario: Callable[[Case], list[str]]) -> Callable[..., None]:
    """Turn `scenario(case)` into a test that runs beside others; the cells that it names must equal the reference."""

    def test(started: dict[str, Future[list[Digests]]], reference: Callable[[], Digests]) -> None:
        for found in started[scenario.__name__].result():
            assert found == reference()

    test.__name__, test.__doc__ = scenario.__name__, scenario.__doc__
    test.scenario = scenario  # type: ignore[attr-defined]
    return test


def train_here(folder: Path) -> subprocess.Popen[bytes]:
    """The run of every cell, without Slurm and never interrupted; its results will be in `folder`/run."""
    (folder / "run.yaml").write_text(yaml.safe_dump({**RUN, "output": str(folder / "run")}))
    command = [sys.executable, "-m", "tpcheck", "train", str(folder / "run.yaml")]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
