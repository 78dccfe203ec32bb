"""Call sites in Transformer Engine, one file per patched module: its layers' forwards, made of `patches.ops`.

Megatron's TE layers call these forwards, so its models and plain `transformer_engine.pytorch` ones are covered alike.
"""

from __future__ import annotations

from patches.registry import Patch
from patches.te import (
    attention,
    grouped_linear,
    layernorm_linear,
    layernorm_mlp,
    linear,
    megatron_extensions,
    norms,
    refusals,
)

__all__ = ["PATCHES"]

PATCHES: list[Patch] = [
    *linear.PATCHES,
    *grouped_linear.PATCHES,
    *layernorm_linear.PATCHES,
    *layernorm_mlp.PATCHES,
    *norms.PATCHES,
    *attention.PATCHES,
    *megatron_extensions.PATCHES,
    *refusals.PATCHES,
]
