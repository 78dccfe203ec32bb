"""Result directories as `tpcheck train` leaves them, without the training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tpcheck.files import result_dir
from tpcheck.sweep.spec import Cell, Sweep, load_sweep

BASE = {"model": "qwen3-tiny", "steps": 3}
MATRIX = {"strategy": ["stock", "tree"], "tp": [1, 2]}


def sweep_file(folder: Path, **changes: object) -> Path:
    """A sweep file in `folder`, with its output there too."""
    content = {"name": "s", "base": BASE, "matrix": MATRIX, "output": str(folder / "out"), **changes}
    path = folder / "s.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def sweep(folder: Path, **changes: object) -> Sweep:
    return load_sweep(sweep_file(folder, **changes))


def finish(
    cell: Cell,
    losses: Sequence[float] = (3.0, 2.0, 1.0),
    model: str = "aa" * 32,
    optimizer: str | None = "bb" * 32,
    notes: Sequence[str] = (),
    **manifest: Any,
) -> None:
    """Make `cell` look as if it had been trained to its end with these losses and digests."""
    begin(cell, losses, **manifest)
    digests = {"algorithm": "blake3", "step": cell.config.steps, "model": model, "optimizer": optimizer}
    result_dir.write_digests(cell.path, {**digests, "tensors": {"model": {}, "optimizer": {}}, "notes": list(notes)})


def begin(cell: Cell, losses: Sequence[float] = (), **manifest: Any) -> None:
    """Make `cell` look as if it had been interrupted after these losses."""
    cell.path.mkdir(parents=True)
    result_dir.write_manifest(cell.path, {"config": cell.config.model_dump(mode="json"), **manifest})
    for step, loss in enumerate(losses, 1):
        record = {"step": step, "loss": loss, "loss_hex": loss.hex(), "tokens": 256, "seconds": 0.5}
        result_dir.append_step(cell.path, {**record, "grad_norm": 1.0, "grad_norm_hex": (1.0).hex(), "lr": 1e-3})
