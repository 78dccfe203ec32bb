"""What a sweep file has become, in the sweep's directory: for whoever comes later without the file.

DIR/sweep.json       the cells; written whenever `tpcheck sweep` runs, here or on a cluster: the last call counts
DIR/CELL/run.yaml    the cell's configuration, resolved: what its run is started with
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tpcheck.config.load import parse_run
from tpcheck.errors import TpcheckError, shown
from tpcheck.files.json_files import read_object, write_object
from tpcheck.files.names import CANCELLED, DIGESTS, EXIT_REASONS, RUN, SWEEP
from tpcheck.files.records import SweepRecord
from tpcheck.sweep.spec import Cell, Sweep

__all__ = ["prepare_job", "read_sweep", "write_run", "write_sweep"]

FORMAT = 1


def write_sweep(sweep: Sweep) -> None:
    """Leave the cells beside their results."""
    sweep.output.mkdir(parents=True, exist_ok=True)
    cells = [
        {
            "name": cell.name,
            "settings": dict(cell.settings),
            "group": dict(cell.group),
            "arch": cell.arch,
            "config": cell.config.model_dump(mode="json"),
        }
        for cell in sweep.cells
    ]
    plan = {"format": FORMAT, "name": sweep.name, "output": str(sweep.output), "invariant": list(sweep.invariant)}
    write_object(sweep.output / SWEEP, {**plan, "cells": cells})


def write_run(cell: Cell, output: Path) -> Path:
    """Leave the cell's run file, whose results are to go to `output`, in the cell's directory."""
    cell.path.mkdir(parents=True, exist_ok=True)
    config = cell.config.model_dump(mode="json") | {"output": str(output)}
    (cell.path / RUN).write_text(yaml.safe_dump(config, sort_keys=False))
    return cell.path / RUN


def prepare_job(cell: Cell) -> None:
    """Make the cell's directory what a job on a cluster wants to find."""
    write_run(cell, cell.path.absolute())  # wherever the job starts
    (cell.path / CANCELLED).unlink(missing_ok=True)
    (cell.path / EXIT_REASONS).unlink(missing_ok=True)  # why an earlier job ended is no reason of this one
    (cell.path / DIGESTS).unlink(missing_ok=True)  # of fewer steps, or the cell would be complete


def read_sweep(output: Path) -> Sweep:
    """The sweep whose results are in `output`, wherever that directory is now."""
    if not (output / SWEEP).exists():
        raise TpcheckError(f"{output} has no {SWEEP}: name the directory of a sweep that was started")
    plan = read_object(output / SWEEP, FORMAT, SweepRecord)
    try:
        cells = tuple(_cell(given, output) for given in plan["cells"])
    except (KeyError, TypeError, ValueError) as error:
        raise TpcheckError(f"{output / SWEEP}: a cell is not as tpcheck writes it ({shown(error)})") from error
    return Sweep(plan["name"], output, cells, tuple(plan["invariant"]))


def _cell(given: dict[str, Any], output: Path) -> Cell:
    name, settings, group = given["name"], given["settings"], given["group"]
    if Path(name).name != name:
        raise ValueError(f"{name} is no name")
    if not isinstance(settings, dict) or not isinstance(group, dict):
        raise TypeError("settings or group is no object")
    config = parse_run({**given["config"], "output": str(output / name)}, f"{output / SWEEP}, {name}")
    return Cell(name, settings, group, config, given["arch"])
