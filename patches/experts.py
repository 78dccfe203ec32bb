"""What experts compute on their rows, whichever library's layers they are made of, each with its weight or all in one.

    x [R, H] ──fc1──▶ [R, F] ──activation · weight──▶ [R, F] ──fc2──▶ [R, H]      F spread over ETP ranks
      rows of one expert, then those of the next

A row's weight is applied in fc2's forward; a contribution to a gradient is that of a run of rows (`ops.dispatch`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patches.call_site import tp_sharded
from patches.ops.linear import GradSink, column_parallel, row_parallel
from patches.ops.sharded import Shards
from patches.ops.weighted import weighted

__all__ = ["are_experts", "expert_products", "give_runs", "give_weights"]

PART, WEIGHTS = "_patches_part", "_patches_weights"


@dataclass(frozen=True)
class Part:
    """What a layer of experts has to know of the rows that it is given next.

    Args:
        column: its output features are spread over ranks, not its input features.
        shards: how they are.
        runs: of each of its experts, the sizes of the runs of rows.
    """

    column: bool
    shards: Shards
    runs: tuple[tuple[int, ...], ...]


def give_runs(experts: Any, runs: list[list[int]]) -> None:
    """Tell the layers of a rank's `experts` the runs of the rows that each expert will be given next."""
    shards, of_experts = tp_sharded(experts.tp_group), tuple(map(tuple, runs))
    owners = getattr(experts, "local_experts", None)
    layers = [(experts, of_experts)] if owners is None else zip(owners, ((one,) for one in of_experts), strict=True)
    for owner, part in layers:
        setattr(owner.linear_fc1, PART, Part(True, shards, part))
        setattr(owner.linear_fc2, PART, Part(False, shards, part))


def give_weights(fc2: Any, weights_R: Tensor) -> None:
    """Tell the last layer of experts what each row's result is to be multiplied by."""
    setattr(fc2, WEIGHTS, weights_R)


def are_experts(layer: Any) -> bool:
    """Whether `layer` was given runs."""
    return PART in vars(layer)


def expert_products(layer: Any, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """The forward of a layer of experts, without bias: [R, N], or [R, tN] of a column-parallel one.

    Args:
        x: [R, K], or [R, tK].
        weights: one of each expert.
    """
    part: Part = getattr(layer, PART)
    of_rows = vars(layer).pop(WEIGHTS, None)
    if of_rows is not None:
        x = weighted(x, of_rows, part.shards)
    rows = x.split([sum(runs) for runs in part.runs])
    products = [_product(part, *one) for one in zip(rows, weights, part.runs, strict=True)]
    return products[0] if len(products) == 1 else torch.cat(products)


def _product(part: Part, x: Tensor, weight: Tensor, runs: tuple[int, ...]) -> Tensor:
    sink = GradSink(runs=runs)
    if part.column:
        return column_parallel(x, weight, None, part.shards, False, sink, getattr(weight, "partition_stride", 1))
    return row_parallel(x, weight, part.shards, False, sink)
