"""Call sites in megatron-core, one file per patched module and named after it, in the order of a training step."""

from __future__ import annotations

from patches.megatron import (
    attention,
    clip_grads,
    cross_entropy,
    distrib_optimizer,
    distributed_data_parallel,
    dot_product_attention,
    finalize_model_grads,
    fsdp,
    fused_layer_norm,
    initial_weights,
    language_model_embedding,
    language_module,
    layers,
    mlp,
    moe,
    param_and_grad_buffer,
    refusals,
    schedules,
    tokenizer,
    torch_norm,
)
from patches.registry import Patch

__all__ = ["PATCHES", "REFUSALS"]

REFUSALS: list[Patch] = refusals.PATCHES  # applied before all else of megatron-core, ATen's overrides included
PATCHES: list[Patch] = [
    *tokenizer.PATCHES,
    *mlp.PATCHES,
    *moe.PATCHES,
    *language_module.PATCHES,
    *language_model_embedding.PATCHES,
    *layers.PATCHES,
    *initial_weights.PATCHES,
    *torch_norm.PATCHES,
    *fused_layer_norm.PATCHES,
    *attention.PATCHES,
    *dot_product_attention.PATCHES,
    *cross_entropy.PATCHES,
    *schedules.PATCHES,
    *fsdp.PATCHES,
    *distributed_data_parallel.PATCHES,
    *param_and_grad_buffer.PATCHES,
    *finalize_model_grads.PATCHES,
    *clip_grads.PATCHES,
    *distrib_optimizer.PATCHES,
]
