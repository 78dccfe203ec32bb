"""Slurm's commands, asked so that nothing the user's shell exports changes the question or the answer.

    SQUEUE_PARTITION=b300, SACCT_FORMAT, SCANCEL_STATE, …   filter or reshape what these commands do
    SLURM_TIME_FORMAT, SLURM_BITSTR_LEN                     times that cannot be ordered, arrays that are cut short
    SLURM_CLUSTERS                                          another Slurm than the one that SLURM_CONF names

A job that a filter hides would be submitted a second time. `requeue.sh` does the same for the calls of a batch script.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence

__all__ = ["CALL_SECONDS", "environment", "is_option", "max_array_size", "run"]

CALL_SECONDS = 60.0
OPTIONS = ("SQUEUE_", "SACCT_", "SCANCEL_", "SCONTROL_")  # each is an option of the command of that name
OUTPUT = {"SLURM_TIME_FORMAT": "standard", "SLURM_BITSTR_LEN": "0"}  # 0: of any length


def environment() -> dict[str, str]:
    """This process's, less what changes Slurm's commands."""
    return {name: value for name, value in os.environ.items() if not is_option(name)} | OUTPUT


def is_option(variable: str) -> bool:
    """Whether an environment variable changes what Slurm's commands are asked."""
    return variable.startswith(OPTIONS) or variable == "SLURM_CLUSTERS"


def run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """The outcome of `command`.

    Raises:
        FileNotFoundError: it is not on this machine.
        subprocess.TimeoutExpired: it takes longer than `CALL_SECONDS`.
    """
    return subprocess.run(
        command, capture_output=True, text=True, errors="replace", timeout=CALL_SECONDS, env=environment()
    )


def max_array_size() -> int | None:
    """How many elements an array may have here, as the controller's MaxArraySize says; None where nobody can say."""
    try:
        done = run(["scontrol", "show", "config"])
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)$", done.stdout, re.MULTILINE)
    return max(1, int(found[1])) if found and done.returncode == 0 else None  # 0: no arrays at all
