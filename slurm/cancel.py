"""`tpcheck cancel DIR [CELL…]`: scancel exactly the array elements that still belong to these cells."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from slurm import submissions
from slurm.queue import job_states
from tpcheck.errors import TpcheckError
from tpcheck.files.names import CANCELLED
from tpcheck.sweep.stored_spec import read_sweep

__all__ = ["command"]


def command(output: Path, cells: Sequence[str] = ()) -> int:
    """Cancel the pending and running jobs of `cells`, of all when none is named."""
    every = submissions.read(output)
    submitted = {cell for submission in every for cell in submission.cells}
    names = [cell.name for cell in read_sweep(output).cells]
    strangers = [cell for cell in cells if cell not in submitted and cell not in names]
    if strangers:
        raise TpcheckError(f"{strangers[0]} is no cell of {output}: it has {', '.join(names)}")
    known = job_states(every, waiting=lambda why: print(f"{why}; asking again", file=sys.stderr))
    elements = {
        f"{state.job}_{place}" if len(each.cells) > 1 else state.job: each.cells[place]
        for each in every
        for place in range(len(each.cells))
        if (state := known.get((each.job_name, place))) and state.active and each.cells[place] in (cells or submitted)
    }
    if not elements:
        print("nothing to cancel: none of these cells is pending or running")
        return 0
    for cell in elements.values():  # first: a script that is about to queue again looks for it
        with contextlib.suppress(OSError):  # on a full disk, too, a job must be cancelled
            (output / cell).mkdir(exist_ok=True)
            (output / cell / CANCELLED).touch()
    done = subprocess.run(["scancel", *elements], capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise TpcheckError(f"scancel: {done.stderr.strip()}")
    for job, cell in elements.items():
        print(f"cancelled {cell} (job {job})")
    return 0
