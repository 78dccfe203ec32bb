"""megatron.core.transformer.moe.shared_experts: the gate of a shared expert, which is a router to one expert."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from patches.call_site import mark_grad_reduced, replicated, tp_group, tp_sharded
from patches.megatron.moe.refusals import VERSIONS
from patches.ops.routing import router_product
from patches.registry import attribute

__all__ = ["PATCHES"]


def _forward(original: Any) -> Any:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if not self.use_shared_expert_gate:
            return original(self, hidden_states)
        mark_grad_reduced(self.gate_weight)
        shards = tp_sharded(tp_group(self)) if self.config.sequence_parallel else replicated()
        gate = router_product(hidden_states, self.gate_weight, hidden_states.dtype, shards).sigmoid()
        self.use_shared_expert_gate = False
        try:
            return original(self, hidden_states) * gate
        finally:
            self.use_shared_expert_gate = True

    return forward


PATCHES = [
    attribute(
        "shared-expert-gate",
        "megatron.core.transformer.moe.shared_experts:SharedExpertMLP.forward",
        "the gate's weight gradient sums over tokens, which SP spreads over ranks",
        _forward,
        parameters="hidden_states",
        versions=VERSIONS,
        order_free=True,
    ),
]
