"""Memory and time of a cell, estimated from its configuration, against what the profile's machines have.

What is certain and does not fit is refused, with what would fit; what is likely and does not is a warning.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from slurm.allocation import Allocation
from slurm.profile import Arch, Profile
from tpcheck.config.check import check as check_run
from tpcheck.config.schema import RunConfig
from tpcheck.cost import terms
from tpcheck.cost.memory import bytes_per_parameter, memory
from tpcheck.errors import TpcheckError
from tpcheck.sweep.spec import Cell

__all__ = ["check", "flops"]


def check(cells: Sequence[Cell], allocations: Mapping[str, Allocation], profile: Profile) -> list[str]:
    """Refuse cells that cannot run with their `allocations`, which are by cell.

    Returns:
        Warnings of the others, one line each, for as many cells as it concerns.

    Raises:
        TpcheckError: a cell certainly needs more memory than a rank has there, or data that a container hides.
    """
    warnings: dict[str, list[str]] = {}
    for cell in cells:
        allocation = allocations[cell.name]
        _refuse_container_paths(cell, profile)
        _refuse_too_much(cell, allocation)
        for warning in _warnings(cell.config, profile, allocation):
            warnings.setdefault(warning, []).append(cell.name)
    return [f"{', '.join(names)}: {warning}" for warning, names in warnings.items()]


def flops(config: RunConfig) -> float:
    """Floating-point operations of one rank in the whole run, with its strategy's repeated ones; stages share alike."""
    return config.steps * terms.total(terms.step(config), "flops", config.strategy) / config.pp


def _refuse_too_much(cell: Cell, allocation: Allocation) -> None:
    arch = allocation.machine
    needed, room = memory(cell.config, arch.gpus_per_node > 0), _room(allocation)
    if needed.certain <= room:
        return
    what = f"one {allocation.arch} GPU has" if arch.gpus_per_node else f"{allocation.arch} nodes have for each rank"
    fits = " or ".join(f"{name} ({size:.0f} GiB)" for name, size in _what_fits(cell.config, arch, room))
    raise TpcheckError(
        f"cell {cell.name} needs at least {needed.certain:.0f} GiB a rank ({needed.model:.0f} for weights, gradients "
        f"and Adam at {bytes_per_parameter(cell.config):.3g} bytes per parameter, {needed.logits:.1f} for logits), "
        f"{what} {room:.0f}: {f'{fits} would fit' if fits else 'nothing would fit here'}; or exclude the cell"
    )


def _room(allocation: Allocation) -> float:
    """GiB for one rank: a GPU's, or a share of the node's."""
    arch = allocation.machine
    return arch.memory_gib if arch.gpus_per_node else arch.memory_gib / allocation.ranks_per_node


def _what_fits(config: RunConfig, arch: Arch, room: float) -> Iterator[tuple[str, float]]:
    """The smallest change of each kind that the machines would take, with its GiB a rank."""
    larger = [{"tp": config.tp * 2**n} for n in range(1, 7)]
    sharing = [{"dp": dp, "distributed_optimizer": True} for dp in (2, 4, 8, 16, 32, 64) if dp >= config.dp]
    for kind in (larger, sharing):
        for changes in [*kind, *({**changes, "recompute": True} for changes in kind)]:
            changed = config.model_copy(update=changes)
            size = memory(changed, arch.gpus_per_node > 0).likely
            if size <= room and changed.world_size <= arch.nodes * arch.per_node and _is_valid(changed):
                yield " ".join(f"{key}={str(value).lower()}" for key, value in changes.items()), size
                break


def _is_valid(config: RunConfig) -> bool:
    try:
        check_run(config)
    except TpcheckError:
        return False
    return True


def _warnings(config: RunConfig, profile: Profile, allocation: Allocation) -> Iterator[str]:
    arch, ranks = allocation.machine, allocation.ranks_per_node
    if ranks % config.tp:
        yield (
            f"tp={config.tp} spans nodes ({ranks} ranks on each), so every layer's sums go over the "
            "network: slow; a smaller tp stays inside a node"
        )
    needed, room = memory(config, arch.gpus_per_node > 0), _room(allocation)
    if needed.likely > room:
        yield (
            f"may run out of memory: about {needed.likely:.0f} GiB a rank with activations, {allocation.arch} has "
            f"{room:.0f}; recompute=true or a smaller micro_batch_size takes less"
        )
    if arch.tflops:
        idle = (config.pp - 1) / (config.vpp * config.microbatches)  # while a step's pipeline fills and drains
        minutes = flops(config) * (1 + idle) / (arch.tflops * 1e12) / 60
        starts = 1 + int(minutes // profile.time)
        if starts > 1 + profile.max_retries:
            yield (
                f"takes about {minutes / 60:.1f} hours, {starts} times the limit of {profile.time} minutes, and may "
                f"start {1 + profile.max_retries} times: raise time or max_retries"
            )


def _refuse_container_paths(cell: Cell, profile: Profile) -> None:
    path = cell.config.data.path
    if profile.container and path and not path.startswith("/"):
        raise TpcheckError(f"cell {cell.name}: data.path={path} is relative, which means nothing inside a container")
