"""python -m patches [--strategy tree|gather|stock] [--leaves N] [--attention unfused|flash|fused]
[--symmetric-memory] script.py ARGS…: an unmodified script, patched."""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path

import patches


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m patches", description="Run a Megatron script with the patches in.")
    parser.add_argument("--strategy", choices=("tree", "gather", "stock"), default="tree")
    parser.add_argument("--leaves", type=int, default=8, help="leaves of the tree, a power of two (default 8)")
    parser.add_argument("--attention", choices=("unfused", "flash", "fused"), default="unfused")
    parser.add_argument("--symmetric-memory", action="store_true", help="ranks read each other's sums: the same bits")
    parser.add_argument("script", type=Path)
    parser.add_argument("args", nargs=argparse.REMAINDER, help="the script's own arguments")
    options = parser.parse_args()
    if not options.script.is_file():
        parser.error(f"{options.script}: no such script")
    try:
        if options.strategy == "stock":
            patches.cpu.enable()
        else:
            patches.enable(options.strategy, options.leaves, options.attention, options.symmetric_memory)
    except (ValueError, patches.UnsupportedError) as error:
        parser.error(str(error))
    sys.argv = [str(options.script), *options.args]
    sys.path[0] = str(options.script.resolve().parent)
    runpy.run_path(str(options.script), run_name="__main__")


if __name__ == "__main__":
    main()
