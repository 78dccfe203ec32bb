"""Settings that the promise does not cover, refused when a module that has them is built."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from patches.call_site import contract
from patches.contract import UnsupportedError, refuse_first
from patches.megatron.moe.refusals import check_mixture
from patches.registry import attribute

__all__ = ["PATCHES", "check_config"]

# setting: (what is covered besides None, the way out with Megatron-LM's flag)
COVERED: dict[str, tuple[tuple[Any, ...], str]] = {
    "hidden_dropout": ((0, 0.0), "set it to 0 (--hidden-dropout 0)"),
    "attention_dropout": ((0, 0.0), "set it to 0 (--attention-dropout 0)"),
    "fp8": ((False,), "train in bf16 or fp32 (without --fp8-format)"),
    "fp4": ((False,), "train in bf16 or fp32 (without --fp4-format)"),
    "fp16": ((False,), "train in bf16 or fp32 (--bf16 for --fp16)"),
    "multi_latent_attention": (
        (False,),
        "use multi-head or grouped-query attention (without --multi-latent-attention)",
    ),
    "hierarchical_context_parallel_sizes": ((), "set it to None (without --hierarchical-context-parallel-sizes)"),
    "hybrid_context_parallel": ((False,), "set it to False (without --hybrid-context-parallel)"),
    "tp_comm_overlap": ((False,), "set it to False (without --tp-comm-overlap)"),
    "cpu_offloading": ((False,), "set it to False (without --cpu-offloading-num-layers)"),
    "gtp_weight_remat_size": ((1,), "set it to 1"),
    "mlp_chunks_for_training": ((1,), "set it to 1 (--mlp-chunks-for-training 1)"),
    "perform_initialization": ((True,), "set it to True (without --no-initialization)"),
    "cross_entropy_fusion_impl": (("native",), "set it to 'native' (--cross-entropy-fusion-impl native)"),
    "enable_cuda_graph": ((False,), "set it to False (without --enable-cuda-graph)"),
    "external_cuda_graph": ((False,), "set it to False (without --external-cuda-graph)"),
    "cuda_graph_impl": (("none",), "set it to 'none' (--cuda-graph-impl none)"),
    "experimental_attention_variant": ((), "use multi-head or grouped-query attention"),
    "delay_wgrad_compute": ((False,), "set it to False (without --delay-wgrad-compute)"),
    "softmax_type": (("vanilla",), "set it to 'vanilla' (--softmax-type vanilla)"),
    "batch_invariant_mode": (
        (False,),
        "its kernels take the place of the patches': set it to False (without --batch-invariant-mode)",
    ),
    "qk_clip": ((False,), "set it to False (without --qk-clip)"),
    "has_cond_embedder": ((False,), "its gradient is a sum over stages: set it to False"),
    "use_te_activation_func": ((False,), "set it to False (without --use-te-activation-func)"),
    "use_transformer_engine_op_fuser": (
        (False,),
        "set it to False (without --use-transformer-engine-op-fuser)",
    ),
    "symmetric_ar_type": ((), "set it to None (without --symmetric-ar-type)"),
}

# The same, where sums over the batch have no order.
COVERED_ORDER_FREE: dict[str, tuple[tuple[Any, ...], str]] = {
    "calculate_per_token_loss": (
        (True,),
        "the loss must be a sum over tokens, divided once, at the end: set it to True (--calculate-per-token-loss)",
    ),
    "mtp_num_layers": ((0,), "its loss is a mean over a micro-batch: set it to None (without --mtp-num-layers)"),
}

# Models and layers of Megatron whose weights, drawn or cut by ranks, or sums depend on TP or pipeline stages.
UNCOVERED_CLASSES = {"HybridModel", "MambaModel", "MambaMixer", "GatedDeltaNet", "_GDNBase", "DSAttention"}
UNCOVERED_MODULES = (
    "transformer_engine", "apex", "megatron.core.extensions",
)  # fmt: skip
ACTIVATIONS = "silu gelu elu mish relu squared_relu quick_gelu fast_gelu openai_gelu erf_gelu sigmoid tanh".split()
# Classes of Transformer Engine, and Megatron's on top of them, whose sums patches.te covers or refuses itself.
COVERED_TE = {
    "TELinear", "TEColumnParallelLinear", "TERowParallelLinear", "TELayerNormColumnParallelLinear",
    "TEColumnParallelGroupedLinear", "TERowParallelGroupedLinear", "TEDotProductAttention", "Linear", "LayerNormLinear",
    "LayerNormMLP", "RMSNorm", "LayerNorm", "DotProductAttention", "UnfusedDotProductAttention", "FlashAttention",
    "FusedAttention", "FusedScaleMaskSoftmax",
}  # fmt: skip
TE_MODULES = ("transformer_engine.pytorch.module.", "transformer_engine.pytorch.attention.", "megatron.core.extensions")


def check_config(config: Any) -> None:
    """Raise `UnsupportedError` for the first setting of a Megatron config that is not covered."""
    contract().check_tp(getattr(config, "tensor_model_parallel_size", 1))
    contract().chunks_of_rank(getattr(config, "context_parallel_size", 1) or 1)
    _check_settings(config, COVERED, "by the patches")
    if getattr(config, "num_moe_experts", None) is not None:
        check_mixture(config)
    if contract().order_free:
        _check_settings(config, COVERED_ORDER_FREE, "by batch='order-free'")
        fused = getattr(config, "bias_activation_fusion", False) and getattr(config, "gated_linear_unit", False)
        if fused and getattr(config, "add_bias_linear", False):
            raise UnsupportedError(
                "bias_activation_fusion=True of a gated MLP with biases is not covered by batch='order-free': "
                "set it to False (--no-bias-swiglu-fusion)"
            )
    activation = getattr(config, "activation_func", None)
    activation = getattr(activation, "func", activation)  # functools.partial
    if activation is not None and getattr(activation, "__name__", None) not in ACTIVATIONS:
        raise UnsupportedError(f"activation_func={activation!r} is not covered: use one of {', '.join(ACTIVATIONS)}")


def _check_settings(config: Any, table: dict[str, tuple[tuple[Any, ...], str]], by: str) -> None:
    for setting, (covered, way_out) in table.items():
        value = getattr(config, setting, None)
        if value is not None and value not in covered:
            raise UnsupportedError(f"{setting}={value!r} is not covered {by}: {way_out}")


def _module_init(original: Any) -> Any:
    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        check_config(config)
        for cls in type(self).__mro__:
            if cls.__name__ in UNCOVERED_CLASSES and cls.__module__.startswith("megatron.core"):
                raise UnsupportedError(
                    f"{cls.__module__}.{cls.__name__} is not covered: build a GPTModel of attention and MLP layers"
                )
        original(self, config, *args, **kwargs)

    return __init__


def _module_tree_init(original: Any) -> Any:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        dropout = getattr(self, "hidden_dropout", None)
        refuse_first([(dropout, f"hidden_dropout={dropout} of a layer", "set it to 0")])
        for name, module in self.named_modules():
            cls = type(module)
            if isinstance(module, torch.nn.Dropout) and module.p:
                raise UnsupportedError(f"{name} is a Dropout of {module.p}, which is not covered: set it to 0")
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
        "refuses layers made of modules that are not covered, or with a dropout of their own",
        _module_tree_init,
    ),
    attribute(
        "block-modules",
        "megatron.core.transformer.transformer_block:TransformerBlock.__init__",
        "refuses a final layernorm that is not covered",
        _module_tree_init,
    ),
]
