"""python -m patches [--strategy tree|gather|stock] [--leaves N] [--attention blockwise|unfused|flash|fused]
[--symmetric-memory] [--batch ordered|order-free [--chunks N]] [--trace OUT [--steps 0,1] [--perturb N]] script.py
ARGS…: an unmodified script, patched, and traced for `tpcheck compare` if asked for."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import runpy
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn, get_args

import torch.distributed as dist

import patches
from patches.contract import Attention, Batch, Strategy

BAD_INPUT = 2
PROMISED = ("leaves", "attention", "symmetric_memory", "batch", "chunks")  # options that a stock run would not heed


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m patches", description="Run a Megatron script with the patches in.")
    parser.add_argument("--strategy", choices=(*get_args(Strategy), "stock"), default="tree")
    parser.add_argument("--leaves", type=int, default=8, help="leaves of the tree, a power of two (default 8)")
    parser.add_argument("--attention", choices=get_args(Attention))
    parser.add_argument("--symmetric-memory", action="store_true", help="ranks read each other's sums: the same bits")
    parser.add_argument("--batch", choices=get_args(Batch), default="ordered", help="order-free: the same bits at every"
                        " PP, DP and micro-batch size, too")  # fmt: skip
    parser.add_argument("--chunks", type=int, default=1, help="with --batch order-free: into how many a sequence is cut"
                        ", 2·c for the same bits at every context-parallel size up to c (default 1)")  # fmt: skip
    parser.add_argument("--trace", type=Path, metavar="OUT", help="record training steps there, for tpcheck compare")
    parser.add_argument("--steps", metavar="N,N", help="with --trace: which, from 0 at the first (default 0,1)")
    parser.add_argument(
        "--perturb", type=int, default=0, metavar="SEED", help="with --trace: nudged, to OUT/noise-SEED"
    )
    parser.add_argument("script", type=Path)
    parser.add_argument("args", nargs=argparse.REMAINDER, help="the script's own arguments")
    options = parser.parse_args()
    if not options.script.is_file():
        parser.error(f"{options.script}: no such script")
    ours = [name for name in PROMISED if getattr(options, name) != parser.get_default(name)]
    if options.strategy == "stock" and ours:
        parser.error(f"--{ours[0].replace('_', '-')} is the patches': use --strategy tree or gather, or leave it out")
    sys.argv = [str(options.script), *options.args]
    sys.path[0] = str(options.script.resolve().parent)  # before the patches look for Megatron
    try:
        if options.strategy == "stock":
            patches.cpu.enable()
        else:
            patches.enable(options.strategy, options.leaves, options.attention, options.symmetric_memory,
                           options.batch, options.chunks)  # fmt: skip
    except (ValueError, patches.UnsupportedError) as error:
        _refuse(str(error))
    try:
        with _traced(options.trace, options.steps, options.perturb):
            runpy.run_path(str(options.script), run_name="__main__")
    except patches.UnsupportedError as error:
        _refuse(str(error))


@contextlib.contextmanager
def _traced(out: Path | None, steps: str | None, perturb: int) -> Iterator[None]:
    if out is None:
        if steps is not None or perturb:
            _refuse("--steps and --perturb say how to trace: add --trace OUT")
        yield
        return
    from tpcheck.errors import TpcheckError
    from tpcheck.trace.record.script import STEPS, trace_script

    try:
        numbers = STEPS if steps is None else [int(number) for number in steps.split(",")]
    except ValueError:
        _refuse(f"--steps {steps}: name them by numbers from 0, as in --steps 0,1")
    try:
        with trace_script(out, numbers, perturb):
            yield
    except TpcheckError as error:
        _refuse(str(error))


def _refuse(message: str) -> NoReturn:
    """One line from all ranks together; torchrun, which reports every rank that fails, is told the reason, too."""
    message = re.sub(r"( when instantiating \w+)+$", "", message)  # Megatron adds what it was building
    if _is_first():
        print(f"python -m patches: {message}", file=sys.stderr)
    if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        told = {"message": message, "extraInfo": {"py_callstack": message, "timestamp": str(int(time.time()))}}
        Path(report).write_text(json.dumps({"message": told}))
    sys.exit(BAD_INPUT)


def _is_first() -> bool:
    """Whether no other rank has come here before; as long as they are not connected, rank 0 it is."""
    if not dist.is_initialized():
        return os.environ.get("RANK", "0") == "0"
    try:
        return dist.distributed_c10d._get_default_store().add("patches/refusals", 1) == 1
    except (RuntimeError, ValueError):  # whoever keeps the store has left
        return False


if __name__ == "__main__":
    main()
