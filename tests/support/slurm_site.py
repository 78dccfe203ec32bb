"""A site without Slurm: a folder with a sweep, a profile, and stand-ins for Slurm's commands that note every call."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from slurm import submissions
from slurm.submissions import Submission
from tests.support.finished import sweep_file
from tpcheck.cli import main
from tpcheck.sweep.spec import Cell, load_sweep

__all__ = ["Site", "anonymous"]

H100 = {"constraint": "h100", "nodes": 2, "ranks_per_node": 2, "memory_gib": 8}
PROFILE = {"time": "0:30:00", "architectures": {"h100": H100}}
STANDINS = {
    "sbatch": 'env | grep -E "^(SBATCH|SLURM)_" >"$FAKE/variables"\n'
    '[ ! -e "$FAKE/error" ] || { cat "$FAKE/error" >&2; exit 1; }\n'
    'number=$(($(ls "$FAKE/submitted" | wc -l) + 100)); cp "$1" "$FAKE/submitted/$number"\n'
    '[ ! -e "$FAKE/answer" ] || { cat "$FAKE/answer"; exit; }\n'
    'echo "Submitted batch job $number"; echo "and good luck with job 7"',
    "squeue": '[ ! -e "$FAKE/down" ] || { echo "Unable to contact slurm controller" >&2; exit 1; }\n'
    '[ -n "${!SQUEUE_*}$SLURM_CLUSTERS" ] || cat "$FAKE/queue"',  # these filter
    "scontrol": 'echo "Configuration data as of now"; cat "$FAKE/config"',
    "srun": "exit 1",
    "sacct": "echo accounting storage is disabled >&2; exit 1",
}


class Site:
    """A folder with a sweep, a profile, and a Slurm that notes what it is asked."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "out"
        self.sweep = sweep_file(folder)
        (folder / "cluster.yaml").write_text(yaml.safe_dump(PROFILE))
        (folder / "submitted").mkdir()
        (folder / "queue").touch()
        (folder / "config").write_text("MailProg                = /bin/mail\nMaxArraySize            = 1001\n")
        (folder / "bin").mkdir()
        for name, body in STANDINS.items():
            (folder / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
            (folder / "bin" / name).chmod(0o755)

    @property
    def cells(self) -> dict[str, Cell]:
        return {cell.name: cell for cell in load_sweep(self.sweep).cells}

    @property
    def submitted(self) -> list[str]:
        return [path.read_text() for path in sorted((self.folder / "submitted").iterdir())]

    @property
    def recorded(self) -> list[Submission]:
        return submissions.read(self.out)

    def submit(self, *options: str) -> int:
        return main(["sweep", str(self.sweep), "--cluster", str(self.folder / "cluster.yaml"), *options])

    def queue(self, submission: Submission, word: str, job: str = "100") -> None:
        """Let squeue say this of every element of `submission`."""
        lines = [f"{submission.job_name}|{job}|{place}|{word}||None" for place in range(len(submission.cells))]
        (self.folder / "queue").write_text("\n".join(lines) + "\n")


def anonymous(text: str) -> str:
    """Scripts without the random part of their names."""
    return re.sub(r"\bs\.[0-9a-f]{8}", "s.NAME", text)
