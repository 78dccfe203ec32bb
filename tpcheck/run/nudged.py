"""A traced run trained again with every rounding nudged, which shows what rounding may do to it."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tpcheck.config.load import parse_run
from tpcheck.errors import TpcheckError
from tpcheck.files import result_dir
from tpcheck.files.names import CHECKPOINTS, NUDGED
from tpcheck.run.launch import launch
from tpcheck.trace.record.noise import REDRAWN, nudged_folder, nudged_folders

__all__ = ["make_nudged_runs"]


def make_nudged_runs(path: Path, redrawn: bool = False, *, seeds: int) -> None:
    """Train the run at `path` again in its folders `noise-1` to `noise-<seeds>`, unless it has so many; a mere trace
    is left alone. `redrawn` ones, whose dropout drops other elements, are numbered from 101."""
    first = REDRAWN if redrawn else 1
    found = nudged_folders(path)
    alike = [folder for folder in found if (_seed(folder) >= REDRAWN) == redrawn]
    if len(alike) >= seeds or not result_dir.is_result(path):
        return
    for seed in range(first, first + seeds):
        folder = nudged_folder(path, seed)
        if folder not in found:
            _run_again(path, folder, seed)


def _seed(folder: Path) -> int:
    text = folder.name.removeprefix(NUDGED)
    return int(text) if text.isdecimal() else 0


def _run_again(path: Path, folder: Path, seed: int) -> None:
    settings: dict[str, Any] = result_dir.read_manifest(path)["config"]
    steps = max(settings["trace"]["steps"]) + 1
    changes = {"output": str(folder), "steps": steps, "stop_after": None, "checkpoint_every": 0}
    config = parse_run({**settings, **changes, "trace": {**settings["trace"], "perturb": seed}}, str(path))
    print(f"running {path} again with every rounding nudged, seed {seed}", file=sys.stderr)
    with _stdout_to_stderr():
        code = launch(config)
    if code:
        raise TpcheckError(f"{folder}: the nudged run failed, see its log.txt")
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """What a run says of its progress is not what `tpcheck compare` has been asked for."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)
