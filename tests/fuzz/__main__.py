"""`python -m tests.fuzz [CASES] [SEED]`: so many cases of every kind; a table, and exit code 1 if any went wrong."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import tpcheck.run.train  # noqa: F401  once, not in every child
from tests.fuzz.cases import KINDS, Source, try_case

DEFAULTS = ["1000", "1"]


def run(cases: int, seed: int) -> int:
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        source = Source.unpacked(Path(scratch, "source"))
        for kind in KINDS:
            began, before = time.monotonic(), len(wrong)
            for number in range(seed, seed + cases):
                for line in try_case(kind, number, source, Path(scratch)):
                    print(line, flush=True)
                    wrong.append(line)
            seconds = time.monotonic() - began
            print(f"{kind:<11} {cases} cases, {len(wrong) - before} wrong, {seconds:.0f} s", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    cases, seed = (int(word) for word in [*sys.argv[1:3], *DEFAULTS[len(sys.argv) - 1 :]])
    sys.exit(run(cases, seed))
