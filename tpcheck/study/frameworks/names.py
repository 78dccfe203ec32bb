"""Which of Hugging Face's tensors are Megatron's: it keeps q, k and v in one, group by group, and gate above up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["OUTPUTS", "from_hugging_face"]

T = TypeVar("T", bound=Any)
PLAIN = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}
# Outputs that both have, each of [samples, positions, features] or the first two the other way about.
OUTPUTS = {
    "embedding.word_embeddings": "model.embed_tokens",
    **{f"decoder.layers.{i}.self_attention.linear_proj": f"model.layers.{i}.self_attn.o_proj" for i in range(2)},
    **{f"decoder.layers.{i}.mlp.linear_fc2": f"model.layers.{i}.mlp.down_proj" for i in range(2)},
    **{f"decoder.layers.{i}": f"model.layers.{i}" for i in range(2)},
    "decoder.final_layernorm": "model.norm",
    "output_layer": "lm_head",
}


def from_hugging_face(name: str, get: Callable[[str], T], sizes: dict[str, int], cat: Callable[[list[T]], T]) -> T:
    """Megatron's whole tensor of this name, made of Hugging Face's, which `get` gives by theirs."""
    if name in PLAIN:
        return get(PLAIN[name])
    number, _, rest = name.removeprefix("decoder.layers.").partition(".")
    layer = f"model.layers.{number}."
    if rest in PLAIN:
        return get(layer + PLAIN[rest])
    if rest == "mlp.linear_fc1.weight":
        return cat([get(f"{layer}mlp.gate_proj.weight"), get(f"{layer}mlp.up_proj.weight")])
    kind = rest.removeprefix("self_attention.linear_qkv.")
    q, k, v = (get(f"{layer}self_attn.{one}_proj.{kind}") for one in "qkv")
    groups = sizes["num_key_value_heads"]
    shares = [part.reshape(groups, -1, *part.shape[1:]) for part in (q, k, v)]
    return cat([share[group] for group in range(groups) for share in shares])
