"""megatron.core.fusions.fused_layer_norm: the local spec's LayerNorm where Apex is installed."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from patches.call_site import mark_complete, over_tp, whole
from patches.megatron.torch_norm import HEADS, TOKENS
from patches.ops.norm import norm
from patches.registry import attribute

__all__ = ["PATCHES"]


def _forward(original: Any) -> Any:
    def forward(self: Any, input: Tensor) -> Tensor:
        mark_complete(self.weight)
        mark_complete(self.bias)
        gamma = self.weight + 1 if self.zero_centered_gamma else self.weight
        leaf_dim = getattr(self, "leaf_dim", TOKENS)
        shards = over_tp() if self.sequence_parallel or leaf_dim == HEADS else whole()
        return norm(input, gamma, self.bias, self.eps, True, leaf_dim, shards)

    return forward


PATCHES = [
    attribute(
        "fused-norm",
        "megatron.core.fusions.fused_layer_norm:FusedLayerNorm.forward",
        "gamma and beta gradients sum over tokens, which SP spreads over ranks, or over heads",
        _forward,
        parameters="input",
    )
]
