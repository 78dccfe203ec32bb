"""A process's place among ranks that torchrun or srun started."""

from __future__ import annotations

import os
import subprocess

from tpcheck.config import RunConfig
from tpcheck.errors import TpcheckError
from tpcheck.run import exit_reason

__all__ = ["rank_from_environment"]


def rank_from_environment(config: RunConfig) -> dict[str, str] | None:
    """RANK, WORLD_SIZE and the place to meet, as far as they have to be added; None where nobody started ranks."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        found, settings = int(env["WORLD_SIZE"]), {}
    elif int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        found, settings = int(env["SLURM_STEP_NUM_TASKS"]), _rank_from_slurm()
    else:
        return None
    if found != config.world_size:
        layout = f"tp * pp * dp = {config.tp} * {config.pp} * {config.dp}"
        raise TpcheckError(f"{found} ranks were started, {layout} needs {config.world_size}")
    return settings


def _rank_from_slurm() -> dict[str, str]:
    """What srun says. Our batch scripts name the meeting place; a container need not have scontrol to find it."""
    env = os.environ
    port = 20000 + (int(env["SLURM_JOB_ID"]) * 31 + int(env["SLURM_STEP_ID"])) % 12000  # no port that a client may hold
    return {
        "RANK": env["SLURM_PROCID"],
        "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": env["SLURM_LOCALID"],
        "MASTER_ADDR": env.get("MASTER_ADDR") or _first_node(),
        "MASTER_PORT": env.get("MASTER_PORT", str(port)),
    }


def _first_node() -> str:
    if int(os.environ.get("SLURM_STEP_NUM_NODES", "1")) == 1:
        return "127.0.0.1"
    nodes = os.environ["SLURM_STEP_NODELIST"]
    try:
        call = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
        return call.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        raise TpcheckError(
            f"cannot tell which of the nodes {nodes} is the first ({exit_reason.one_line(error)}): "
            "set MASTER_ADDR to it"
        ) from error
