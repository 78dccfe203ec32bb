"""Ranks forked from this process after one import, and what becomes of them.

    fork_ranks ── fork them ── work(place, pulse) in each ── wait
                                   └─ the first that fails takes the others with it

A forked rank leads its own process group and dies with its parent, so nothing is left behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tpcheck.errors import TpcheckError
from tpcheck.files.json_files import write_object
from tpcheck.run import exit_reason
from tpcheck.run.heartbeat import ENDED, PATIENCE, Pulse, no_sign_of
from tpcheck.run.place import Place

__all__ = ["SIGNALS", "fork_ranks"]

SIGNALS = {signal.SIGTERM, signal.SIGUSR2, signal.SIGINT}  # each asks a run to save and leave
POLL_SECONDS = 0.05
GRACE_SECONDS = 1.0  # for the other ranks to say why they fail, before they are killed
PR_SET_PDEATHSIG = 1

Work = Callable[[Place, Pulse], None]


def fork_ranks(world_size: int, log: Path, work: Work) -> tuple[int, int | None]:
    """Do `work` in `world_size` ranks forked from here.

    Args:
        log: where it is noted what has ended them.
        work: what a rank does, given its place and where to show that it is alive; it unblocks `SIGNALS`.

    Returns:
        An exit code, and the signal that asked the ranks to stop, if one did.

    Raises:
        TpcheckError: bad input that a rank found.
    """
    ranks: dict[int, int] = {}
    pulse = Pulse(world_size)
    with tempfile.TemporaryDirectory(prefix="tpcheck-") as scratch, _forwarded_signals(ranks) as asked:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            for rank in range(world_size):
                place = Place(rank, world_size, rank, f"file://{scratch}/store")
                ranks[rank] = _fork(work, place, Path(scratch), pulse)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        code = _supervise(ranks, Path(scratch), log, pulse, asked)
    return code, asked[0] if asked else None


@contextlib.contextmanager
def _forwarded_signals(ranks: dict[int, int]) -> Iterator[list[int]]:
    """While this lasts, requests to stop, which are listed, go to every rank; a second Ctrl-C ends them at once."""
    asked: list[int] = []

    def forward(number: int, frame: object) -> None:
        if number == signal.SIGINT and number in asked:
            raise KeyboardInterrupt
        asked.append(number)
        for pid in ranks.values():
            with contextlib.suppress(ProcessLookupError):
                # A terminal's user has a second Ctrl-C, and Slurm its time limit: only SIGTERM has to be quick.
                os.kill(pid, signal.SIGTERM if number == signal.SIGTERM else signal.SIGUSR2)

    before = {number: signal.signal(number, forward) for number in SIGNALS}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _fork(work: Work, place: Place, scratch: Path, pulse: Pulse) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setpgid(0, 0)
        _die_with_parent()
        os.register_at_fork(after_in_child=_die_with_parent)
        place.announce()
        if "lo" in (name for _, name in socket.if_nameindex()):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        code = _reported(work, place, scratch, pulse)
    finally:
        os._exit(code)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _reported(work: Work, place: Place, scratch: Path, pulse: Pulse) -> int:
    """Do a rank's work; why it fails goes to a file of its own in `scratch`."""
    try:
        work(place, pulse)
        return 0
    except TpcheckError as error:
        report = {"refused": True, "why": str(error)}
    except BaseException as error:
        report = {"refused": False, "why": exit_reason.one_line(error)}
    write_object(scratch / f"rank-{place.rank}.json", {"time": time.time(), **report})
    return 1


def _supervise(ranks: dict[int, int], scratch: Path, log: Path, pulse: Pulse, asked: list[int]) -> int:
    """Wait for all ranks; when one fails or is lost, end the others. Bad input that a rank found is raised here."""
    waiting, failed, deadline = dict(ranks), {}, float("inf")
    silent: list[int] = []
    try:
        while waiting and time.monotonic() < deadline:
            for rank, pid in list(waiting.items()):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if not ended:
                    continue
                del waiting[rank]
                if status:
                    failed[rank] = os.waitstatus_to_exitcode(status)
                    _kill_group(pid)
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
            silent = [rank for rank in pulse.lost(POLL_SECONDS, bool(asked)) if rank in waiting]
            if silent:
                break
            time.sleep(POLL_SECONDS)
    finally:
        for pid in waiting.values():
            _kill_group(pid)
            os.waitpid(pid, 0)
    if silent:
        return _tell(log, no_sign_of(silent[0]), waiting, "lost")
    if not failed:
        return 0
    reports = {rank: _report(scratch, rank, code) for rank, code in failed.items()}
    rank = min(reports, key=lambda rank: (reports[rank]["order"], reports[rank].get("time", 0.0)))
    if reports[rank].get("refused"):
        raise TpcheckError(reports[rank]["why"])
    why = f"rank {rank} {reports[rank]['why']}"
    if failed[rank] < 0:
        _tell(log, why, waiting)
        return 128 - failed[rank]  # as a shell says it
    if failed[rank] == ENDED:
        _tell(log, why, waiting)
        return ENDED
    return _tell(log, why, waiting, "failed")


def _tell(log: Path, why: str, waiting: dict[int, int], kind: exit_reason.Kind | None = None) -> int:
    """Say why the run has ended, in the log, on the screen and, as `kind`, to a batch script; its exit code."""
    message = f"{why} (the {len(waiting)} ranks still running were ended)" if waiting else why
    with open(log, "a", encoding="utf-8") as file:
        print(f"[launch] {message}", file=file)
    print(f"tpcheck: {message}; see {log}", file=sys.stderr)
    if kind:
        exit_reason.record(kind, why)
    return 1


def _report(scratch: Path, rank: int, code: int) -> dict[str, Any]:
    """Why a rank ended; a lower `order` is nearer to the cause: the others often fail because it did."""
    if code < 0:
        name = signal.Signals(-code).name
        return {"order": 2 if code == -signal.SIGABRT else 0, "why": f"was killed by {name}"}
    if code == ENDED:
        return {"order": 2, "why": f"did not end its step within {PATIENCE:.0f} s of SIGTERM"}
    try:
        report = json.loads((scratch / f"rank-{rank}.json").read_text())
    except (OSError, ValueError):
        return {"order": 3, "why": f"ended with exit code {code}"}
    return {"order": 1, **report, "why": report["why"] if report["refused"] else f"failed: {report['why']}"}


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
