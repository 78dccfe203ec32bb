"""Stand-ins for squeue, sacct and scancel that print what a real Slurm printed, and a sweep whose jobs they tell of."""

from __future__ import annotations

import json
from pathlib import Path

from slurm import submissions
from slurm.status import look
from tpcheck.files.names import ATTEMPTS
from tpcheck.sweep.spec import Sweep

__all__ = ["NAME", "attempt", "cell_states", "say", "submission"]

NAME = "s.0a1b2c3d"
CELLS = ("stock-tp1", "stock-tp2", "tree-tp1", "tree-tp2")


def say(folder: Path, command: str, text: str, code: int = 0) -> None:
    """Have `command` print `text`, on standard error when it fails."""
    (folder / f"{command}.text").write_text(text)
    to = ">&2" if code else ""
    script = f'#!/bin/sh\necho "$@" >> {folder}/{command}.calls\ncat {folder}/{command}.text {to}\nexit {code}\n'
    (folder / command).write_text(script)
    (folder / command).chmod(0o755)


def submission(
    cells: tuple[str, ...] = CELLS, job: str | None = "77", folder: Path = Path("jobs")
) -> submissions.Submission:
    return submissions.Submission("2026-02-03T04:05:06+00:00", "local", NAME, job, cells, folder)


def attempt(of: Sweep, cell: str, restart: int = 0) -> None:
    line = {"job": "77", "array_index": 0, "restart": restart, "nodes": "h1", "began": "x", "job_name": NAME}
    (of.output / cell).mkdir(exist_ok=True)
    with (of.output / cell / ATTEMPTS).open("a") as file:
        print(json.dumps(line), file=file)


def cell_states(of: Sweep) -> dict[str, str]:
    return {row.cell: row.state for row in look(of)[0]}
