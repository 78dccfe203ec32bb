"""`tpcheck hash` against b3sum and sha256sum over the same files: `python tests/bench/bench_hash.py [MiB]`.

Two checkpoints of the same tensors: cut along their rows, which are read as they lie in the files, and along
their columns, where every row is put together from eight pieces.
"""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch

from tests.support.torch_dist import along, save
from tpcheck.checkpoint.digest import digest_checkpoint

ROUNDS = 5


def main(mebibytes: int = 512) -> None:
    layers = max(1, mebibytes // 64)
    tensors = {f"decoder.layers.{layer}.weight": torch.randn(4096, 4096) for layer in range(layers)}
    with tempfile.TemporaryDirectory() as scratch:
        paths = {dim: save(Path(scratch) / f"dim{dim}", tensors, along(dim, 8)) for dim in (0, 1)}
        files = [str(file) for file in paths[0].glob("*.distcp")]
        commands = {
            "b3sum": ["b3sum", *files],
            "b3sum, one thread": ["b3sum", "--num-threads=1", *files],
            "sha256sum": ["sha256sum", *files],
        }
        works = {name: partial(_run, command) for name, command in commands.items() if shutil.which(command[0])}
        works |= {f"tpcheck, cut along dim {dim}": partial(digest_checkpoint, path) for dim, path in paths.items()}
        times = _best(works)
    fastest = min(commands.keys() & times.keys(), key=lambda name: times[name])
    size = sum(tensor.nbytes for tensor in tensors.values())
    for name, seconds in times.items():
        print(f"{name:24} {size / seconds / 1e9:6.2f} GB/s {times[fastest] / seconds:6.2f} of {fastest}")


def _best(works: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Best time of each, taking turns, so that a busy machine slows all of them alike."""
    times = dict.fromkeys(works, math.inf)
    for _ in range(ROUNDS):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            times[name] = min(times[name], time.perf_counter() - start)
    return times


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
