"""Real gloo ranks for tests: forked from this process after its imports, each with its own result or traceback."""

from __future__ import annotations

import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def on_ranks(size: int, function: Callable[..., Any], *args: Any, timeout: float = 240, threads: int = 1) -> list[Any]:
    """`function(*args)` on `size` forked gloo ranks; their results in rank order.

    More than one thread a rank only from a process that has not used OpenMP yet: its threads don't survive a fork.

    Raises AssertionError with the first traceback when a rank fails, and when `timeout` seconds are over.
    """
    with tempfile.TemporaryDirectory() as folder:
        pids = [_fork(rank, size, Path(folder), function, args, threads) for rank in range(size)]
        _wait(pids, Path(folder), time.monotonic() + timeout)
        return [pickle.loads((Path(folder) / f"{rank}.result").read_bytes()) for rank in range(size)]


def _fork(rank: int, size: int, folder: Path, function: Callable[..., Any], args: tuple[Any, ...], threads: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        torch.set_num_threads(threads)
        store = dist.FileStore(str(folder / "store"), size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=120))
        result = function(*args)
        (folder / f"{rank}.result").write_bytes(pickle.dumps(result))
        dist.barrier()
        dist.destroy_process_group()
        code = 0
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
    finally:
        os._exit(code)


def _wait(pids: list[int], folder: Path, deadline: float) -> None:
    left = set(pids)
    failed = None
    while left and failed is None:
        for pid in list(left):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                left.discard(pid)
                if status:
                    failed = f"rank {pids.index(pid)} ended with status {status}"
        if time.monotonic() > deadline:
            failed = "timeout"
        time.sleep(0.01)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    if failed:
        errors = [path.read_text() for path in sorted(folder.glob("*.error"))]
        raise AssertionError("\n".join([failed, *errors[:2]]))
