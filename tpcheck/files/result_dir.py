"""A result directory: what a run leaves behind, and how it is written so that no kill leaves half a file.

    manifest.json   config, versions, git, hardware, data digest, patches: written once, at the start
    steps.jsonl     one JSON object a step, appended; readers pass over a last line that a kill cut short
    digests.json    the final state's logical digests, written last: a run with it is complete
    checkpoints/step-00000020/   Megatron torch_dist, renamed into place when whole

JSON only, never a pickle.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tpcheck.errors import TpcheckError
from tpcheck.files.json_files import append_line, read_lines, read_object, write_lines, write_object
from tpcheck.files.names import CHECKPOINTS, DIGESTS, MANIFEST, STEPS
from tpcheck.files.records import DigestsRecord, Json, ManifestRecord, StepRecord

__all__ = [
    "append_step",
    "bits_of",
    "checkpoint_path",
    "checkpoints",
    "code",
    "final_digests",
    "is_result",
    "products",
    "read_digests",
    "read_manifest",
    "read_steps",
    "truncate_steps",
    "write_digests",
    "write_manifest",
]

MANIFEST_FORMAT = 1
DIGESTS_FORMAT = 1


def is_result(path: Path) -> bool:
    """Whether `path` looks like a result directory, whole or not."""
    return any((path / name).exists() for name in (MANIFEST, STEPS, DIGESTS, CHECKPOINTS))


def read_manifest(path: Path) -> Json:
    """The run's manifest, with at least its resolved `config`."""
    return read_object(path / MANIFEST, MANIFEST_FORMAT, ManifestRecord)


def products(manifest: Mapping[str, Any]) -> Json | None:
    """What the run's products were made of, None of a stock run; before manifests told, they were exact everywhere."""
    return manifest.get("products", None if manifest["config"].get("strategy") == "stock" else {"leaf": "exact"})


def bits_of(products: Mapping[str, Any]) -> tuple[Any, ...]:
    """What follows from the device of `products`: their class of bits, then what its own functions and kernels gave.

    Before manifests told of classes, products on GPUs were told apart by architecture.
    """
    name = products.get("class", products.get("family", "exact"))
    return name, products.get("functions", ""), products.get("attention", "")


def code(manifest: Mapping[str, Any]) -> str | None:
    """What tells the code that made a run from other code: the digest of a copy, or a commit."""
    git = manifest.get("git") or {}
    return git.get("digest") or (f"{git.get('commit')}{' and changes' if git.get('dirty') else ''}" if git else None)


def write_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    write_object(path / MANIFEST, {"format": MANIFEST_FORMAT, **manifest})


def read_digests(path: Path) -> Json | None:
    """The digests of the last step that a run has come to the end of; None of one that never has."""
    if not (path / DIGESTS).exists():
        return None
    return read_object(path / DIGESTS, DIGESTS_FORMAT, DigestsRecord)


def final_digests(path: Path, steps: int) -> Json | None:
    """The digests after `steps` steps: a run of so many is complete if it has them."""
    digests = read_digests(path)
    return digests if digests is not None and digests["step"] == steps else None


def write_digests(path: Path, digests: Mapping[str, Any]) -> None:
    write_object(path / DIGESTS, {"format": DIGESTS_FORMAT, **digests})


def read_steps(path: Path) -> list[Json]:
    """The steps on record, in order; an unfinished last line, which a kill leaves, is left out."""
    records = read_lines(path / STEPS, StepRecord)
    for before, record in zip([None, *records], records, strict=False):
        step, expected = record["step"], before["step"] + 1 if before else record["step"]
        if step != expected:
            raise TpcheckError(f"{path / STEPS}: step {step} stands where {expected} should; train the run again")
    return records


def append_step(path: Path, record: Mapping[str, Any]) -> None:
    """Add one step's record, on disk when this returns."""
    append_line(path / STEPS, record)


def truncate_steps(path: Path, step: int) -> None:
    """Forget every step after `step`, all at once, as a resumed run must before it goes on."""
    write_lines(path / STEPS, [record for record in read_steps(path) if record["step"] <= step])


def checkpoint_path(path: Path, step: int) -> Path:
    return path / CHECKPOINTS / f"step-{step:08d}"


def checkpoints(path: Path) -> list[tuple[int, Path]]:
    """The complete checkpoints by step; one being written has another name until it is renamed into place."""
    folder = path / CHECKPOINTS
    if not folder.is_dir():
        return []
    found = ((re.fullmatch(r"step-(\d{8,})", entry.name), entry) for entry in folder.iterdir())
    return sorted((int(match[1]), entry) for match, entry in found if match and entry.is_dir())
