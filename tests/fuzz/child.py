"""One command in a process forked from this one, and what is wrong with how it ended."""

from __future__ import annotations

import os
import re
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

__all__ = ["DOCUMENTED", "complaint", "in_child"]

CPU_SECONDS = 10  # of processor time: the machine may be busy
WALL_SECONDS = 200
MEMORY = 2 << 30  # bytes beyond what a process has that has imported everything
LETTERS = 300
DOCUMENTED = (0, 1, 2, 141)


def in_child(command: Callable[[], int], folder: Path) -> tuple[int, str, str]:
    """Exit code, output and errors of `command`, run in `folder`; it may use no more than its share."""
    out, err = folder / "out.txt", folder / "err.txt"
    pid = os.fork()
    if pid == 0:
        _run(command, folder, out, err)
    deadline = time.monotonic() + WALL_SECONDS
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            break
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)
    return os.waitstatus_to_exitcode(status), out.read_text(errors="replace"), err.read_text(errors="replace")


def _run(command: Callable[[], int], folder: Path, out: Path, err: Path) -> None:
    code = 70
    try:
        os.chdir(folder)
        os.setpgid(0, 0)
        for number, file in ((1, out), (2, err)):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = int(used.ru_utime + used.ru_stime) + CPU_SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        code = command()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def complaint(code: int, errors: str, allowed: Sequence[int] = DOCUMENTED) -> str:
    """What is wrong with an exit code and the text on standard error; empty if nothing is."""
    if "Traceback" in errors:
        return f"traceback: {errors.strip().splitlines()[-1][:200]}"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}: it took too long"
    if code not in allowed:
        return f"exit code {code}"
    told = [line for line in errors.splitlines() if line.startswith("tpcheck: error:")]
    if code == 2 and len(told) > 1:
        return f"{len(told)} lines of error"
    if told and len(short := re.sub(r"(/[^\s/:,]+)+", "…", told[0])) > LETTERS:
        return f"{len(short)} letters: {short[:200]}"
    return ""
