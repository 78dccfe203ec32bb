"""transformer_engine.pytorch.ops.basic.{rmsnorm,layer_norm}: te.RMSNorm and te.LayerNorm, Megatron's TENorm."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from patches.call_site import mark_grad_reduced, norm_shards
from patches.contract import UnsupportedError
from patches.ops.norm import TOKENS, norm
from patches.te.context import refuse_uncovered, te_attribute

__all__ = ["PATCHES"]


def _forward(original: Any) -> Any:
    def forward(self: Any, input: Tensor, *extra_inputs: Tensor, **kwargs: Any) -> Tensor:
        gamma, beta = self.weight, getattr(self, "bias", None)
        x = input.to(gamma.dtype)
        refuse_uncovered(self, x, [gamma])
        if extra_inputs or kwargs or gamma.dim() > 1:
            raise UnsupportedError("te norms over several dimensions or with extra inputs are not covered: use one")
        mark_grad_reduced(gamma, beta)
        scale = gamma.float() + 1 if self.zero_centered_gamma else gamma
        leaf_dim = getattr(self, "leaf_dim", TOKENS)
        # te norms have no group of their own, only Megatron's mark on their weight.
        shards = norm_shards(leaf_dim, getattr(gamma, "sequence_parallel", False))
        return norm(x, scale, beta, self.eps, beta is not None, leaf_dim, shards, gamma)

    return forward


def _norm_patch(name: str, module: str, cls: str) -> Any:
    return te_attribute(
        name,
        f"transformer_engine.pytorch.ops.basic.{module}:{cls}.forward",
        "gamma and beta gradients sum over tokens, which SP spreads over ranks, or over heads",
        _forward,
        parameters="input extra_inputs kwargs",
    )


PATCHES = [_norm_patch("te-rmsnorm", "rmsnorm", "RMSNorm"), _norm_patch("te-layernorm", "layer_norm", "LayerNorm")]
