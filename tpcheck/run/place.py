"""A process's place among the ranks of a run, and where they meet."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass

from tpcheck.config.schema import RunConfig
from tpcheck.errors import TpcheckError
from tpcheck.run import exit_reason

__all__ = ["Place", "place_from_environment"]


@dataclass(frozen=True)
class Place:
    """One rank of a run.

    Attributes:
        rank, world_size: among all ranks.
        local_rank: among those of its node; the number of its GPU.
        meeting: where ranks find each other, as torch's `init_method` has it.
    """

    rank: int
    world_size: int
    local_rank: int
    meeting: str

    @property
    def address(self) -> tuple[str, int] | None:
        """Host and port of the store that ranks meet at, where it has one."""
        if self.meeting == "env://":
            return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        host, _, port = self.meeting.removeprefix("tcp://").rpartition(":")
        return (host, int(port)) if self.meeting.startswith("tcp://") else None

    def announce(self) -> None:
        """Tell libraries that ask the environment."""
        os.environ.update(RANK=str(self.rank), WORLD_SIZE=str(self.world_size), LOCAL_RANK=str(self.local_rank))


def place_from_environment(config: RunConfig) -> Place | None:
    """The place that torchrun or srun gave this process; None where nobody started ranks."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        rank = int(env["RANK"])
        place = Place(rank, int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", rank)), "env://")
    elif int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        place = _place_from_slurm()
    else:
        return None
    if place.world_size != config.world_size:
        raise TpcheckError(f"{place.world_size} ranks were started, {config.layout} needs {config.world_size}")
    return place


def _place_from_slurm() -> Place:
    """What srun says. Our batch scripts name the meeting place; a container need not have scontrol to find it."""
    env = os.environ
    # A port that no client may hold.
    port = 20000 + (int(env["SLURM_JOB_ID"]) * 31 + int(env["SLURM_STEP_ID"])) % 12000
    meeting = f"tcp://{env.get('MASTER_ADDR') or _first_node()}:{env.get('MASTER_PORT', port)}"
    return Place(int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"]), int(env["SLURM_LOCALID"]), meeting)


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
