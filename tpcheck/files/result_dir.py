"""A result directory: what a run leaves behind, and how it is written so that no kill leaves half a file.

    manifest.json   config, versions, git, hardware, data digest, patches: written once, at the start
    steps.jsonl     one JSON object a step, appended; readers pass over a last line that a kill cut short
    digests.json    the final state's logical digests, written last: a run with it is complete
    checkpoints/step-00000020/   Megatron torch_dist, renamed into place when whole

JSON only, never a pickle. Whole files are replaced by `os.replace` of a synced neighbour.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tpcheck.errors import TpcheckError

__all__ = [
    "CHECKPOINTS",
    "DIGESTS",
    "FORMAT",
    "MANIFEST",
    "STEPS",
    "append_step",
    "checkpoint_path",
    "checkpoints",
    "is_result",
    "read_digests",
    "read_formatted",
    "read_manifest",
    "read_steps",
    "sync",
    "truncate_steps",
    "write_digests",
    "write_json",
    "write_manifest",
]

FORMAT = 1
MANIFEST, STEPS, DIGESTS, CHECKPOINTS = "manifest.json", "steps.jsonl", "digests.json", "checkpoints"

Json = dict[str, Any]


def is_result(path: Path) -> bool:
    """Whether `path` looks like a result directory, whole or not."""
    return any((path / name).exists() for name in (MANIFEST, STEPS, DIGESTS, CHECKPOINTS))


def read_manifest(path: Path) -> Json:
    """The run's manifest, with at least its resolved `config`."""
    found = read_formatted(path, MANIFEST, {"config": dict})
    if not isinstance(found.get("products"), dict | None):
        raise TpcheckError(f"{path / MANIFEST}: 'products' should be an object, found {found['products']!r}")
    return found


def products(manifest: Mapping[str, Any]) -> Json | None:
    """What the run's products were made of, None of a stock run; before manifests told, they were exact everywhere."""
    return manifest.get("products", None if manifest["config"].get("strategy") == "stock" else {"leaf": "exact"})


def write_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    write_json(path / MANIFEST, {"format": FORMAT, **manifest})


def read_digests(path: Path) -> Json | None:
    """The run's final digests, or None when it has not come to its end."""
    if not (path / DIGESTS).exists():
        return None
    return read_formatted(path, DIGESTS, {"step": int, "model": str, "tensors": dict})


def write_digests(path: Path, digests: Mapping[str, Any]) -> None:
    write_json(path / DIGESTS, {"format": FORMAT, **digests})


def read_steps(path: Path) -> list[Json]:
    """The steps on record, in order; an unfinished last line, which a kill leaves, is left out."""
    file = path / STEPS
    text = file.read_bytes()[: _whole(file)] if file.exists() else b""
    records = [_parse(line, f"{file}:{number}") for number, line in enumerate(text.splitlines(), 1)]
    for before, record in zip([None, *records], records, strict=False):
        step, expected = record.get("step"), before["step"] + 1 if before else record.get("step")
        if not isinstance(step, int) or step != expected:
            wanted = "a number" if expected is None else expected
            raise TpcheckError(f"{file}: step {step!r} stands where {wanted} should; train the run again")
    return records


def append_step(path: Path, record: Mapping[str, Any]) -> None:
    """Add one step's record, synced; what a kill left of an unfinished line before it is cut off."""
    line = json.dumps(record) + "\n"
    with open(path / STEPS, "ab") as file:
        file.truncate(_whole(path / STEPS))
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def truncate_steps(path: Path, step: int) -> None:
    """Forget every step after `step`, all at once, as a resumed run must before it goes on."""
    records = [record for record in read_steps(path) if record["step"] <= step]
    _replace(path / STEPS, "".join(json.dumps(record) + "\n" for record in records))


def checkpoint_path(path: Path, step: int) -> Path:
    return path / CHECKPOINTS / f"step-{step:08d}"


def checkpoints(path: Path) -> list[tuple[int, Path]]:
    """The complete checkpoints by step; one being written has another name until it is renamed into place."""
    folder = path / CHECKPOINTS
    if not folder.is_dir():
        return []
    found = ((re.fullmatch(r"step-(\d{8,})", entry.name), entry) for entry in folder.iterdir())
    return sorted((int(match[1]), entry) for match, entry in found if match and entry.is_dir())


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Replace `file` by `value`: readers and a crash see the old file or the new one, never a part."""
    _replace(file, json.dumps(value, indent=1) + "\n")


def _replace(file: Path, text: str) -> None:
    new = file.with_name(f".{file.name}.new")
    with open(new, "wb") as out:
        out.write(text.encode())
        out.flush()
        os.fsync(out.fileno())
    os.replace(new, file)
    sync(file.parent)


def sync(path: Path) -> None:
    """Put what was written to a file, or the names in a folder, on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _whole(file: Path) -> int:
    """Bytes of `file` up to and with its last line end."""
    with open(file, "rb") as text:
        size = text.seek(0, os.SEEK_END)
        text.seek(max(size - 1, 0))
        if text.read(1) in (b"", b"\n"):
            return size
    return file.read_bytes().rfind(b"\n") + 1


def read_formatted(path: Path, name: str, required: Mapping[str, type]) -> Json:
    """The JSON object in `path`/`name`, which must have this format and hold `required` keys of these types."""
    file = path / name
    if not file.exists():
        raise TpcheckError(f"{path} has no {name}: not a result directory, or a run that never started")
    value = _parse(file.read_bytes(), str(file))
    if value.get("format") != FORMAT:
        raise TpcheckError(
            f"{file} has format {value.get('format')!r}, this tpcheck reads format {FORMAT}: "
            "use the tpcheck that wrote it, or train the run again"
        )
    for key, kind in required.items():
        if not isinstance(value.get(key), kind):
            raise TpcheckError(f"{file}: {key!r} should be a {kind.__name__}, found {value.get(key)!r}")
    return value


def _parse(text: bytes, where: str) -> Json:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TpcheckError(f"{where} is not JSON ({error}): restore it or train the run again") from error
    if not isinstance(value, dict):
        raise TpcheckError(f"{where} holds a {type(value).__name__}, not an object: not written by tpcheck")
    return value
