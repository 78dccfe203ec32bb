"""Locks that the kernel lets go of when their holder dies, however it dies; child processes inherit them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

__all__ = ["hold", "is_locked"]

POLL_SECONDS = 0.05
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # what file systems without locks say


@contextlib.contextmanager
def hold(file: Path, patience: float = 0.0) -> Iterator[IO[bytes]]:
    """Hold the lock of `file`, which is made if need be; yields it open, for its descriptor to be passed on.

    Raises:
        BlockingIOError: another process still has it after `patience` seconds.
    """
    deadline = time.monotonic() + patience
    with open(file, "ab") as opened:
        while not _takes(opened, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                raise BlockingIOError(f"{file} is locked")
            time.sleep(POLL_SECONDS)
        yield opened


def is_locked(file: Path) -> bool:
    """Whether a process holds the lock of `file`; whoever may read it may ask."""
    try:
        with open(file, "rb") as probe:
            return not _takes(probe, fcntl.LOCK_SH)
    except FileNotFoundError:
        return False


def _takes(file: IO[bytes], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return True
