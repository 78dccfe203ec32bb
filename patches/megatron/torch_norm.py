"""megatron.core.transformer.torch_norm: RMSNorm and LayerNorm of the local spec, with or without SP."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patches.call_site import mark_grad_reduced, norm_shards
from patches.contract import UnsupportedError
from patches.ops.norm import TOKENS, norm
from patches.registry import REGISTRY, attribute

__all__ = ["PATCHES", "InvariantNorm"]

NOT_LOCAL = {
    "layernorm_zero_centered_gamma": "--apply-layernorm-1p",
    "memory_efficient_layer_norm": "--memory-efficient-layer-norm",
}


class InvariantNorm:
    """Mixed into torch's norms. After `patches.disable()` the module is torch's own again."""

    weight: Any
    bias: Any
    eps: Any
    centered: bool
    spread: bool
    leaf_dim = TOKENS

    def setup(self, sequence_parallel: bool) -> None:
        self.spread = sequence_parallel
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                parameter.sequence_parallel = sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        if REGISTRY.contract is None:
            return super().forward(x)  # type: ignore[misc]
        mark_grad_reduced(self.weight, self.bias)
        shards = norm_shards(self.leaf_dim, self.spread)
        return norm(x, self.weight, self.bias, self.eps, self.centered, self.leaf_dim, shards)


class _RMSNorm(InvariantNorm, torch.nn.RMSNorm):
    centered = False
    bias = None


class _LayerNorm(InvariantNorm, torch.nn.LayerNorm):
    centered = True


def _new(original: Any) -> Any:
    def __new__(
        cls: Any,
        config: Any,
        hidden_size: int,
        eps: float = 1e-5,
        persist_layer_norm: bool = False,
        zero_centered_gamma: bool = False,
        normalization: str = "LayerNorm",
    ) -> torch.nn.Module:
        for setting, flag in NOT_LOCAL.items():
            if getattr(config, setting, False):
                raise UnsupportedError(f"{setting}=True is not covered by the local layer spec: leave out {flag}")
        kinds = {"RMSNorm": _RMSNorm, "LayerNorm": _LayerNorm}
        if config.normalization not in kinds:
            raise UnsupportedError(f"normalization={config.normalization!r} is not covered: use RMSNorm or LayerNorm")
        module = kinds[config.normalization](hidden_size, eps=eps)
        module.setup(config.sequence_parallel)
        return module

    return __new__


PATCHES = [
    attribute(
        "norms",
        "megatron.core.transformer.torch_norm:WrappedTorchNorm.__new__",
        "gamma and beta gradients sum over tokens, which SP spreads over ranks",
        _new,
        parameters="config hidden_size eps persist_layer_norm zero_centered_gamma normalization",
    )
]
