"""Settings that the promise does not cover, refused when a module that has them is built."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from patches.contract import UnsupportedError
from patches.megatron.context import contract
from patches.registry import attribute

__all__ = ["PATCHES", "check_config"]

# setting: (what is covered besides None, the way out)
COVERED: dict[str, tuple[tuple[Any, ...], str]] = {
    "hidden_dropout": ((0, 0.0), "set it to 0"),
    "attention_dropout": ((0, 0.0), "set it to 0"),
    "fp8": ((False,), "train in bf16 or fp32"),
    "fp4": ((False,), "train in bf16 or fp32"),
    "fp16": ((False,), "train in bf16 or fp32"),
    "num_moe_experts": ((), "train a dense model"),
    "multi_latent_attention": ((False,), "use multi-head or grouped-query attention"),
    "context_parallel_size": ((1,), "set it to 1"),
    "tp_comm_overlap": ((False,), "set it to False"),
    "cpu_offloading": ((False,), "set it to False"),
    "gtp_weight_remat_size": ((1,), "set it to 1"),
    "mlp_chunks_for_training": ((1,), "set it to 1"),
    "perform_initialization": ((True,), "set it to True"),
    "cross_entropy_fusion_impl": (("native",), "set it to 'native'"),
    "enable_cuda_graph": ((False,), "set it to False"),
    "external_cuda_graph": ((False,), "set it to False"),
    "cuda_graph_impl": (("none",), "set it to 'none'"),
    "experimental_attention_variant": ((), "use multi-head or grouped-query attention"),
    "delay_wgrad_compute": ((False,), "set it to False"),
    "use_te_activation_func": ((False,), "set it to False"),
    "use_transformer_engine_op_fuser": ((False,), "set it to False"),
    "symmetric_ar_type": ((), "set it to None"),
}

UNCOVERED_MODULES = (
    "transformer_engine", "apex", "megatron.core.extensions", "megatron.core.fusions.fused_layer_norm",
)  # fmt: skip
ACTIVATIONS = "silu gelu elu mish relu squared_relu quick_gelu fast_gelu openai_gelu erf_gelu sigmoid tanh".split()
# Classes of Transformer Engine, and Megatron's on top of them, whose sums patches.te covers or refuses itself.
COVERED_TE = {
    "TELinear", "TEColumnParallelLinear", "TERowParallelLinear", "TELayerNormColumnParallelLinear",
    "TEDotProductAttention", "Linear", "LayerNormLinear", "LayerNormMLP", "RMSNorm", "LayerNorm",
    "DotProductAttention", "UnfusedDotProductAttention", "FlashAttention", "FusedAttention", "FusedScaleMaskSoftmax",
}  # fmt: skip
TE_MODULES = ("transformer_engine.pytorch.module.", "transformer_engine.pytorch.attention.", "megatron.core.extensions")


def check_config(config: Any) -> None:
    """Raise `UnsupportedError` for the first setting of a Megatron config that is not covered."""
    contract().check_tp(getattr(config, "tensor_model_parallel_size", 1))
    for setting, (covered, way_out) in COVERED.items():
        value = getattr(config, setting, None)
        if value is not None and value not in covered:
            raise UnsupportedError(f"{setting}={value!r} is not covered by the patches: {way_out}")
    activation = getattr(config, "activation_func", None)
    activation = getattr(activation, "func", activation)  # functools.partial
    if activation is not None and getattr(activation, "__name__", None) not in ACTIVATIONS:
        raise UnsupportedError(f"activation_func={activation!r} is not covered: use one of {', '.join(ACTIVATIONS)}")


def _module_init(original: Any) -> Any:
    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        check_config(config)
        original(self, config, *args, **kwargs)

    return __init__


def _module_tree_init(original: Any) -> Any:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        for name, module in self.named_modules():
            cls = type(module)
            if cls.__module__.startswith(UNCOVERED_MODULES) and not _is_covered(cls):
                raise UnsupportedError(
                    f"{name} is a {cls.__module__}.{cls.__name__}, which is not covered: "
                    "build the model from get_gpt_layer_local_spec()"
                )

    return __init__


def _is_covered(cls: type) -> bool:
    return (
        cls.__name__ in COVERED_TE
        and cls.__module__.startswith(TE_MODULES)
        and find_spec("transformer_engine") is not None
    )


PATCHES = [
    attribute(
        "settings",
        "megatron.core.transformer.module:MegatronModule.__init__",
        "refuses settings that are not covered",
        _module_init,
        parameters="config",
    ),
    attribute(
        "layer-modules",
        "megatron.core.transformer.transformer_layer:TransformerLayer.__init__",
        "refuses layers made of modules that are not covered",
        _module_tree_init,
    ),
    attribute(
        "block-modules",
        "megatron.core.transformer.transformer_block:TransformerBlock.__init__",
        "refuses a final layernorm that is not covered",
        _module_tree_init,
    ),
]
