"""Why a run ended, for the batch script that decides whether to start it again: lines in the file TPCHECK_ENDS.

    stopped   a signal asked for it, and everything is saved     start again
    lost      another rank or the network went away              start again
    failed    an error of the user's or ours: it would recur     never

An exit code can't tell these apart: when one rank fails, Slurm kills the others, and torchrun says 1 to everything.
A rank that is killed writes nothing; its peers write that they lost it.
"""

from __future__ import annotations

import contextlib
import json
import os
import traceback
from typing import Literal

__all__ = ["Kind", "is_wanted", "one_line", "record", "record_error"]

VARIABLE = "TPCHECK_ENDS"
# What torch says when a peer, the network or a device has gone; DistError and its kin are asked by their names.
LOST = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "ECC error", "NVLink")

Kind = Literal["stopped", "lost", "failed"]


def is_wanted() -> bool:
    """Whether a batch script has started this run."""
    return VARIABLE in os.environ


def record(kind: Kind, why: str, rank: int = 0) -> None:
    """Add a line, if anybody wants to know."""
    if not (path := os.environ.get(VARIABLE)):
        return
    line = json.dumps({"kind": kind, "rank": rank, "why": why})
    with contextlib.suppress(OSError), open(path, "a", encoding="utf-8") as file:  # a full disk has been reported
        file.write(line + "\n")


def record_error(error: BaseException, rank: int) -> None:
    """Add a line on what ended this rank."""
    record("lost" if _is_lost(error) else "failed", one_line(error), rank)


def one_line(error: BaseException) -> str:
    return " ".join("".join(traceback.format_exception_only(error)).split())[:400]


def _is_lost(error: BaseException) -> bool:
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "DistError" in kinds or ("RuntimeError" in kinds and any(word in str(error) for word in LOST)):
        return True
    return error.__cause__ is not None and _is_lost(error.__cause__)  # a checkpoint that a peer's end kept from loading
