"""transformer_engine.pytorch.ops.basic.{rmsnorm,layer_norm}: te.RMSNorm and te.LayerNorm, Megatron's TENorm."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from patches.call_site import contract
from patches.call_site import over_tp as over_megatrons_tp
from patches.contract import UnsupportedError
from patches.megatron.torch_norm import HEADS, TOKENS
from patches.ops.norm import norm
from patches.ops.sharded import Shards
from patches.te.context import mark_complete, refuse_uncovered, te_attribute

__all__ = ["PATCHES"]


def _forward(original: Any) -> Any:
    def forward(self: Any, input: Tensor, *extra_inputs: Tensor, **kwargs: Any) -> Tensor:
        gamma, beta = self.weight, getattr(self, "bias", None)
        x = input.to(gamma.dtype)
        refuse_uncovered(self, x, [gamma])
        if extra_inputs or kwargs or gamma.dim() > 1:
            raise UnsupportedError("te norms over several dimensions or with extra inputs are not covered: use one")
        for parameter in (gamma, beta):
            if parameter is not None:
                mark_complete(parameter)
        scale = gamma.float() + 1 if self.zero_centered_gamma else gamma
        leaf_dim = getattr(self, "leaf_dim", TOKENS)
        return norm(x, scale, beta, self.eps, beta is not None, leaf_dim, _shards(gamma, leaf_dim))

    return forward


def _shards(gamma: Any, leaf_dim: int) -> Shards:
    """How `leaf_dim` is spread: te norms have no group of their own, only Megatron's mark on their weight."""
    if leaf_dim == HEADS or getattr(gamma, "sequence_parallel", False):
        return over_megatrons_tp()
    return Shards(contract())


def _norm_patch(name: str, module: str, cls: str) -> Any:
    return te_attribute(
        name,
        f"transformer_engine.pytorch.ops.basic.{module}:{cls}.forward",
        "gamma and beta gradients sum over tokens, which SP spreads over ranks, or over heads",
        _forward,
        parameters="input extra_inputs kwargs",
    )


PATCHES = [_norm_patch("te-rmsnorm", "rmsnorm", "RMSNorm"), _norm_patch("te-layernorm", "layer_norm", "LayerNorm")]
