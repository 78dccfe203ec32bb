"""megatron.core.transformer.moe.experts: what an expert computes on its rows.

    x [R, H] ──fc1──▶ [R, F] ──activation · weight──▶ [R, F] ──fc2──▶ [R, H]      F spread over ETP ranks

A row's weight is applied in fc2's forward; a contribution to a gradient is that of a run of rows (`ops.dispatch`).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from patches.call_site import tp_group, tp_sharded
from patches.megatron.moe.refusals import VERSIONS
from patches.ops.linear import GradSink, column_parallel, row_parallel
from patches.ops.weighted import weighted
from patches.registry import attribute

__all__ = ["PATCHES", "expert_column", "expert_row", "give_runs"]

RUNS, WEIGHTS = "_patches_runs", "_patches_weights"


def give_runs(experts: Any, runs: list[list[int]]) -> None:
    """Tell the layers of each of a rank's `experts` the runs of the rows that it will be given next."""
    for expert, of_expert in zip(experts.local_experts, runs, strict=True):
        for layer in (expert.linear_fc1, expert.linear_fc2):
            setattr(layer, RUNS, tuple(of_expert))


def expert_column(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    """The forward of a column-parallel layer of an expert, without bias: [R, tN]."""
    sink, pieces = GradSink(runs=getattr(layer, RUNS)), getattr(weight, "partition_stride", 1)
    return column_parallel(x, weight, None, tp_sharded(tp_group(layer)), False, sink, pieces)


def expert_row(layer: Any, x: Tensor) -> tuple[Tensor, None]:
    """The forward of a row-parallel layer of an expert, without bias: [R, N]."""
    shards = tp_sharded(tp_group(layer))
    weights = vars(layer).pop(WEIGHTS, None)
    if weights is not None:
        x = weighted(x, weights, shards)
    return row_parallel(x, layer.weight, shards, False, GradSink(runs=getattr(layer, RUNS))), None


def _mlp_forward(original: Any) -> Any:
    def forward(self: Any, hidden_states: Tensor, per_token_scale: Tensor | None = None, **kwargs: Any) -> Any:
        if per_token_scale is not None:
            setattr(self.linear_fc2, WEIGHTS, per_token_scale)
        return original(self, hidden_states, None, **kwargs)

    return forward


PATCHES = [
    attribute(
        "expert-weights",
        "megatron.core.transformer.mlp:MLP.forward",
        "the gradient of a router's weight sums over an expert's width, which ETP spreads over ranks",
        _mlp_forward,
        parameters="hidden_states per_token_scale kwargs",
        versions=VERSIONS,
        order_free=True,
    ),
]
