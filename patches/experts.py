"""What experts compute on their rows, whichever library's layers they are made of, each with its weight or all in one.

    x [R, H] ──fc1──▶ [R, F] ──activation · weight──▶ [R, F] ──fc2──▶ [R, H]      F spread over ETP ranks
      rows of one expert, then those of the next

A row's weight is applied in fc2's forward; a contribution to a gradient is that of a run of rows (`ops.dispatch`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from patches.call_site import tp_sharded
from patches.ops.grouped import Grouped, grouped
from patches.ops.weighted import weighted

__all__ = ["are_experts", "expert_products", "give_runs", "give_weights"]

HOW, WEIGHTS = "_patches_grouped", "_patches_weights"


def give_runs(experts: Any, runs: list[list[int]]) -> None:
    """Tell the layers of a rank's `experts` the runs of the rows that each expert will be given next."""
    shards, of_experts = tp_sharded(experts.tp_group), tuple(map(tuple, runs))
    owners = getattr(experts, "local_experts", None)
    layers = [(experts, of_experts)] if owners is None else zip(owners, ((one,) for one in of_experts), strict=True)
    for owner, part in layers:
        setattr(owner.linear_fc1, HOW, Grouped(True, shards, part))
        setattr(owner.linear_fc2, HOW, Grouped(False, shards, part))


def give_weights(fc2: Any, weights_R: Tensor) -> None:
    """Tell the last layer of experts what each row's result is to be multiplied by."""
    setattr(fc2, WEIGHTS, weights_R)


def are_experts(layer: Any) -> bool:
    """Whether `layer` was given runs."""
    return HOW in vars(layer)


def expert_products(layer: Any, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """The forward of a layer of experts, without bias: [R, N], or [R, tN] of a column-parallel one.

    Args:
        x: [R, K], or [R, tK].
        weights: one of each expert.
    """
    how: Grouped = replace(getattr(layer, HOW), pieces=getattr(weights[0], "partition_stride", 1))
    of_rows = vars(layer).pop(WEIGHTS, None)
    if of_rows is not None:
        x = weighted(x, of_rows, how.shards)
    return grouped(x, weights, how)
