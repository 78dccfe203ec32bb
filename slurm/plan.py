"""`tpcheck sweep SWEEP.yaml --plan`: prepare a sweep's directory for `sweep.sbatch`, submit nothing.

    DIR/sweep.json, DIR/CELL/run.yaml, DIR/cells.txt     a line for every cell, in the order of the array
    DIR/code/DIGEST                                      where it is not called in a clone, whose code would do

Prints one line to submit for every kind of machine and number of ranks, more where arrays must be small; the site's
own options are the user's.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from slurm.commands import max_array_size
from tpcheck.files.names import CELLS
from tpcheck.sweep.completeness import is_complete, only_one
from tpcheck.sweep.spec import load_sweep
from tpcheck.sweep.stored_spec import prepare_job, write_sweep

__all__ = ["command", "plan"]


def command(path: Path, overrides: Sequence[str]) -> int:
    print("\n".join(plan(path, overrides)) or "every cell is complete")
    return 0


def plan(path: Path, overrides: Sequence[str] = ()) -> list[str]:
    """Write the directory; the lines that submit it."""
    sweep = load_sweep(path, overrides)
    largest = max_array_size() or len(sweep.cells)
    arrays: dict[tuple[str | None, int, int], list[str]] = {}
    with only_one(sweep.output):
        todo = [(place, cell) for place, cell in enumerate(sweep.cells) if not is_complete(cell)]
        write_sweep(sweep)
        for place, cell in todo:
            prepare_job(cell)
            first = place - place % largest
            arrays.setdefault((cell.arch, cell.config.world_size, first), []).append(str(place - first))
        (sweep.output / CELLS).write_text("".join(f"{cell.name}\n" for cell in sweep.cells))
    script, code = Path(__file__).with_name("sweep.sbatch"), _code(sweep.output)
    return [
        f"OUTPUT={shlex.quote(str(sweep.output))} {f'FIRST={first} ' if first else ''}{code}"
        f"sbatch --array={','.join(places)} --ntasks={ranks} "
        f"{f'--constraint={shlex.quote(arch)} ' if arch else ''}{shlex.quote(str(script))}"
        for (arch, ranks, first), places in arrays.items()
    ]


def _code(output: Path) -> str:
    """Where jobs find the code, for sweep.sbatch: in the clone that they are submitted from, or else in a copy."""
    if Path.cwd().samefile(Path(__file__).parents[1]):
        return ""
    from slurm.snapshot import Snapshot  # imports torch, which a login shell in a clone can do without

    return f"CODE={shlex.quote(str(Snapshot.now().write(output)))} "
