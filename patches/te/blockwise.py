"""The patches' own attention in the place of transformer_engine.pytorch.DotProductAttention, whatever it would choose.

Every argument of the call is either acted upon here or must have its default: what a later version adds is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from patches.call_site import context_group
from patches.contract import UnsupportedError, refuse_first
from patches.ops.attention import blockwise_attention
from patches.order.visible import Packed, Visible
from patches.te.context import tp_sharded

__all__ = ["WHO", "blockwise", "uncovered"]

WHO = "transformer_engine DotProductAttention: "

ACTED_UPON = {
    "self", "query_layer", "key_layer", "value_layer", "qkv_format", "cu_seqlens_q", "cu_seqlens_kv",
    "cu_seqlens_q_padded", "cu_seqlens_kv_padded", "attn_mask_type", "window_size", "bottom_right_diagonal",
}  # fmt: skip
# What changes no bits: TE's masks of no use to a band, sizes that follow from others, memory and speed.
WITHOUT_EFFECT = {
    "attention_mask", "max_seqlen_q", "max_seqlen_kv", "checkpoint_core_attention", "fast_zero_fill",
    "pad_between_seqs", "num_splits", "bf16_backward",
}  # fmt: skip
BANDS = ("causal", "no_mask", "causal_bottom_right")
BANDS_OF_PACKED = ("padding_causal", "padding")


def blockwise(original: Any, module: Any, *args: Any, **kwargs: Any) -> Tensor:
    """DotProductAttention.forward(*args, **kwargs) of `module`: [s, b, h·d], [b, s, h·d] or [rows, h·d]."""
    given = inspect.signature(original).bind(module, *args, **kwargs).arguments
    _refuse(original, module, given)
    form = given.get("qkv_format") or module.qkv_format
    q, k, v = (given[name] for name in ("query_layer", "key_layer", "value_layer"))
    packed = None
    if form == "thd":
        padded = (given.get(f"cu_seqlens_{which}_padded") for which in ("q", "kv"))
        packed = Packed.of(given["cu_seqlens_q"], given["cu_seqlens_kv"], *padded)
        q, k, v = (x.unsqueeze(1) for x in (q, k, v))
    elif form == "bshd":
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    visible = _visible(module, given, len(q), len(k), packed)
    # Megatron sets kv_groups, since it tells TE of one group per rank where ranks share groups.
    groups = getattr(module, "kv_groups", module.num_gqa_groups)
    shards = replace(tp_sharded(module), context=_context(module))
    y = blockwise_attention(q, k, v, visible, module.unfused_attention.softmax_scale, groups, shards)
    if form == "thd":
        return y.flatten(1)
    return y.flatten(2) if form == "sbhd" else y.transpose(0, 1).flatten(2)


def _context(module: Any) -> Any:
    """The ranks that hold other chunks of the module's sequences, as many as Megatron says; None without any."""
    group, of_megatron = module.cp_group, context_group()
    sizes = [1 if one is None else one.size() for one in (group, of_megatron)]
    if sizes[0] != sizes[1]:
        raise UnsupportedError(
            f"transformer_engine DotProductAttention: context parallelism of {sizes[0]} ranks in a model of {sizes[1]} "
            "is not covered: use Megatron's context-parallel group everywhere"
        )
    return of_megatron and group


def _visible(module: Any, given: dict[str, Any], queries: int, keys: int, packed: Packed | None) -> Visible:
    kind = (given.get("attn_mask_type") or module.attn_mask_type).replace(",", "_")
    if kind == "causal_padding":
        kind = "padding_causal"
    allowed = BANDS if packed is None else BANDS_OF_PACKED
    if kind not in allowed:
        raise UnsupportedError(
            f"attn_mask_type={kind!r} of {'packed sequences' if packed else 'whole batches'} is not covered by "
            f"attention='blockwise': use {' or '.join(allowed)}, or attention='unfused'"
        )
    window = given.get("window_size") or module.window_size or (-1, -1)
    left, right = (None if size < 0 else size for size in window)
    if "causal" in kind:
        right = 0
    if kind == "padding" and not left is right is None:
        raise UnsupportedError("a sliding window over packed sequences is covered with padding_causal alone")
    aligned = kind == "causal_bottom_right"
    if (
        packed is None
        and queries != keys
        and not aligned
        and (left is not None or (kind == "no_mask" and right is not None))
    ):
        raise UnsupportedError(
            f"a sliding window of {queries} queries over {keys} keys is not covered: use causal_bottom_right"
        )
    if given.get("bottom_right_diagonal") and kind.endswith("causal") and (packed is not None or queries != keys):
        raise UnsupportedError("bottom_right_diagonal is not covered: use attn_mask_type='causal_bottom_right'")
    return Visible(left, right, max(0, keys - queries) if aligned else 0, packed)


def _refuse(original: Any, module: Any, given: dict[str, Any]) -> None:
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    settings: list[tuple[object, str, str]] = [
        *uncovered(module, given),
        (isinstance(module.cp_group, list), "cp_comm_type='a2a+p2p'", "use another, which changes nothing"),
        (getattr(module, "softcap", None), "softcap", "leave it 0"),
        (getattr(module, "return_max_logit", False), "return_max_logit", "set log_max_attention_logit=False"),
        (FP8GlobalStateManager.is_fp8_enabled(), "FP8", "train in bf16 or fp32"),
    ]
    for name, parameter in inspect.signature(original).parameters.items():
        value = given.get(name, parameter.default)
        if name not in ACTED_UPON | WITHOUT_EFFECT and not _is(value, parameter.default):
            settings.append((True, name, f"leave it {parameter.default!r}"))
    refuse_first(settings, WHO)


def uncovered(module: Any, given: Mapping[str, Any]) -> Iterator[tuple[object, str, str]]:
    """What no attention of the patches' covers, their own or one of TE's, as `refuse_first` takes it."""
    yield getattr(module, "softmax_type", "vanilla") != "vanilla", "softmax_type", "use 'vanilla'"
    yield module.training and module.attention_dropout > 0, "attention dropout", "set it to 0"
    yield given.get("num_splits", 1) not in (None, 1), "num_splits > 1", "leave it 1"


def _is(value: Any, default: Any) -> bool:
    """Whether an argument says no more than its default: None, False and "no_bias" ask for nothing either."""
    if isinstance(value, torch.Tensor):
        return False
    return value is default or value in (None, False, "no_bias") or value == default
