"""What is covered of a mixture of experts, and what is refused when its config or its layer is met."""

from __future__ import annotations

from typing import Any

from packaging.specifiers import SpecifierSet

from patches.call_site import contract
from patches.contract import UnsupportedError
from patches.registry import library_version

__all__ = ["VERSIONS", "check_experts", "check_mixture"]

VERSIONS = ">=0.16"  # of megatron-core, whose mixtures of experts are covered

# setting: (what is covered besides None, the way out); Megatron-LM's flag is named after the setting
COVERED: dict[str, tuple[tuple[Any, ...], str]] = {
    "add_bias_linear": ((False,), "experts have no biases: set it to False (--disable-bias-linear)"),
    "context_parallel_size": ((1,), "set it to 1"),
    "moe_token_dispatcher_type": (("allgather", "alltoall"), "use 'allgather' or 'alltoall'"),
    "moe_router_dtype": (("fp32",), "use 'fp32', or None"),
    "moe_router_score_function": (("softmax", "sigmoid", "sqrtsoftplus"), "use one of these three"),
    "moe_input_jitter_eps": ((), "it is random: set it to None"),
    "moe_router_force_load_balancing": ((False,), "it is random: set it to False"),
    "moe_router_force_biased": ((), "it is random: set it to None"),
    "moe_router_topk_limited_devices": ((), "use moe_router_num_groups"),
    "moe_latent_size": ((), "set it to None"),
    "moe_mlp_glu_interleave_size": ((), "set it to None"),
    "moe_expert_rank_capacity_factor": ((), "it drops what is too much for a rank: set it to None"),
    "expert_gtp_weight_remat_size": ((1,), "set it to 1"),
    **dict.fromkeys(
        (
            "moe_enable_routing_replay",
            "moe_shared_expert_overlap",
            "overlap_moe_expert_parallel_comm",
            "moe_router_fusion",
            "moe_permute_fusion",
            "moe_apply_probs_on_input",
            "fine_grained_activation_offloading",
            "moe_use_legacy_grouped_gemm",
            "moe_router_padding_for_quantization",
            "moe_pad_expert_input_to_capacity",
            "moe_single_grouped_weight",
            "moe_paged_stash",
            "use_grouped_gemm_for_shared_expert",
            "overlap_dispatch_backward_with_experts_wgrad",
        ),
        ((False,), "set it to False"),
    ),
}

# Experts of Megatron: what their first layer may be.
LAYERS = {
    "SequentialMLP": ("ColumnParallelLinear", "TEColumnParallelLinear"),
    "TEGroupedMLP": ("TEColumnParallelGroupedLinear",),
}

# Kinds of balancing whose definition is a rank's, a micro-batch's or the number of micro-batches'.
BALANCE = {
    "aux_loss": "is that of one micro-batch's tokens, so that their number has a say",
    "global_aux_loss": "takes the average over the micro-batches that a rank has seen, so that their number has a say",
    "sinkhorn": "normalises over the tokens of one rank",
    "quantile_balancing": "takes quantiles of one micro-batch's logits",
}
LOSSES = ("aux_loss", "global_aux_loss")  # those of them that are nothing where their coefficient is 0


def check_mixture(config: Any) -> None:
    """Raise `UnsupportedError` for what a config with `num_moe_experts` has that is not covered."""
    experts, found = config.num_moe_experts, library_version("megatron-core")
    if found is None or not SpecifierSet(VERSIONS).contains(found, prereleases=True):
        raise UnsupportedError(
            f"num_moe_experts={experts} is not covered by the patches with megatron-core {found}: use {VERSIONS}, or "
            "train a dense model (without --num-experts)"
        )
    if not contract().order_free:
        raise UnsupportedError(
            f"num_moe_experts={experts} is not covered by batch='ordered', since every expert-parallel size brings an "
            "expert other sequences: set batch='order-free', whose sums over them have no order (--batch order-free of "
            "python -m patches)"
        )
    if contract().strategy != "tree":
        raise UnsupportedError(
            f"num_moe_experts={experts} is not covered by strategy={contract().strategy!r}, which knows no leaves of a "
            "sequence: use strategy='tree'"
        )
    if contract().chunks > 1:
        raise UnsupportedError(
            f"num_moe_experts={experts} is not covered with chunks={contract().chunks}, since rows of experts are told "
            "apart by sequences: set chunks=1"
        )
    for setting, (covered, way_out) in COVERED.items():
        value = getattr(config, setting, None)
        if value is not None and value not in covered:
            raise UnsupportedError(f"{setting}={value!r} of a mixture of experts is not covered: {way_out}")
    _check_balance(config)
    if getattr(config, "pipeline_model_parallel_size", 1) > 1 and config.moe_layer_freq != 1:
        raise UnsupportedError(
            f"moe_layer_freq={config.moe_layer_freq!r} with pipeline_model_parallel_size > 1 is not covered, since the "
            "gradient norm of experts is summed over stages that may have none: set it to 1, or use no pipeline"
        )


def _check_balance(config: Any) -> None:
    kinds, coefficients = config.moe_router_load_balancing_type, config.moe_aux_loss_coeff
    if not isinstance(kinds, list):
        kinds, coefficients = [kinds], [coefficients]
    for kind, coefficient in zip(kinds, coefficients, strict=True):
        if kind in BALANCE and (coefficient or kind not in LOSSES):
            raise UnsupportedError(
                f"moe_router_load_balancing_type={kind!r} is not covered: it {BALANCE[kind]}; use 'seq_aux_loss', a "
                "loss of every sequence, 'none' with moe_router_enable_expert_bias, or moe_aux_loss_coeff=0 "
                "(--moe-router-load-balancing-type)"
            )


def check_experts(experts: Any) -> None:
    """Raise `UnsupportedError` for a kind of experts whose sums are not covered."""
    kind = type(experts).__name__
    if kind not in LAYERS:
        raise UnsupportedError(
            f"experts in a {kind} are not covered: use SequentialMLP (without --moe-grouped-gemm), or with Transformer "
            "Engine's layers TEGroupedMLP"
        )
    layer = type((experts if kind == "TEGroupedMLP" else experts.local_experts[0]).linear_fc1)
    if layer.__name__ not in LAYERS[kind]:
        raise UnsupportedError(
            f"experts made of {layer.__module__}.{layer.__name__} are not covered: build the model from "
            "get_gpt_layer_local_spec(num_experts=…) or get_gpt_layer_with_transformer_engine_spec(num_experts=…)"
        )
    if getattr(experts, "activation_recompute", False):
        raise UnsupportedError(
            "'moe_act' in recompute_modules is not covered: use 'moe', which recomputes the layer (--recompute-modules)"
        )
