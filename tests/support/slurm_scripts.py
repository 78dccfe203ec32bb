"""Batch scripts for tests: several sites' profiles, their scripts, and stand-ins for Slurm's commands to run them.

`python -m tests.support.slurm_scripts` writes tests/slurm/golden/*.sh anew; look at the difference first.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slurm.allocation import Allocation
from slurm.profile import Profile
from slurm.script import Script
from tests.support import ROOT

GOLDEN = ROOT / "tests" / "slurm" / "golden"
H100 = {"partition": "h100", "nodes": 4, "gpus_per_node": 8, "memory_gib": 80}
CPU = {"constraint": "h100", "nodes": 2, "ranks_per_node": 2, "memory_gib": 8}
SITES: dict[str, dict[str, Any]] = {
    "srun-gpu": {
        "account": "lab",
        "qos": "high",
        "exclusive": True,
        "setup": ["module load cuda/12.8", 'export HF_HOME="$HOME/hf"'],
        "env": {"NCCL_DEBUG": "WARN", "GREETING": "it's 5 o'clock"},
        "sbatch": {"mail-type": "END,FAIL", "mem": 0},
        "srun": {"cpu-bind": "none"},
        "architectures": {"h100": H100},
    },
    "torchrun": {
        "launcher": "torchrun",
        "cpus_per_rank": 4,
        "max_retries": 0,
        "architectures": {"h100": {**H100, "gres": "gpu:h100", "env": {"CUDA_DEVICE_MAX_CONNECTIONS": 1}}},
    },
    "container": {
        "python": None,
        "container": {
            "image": "nvcr.io#nvidia/nemo:25.09",
            "mounts": ["/data:/data:ro"],
            "srun": {"container-writable": True},
        },
        "env": {"NCCL_DEBUG": "WARN"},
        "architectures": {"h100": {**H100, "request_gpus": False}},
    },
    "cpu": {"cpus_per_rank": 1, "throttle": 2, "architectures": {"h100": CPU}},
}
NODES_AND_RANKS = {"torchrun": (2, 8), "cpu": (1, 2)}
CELLS = {"cpu": ("tree-tp2",)}  # a single cell is no array


def script(site: str = "cpu", **changes: Any) -> Script:
    profile = Profile.model_validate({"time": "4:00:00", "python": "/venv/bin/python"} | SITES[site] | changes)
    return Script(
        profile,
        Allocation("h100", *NODES_AND_RANKS.get(site, (1, 4)), profile.architectures["h100"]),
        "qwen.0123abcd",
        CELLS.get(site, ("stock-tp4", "tree-tp4")),
        Path("/shared/my results/qwen"),
        Path("/shared/my results/qwen/code/0123456789ab"),
        Path("/shared/my results/qwen/slurm/qwen.0123abcd"),
        Path("/home/user/project"),
    )


@dataclass(frozen=True)
class Ran:
    """What a batch script did with the stand-ins."""

    code: int
    output: str
    requeued: list[str]  # the jobs
    steps: list[list[str]]  # the calls of srun, with the environment variable SHOWN before them


STANDINS = {
    "srun": 'printf "%s\\0" "${SHOWN-}" "$@" >>"$FAKE/steps"; printf "\\1" >>"$FAKE/steps"; bash -c "$FAKE_STEP"',
    # Filters of the environment hide the job; what a site's wrapper may print comes first.
    "squeue": '[ -z "${FAKE_BANNER-}" ] || echo "$FAKE_BANNER"; [ -z "${!SQUEUE_*}$SLURM_CLUSTERS" ] || exit 0\n'
    "for word; do case $word in --format=*) format=${word#*=} ;; esac; done\n"
    'echo "${format/"%T %r"/${FAKE_STATE:-RUNNING None}}"',
    "scontrol": '[ -z "${FAKE_BANNER-}" ] || echo "$FAKE_BANNER"; [ -z "${!SCONTROL_*}$SLURM_CLUSTERS" ] || exit 1\n'
    'if [ "$1" = show ]; then echo node1; else echo "$2" >>"$FAKE/requeued"; fi',
    "python": "exit 99",
}


def run(text: str, folder: Path, step: str = "exit 0", **environment: str) -> Ran:
    """Run a batch script as Slurm would; `step` is what srun does, in bash."""
    bin_ = folder / "bin"
    bin_.mkdir(parents=True, exist_ok=True)
    for name, body in STANDINS.items():
        (bin_ / name).write_text(f"#!/bin/bash\n{body}\n")
        (bin_ / name).chmod(0o755)
    fake = {"FAKE": str(folder), "FAKE_STEP": step, "PATH": f"{bin_}:{os.environ['PATH']}", "SLURM_JOB_ID": "45"}
    slurm = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NAME": "qwen.0123abcd", "SLURM_SUBMIT_DIR": str(folder)}
    done = subprocess.run(
        ["bash"],
        input=text,
        capture_output=True,
        text=True,
        cwd=folder,
        env={**fake, **slurm, **environment},
        timeout=20,
    )
    steps, requeued = folder / "steps", folder / "requeued"
    calls = steps.read_text().split("\1")[:-1] if steps.exists() else []
    again = requeued.read_text().split() if requeued.exists() else []
    return Ran(done.returncode, done.stdout + done.stderr, again, [call.split("\0")[:-1] for call in calls])


def in_folder(one: Script, folder: Path) -> Script:
    """The script with its sweep in `folder`: cells, and of the code what the script itself needs."""
    out, code = folder / "out", folder / "out" / "code" / one.code.name
    for cell in one.cells:
        (out / cell).mkdir(parents=True, exist_ok=True)
    (code / "slurm").mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "slurm" / "requeue.sh", code / "slurm")
    return replace(one, output=out, code=code, folder=out / "slurm", cwd=folder)


if __name__ == "__main__":
    for name in SITES:
        (GOLDEN / f"{name}.sh").write_text(script(name).text)
