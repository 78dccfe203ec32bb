"""transformer_engine.pytorch.attention.dot_product_attention: the backend that the contract names, and no other.

blockwise      the patches' own, whatever TE would choose (`te.blockwise`)
unfused        products and a softmax that `patches.aten.overrides` covers
flash, fused   run deterministically, on keys repeated for their query heads, once they were seen to compute each head
               by itself at the shape that is met, with the heads that every TP size sees (`order.head_invariance`)

A backend that was not asked for is refused where it would run, whatever chose it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from patches.call_site import contract
from patches.contract import Attention, UnsupportedError, refuse_first
from patches.ops.attention import repeat_for_heads
from patches.order.head_invariance import find_head_dependence
from patches.registry import REGISTRY
from patches.te.blockwise import WHO, blockwise, uncovered
from patches.te.context import te_attribute, tp_sharded

__all__ = ["PATCHES"]

PACKAGE = "transformer_engine.pytorch.attention.dot_product_attention"
BACKENDS = {"unfused": "unfused", "flash": "flash-attention", "fused": "fused (cuDNN)"}
ENVIRONMENT = {
    "unfused": "NVTE_FLASH_ATTN=0 NVTE_FUSED_ATTN=0",
    "flash": "NVTE_FUSED_ATTN=0 NVTE_UNFUSED_ATTN=0",
    "fused": "NVTE_FLASH_ATTN=0 NVTE_UNFUSED_ATTN=0",
}
HEADS = 2  # of [s, b, heads, d] and [b, s, heads, d]


def _forward(original: Any) -> Any:
    def forward(self: Any, query_layer: Tensor, key_layer: Tensor, value_layer: Tensor, *args: Any, **kw: Any) -> Any:
        if contract().attention == "blockwise":
            return blockwise(original, self, query_layer, key_layer, value_layer, *args, **kw)
        _refuse(self, query_layer, kw)
        # Megatron sets kv_groups, since it tells TE of one group per rank where ranks share groups.
        groups = getattr(self, "kv_groups", self.num_gqa_groups)
        shared = groups != self.num_attention_heads
        if contract().attention == "unfused":
            self.unfused_attention.repeat_kv = (groups, tp_sharded(self)) if shared else None
            return original(self, query_layer, key_layer, value_layer, *args, **kw)
        kv = [key_layer, value_layer]
        if shared:
            repeat = query_layer.shape[HEADS] // key_layer.shape[HEADS]
            heads = tp_sharded(self)
            kv = [repeat_for_heads(x, repeat, groups, heads) for x in kv]
        # Three tensors of their own: TE tells its kernels how they lie in memory.
        return _fused(self, original, [x.contiguous() for x in (query_layer, *kv)], args, kw)

    return forward


def _fused(module: Any, original: Any, qkv: list[Tensor], args: Any, kwargs: dict[str, Any]) -> Any:
    """The backend that was asked for, once it was seen to keep the promise."""
    asked = contract().attention
    parts = (module, module.flash_attention, module.fused_attention)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        groups, before = module.num_gqa_groups_per_partition, [part.deterministic for part in parts]
        try:
            module.num_gqa_groups_per_partition = k.shape[HEADS]
            for part in parts:
                part.deterministic = True
            return original(module, q, k, v, *args, **kwargs)
        except ValueError as error:
            raise UnsupportedError(f"attention={asked!r} cannot run here: {error}") from error
        finally:
            module.num_gqa_groups_per_partition = groups
            for part, deterministic in zip(parts, before, strict=True):
                part.deterministic = deterministic

    q, k, v = qkv
    settings = (kwargs.get("attn_mask_type") or module.attn_mask_type, kwargs.get("window_size") or module.window_size)
    key = (asked, q.shape, k.shape, v.shape, q.dtype, q.device, module.num_attention_heads, module.training, *settings)
    if key not in REGISTRY.verified:
        sizes = {1 << level for level in range(contract().leaves.bit_length())} | {module.tp_size}
        found = find_head_dependence(
            lambda q, k, v: attention(q, k, v).view(*q.shape[:-1], v.shape[-1]),
            q, k, v, module.num_attention_heads, HEADS, sorted(sizes), module.training,
        )  # fmt: skip
        if found:
            raise UnsupportedError(
                f"attention={asked!r} does not keep the promise for queries {list(q.shape)} and keys {list(k.shape)} "
                f"of {q.dtype}: {found}: use attention='unfused'"
            )
        REGISTRY.verified.add(key)
    return attention(q, k, v)


def _refuse(module: Any, query: Tensor, kwargs: dict[str, Any]) -> None:
    qkv_format = kwargs.get("qkv_format") or module.qkv_format
    bias = kwargs.get("core_attention_bias_type", "no_bias")
    groups = module.cp_group if isinstance(module.cp_group, list) else [module.cp_group]
    context_parallel = any(group is not None and group.size() > 1 for group in groups)
    settings = (
        *uncovered(module, kwargs),
        (qkv_format == "thd", "qkv_format='thd' (packed sequences)", "use 'sbhd' or 'bshd'"),
        (bias != "no_bias", f"core_attention_bias_type={bias!r}", "use 'no_bias'"),
        (kwargs.get("fp8_output"), "fp8_output", "set it to False"),
        (kwargs.get("score_mod"), "score_mod", "set it to None"),
        (kwargs.get("qkv_layer") is not None or kwargs.get("kv_layer") is not None, "packed qkv_layer", "pass q, k, v"),
        (kwargs.get("inference_params"), "inference_params", "call patches.disable() for inference"),
        (context_parallel, "context parallelism", "set context_parallel_size=1"),
    )
    refuse_first(settings, WHO)


def _unfused_forward(original: Any) -> Any:
    def forward(
        self: Any, _alibi_cache: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        if kwargs.get("fp8"):
            raise UnsupportedError("transformer_engine attention in FP8 is not covered: train in bf16 or fp32")
        if getattr(self, "repeat_kv", None) is not None:
            groups, shards = self.repeat_kv
            key, value = (repeat_for_heads(kv, query.shape[2] // kv.shape[2], groups, shards) for kv in (key, value))
        return original(self, _alibi_cache, query, key, value, *args, **kwargs)

    return forward


def _if_asked_for(backend: Attention) -> Any:
    def replacement(original: Any) -> Any:
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            asked = contract().attention
            if asked != backend:
                raise UnsupportedError(
                    f"Transformer Engine chose its {BACKENDS[backend]} backend, but attention={asked!r} was asked for: "
                    f"use Megatron's attention_backend=AttnBackend.{asked}, or {ENVIRONMENT[asked]}; "
                    "NVTE_DEBUG=1 NVTE_DEBUG_LEVEL=2 says why TE rules a backend out"
                )
            return original(self, *args, **kwargs)

        return forward

    return replacement


PATCHES = [
    te_attribute(
        "te-attention",
        f"{PACKAGE}.dot_product_attention:DotProductAttention.forward",
        "says which ranks share keys, verifies fused backends, refuses what is not covered",
        _forward,
    ),
    te_attribute(
        "te-unfused-attention",
        f"{PACKAGE}.backends:UnfusedDotProductAttention.forward",
        "the gradient of a key shared by query heads (GQA) sums over heads, on several ranks if groups < TP",
        lambda original: _if_asked_for("unfused")(_unfused_forward(original)),
    ),
    te_attribute(
        "te-softmax",
        f"{PACKAGE}.softmax:FusedScaleMaskSoftmax.is_kernel_available",
        "TE picks a fused softmax kernel by batch · heads per rank",
        lambda original: lambda self, *args, **kwargs: False,
        parameters="mask b np sq sk",
    ),
    te_attribute(
        "te-flash-attention",
        f"{PACKAGE}.backends:FlashAttention.forward",
        "its sums are out of reach: refused, or verified where asked for",
        _if_asked_for("flash"),
    ),
    te_attribute(
        "te-fused-attention",
        f"{PACKAGE}.backends:FusedAttention.forward",
        "its sums are out of reach: refused, or verified where asked for",
        _if_asked_for("fused"),
    ),
]
