"""The models that a run file can name: one small Qwen3 for tests, and published shapes.

`qwen3-tiny` has every feature of Qwen3 (RMSNorm, normalised queries and keys, gated MLP, rotary positions,
untied output) at a size that trains in milliseconds; its feed-forward width is no multiple of a vector
register times eight, so that tensor parallelism moves the vectors' tails. `qwen3-moe-tiny` is the same with experts.
"""

from __future__ import annotations

from typing import Any

__all__ = ["PRESETS"]

_QWEN3: dict[str, Any] = {
    "normalization": "RMSNorm",
    "norm_eps": 1e-6,
    "qk_layernorm": True,
    "activation": "swiglu",
    "bias": False,
    "positions": "rope",
    "rope_base": 1_000_000,
    "max_positions": 40960,
    "init_std": 0.02,
}

_QWEN3_TINY = _QWEN3 | {
    "num_layers": 2,
    "hidden_size": 128,
    "num_attention_heads": 8,
    "num_query_groups": 8,
    "head_dim": 16,
    "ffn_hidden_size": 360,
    "vocab_size": 257,
    "tied": False,
}

PRESETS: dict[str, dict[str, Any]] = {
    "qwen3-tiny": _QWEN3_TINY,
    "qwen3-moe-tiny": _QWEN3_TINY
    | {"experts": {"number": 8, "per_token": 2, "ffn_hidden_size": 72, "balance_loss": 0.001}},
    "qwen3-30b-a3b": _QWEN3
    | {
        "num_layers": 48,
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "num_query_groups": 4,
        "head_dim": 128,
        "ffn_hidden_size": 6144,
        "vocab_size": 151936,
        "tied": False,
        "experts": {"number": 128, "per_token": 8, "ffn_hidden_size": 768, "balance_loss": 0.001},
    },
    "qwen3-0.6b": _QWEN3
    | {
        "num_layers": 28,
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "num_query_groups": 8,
        "head_dim": 128,
        "ffn_hidden_size": 3072,
        "vocab_size": 151936,
        "tied": True,
    },
    "qwen3-8b": _QWEN3
    | {
        "num_layers": 36,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_query_groups": 8,
        "head_dim": 128,
        "ffn_hidden_size": 12288,
        "vocab_size": 151936,
        "tied": False,
    },
    "gpt2-124m": {
        "num_layers": 12,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "num_query_groups": 12,
        "head_dim": 64,
        "ffn_hidden_size": 3072,
        "vocab_size": 50257,
        "normalization": "LayerNorm",
        "norm_eps": 1e-5,
        "qk_layernorm": False,
        "activation": "gelu",
        "bias": True,
        "positions": "learned",
        "rope_base": 10_000,
        "max_positions": 1024,
        "init_std": 0.02,
        "tied": True,
    },
}
