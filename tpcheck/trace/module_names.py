"""One name for a module or parameter, whatever wraps the model and whoever wrote its layers.

module.module.decoder.layers.3.mlp.linear_fc1.layer_norm_weight      DDP, Float16Module, Transformer Engine
              decoder.layers.3.pre_mlp_layernorm.weight              canonical: megatron-core's local layers
"""

from __future__ import annotations

import re

__all__ = ["canonical", "layer_of", "norm_of", "role_of"]

WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)(?:\.|$)")
# Transformer Engine fuses a norm into the linear layer behind it.
FUSED_NORMS = (
    (re.compile(r"self_attention\.linear_qkv\.layer_norm_(weight|bias)$"), r"input_layernorm.\1"),
    (re.compile(r"mlp\.linear_fc1\.layer_norm_(weight|bias)$"), r"pre_mlp_layernorm.\1"),
)


def canonical(name: str) -> str:
    """`name` without wrappers; empty for a wrapper around the whole model, and for the model itself."""
    name = WRAPPERS.sub("", name).rstrip(".")
    while name == "module" or name.startswith("module."):
        name = name[len("module.") :]
    for pattern, replacement in FUSED_NORMS:
        name = pattern.sub(replacement, name)
    return name


def norm_of(name: str) -> str:
    """The norm that is fused into the linear layer `name`."""
    return canonical(f"{name}.layer_norm_weight").removesuffix(".weight")


def layer_of(name: str) -> int | None:
    """The number of the layer that `name` belongs to; None outside the layers."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(found[1]) if found else None


def role_of(name: str) -> str:
    """`name` without its layer's number: what is at the same place in every layer has the same role."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name, count=1)
