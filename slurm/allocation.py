"""What a cell is allocated of a cluster: how many nodes, how many ranks on each.

tp=4, dp=4 on nodes of 8 GPUs ── 2 nodes of 8 ranks ── a TP group never leaves its node
tp=4, dp=3                    ── 3 nodes of 4 ranks ── for the same reason
tp=8, pp=2                    ── 2 nodes of 8 ranks ── stages may lie on different nodes
tp=16                         ── 2 nodes of 8 ranks ── it must, and is warned of
"""

from __future__ import annotations

from dataclasses import dataclass, field

from slurm.profile import Arch, Profile
from tpcheck.errors import TpcheckError
from tpcheck.sweep.spec import Cell

__all__ = ["Allocation", "allocation_of"]


@dataclass(frozen=True)
class Allocation:
    """The machines of a cell, the same for all cells of an array; `arch` is the profile's name for their kind."""

    arch: str
    nodes: int
    ranks_per_node: int
    machine: Arch = field(compare=False, repr=False)


def allocation_of(cell: Cell, profile: Profile) -> Allocation:
    """The fewest nodes that take the cell with every TP group inside a node, or else the fewest that take it.

    Raises:
        TpcheckError: the profile has no such machines, or too few of them.
    """
    name, arch = profile.arch(cell.arch, cell.name)
    world, tp = cell.config.world_size, cell.config.tp
    even = [nodes for nodes in range(1, world + 1) if world % nodes == 0 and world // nodes <= arch.per_node]
    inside = [nodes for nodes in even if (world // nodes) % tp == 0]
    nodes = min(inside or even)
    if nodes > arch.nodes:
        raise TpcheckError(_too_many(cell, nodes, name, arch))
    return Allocation(name, nodes, world // nodes, arch)


def _too_many(cell: Cell, nodes: int, name: str, arch: Arch) -> str:
    what = "GPUs" if arch.gpus_per_node else "ranks"
    return (
        f"cell {cell.name} needs {cell.config.world_size} {what} ({cell.config.layout}) on "
        f"{nodes} nodes, the profile has {arch.nodes} {name} nodes of {arch.per_node}: "
        "exclude it, or use a smaller tp, cp, pp or dp"
    )
