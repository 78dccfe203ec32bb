"""megatron.core.transformer.moe.moe_layer: a mixture of experts, whichever of Megatron's dispatchers it would use.

    tokens ──router──▶ weights, choice ──dispatch──▶ rows of this rank's experts ──experts──▶ rows ──combine──▶ tokens

The dispatchers add what experts return in the order in which it comes back from ranks: `ops.dispatch` is used instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patches.call_site import contract, tp_group
from patches.contract import UnsupportedError
from patches.experts import give_runs
from patches.megatron.moe.refusals import VERSIONS, check_experts
from patches.ops.dispatch import route, to_experts, to_tokens, weights_to_experts
from patches.registry import attribute

__all__ = ["PATCHES"]

TARGET = "megatron.core.transformer.moe.moe_layer:MoELayer"


def _init(original: Any) -> Any:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        check_experts(self.experts)
        contract().check_tp(self.experts.tp_group.size())
        for parameter in self.experts.parameters():
            # Summed over expert-data-parallel ranks and stepped by the experts' optimizer, at EP=1, too: there stock
            # takes experts for dense layers, and forgets the tokens of other tensor-parallel ranks where ETP < TP.
            parameter.allreduce = False

    return __init__


def _forward(original: Any) -> Any:
    def forward(
        self: Any, hidden_states: Tensor, intermediate_tensors: Any = None, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        if intermediate_tensors is not None or padding_mask is not None:
            raise UnsupportedError(
                "a mixture of experts in parts (overlap_moe_expert_parallel_comm) or with a padding mask is not "
                "covered: give it hidden_states alone"
            )
        if tp_group(self).size() > 1 and not self.config.sequence_parallel:
            raise UnsupportedError(
                "a mixture of experts with tensor_model_parallel_size > 1 is not covered without sequence "
                "parallelism: set sequence_parallel=True (--sequence-parallel)"
            )
        if not self.moe_layer_recompute:
            return _mixture(self, hidden_states), None
        from megatron.core import tensor_parallel

        return tensor_parallel.checkpoint(lambda x: _mixture(self, x), False, hidden_states), None

    return forward


def _mixture(self: Any, hidden_states: Tensor) -> Tensor:
    shared = self.shared_experts_compute(hidden_states)
    weights, chosen = self.router(hidden_states)
    leaves = contract().leaves_of_rank(tp_group(self).size() if self.config.sequence_parallel else 1)
    group, experts = tp_group(self.experts), self.experts
    way = route(chosen, hidden_states.shape[1], leaves, self.config.moe_router_topk, experts.ep_group, group)
    give_runs(experts, way.runs)
    counts = torch.tensor(way.rows_of_experts)
    rows = to_experts(hidden_states.flatten(0, 1), way)
    results, _ = experts(rows, counts, weights_to_experts(weights, way))
    y = to_tokens(results, way).view_as(hidden_states)
    return y if shared is None else y + shared


PATCHES = [
    attribute(
        "experts",
        f"{TARGET}.__init__",
        "at EP=1 stock sums the gradients of experts over data-parallel ranks alone",
        _init,
        parameters="config submodules layer_number pg_collection is_mtp_layer name",
        versions=VERSIONS,
        order_free=True,
    ),
    attribute(
        "mixture",
        f"{TARGET}.forward",
        "a token's results of k experts are added in an order that follows ranks; likewise its gradient's k parts",
        _forward,
        parameters="hidden_states intermediate_tensors padding_mask",
        versions=VERSIONS,
        order_free=True,
    ),
]
