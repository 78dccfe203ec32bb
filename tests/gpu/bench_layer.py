"""A transformer layer of Qwen3-8B, forward and backward, as one rank of TP=1, 2, 4 and 8 has it: ours against stock.

One GPU holds the share of a rank (its heads, its part of the feed-forward width, its leaves) as a layer of its own, so
what ranks send each other is not in these times. Stock is Transformer Engine's layer where it is installed, else
Megatron's local one with torch's kernels. Ours runs with every attention that the contract names and that is not
Transformer Engine's own: one that is new there is measured here without a change.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol, get_args

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

import patches
from patches.contract import Attention
from tpcheck.config.presets import PRESETS

LEAVES = 8
OF_TRANSFORMER_ENGINE = ("flash", "fused")
GIB = 1 << 30


class Times(Protocol):
    """`bench.Clock`."""

    device: str

    def times(self, calls: dict[str, Any]) -> dict[str, float]: ...


@dataclass(frozen=True)
class Layer:
    """Who computes the layer of a rank; `attention` is None for stock."""

    tp: int
    attention: Attention | None

    @property
    def name(self) -> str:
        return f"layer of TP={self.tp}, {self.attention or 'stock'}"


# preset, sizes of TP, sequence, micro-batch
SCALES = {"cuda": ("qwen3-8b", (1, 8, 2, 4), 4096, 1), "cpu": ("qwen3-tiny", (1, 8), 16, 1)}


def layers(device: str) -> Iterator[Layer]:
    """Stock first: the others are divided by it."""
    for tp in SCALES[device][1]:
        yield Layer(tp, None)
        for attention in get_args(Attention):
            if attention not in OF_TRANSFORMER_ENGINE:
                yield Layer(tp, attention)


class Measured:
    """Measures layers one by one and remembers how long stock took."""

    def __init__(self) -> None:
        self._stock: dict[int, dict[str, Any]] = {}

    def __call__(self, one: Layer, clock: Times) -> dict[str, Any]:
        te = find_spec("transformer_engine") is not None and clock.device == "cuda" and one.attention is None
        gc.collect()  # a layer and its autograd graph refer to each other
        _alone()
        with _patched(one):
            row = {"tp": one.tp, "who": _who(one, te), **_times(one, te, clock)}
        if one.attention is None:
            self._stock[one.tp] = row
        if stock := self._stock.get(one.tp):
            row |= {"over_stock": row["ms"] / stock["ms"], "memory_over_stock": row["gib"] / (stock["gib"] or 1)}
        return row


def _who(one: Layer, te: bool) -> str:
    if one.attention is None:
        return "stock, Transformer Engine" if te else "stock, torch's kernels"
    return f"ours, attention {one.attention}"


def _patched(one: Layer) -> AbstractContextManager[None]:
    if one.attention is None:
        return nullcontext()
    return patches.enabled("tree", LEAVES // one.tp, one.attention)  # of 8 leaves, this rank's own


def _alone() -> None:
    """The process group of one rank that Megatron asks for."""
    patches.cpu.enable()
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1234)


def _times(one: Layer, te: bool, clock: Times) -> dict[str, Any]:
    preset, _, length, batch = SCALES[clock.device]
    config = _config(PRESETS[preset], one.tp, length)
    if te:
        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=True)
    else:
        spec = get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm")
    layer: Any = build_module(spec, config=config, layer_number=1).to(clock.device, torch.bfloat16)
    x = torch.randn(length, batch, config.hidden_size, device=clock.device, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn_like(x)
    angles = RotaryEmbedding(config.kv_channels, rotary_percent=1.0)(length)

    def forward() -> Tensor:
        y: Tensor = layer(x, attention_mask=None, rotary_pos_emb=angles)[0]
        return y

    def step() -> None:
        layer.zero_grad(set_to_none=True)
        forward().backward(dy)

    step()
    peak = _peak(step, clock.device)
    ms = clock.times({"forward": forward, "step": step})
    return {"tokens": length * batch, "ms": ms["step"], "forward_ms": ms["forward"], "gib": peak / GIB}


def _config(model: dict[str, Any], tp: int, length: int) -> TransformerConfig:
    """A rank's share of the model's layer, whole in itself."""
    return TransformerConfig(
        num_layers=1,
        hidden_size=model["hidden_size"],
        num_attention_heads=model["num_attention_heads"] // tp,
        num_query_groups=max(1, model["num_query_groups"] // tp),
        kv_channels=model["head_dim"],
        ffn_hidden_size=model["ffn_hidden_size"] // tp,
        normalization="RMSNorm", qk_layernorm=True, gated_linear_unit=True, activation_func=torch.nn.functional.silu,
        add_bias_linear=False, hidden_dropout=0.0, attention_dropout=0.0, use_cpu_initialization=True, bf16=True,
        params_dtype=torch.bfloat16, gradient_accumulation_fusion=False, masked_softmax_fusion=False,
        apply_rope_fusion=False, bias_activation_fusion=True, bias_dropout_fusion=False, persist_layer_norm=False,
    )  # fmt: skip


def _peak(step: Any, device: str) -> int:
    """Bytes of a step beyond weights and its input; of a CPU nobody keeps count."""
    if device == "cpu":
        return 0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() - before
