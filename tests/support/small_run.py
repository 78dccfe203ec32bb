"""A run of one small layer, by `tpcheck train` as users call it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tpcheck.cli import main

RUN = """
model: {preset: qwen3-tiny, num_layers: 1}
seq_length: 24
micro_batch_size: 2
global_batch_size: 4
"""


def run_file(folder: Path) -> Path:
    path = folder / "run.yaml"
    path.write_text(RUN)
    return path


def train(folder: Path, output: str, *overrides: str, resume: bool = False) -> dict[str, Any]:
    """Train into `folder / output`; the digests, if the run has come to its end."""
    flags = ["--resume"] if resume else []
    assert main(["train", str(run_file(folder)), f"output={folder / output}", *overrides, *flags]) == 0
    digests = folder / output / "digests.json"
    found = json.loads(digests.read_text()) if digests.exists() else {}
    return {key: value for key, value in found.items() if key != "beside"}  # which follows from layers and layout
