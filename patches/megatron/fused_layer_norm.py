"""megatron.core.fusions.fused_layer_norm: the local spec's LayerNorm where Apex is installed."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from patches.call_site import mark_grad_reduced, norm_shards
from patches.ops.norm import TOKENS, norm
from patches.registry import attribute

__all__ = ["PATCHES"]


def _forward(original: Any) -> Any:
    def forward(self: Any, input: Tensor) -> Tensor:
        mark_grad_reduced(self.weight, self.bias)
        gamma = self.weight + 1 if self.zero_centered_gamma else self.weight
        leaf_dim = getattr(self, "leaf_dim", TOKENS)
        shards = norm_shards(leaf_dim, self.sequence_parallel)
        return norm(input, gamma, self.bias, self.eps, True, leaf_dim, shards, self.weight)

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
