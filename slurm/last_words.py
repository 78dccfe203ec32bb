"""Why a job failed, from what it has printed: the line of whoever failed, not those in which srun and Slurm clear up.

tpcheck: tree-tp1 on h1, start 1                                       where the last start begins
0: slurmstepd-h1: error: execve(): /no/python: No such file …          the reason
srun: error: h1: task 0: Exited with exit code 2                       what it led to; all there is of a killed rank
srun: launch/slurm: _step_signal: Terminating StepId=45.0
"""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["last_words"]

START = re.compile(r"tpcheck: \S+ on \S+, start \d+")  # as requeue.sh begins
LABEL = re.compile(r"^\s*\d+: ")  # srun's, of a rank
OUTCOME = re.compile(r"srun: error: .*: tasks? [\d,-]+: ")
EXITED = re.compile(r".*: Exited with exit code \d+")
CLEARING_UP = re.compile(r"srun: |slurmstepd\S*: error: \*\*\* ")
TAIL = 1 << 16  # bytes of a log


def last_words(log: Path) -> str:
    """The line that says why, of the last start in `log`; nothing where it has none."""
    lines: list[str] = []
    for line in _end(log).splitlines():
        if START.fullmatch(line.strip()):
            lines.clear()
        elif line.strip():
            lines.append(LABEL.sub("", line).strip())
    ours = [line for line in lines if line.startswith("tpcheck: ")]
    killed = [line for line in lines if OUTCOME.match(line)][:1]  # the others were killed because of this one
    if killed and EXITED.fullmatch(killed[0]):
        killed = []
    said = [line for line in lines if not CLEARING_UP.match(line)]
    return (ours or killed or said or lines or [""])[-1]


def _end(file: Path) -> str:
    """The end of what `file` holds; nothing where it can't be read."""
    try:
        with open(file, "rb") as opened:
            size = opened.seek(0, 2)
            opened.seek(max(size - TAIL, 0))
            return opened.read().decode(errors="replace")
    except OSError:
        return ""
