"""megatron.core.transformer.{attention,dot_product_attention}: sums over heads, which TP spreads over ranks."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from patches.call_site import context_group, contract, tp_sharded
from patches.contract import UnsupportedError, refuse_first
from patches.ops.attention import blockwise_attention, repeat_for_heads
from patches.ops.norm import HEADS
from patches.order.chunks import own_tokens
from patches.order.visible import Packed, Visible
from patches.registry import attribute

__all__ = ["PATCHES"]

SEEN = "_patches_is_causal"


def _init(original: Any) -> Any:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if contract().attention in ("flash", "fused") and type(self.core_attention).__name__ == "DotProductAttention":
            raise UnsupportedError(
                f"attention={contract().attention!r} is Transformer Engine's, and this layer is Megatron's local one: "
                "build the model from get_gpt_layer_with_transformer_engine_spec(), or use attention='blockwise' or "
                "'unfused'"
            )
        for norm in (self.q_layernorm, self.k_layernorm):
            if norm is not None:
                norm.leaf_dim = HEADS
        # Megatron tells its core attention of at least one group per rank, where ranks share groups.
        self.core_attention.kv_groups = self.config.num_query_groups

    return __init__


def _core_init(original: Any) -> Any:
    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        """Stock's, which is for whole sequences alone; the patches' attention takes chunks of them."""
        group = context_group()
        if config.context_parallel_size != (group.size() if group else 1):
            raise UnsupportedError(
                f"context_parallel_size={config.context_parallel_size} in a model of {group.size() if group else 1} "
                "context-parallel ranks: give initialize_model_parallel the same context_parallel_size"
            )
        of_whole_sequences = copy.copy(config)
        of_whole_sequences.context_parallel_size = 1
        original(self, of_whole_sequences, *args, **kwargs)
        self.config = config

    return __init__


def _forward(original: Any) -> Any:
    def forward(self: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if contract().attention == "blockwise":
            return original(self, query, key, value, *args, **kwargs)
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


def _blockwise(original: Any) -> Any:
    def forward(
        self: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        if contract().attention != "blockwise":
            more = () if packed_seq_params is attention_bias is None else (attention_bias, packed_seq_params)
            return original(self, query, key, value, attention_mask, attn_mask_type, *more)
        _refuse_blockwise(self, attention_bias)
        packed = _packed(packed_seq_params)
        if packed is not None:
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        visible = _visible(self, len(query), len(key), attention_mask, packed)
        scale = self.softmax_scale * (self.scale_mask_softmax.scale or 1)  # the two that layer scaling makes of one
        groups = getattr(self, "kv_groups", self.config.num_query_groups)
        y = blockwise_attention(query, key, value, visible, scale, groups, tp_sharded())
        return y.flatten(2) if packed is None else y.flatten(1)

    return forward


def _refuse_blockwise(module: Any, bias: Tensor | None) -> None:
    dropout = module.training and module.attention_dropout.p > 0
    refuse_first(
        (
            (dropout, "attention dropout", "set it to 0 (--attention-dropout 0)"),
            (bias is not None, "an attention bias", "leave it out"),
        )
    )


def _packed(params: Any) -> Packed | None:
    if params is None:
        return None
    if params.qkv_format != "thd":
        raise UnsupportedError(f"packed_seq_params.qkv_format={params.qkv_format!r} is not covered: use 'thd'")
    padded = (getattr(params, f"cu_seqlens_{which}_padded", None) for which in ("q", "kv"))
    return Packed.of(params.cu_seqlens_q, params.cu_seqlens_kv, *padded)


def _visible(module: Any, queries: int, keys: int, mask: Tensor | None, packed: Packed | None) -> Visible:
    """What Megatron's own softmax leaves of the scores, if that is a band."""
    kind, window = module.attn_mask_type.name, getattr(module.scale_mask_softmax, "window_size", None)
    causal = kind == "causal"
    if window is not None:
        if packed is not None and not causal:
            raise UnsupportedError("a sliding window over packed sequences is covered with causal attention alone")
        left, right = window
        return Visible(left, right, 0 if packed is not None else keys - queries, packed)
    if not causal and (mask is not None or kind not in ("no_mask", "padding")):
        raise UnsupportedError(
            f"attn_mask_type={kind!r} {'with' if mask is not None else 'without'} an attention mask is not covered by "
            "attention='blockwise': use causal or no_mask attention, packed sequences, or attention='unfused'"
        )
    if causal and packed is None and queries != keys:
        raise UnsupportedError(f"causal attention of {queries} queries to {keys} keys is not covered")
    if mask is not None and packed is None and not _is_causal(mask):
        raise UnsupportedError(
            "an attention mask that is not the causal one is not covered by attention='blockwise': use packed "
            "sequences (without --reset-attention-mask), or attention='unfused'"
        )
    return Visible(right=0 if causal else None, packed=packed)


def _is_causal(mask: Tensor) -> bool:
    """Whether `mask` [.., queries, keys] of this rank hides what lies ahead and nothing else; it is looked at once."""
    if not hasattr(mask, SEEN):
        keys, context = torch.arange(mask.shape[-1], device=mask.device), context_group()
        queries = keys if context is None else own_tokens(keys, context)
        ahead = keys > queries.unsqueeze(1)
        setattr(mask, SEEN, mask.shape[-2:] == ahead.shape and bool((mask.bool() == ahead).all()))
    return bool(getattr(mask, SEEN))


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
        "context-parallel",
        "megatron.core.transformer.dot_product_attention:DotProductAttention.__init__",
        "local layers refuse sequences that are spread over ranks; the patches' attention takes chunks of them",
        _core_init,
        parameters="config layer_number attn_mask_type attention_type attention_dropout softmax_scale cp_comm_type "
        "model_comm_pgs pg_collection",
        order_free=True,
    ),
    attribute(
        "blockwise-attention",
        "megatron.core.transformer.dot_product_attention:DotProductAttention.forward",
        "attention by blocks of keys, with O(S) memory, where it is asked for",
        _blockwise,
        parameters="query key value attention_mask attn_mask_type attention_bias packed_seq_params",
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
