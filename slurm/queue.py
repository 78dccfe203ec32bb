"""What Slurm knows of the jobs that were submitted.

    squeue   everything the controller still remembers, ended jobs included for MinJobAge (what `scontrol` shows, too)
    sacct    how those ended that it has forgotten, where there is accounting; silently nothing where there is none

Jobs are looked up by name, since every submission has a name of its own: so one whose number was never written down
is found, and a number that Slurm has used twice can't deceive. A controller that does not answer is asked again for
half a minute; then the answer is an error, never that a job is gone.
"""

from __future__ import annotations

import datetime
import re
import subprocess
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from slurm import commands
from slurm.submissions import Submission
from tpcheck.errors import TpcheckError

__all__ = ["ENDED", "JobState", "job_states"]

# States in `man squeue` of jobs that have ended; every other one may still write to its cell.
ENDED = frozenset(
    "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED REVOKED TIMEOUT".split()
)
PATIENCE_SECONDS = 30.0
PAUSE_SECONDS = 2.0


@dataclass(frozen=True)
class JobState:
    """What Slurm says of one job, or of one element of an array."""

    job: str  # Slurm's number of the job, or of the array
    name: str  # Slurm's of the state, in capitals: PENDING, RUNNING, TIMEOUT, …
    nodes: str = ""
    reason: str = ""

    @property
    def active(self) -> bool:
        """Whether it runs, or will by itself."""
        return self.name not in ENDED


def job_states(
    submissions: Sequence[Submission],
    patience: float = PATIENCE_SECONDS,
    waiting: Callable[[str], None] = lambda why: None,
) -> dict[tuple[str, int], JobState]:
    """The state of every element of `submissions` that Slurm knows of, by job name and place in the array.

    Args:
        patience: seconds for which a silent controller is asked again.
        waiting: is told, before each new try, why squeue gave no answer.

    Raises:
        TpcheckError: squeue does not answer, or is not on this machine.
    """
    if not submissions:
        return {}
    ours = [submission.job_name for submission in submissions]
    names = ",".join(ours)
    queue = "squeue --noheader --array --all --states=all --name".split()
    answer = _patiently([*queue, names, "--format=%j|%F|%K|%T|%N|%r"], patience, waiting)
    # A script that somebody has submitted again by hand has the same name: what may still run counts.
    found = dict(sorted(_queued(_rows(answer, 6, ours)), key=lambda item: item[1].active))
    if any((each.job_name, index) not in found for each in submissions for index in range(len(each.cells))):
        since = min(datetime.datetime.fromisoformat(submission.time) for submission in submissions)
        accounts = "sacct --noheader --parsable2 --allocations --duplicates --format=JobName,JobID,Submit,Start,State"
        window = (since - datetime.timedelta(days=1)).astimezone().strftime("%Y-%m-%dT%H:%M:%S")
        known = _try([*f"{accounts},NodeList".split(), "--starttime", window, "--name", names])
        ended = known.stdout if known and known.returncode == 0 else ""
        found = {**dict(_accounted(_rows(ended, 6, ours))), **found}
    return found


def _patiently(command: Sequence[str], patience: float, waiting: Callable[[str], None]) -> str:
    """What `command` prints, asked for `patience` seconds."""
    deadline = time.monotonic() + patience
    while True:
        try:
            done = _try(command)
        except FileNotFoundError:
            raise TpcheckError(
                f"{command[0]} is not on this machine: call from one that has Slurm's commands"
            ) from None
        if done and done.returncode == 0:
            return done.stdout
        why = " ".join(done.stderr.split()) if done else f"no answer within {commands.CALL_SECONDS:.0f} s"
        if time.monotonic() > deadline:
            raise TpcheckError(f"{command[0]} does not answer, so nothing is known of the jobs: {why}")
        waiting(f"{command[0]}: {why}")
        time.sleep(PAUSE_SECONDS)


def _try(command: Sequence[str]) -> subprocess.CompletedProcess[str] | None:
    """The command's outcome; None when it took too long. sacct may be missing, squeue may not."""
    try:
        return commands.run(command)
    except subprocess.TimeoutExpired:
        return None
    except FileNotFoundError:
        if command[0] == "sacct":
            return None
        raise


def _rows(text: str, columns: int, names: Collection[str]) -> list[list[str]]:
    """The lines about jobs called `names`, in their columns; others are what a site's wrapper or plugin prints."""
    rows = (line.split("|", columns - 1) for line in text.splitlines())
    return [row for row in rows if len(row) == columns and row[0] in names]


def _queued(rows: Sequence[Sequence[str]]) -> Iterator[tuple[tuple[str, int], JobState]]:
    for job_name, job, index, state, nodes, reason in rows:
        place = int(index) if index.isdecimal() else 0  # N/A for a plain job
        yield (job_name, place), JobState(job, state, nodes, "" if reason == "None" else reason)


def _accounted(rows: Sequence[Sequence[str]]) -> Iterator[tuple[tuple[str, int], JobState]]:
    """How jobs ended, oldest record first, so that of a requeued job the last one counts.

    Records of running and pending jobs lag behind: squeue would have shown them.
    """
    for job_name, job, _, _, said, nodes in sorted(rows, key=lambda row: (row[2], row[3])):
        state = said.partition(" ")[0]  # "CANCELLED by 1000"
        if state in ENDED:
            number, _, places = job.partition("_")
            for place in _places(places):
                yield (job_name, place), JobState(number, state, "" if nodes == "None assigned" else nodes)


def _places(text: str) -> list[int]:
    """Places in an array: `3`, or `[1-2,5,8-12:2%4]` for those that never started; a plain job has place 0."""
    ranges = re.findall(r"(\d+)(?:-(\d+)(?::(\d+))?)?", text.partition("%")[0])
    parts = (range(int(first), int(last or first) + 1, int(step or 1)) for first, last, step in ranges)
    return [place for part in parts for place in part] or [0]
