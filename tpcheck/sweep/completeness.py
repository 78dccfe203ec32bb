"""What a cell's directory says of it: complete, held by a process, made with other settings.

A cell is complete when it has the digests of its last step, and by nothing else.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tpcheck.config.differences import settings_differences
from tpcheck.config.dotted import flat
from tpcheck.config.schema import RunConfig
from tpcheck.errors import TpcheckError
from tpcheck.files import result_dir
from tpcheck.files.lock import hold, is_locked
from tpcheck.files.names import LOCK, LOG, MANIFEST
from tpcheck.sweep.spec import Cell

__all__ = ["Digests", "differ", "digests_of", "is_complete", "only_one", "other_settings"]

CELL_FREE = ("output", "stop_after")  # settings that two runs of the same cell may differ in


@dataclass(frozen=True)
class Digests:
    """One cell's final state; an optimizer that was saved without logical tensors, or wrong, has no digest."""

    model: str
    optimizer: str | None
    notes: tuple[str, ...] = field(default=(), compare=False)  # why there is none


def differ(states: Collection[Digests]) -> bool:
    """Whether any two of the states are known not to be the same."""
    models, optimizers = {state.model for state in states}, {state.optimizer for state in states}
    return len(models) > 1 or len(optimizers - {None}) > 1


def digests_of(cell: Cell) -> Digests | None:
    """The digests of a complete cell's final state; None of any other cell."""
    with contextlib.suppress(OSError):
        os.listdir(cell.path)  # a network file system may answer from memory until it is asked for the whole folder
    found = result_dir.final_digests(cell.path, cell.config.steps)
    return None if found is None else Digests(found["model"], found.get("optimizer"), tuple(found.get("notes", ())))


def is_complete(cell: Cell) -> bool:
    """Whether the cell, which is to be run otherwise, needs no run any more.

    Raises:
        TpcheckError: a process is running the cell, or it was made with other settings.
    """
    if is_locked(cell.path / LOCK):
        raise TpcheckError(f"cell {cell.name} is being run by another process: wait for it, or end it, then call again")
    if not (cell.path / MANIFEST).exists():
        return False
    if changes := other_settings(cell, result_dir.read_manifest(cell.path)["config"]):
        first = "wait for what is training it, or end that" if is_locked(cell.path / LOG) else "remove it"
        raise TpcheckError(f"{cell.path} was made with other settings ({changes}): {first}, or add output=DIR")
    return digests_of(cell) is not None


def other_settings(cell: Cell, config: Mapping[str, Any]) -> str:
    """What is different in `config`, the cell's own at another time; what it did not know had its default."""
    there = flat(RunConfig().model_dump(mode="json")) | flat(config)
    differing = settings_differences(there, cell.config.model_dump(mode="json"), ignore=CELL_FREE)
    return ", ".join(f"{key}: {before} there, {after} now" for key, (before, after) in differing.items())


@contextlib.contextmanager
def only_one(output: Path) -> Iterator[None]:
    """Hold the sweep's own lock, so that no second sweep writes to the same directory.

    Raises:
        TpcheckError: another sweep has it.
    """
    output.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(hold(output / LOCK))
        except BlockingIOError:
            raise TpcheckError(f"another sweep writes to {output}: wait for it, or add output=DIR") from None
        yield
