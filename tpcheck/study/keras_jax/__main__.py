"""A job in a process of its own: `python -m tpcheck.study.keras_jax JOB < arguments.json`; the answer is printed."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys


def main() -> None:
    module, _, function = sys.argv[1].rpartition(".")
    with contextlib.redirect_stdout(sys.stderr):
        answer = getattr(importlib.import_module(f"tpcheck.study.keras_jax.{module}"), function)(**json.load(sys.stdin))
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
