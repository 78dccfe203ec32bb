"""megatron.core.transformer.{attention,dot_product_attention}: sums over heads, which TP spreads over ranks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from patches.call_site import contract, tp_sharded
from patches.contract import UnsupportedError
from patches.ops.attention import repeat_for_heads
from patches.ops.norm import HEADS
from patches.registry import attribute

__all__ = ["PATCHES"]


def _init(original: Any) -> Any:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if contract().attention != "unfused" and type(self.core_attention).__name__ == "DotProductAttention":
            raise UnsupportedError(
                f"attention={contract().attention!r} is Transformer Engine's, and this layer is Megatron's local one: "
                "build the model from get_gpt_layer_with_transformer_engine_spec(), or use attention='unfused'"
            )
        for norm in (self.q_layernorm, self.k_layernorm):
            if norm is not None:
                norm.leaf_dim = HEADS
        # Megatron tells its core attention of at least one group per rank, where ranks share groups.
        self.core_attention.kv_groups = self.config.num_query_groups

    return __init__


def _forward(original: Any) -> Any:
    def forward(self: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if getattr(self.config, "softmax_type", "vanilla") != "vanilla":
            raise UnsupportedError(f"softmax_type={self.config.softmax_type!r} is not covered: use 'vanilla'")
        groups = getattr(self, "kv_groups", self.config.num_query_groups)
        repeat = query.shape[2] // key.shape[2]
        if groups == self.config.num_attention_heads:
            return original(self, query, key, value, *args, **kwargs)
        heads = tp_sharded()
        key, value = (repeat_for_heads(kv, repeat, groups, heads) for kv in (key, value))
        stock_groups = self.num_query_groups_per_partition
        self.num_query_groups_per_partition = self.num_attention_heads_per_partition  # nothing left to repeat
        try:
            return original(self, query, key, value, *args, **kwargs)
        finally:
            self.num_query_groups_per_partition = stock_groups

    return forward


PATCHES = [
    attribute(
        "masked-softmax",
        "megatron.core.fusions.fused_softmax:FusedScaleMaskSoftmax.is_kernel_available",
        "whether the fused softmax kernel is used depends on the heads of a rank",
        lambda original: lambda self, mask, b, np, sq, sk: False,
        parameters="mask b np sq sk",
    ),
    attribute(
        "qk-layernorm",
        "megatron.core.transformer.attention:SelfAttention.__init__",
        "q/k-layernorm's gamma gradient sums over heads, which TP spreads over ranks",
        _init,
        parameters="config submodules layer_number attn_mask_type cp_comm_type model_comm_pgs pg_collection "
        "pp_layer_offset name",
    ),
    attribute(
        "shared-kv",
        "megatron.core.transformer.dot_product_attention:DotProductAttention.forward",
        "the gradient of a key shared by query heads (GQA) sums over heads, on several ranks if groups < TP",
        _forward,
        parameters="query key value attention_mask attn_mask_type attention_bias packed_seq_params",
        versions=">=0.16",  # before, Megatron refuses groups < TP
    ),
]
