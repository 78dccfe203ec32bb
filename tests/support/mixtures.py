"""Mixtures of experts for `plain_megatron`, and the layouts that spread them over up to eight ranks."""

from __future__ import annotations

import itertools
from typing import Any

from packaging.version import Version

from patches.registry import library_version
from tests.support.megatron_runs import FULL_RECOMPUTE, differences, run

SHARDED = {"use_distributed_optimizer": True}
EXPERTS: dict[str, Any] = {
    "num_moe_experts": 8, "moe_ffn_hidden_size": 40, "moe_router_topk": 2, "moe_token_dispatcher_type": "alltoall",
    "moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.0,
}  # fmt: skip
SIGMOID: dict[str, Any] = {
    "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True, "moe_router_bias_update_rate": 0.1,
}  # fmt: skip
BALANCED: dict[str, Any] = {
    "moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.1, "moe_z_loss_coeff": 0.01,
}  # fmt: skip
SHARED: dict[str, Any] = {"moe_shared_expert_intermediate_size": 48, "moe_shared_expert_gate": True}
EIGHT_OF_SIXTEEN = {"num_moe_experts": 16, "moe_router_topk": 8, "moe_token_dispatcher_type": "allgather"}
CAPACITY = {"moe_expert_capacity_factor": 0.7}
BATCH: dict[str, Any] = {"seq": 16, "global_batch": 8, "micro_batch": 1, "steps": 2}

# name: options of `plain_megatron.train`; model settings beside EXPERTS
CASES: dict[str, dict[str, Any]] = {
    "softmax, top 2, balanced": {"model": BALANCED},
    "sigmoid, top 8, allgather": {"model": {**SIGMOID, **EIGHT_OF_SIXTEEN, "moe_router_dtype": "fp32"}},
    "sigmoid, balanced, scaled": {"model": {**SIGMOID, **BALANCED, "moe_router_topk_scaling_factor": 2.5}},
    "capacity, balanced": {"model": {**CAPACITY, **BALANCED}},
    "capacity by position": {"model": {**CAPACITY, "moe_token_drop_policy": "position"}},
    "shared expert": {"model": SHARED},
    "shared expert, full recompute fp32": {"model": {**SHARED, **BALANCED, **FULL_RECOMPUTE}, "dtype": "fp32"},
    "recompute of the layer": {"model": {"recompute_granularity": "selective", "recompute_modules": ["moe"]}},
    "groups of experts": {
        "model": {**SIGMOID, "moe_router_num_groups": 4, "moe_router_group_topk": 2, "moe_router_topk": 4}
    },
    "softmax before the choice, allgather": {
        "model": {"moe_router_pre_softmax": True, "moe_token_dispatcher_type": "allgather"}
    },
    "two layers, fusions": {"model": {"num_layers": 2, "bias_activation_fusion": True, "bias_dropout_fusion": True}},
    "equal scores, idle experts": {"equal_scores": True},
}
if Version(library_version("megatron-core") or "0") >= Version("0.18"):
    CASES["sqrtsoftplus, balanced"] = {"model": {**SIGMOID, **BALANCED, "moe_router_score_function": "sqrtsoftplus"}}


def layout(tp: int, ep: int, etp: int, **options: Any) -> dict[str, Any]:
    """Options of a layout on as few ranks as it needs."""
    return {"tp": tp, "sp": tp > 1, "dp": max(1, ep * etp // tp), "ep": ep, "etp": etp, **options}


EVERY = [
    layout(tp, ep, etp)
    for tp, ep, etp in itertools.product((1, 2, 4), (1, 2, 4, 8), (1, 2))
    if ep * etp <= 8 and (tp * max(1, ep * etp // tp)) % (ep * etp) == 0
]
# Every size along each axis, each with others along the rest.
COVERING = [
    layout(*sizes) for sizes in ((1, 8, 1), (1, 4, 2), (2, 1, 1), (2, 2, 2), (2, 8, 1), (4, 1, 2), (4, 4, 1), (4, 4, 2))
]


def options_of(name: str) -> dict[str, Any]:
    """All options of a case, but its layout."""
    case = CASES[name]
    return {**BATCH, **case, "model": {**EXPERTS, **case.get("model", {})}}


def comparable(record: dict[str, Any]) -> dict[str, Any]:
    """What ranks of the distributed optimizer have, too."""
    return {key: value for key, value in record.items() if key != "final" and "gradients" not in key}


def unlike(one: dict[str, Any], strategy: str, name: str, where: dict[str, Any]) -> list[str]:
    """Where the run of a case in another layout differs from `one`."""
    other = run(strategy, **{**options_of(name), **where})
    if where.get("ddp", {}).get("use_distributed_optimizer"):
        return differences(comparable(one), comparable(other))
    return differences(one, other)
