"""`DIR/submissions.jsonl`: what was submitted to Slurm, one line per event, so that no cell is ever submitted twice.

    before sbatch   {"job": null,  "job_name": "qwen3-8b.1f0c22ab", "cells": [...], ...}
    after it        {"job": "123", "job_name": "qwen3-8b.1f0c22ab", "cells": [...], ...}

The later line of a job name counts. A name that never got its number belongs to a submission that was interrupted:
Slurm, or the cell's own `attempts.jsonl`, knows whether there is such a job (see `slurm.submit`).
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpcheck.errors import TpcheckError
from tpcheck.files.json_files import append_line, readable_lines, require_format
from tpcheck.files.names import ATTEMPTS, SUBMISSIONS
from tpcheck.files.records import AttemptRecord, Record

__all__ = ["Attempt", "Submission", "attempts", "latest", "read", "record"]

FORMAT = 1


@dataclass(frozen=True)
class Submission:
    """One call of sbatch: an array of cells, or a plain job for a single one.

    Attributes:
        time: when it was written, UTC, ISO 8601.
        profile: the cluster's name, or the path of its file.
        job_name: unique, `<sweep>.<8 hex digits>`.
        job: Slurm's number of the array (of the job, for a single cell); None until sbatch has answered.
        cells: names, in array order.
        folder: where the submitted script and the jobs' output are.
    """

    time: str
    profile: str
    job_name: str
    job: str | None
    cells: tuple[str, ...]
    folder: Path

    def element(self, cell: str) -> str | None:
        """What Slurm's commands call the job of `cell`: `123_4`, or `123` for a single cell."""
        return None if self.job is None else self.element_of(self.job, cell)

    def element_of(self, job: str, cell: str) -> str:
        """`element`, where Slurm's number of the array is `job`."""
        return job if len(self.cells) == 1 else f"{job}_{self.cells.index(cell)}"


@dataclass(frozen=True)
class Attempt:
    """One start of a cell by Slurm; `restart` counts those of the same job, from 0."""

    job: str
    array_index: int
    restart: int
    nodes: str
    began: str
    job_name: str


def record(output: Path, submission: Submission) -> None:
    """Add `submission`, on disk when this returns."""
    append_line(
        output / SUBMISSIONS,
        {"format": FORMAT, **dataclasses.asdict(submission), "folder": str(submission.folder)},
    )


def read(output: Path) -> list[Submission]:
    """All submissions of the sweep in `output`, the oldest first.

    Raises:
        TpcheckError: another version of tpcheck has written them, or somebody has changed them.
    """
    found: dict[str, Submission] = {}
    for line in readable_lines(output / SUBMISSIONS, Record):
        require_format(line, FORMAT, str(output / SUBMISSIONS))
        try:
            submission = _submission(line)
        except (KeyError, TypeError, ValueError) as error:
            raise TpcheckError(
                f"{output / SUBMISSIONS}: a line is not as tpcheck writes it ({error!r}): restore it"
            ) from error
        found[submission.job_name] = submission
    return list(found.values())


def _submission(line: dict[str, Any]) -> Submission:
    known = {field.name: line[field.name] for field in dataclasses.fields(Submission)}
    if not isinstance(known["cells"], list):
        raise TypeError(f"cells: {known['cells']!r}")
    for text in [value for key, value in known.items() if key not in ("cells", "job")] + [known["job"] or ""]:
        if not isinstance(text, str):
            raise TypeError(f"{text!r} is no text")
    for cell in known["cells"]:
        if Path(cell).name != cell:
            raise ValueError(f"{cell} is no name of a cell")
    if datetime.datetime.fromisoformat(known["time"]).tzinfo is None:
        raise ValueError(f"{known['time']} has no time zone")
    return Submission(**known | {"cells": tuple(known["cells"]), "folder": Path(known["folder"])})


def latest(submissions: Sequence[Submission]) -> dict[str, Submission]:
    """For every cell that was ever submitted, the submission that it was in last."""
    return {cell: submission for submission in submissions for cell in submission.cells}


def attempts(cell: Path) -> list[Attempt]:
    """How often Slurm has started the cell, the oldest first."""
    names = [field.name for field in dataclasses.fields(Attempt)]
    lines = readable_lines(cell / ATTEMPTS, AttemptRecord)
    return [Attempt(**{name: line[name] for name in names}) for line in lines]
