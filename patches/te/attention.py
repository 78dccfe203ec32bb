"""transformer_engine.pytorch.attention.dot_product_attention: its unfused backend, of products and a softmax that
`patches.order.local` covers; the fused backends are refused where they would run, whatever chose them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from patches.contract import UnsupportedError
from patches.ops.attention import repeat_for_heads
from patches.te.context import over_tp, te_attribute

__all__ = ["PATCHES"]

PACKAGE = "transformer_engine.pytorch.attention.dot_product_attention"


def _forward(original: Any) -> Any:
    def forward(self: Any, query_layer: Tensor, *args: Any, **kwargs: Any) -> Any:
        _refuse(self, query_layer, kwargs)
        # Megatron sets kv_groups, since it tells TE of one group per rank where ranks share groups.
        groups = getattr(self, "kv_groups", self.num_gqa_groups)
        self.unfused_attention.repeat_kv = None
        if groups != self.num_attention_heads:
            self.unfused_attention.repeat_kv = (groups, over_tp(self))
        return original(self, query_layer, *args, **kwargs)

    return forward


def _refuse(module: Any, query: Tensor, kwargs: dict[str, Any]) -> None:
    qkv_format = kwargs.get("qkv_format") or module.qkv_format
    bias = kwargs.get("core_attention_bias_type", "no_bias")
    groups = module.cp_group if isinstance(module.cp_group, list) else [module.cp_group]
    context_parallel = any(group is not None and group.size() > 1 for group in groups)
    for found, setting, way_out in (
        (getattr(module, "softmax_type", "vanilla") != "vanilla", "softmax_type", "use 'vanilla'"),
        (module.training and module.attention_dropout > 0, "attention dropout", "set it to 0"),
        (qkv_format == "thd", "qkv_format='thd' (packed sequences)", "use 'sbhd' or 'bshd'"),
        (bias != "no_bias", f"core_attention_bias_type={bias!r}", "use 'no_bias'"),
        (kwargs.get("fp8_output"), "fp8_output", "set it to False"),
        (kwargs.get("score_mod"), "score_mod", "set it to None"),
        (kwargs.get("qkv_layer") is not None or kwargs.get("kv_layer") is not None, "packed qkv_layer", "pass q, k, v"),
        (kwargs.get("inference_params"), "inference_params", "call patches.disable() for inference"),
        (context_parallel, "context parallelism", "set context_parallel_size=1"),
    ):
        if found:
            raise UnsupportedError(f"transformer_engine DotProductAttention: {setting} is not covered: {way_out}")


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


def _refused(backend: str) -> Any:
    def replacement(original: Any) -> Any:
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            raise UnsupportedError(
                f"Transformer Engine chose its {backend} backend, whose sums are out of reach: use Megatron's "
                "attention_backend=AttnBackend.unfused, or NVTE_FLASH_ATTN=0 NVTE_FUSED_ATTN=0"
            )

        return forward

    return replacement


PATCHES = [
    te_attribute(
        "te-attention",
        f"{PACKAGE}.dot_product_attention:DotProductAttention.forward",
        "tells the unfused backend which ranks share keys; refuses what is not covered",
        _forward,
    ),
    te_attribute(
        "te-unfused-attention",
        f"{PACKAGE}.backends:UnfusedDotProductAttention.forward",
        "the gradient of a key shared by query heads (GQA) sums over heads, on several ranks if groups < TP",
        _unfused_forward,
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
        "refused: its sums are out of reach",
        _refused("flash-attention"),
    ),
    te_attribute(
        "te-fused-attention",
        f"{PACKAGE}.backends:FusedAttention.forward",
        "refused: its sums are out of reach",
        _refused("fused (cuDNN)"),
    ),
]
