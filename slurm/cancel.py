"""`tpcheck cancel DIR [CELL…]`: scancel exactly the array elements that still belong to these cells.

Each cell is marked before scancel, for a script that is about to queue its job again looks for the mark; the marks of
what scancel refuses are taken back, or those jobs would end as if they had been cancelled.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from slurm import commands, submissions
from slurm.queue import job_states
from slurm.submissions import Submission
from tpcheck.errors import TpcheckError
from tpcheck.files.names import CANCELLED
from tpcheck.sweep.stored_spec import read_sweep

__all__ = ["command"]


def command(output: Path, cells: Sequence[str] = ()) -> int:
    """Cancel the pending and running jobs of `cells`, of all when none is named; also of those that left the sweep."""
    every = submissions.read(output)
    submitted = {cell for submission in every for cell in submission.cells}
    names = [cell.name for cell in read_sweep(output).cells]
    strangers = [cell for cell in cells if cell not in submitted and cell not in names]
    if strangers:
        raise TpcheckError(f"{strangers[0]} is no cell of {output}: it has {', '.join(names)}")

    elements = _active(every, cells or submitted)
    if not elements:
        print("nothing to cancel: none of these cells is pending or running")
        return 0
    with _marks(output, elements) as take_back:
        refusal = _scancel(list(elements))
        left = _active(every, cells or submitted) if refusal else {}
        refused = [job for job, before in elements.items() if job in left and not left[job].ends_after(before)]
        take_back([elements[job].cell for job in refused])
    for job, element in elements.items():
        if job not in refused:
            print(f"cancelled {element.cell} (job {job})")
    if refused:
        jobs = ", ".join(f"{elements[job].cell} (job {job})" for job in refused)
        raise TpcheckError(f"not cancelled: {jobs}: scancel: {refusal}")
    return 0


@dataclass(frozen=True)
class _Element:
    """One job that a cancellation would end."""

    cell: str
    state: str  # Slurm's

    def ends_after(self, before: _Element) -> bool:
        """Whether it has begun to end since it was `before`. One that was ending then may be queueing itself again."""
        return self.state == "COMPLETING" != before.state


def _active(every: Sequence[Submission], cells: Collection[str]) -> dict[str, _Element]:
    """The pending and running jobs of `cells`, as Slurm's commands call them."""
    known = job_states(every, waiting=lambda why: print(f"{why}; asking again", file=sys.stderr))
    return {
        each.element_of(state.job, cell): _Element(cell, state.name)
        for each in every
        for place, cell in enumerate(each.cells)
        if (state := known.get((each.job_name, place))) and state.active and cell in cells
    }


@contextlib.contextmanager
def _marks(output: Path, elements: Mapping[str, _Element]) -> Iterator[Callable[[Sequence[str]], None]]:
    """Mark the cells of `elements`; yields how to unmark some of them, which an error does with all."""
    made: list[Path] = []

    def take_back(cells: Sequence[str]) -> None:
        for mark in made:
            if mark.parent.name in cells:
                mark.unlink(missing_ok=True)

    try:
        for cell in {element.cell for element in elements.values()}:
            with contextlib.suppress(OSError):  # on a full disk, too, a job must be cancelled
                (output / cell).mkdir(exist_ok=True)
                mark = output / cell / CANCELLED
                if not mark.exists():
                    made.append(mark)
                    mark.touch()
        yield take_back
    except BaseException:
        take_back([element.cell for element in elements.values()])
        raise


def _scancel(jobs: Sequence[str]) -> str:
    """Why scancel refuses some of `jobs`; nothing when it refuses none."""
    try:
        done = commands.run(["scancel", *jobs])
    except subprocess.TimeoutExpired:
        return f"no answer within {commands.CALL_SECONDS:.0f} s"
    return (done.stderr.strip() or f"exit code {done.returncode}") if done.returncode else ""
