"""What is not covered of a mixture of experts is refused by name, with the way out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import patches
from patches.megatron.moe.refusals import VERSIONS, check_experts, check_mixture
from patches.registry import library_version
from tests.support import plain_megatron
from tests.support.mixtures import BATCH, EXPERTS
from tests.support.ranks import on_ranks

FOUND = Version(library_version("megatron-core") or "0")

# what is set: what the message says
SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "biases": ({"add_bias_linear": True}, "add_bias_linear=True of a mixture .*--disable-bias-linear"),
    "flex": ({"moe_token_dispatcher_type": "flex"}, "type='flex' .*: use 'allgather' or 'alltoall'"),
    "float64 router": ({"moe_router_dtype": "fp64"}, "moe_router_dtype='fp64' of a mixture .*: use 'fp32'"),
    "jitter": ({"moe_input_jitter_eps": 0.1}, "moe_input_jitter_eps=0.1 .* it is random"),
    "random logits": ({"moe_router_force_load_balancing": True}, "load_balancing=True .* it is random"),
    "replay": ({"moe_enable_routing_replay": True}, "moe_enable_routing_replay=True"),
    "overlapped shared expert": (
        {"moe_shared_expert_intermediate_size": 8, "moe_shared_expert_overlap": True},
        "moe_shared_expert_overlap=True",
    ),
    "fused router": ({"moe_router_fusion": True}, "moe_router_fusion=True"),
    "scaled rows": (
        {"moe_apply_probs_on_input": True, "moe_router_topk": 1, "moe_router_pre_softmax": True},
        "moe_apply_probs_on_input=True",
    ),
    "padding to capacity": (
        {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True},
        "moe_pad_expert_input_to_capacity=True",
    ),
    "latent experts": ({"moe_latent_size": 8}, "moe_latent_size=8"),
    "a micro-batch's balance": (
        {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.1},
        "'aux_loss' is not covered: it is that of one micro-batch's tokens.* use 'seq_aux_loss'",
    ),
    "a running balance": (
        {"moe_router_load_balancing_type": "global_aux_loss", "moe_aux_loss_coeff": 0.1},
        "'global_aux_loss' is not covered: it takes the average over the micro-batches",
    ),
    "one of several balances": (
        {"moe_router_load_balancing_type": ["seq_aux_loss", "aux_loss"], "moe_aux_loss_coeff": [0.1, 0.1]},
        "'aux_loss' is not covered",
    ),
    "sinkhorn": ({"moe_router_load_balancing_type": "sinkhorn"}, "'sinkhorn' is not covered: it normalises over"),
    "latent attention": ({"multi_latent_attention": True}, "multi_latent_attention=True is not covered"),
}  # fmt: skip
if FOUND.release >= (0, 17):
    SETTINGS["biased logits"] = ({"moe_router_force_biased": 0.1}, "moe_router_force_biased=0.1 .* it is random")
if FOUND.release >= (0, 19):
    SETTINGS["quantiles"] = (
        {"moe_router_load_balancing_type": "quantile_balancing"},
        "'quantile_balancing' is not covered: it takes quantiles of one micro-batch's logits",
    )


def train(options: dict[str, Any], strategy: Any = "tree", batch: Any = "order-free") -> None:
    patches.enable(strategy, batch=batch)
    plain_megatron.train(**{**BATCH, **options, "model": {**EXPERTS, **options.get("model", {})}})


@pytest.mark.parametrize("name", SETTINGS)
def test_setting_is_refused_by_name(name):
    settings, message = SETTINGS[name]
    with pytest.raises(AssertionError, match=message):
        on_ranks(1, train, {"model": settings})


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("moe_permute_fusion", True),
        ("moe_use_legacy_grouped_gemm", True),
        ("moe_router_padding_for_quantization", True),
        ("moe_router_topk_limited_devices", 2),
        ("overlap_moe_expert_parallel_comm", True),
        ("context_parallel_size", 2),
        ("fine_grained_activation_offloading", True),
        ("moe_router_score_function", "tanh"),
        ("moe_mlp_glu_interleave_size", 32),
        ("moe_expert_rank_capacity_factor", 1.5),
        ("expert_gtp_weight_remat_size", 2),
        ("moe_single_grouped_weight", True),
        ("moe_paged_stash", True),
        ("use_grouped_gemm_for_shared_expert", True),
        ("overlap_dispatch_backward_with_experts_wgrad", True),
    ],
)
def test_setting_that_megatron_itself_may_refuse_here_is_refused_by_name(setting, value):
    plain = {"num_moe_experts": 8, "moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.0}
    with patches.enabled(batch="order-free"):
        check_mixture(SimpleNamespace(**plain, moe_layer_freq=1))
        with pytest.raises(patches.UnsupportedError, match=f"{setting}={value!r} of a mixture of experts is not"):
            check_mixture(SimpleNamespace(**plain, **{setting: value}))


def grouped_by_another_package() -> None:
    """Megatron's older grouped experts, as they are where the package grouped_gemm is installed."""
    from megatron.core.transformer.moe import grouped_gemm_util

    grouped_gemm_util.assert_grouped_gemm_is_available = lambda: None
    patches.enable(batch="order-free")
    parallel_state.initialize_model_parallel()
    config = TransformerConfig(
        **{**plain_megatron.SHARED, **plain_megatron.QWEN3, **EXPERTS}, moe_grouped_gemm=True, bf16=True,
        calculate_per_token_loss=True, params_dtype=torch.bfloat16,
    )  # fmt: skip
    GPTModel(config, get_gpt_layer_local_spec(num_experts=8, moe_grouped_gemm=True), 64, 16)


@pytest.mark.skipif(FOUND.release >= (0, 17), reason="megatron-core 0.17 has no GroupedMLP any more")
def test_older_grouped_experts_are_refused():
    with pytest.raises(AssertionError, match="experts in a GroupedMLP .*without --moe-grouped-gemm.*TEGroupedMLP"):
        on_ranks(1, grouped_by_another_package)


def test_experts_of_another_kind_are_refused():
    with pytest.raises(patches.UnsupportedError, match="experts in a InferenceGroupedMLP are not covered"):
        check_experts(type("InferenceGroupedMLP", (), {})())
    layer = SimpleNamespace(linear_fc1=object())
    experts = type("SequentialMLP", (), {"local_experts": [layer]})()
    with pytest.raises(patches.UnsupportedError, match="experts made of builtins.object are not covered"):
        check_experts(experts)
    layers = {"linear_fc1": type("TEColumnParallelGroupedLinear", (), {})(), "activation_recompute": True}
    grouped = type("TEGroupedMLP", (), layers)()
    with pytest.raises(patches.UnsupportedError, match="'moe_act' in recompute_modules is not covered: use 'moe'"):
        check_experts(grouped)


def test_sums_over_the_batch_in_order_and_gathered_operands_are_refused():
    with pytest.raises(AssertionError, match="num_moe_experts=8 is not covered by batch='ordered', since every expert"):
        on_ranks(1, train, {}, "tree", "ordered")
    with pytest.raises(AssertionError, match="num_moe_experts=8 is not covered by strategy='gather'"):
        on_ranks(1, train, {}, "gather")


def test_tensor_parallelism_without_sequence_parallelism_is_refused():
    with pytest.raises(AssertionError, match="without sequence parallelism: set sequence_parallel=True"):
        on_ranks(2, train, {"tp": 2})


def test_dense_layers_in_a_pipeline_are_refused():
    with pytest.raises(AssertionError, match="moe_layer_freq=2 with pipeline_model_parallel_size > 1 is not covered"):
        on_ranks(2, train, {"pp": 2, "model": {"num_layers": 2, "moe_layer_freq": 2}})


def test_other_versions_of_megatron_core_are_refused(monkeypatch):
    found = str(FOUND)
    if SpecifierSet(VERSIONS).contains(found):
        found = "0.15.3"
        monkeypatch.setattr("patches.megatron.moe.refusals.library_version", lambda name: found)
    with pytest.raises(
        AssertionError, match=f"num_moe_experts=8 is not covered by the patches with megatron-core {found}: use >=0.16"
    ):
        on_ranks(1, train, {})
