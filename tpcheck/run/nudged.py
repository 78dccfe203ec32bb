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
    settings = _traced_with(path)
    for seed in range(first, first + seeds):
        folder = nudged_folder(path, seed)
        if folder not in found and settings is not None:
            _run_again(path, settings, folder, seed)


def _seed(folder: Path) -> int:
    text = folder.name.removeprefix(NUDGED)
    return int(text) if text.isdecimal() else 0


def _traced_with(path: Path) -> dict[str, Any] | None:
    """The settings that the trace of the run was made with: it may have gone on with others since."""
    manifest = result_dir.read_manifest(path)
    settings = (one["config"] for one in (*manifest.get("history", ()), manifest))
    return next((one for one in settings if one.get("trace")), None)


def _run_again(path: Path, settings: dict[str, Any], folder: Path, seed: int) -> None:
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
