"""The code that jobs run: a copy, made when they are submitted, so that a job that waits until tomorrow runs it too.

DIR/code/1f0c22ab93de/            named after its digest; the same code is copied once
    code.json                     {commit, dirty, digest}: goes into every manifest
    patches/ tpcheck/ slurm/      *.py, *.yaml, *.sbatch, *.sh
    __main__.py                   `python DIR/code/1f0c22ab93de` runs this code, whatever is in the working directory
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import blake3

import patches
import slurm
import tpcheck
from tpcheck.files.json_files import write_object
from tpcheck.files.names import CODE, SNAPSHOTS
from tpcheck.run import provenance

__all__ = ["Snapshot"]

PACKAGES = (patches, tpcheck, slurm)
SUFFIXES = {".py", ".yaml", ".sbatch", ".sh"}
DIGITS = 12


@dataclass(frozen=True)
class Snapshot:
    """What the packages hold now."""

    files: dict[str, bytes]  # by their paths below the copy
    digest: str

    @classmethod
    def now(cls) -> Snapshot:
        files = {}
        for package in PACKAGES:
            folder = Path(str(package.__file__)).parent
            for path in sorted(folder.rglob("*")):
                if path.suffix in SUFFIXES and path.is_file():
                    files[f"{folder.name}/{path.relative_to(folder)}"] = path.read_bytes()
        files["__main__.py"] = files["tpcheck/__main__.py"]
        digest = blake3.blake3()
        for name, content in sorted(files.items()):
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
        return cls(files, digest.hexdigest())

    def place(self, output: Path) -> Path:
        """Where the copy is in the sweep's output, or will be."""
        return output.absolute() / SNAPSHOTS / self.digest[:DIGITS]

    def write(self, output: Path) -> Path:
        """Make the copy, unless it is there; it appears whole or not at all."""
        place = self.place(output)
        if place.exists():
            return place
        place.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=place.parent, prefix=".new-"))
        try:
            for name, content in self.files.items():
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                (partial / name).write_bytes(content)
            git = provenance.git(Path(str(tpcheck.__file__)).parent) or {"commit": None, "dirty": None}
            write_object(partial / CODE, {"format": provenance.CODE_FORMAT, **git, "digest": self.digest})
            partial.chmod(0o755)
            os.rename(partial, place)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return place
