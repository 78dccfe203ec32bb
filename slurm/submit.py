"""`tpcheck sweep FILE --cluster NAME`: the cells that need a run, handed to Slurm as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tpcheck.errors import TpcheckError

__all__ = ["command"]


def command(path: Path, overrides: Sequence[str], cluster: str, dry_run: bool = False, wait: bool = False) -> int:
    """Submit what is neither complete nor pending nor running of the sweep at `path` to `cluster`."""
    raise TpcheckError("not yet")
