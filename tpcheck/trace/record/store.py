"""A rank's trace on disk: safetensors files of bounded size, and a line of JSON for every record.

    rank-00000/rank.json           where the rank stands, what was asked for; `records` once the trace is whole
               records.jsonl       name, kind, step, shape, offsets of its boxes … one line a record
               settings.jsonl      what each step is made with, a line a step
               000000.safetensors  the boxes of the records that say `file: 0`, as "<record>.<box>"

Records wait in memory until they fill a file; nothing else is kept.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tpcheck.errors import TpcheckError
from tpcheck.files.json_files import write_object
from tpcheck.files.names import RANK, RECORDS, SETTINGS
from tpcheck.trace.record.shards import Shards

__all__ = ["FORMAT", "Writer", "discard_unfinished", "rank_folder", "require_untraced"]

FORMAT = 1
FILE_BYTES = 32 << 20


def rank_folder(trace: Path, rank: int) -> Path:
    return trace / f"rank-{rank:05d}"


def require_untraced(folder: Path, instead: str = "name another folder, or remove it") -> None:
    """Raise `TpcheckError` where `folder`, a trace's or one rank's, holds a trace already; `instead` is the way out."""
    if (folder / RANK).exists() or any(folder.glob(f"rank-*/{RANK}")):
        raise TpcheckError(f"{folder} holds a trace already: {instead}")


def discard_unfinished(trace: Path) -> None:
    """Remove the trace in the folder `trace` if a rank has not come to its end, as where the run was killed."""
    files = list(trace.glob(f"rank-*/{RANK}"))
    if any("records" not in json.loads(file.read_bytes()) for file in files):
        for file in files:
            shutil.rmtree(file.parent)


class Writer:
    """Writes one rank's records into `folder`, which must not hold a trace yet."""

    def __init__(self, folder: Path, description: dict[str, Any]) -> None:
        require_untraced(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.description = folder, {"format": FORMAT, **description}
        self.records = self.files = self.bytes = 0
        self.waiting: dict[str, torch.Tensor] = {}
        self.lines: list[str] = []
        write_object(folder / RANK, self.description)

    def add(self, record: dict[str, Any], shards: Shards) -> None:
        """Keep a copy of `shards`, written at the latest when the trace is closed."""
        for box, (_, part) in enumerate(shards.parts):
            copy = part.detach().to("cpu", copy=True).contiguous()
            self.waiting[f"{self.records}.{box}"] = copy
            self.bytes += copy.nbytes
        dtype = str(shards.parts[0][1].dtype).removeprefix("torch.") if shards.parts else None
        line = {
            **record,
            "shape": shards.shape,
            "dtype": dtype,
            "at": [offset for offset, _ in shards.parts],
            "how": shards.how,
            "file": self.files,
        }
        flags = {name: True for name in ("partial", "assumed", "alone") if getattr(shards, name)}
        scale = {"scale": shards.scale} if shards.scale != 1 else {}
        self.lines.append(json.dumps({**line, **flags, **scale}))
        self.records += 1
        if self.bytes >= FILE_BYTES:
            self._flush()

    def add_settings(self, line: str) -> None:
        with open(self.folder / SETTINGS, "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def close(self, summary: dict[str, Any]) -> None:
        """Write what is waiting, and that the trace is whole."""
        self._flush()
        write_object(self.folder / RANK, {**self.description, **summary, "records": self.records})

    def _flush(self) -> None:
        if self.waiting:
            save_file(self.waiting, self.folder / f"{self.files:06d}.safetensors")
        with open(self.folder / RECORDS, "a", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in self.lines)
        self.files += bool(self.waiting)
        self.waiting, self.lines, self.bytes = {}, [], 0
