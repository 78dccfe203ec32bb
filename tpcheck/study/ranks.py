"""Gloo ranks for a study: forked from this process after its imports, on one thread each.

Nobody may have used JAX in this process before: its threads do not survive a fork.
"""

from __future__ import annotations

import os
import pickle
import socket
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import FileStore  # type: ignore[attr-defined]
from torch.multiprocessing.spawn import start_processes

__all__ = ["on_ranks"]

TIMEOUT = timedelta(minutes=10)


def on_ranks(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(*arguments)` on `size` new ranks; what each returned, in rank order. An error of a rank is raised."""
    with tempfile.TemporaryDirectory(prefix="tpcheck-") as scratch:
        start_processes(_rank, (size, Path(scratch), function, arguments), nprocs=size, start_method="fork")
        return [pickle.loads((Path(scratch) / f"{rank}").read_bytes()) for rank in range(size)]


def _rank(rank: int, size: int, scratch: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    if "lo" in (name for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = FileStore(str(scratch / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    result = function(*arguments)
    (scratch / f"{rank}").write_bytes(pickle.dumps(result))
    dist.barrier()
    dist.destroy_process_group()
