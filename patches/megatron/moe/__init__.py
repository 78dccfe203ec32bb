"""Call sites in megatron.core.transformer.moe, one file per patched module."""

from __future__ import annotations

from patches.megatron.moe import experts, moe_layer, router, shared_experts
from patches.registry import Patch

__all__ = ["PATCHES"]

PATCHES: list[Patch] = [*router.PATCHES, *experts.PATCHES, *shared_experts.PATCHES, *moe_layer.PATCHES]
