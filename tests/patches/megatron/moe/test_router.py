"""What a router says of a token is what Megatron's own functions do, in whatever dtype, but for a rule where scores are
equal: versions differ in what they compute in float32."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import (
    compute_routing_scores_for_aux_loss,
    topk_routing_with_score_function,
)
from megatron.core.transformer.moe.router import TopKRouter
from packaging.version import Version

import patches
from patches.megatron.moe.router import _scores_for_balance
from patches.registry import library_version

EXPERTS, CHOSEN = 8, 3
SETTINGS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "softmax before the choice": {"use_pre_softmax": True, "scaling_factor": 1.3},
    "sigmoid": {"score_function": "sigmoid", "scaling_factor": 2.5, "expert_bias": torch.linspace(0.3, -0.3, EXPERTS)},
    "groups of experts": {"score_function": "sigmoid", "num_groups": 4, "group_topk": 2},
}
if Version(library_version("megatron-core") or "0") >= Version("0.18"):
    SETTINGS["sqrtsoftplus"] = {**SETTINGS["sigmoid"], "score_function": "sqrtsoftplus"}


@pytest.fixture(autouse=True)
def _patched():
    with patches.enabled(batch="order-free"):
        yield


def unequal_logits(dtype: torch.dtype) -> torch.Tensor:
    """[T, E], no two alike in a row, nor two scores of them."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.linspace(-2, 2, EXPERTS)[torch.randperm(EXPERTS, generator=generator)] for _ in range(40)]
    return (torch.stack(rows) + 0.1 * torch.rand(40, EXPERTS, generator=generator)).to(dtype)


def router(settings: dict[str, Any]) -> Any:
    config = SimpleNamespace(
        moe_z_loss_coeff=None, moe_router_pre_softmax=settings.get("use_pre_softmax", False),
        moe_router_num_groups=settings.get("num_groups"), moe_router_group_topk=settings.get("group_topk"),
        moe_router_topk_scaling_factor=settings.get("scaling_factor"), moe_expert_capacity_factor=None,
    )  # fmt: skip
    return SimpleNamespace(
        config=config, training=True, topk=CHOSEN, score_function=settings.get("score_function", "softmax"),
        expert_bias=settings.get("expert_bias"), get_aux_loss_coeff=lambda name: 0.0, _apply_expert_bias=len,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_weights_choice_and_gradient_are_stocks(name, dtype):
    results = []
    for routing in (
        lambda logits: TopKRouter.routing(router(SETTINGS[name]), logits.unsqueeze(1)),
        lambda logits: topk_routing_with_score_function(logits, CHOSEN, **SETTINGS[name]),
    ):
        logits = unequal_logits(dtype).requires_grad_()
        weights, chosen = routing(logits)
        weights.backward(torch.arange(weights.numel()).view_as(weights).to(weights.dtype) / 100)
        results.append((weights.detach(), chosen, logits.grad))
    for ours, stock in zip(*results, strict=True):
        assert ours.dtype == stock.dtype and torch.equal(ours, stock)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize("function", sorted({s.get("score_function", "softmax") for s in SETTINGS.values()}))
def test_scores_that_loads_are_balanced_by_are_stocks(function, dtype):
    logits = unequal_logits(dtype)
    scores, ideal = _scores_for_balance(router({"score_function": function}), logits)
    chosen, of_stock = compute_routing_scores_for_aux_loss(logits, CHOSEN, function)
    assert scores.dtype == of_stock.dtype and torch.equal(scores, of_stock) and torch.equal(ideal, chosen)
