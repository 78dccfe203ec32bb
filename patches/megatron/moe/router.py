"""megatron.core.transformer.moe.router: logits, the experts that are chosen, and what keeps their loads alike."""

from __future__ import annotations

from typing import Any

import torch
from packaging.version import Version
from torch import Tensor

from patches.call_site import contract, mark_grad_reduced, replicated, tp_group, tp_sharded
from patches.contract import UnsupportedError
from patches.megatron.moe.refusals import VERSIONS
from patches.ops.routing import (
    Choice,
    balance_loss,
    chosen_experts,
    router_product,
    separate_scores,
    top_k,
    within_capacity,
    z_losses,
)
from patches.registry import attribute, library_version

__all__ = ["PATCHES"]

MODULE = "megatron.core.transformer.moe.router"
EXACT_COUNTS = 1 << 24  # above it float32, which Megatron counts a rank's tokens in, leaves numbers out


def _gating(original: Any) -> Any:
    def gating(self: Any, input: Tensor) -> Tensor:
        mark_grad_reduced(self.weight)
        dtype = torch.float32 if self.config.moe_router_dtype == "fp32" else input.dtype
        shards = tp_sharded(tp_group(self)) if self.config.sequence_parallel else replicated()
        return router_product(input, self.weight, dtype, shards)

    return gating


def _routing(original: Any) -> Any:
    def routing(self: Any, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights and choice [T, E] of logits [s, b, E]."""
        if padding_mask is not None:
            raise UnsupportedError("a padding mask of a mixture of experts is not covered: leave it None")
        config, sequences, learns = self.config, logits.shape[1], self.training and torch.is_grad_enabled()
        logits = logits.flatten(0, 1)
        if learns and config.moe_z_loss_coeff is not None:
            logits = _with_loss(self, logits, z_losses(logits).sum() * config.moe_z_loss_coeff, "z_loss",
                                config.moe_z_loss_coeff * len(logits))  # fmt: skip
        choice = Choice(
            self.topk, self.score_function, config.moe_router_pre_softmax,
            config.moe_router_num_groups, config.moe_router_group_topk, config.moe_router_topk_scaling_factor,
        )  # fmt: skip
        weights, chosen = chosen_experts(_wide(logits, "0.18"), choice, self.expert_bias)
        weights = weights.type_as(logits)
        if config.moe_expert_capacity_factor is not None:
            chosen = _within_capacity(self, weights, chosen, sequences)
            weights = weights * chosen
        coefficient = self.get_aux_loss_coeff("seq_aux_loss")
        if learns and coefficient > 0:
            scores, ideal = _scores_for_balance(self, logits)
            loss = balance_loss(scores, ideal, sequences, coefficient, self.topk, self.tp_cp_group)
            weights = _with_loss(self, weights, loss, "seq_load_balancing_loss", coefficient * len(logits))
        self._apply_expert_bias(chosen)
        return weights, chosen

    return routing


def _with_loss(self: Any, x: Tensor, loss: Tensor, name: str, scale: float) -> Tensor:
    """`x`, whose backward begins that of `loss` as well; `loss / scale` is logged."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    layers = self.config.num_layers + (self.config.mtp_num_layers or 0)
    group = {"reduce_group": self.tp_cp_group} if name != "z_loss" else {"avg_group": self.tp_cp_group}
    _recorder()(name, loss / scale, self.layer_number, layers, **group)
    with_loss: Tensor = MoEAuxLossAutoScaler.apply(x, loss)
    return with_loss


def _recorder() -> Any:
    """What keeps a layer's loss until it is logged."""
    try:
        from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
    except ModuleNotFoundError:  # before 0.18
        from megatron.core.transformer.moe.moe_utils import save_to_aux_losses_tracker

        return save_to_aux_losses_tracker
    return get_moe_metrics_tracker().record


def _within_capacity(self: Any, weights: Tensor, chosen: Tensor, sequences: int) -> Tensor:
    from megatron.core.transformer.moe.moe_utils import get_capacity

    config = self.config
    group = tp_group(self) if config.sequence_parallel else None
    tokens = len(chosen) // sequences * (1 if group is None else group.size())
    capacity = get_capacity(tokens * self.topk, config.num_moe_experts, config.moe_expert_capacity_factor)
    by_position = config.moe_token_drop_policy == "position"
    return within_capacity(weights, chosen, sequences, capacity, by_position, group)


def _scores_for_balance(self: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of all experts that sum to 1, and the experts that they would choose."""
    if self.score_function == "softmax":
        scores = logits.softmax(-1, dtype=torch.float32)
    else:
        scores = separate_scores(_wide(logits, "0.17"), self.score_function)
        scores = scores / (scores.sum(-1, keepdim=True) + 1e-20)
    places = top_k(scores.detach(), self.topk)[1]
    return scores, torch.zeros_like(scores, dtype=torch.bool).scatter(1, places, True)


def _wide(logits: Tensor, since: str) -> Tensor:
    """`logits` as Megatron reads them: in float32 since a version, before in their own dtype."""
    found = library_version("megatron-core")
    return logits.float() if found is not None and Version(found) >= Version(since) else logits


def _updated_bias(original: Any) -> Any:
    @torch.no_grad()
    def get_updated_expert_bias(
        tokens_per_expert: Tensor, expert_bias: Tensor, expert_bias_update_rate: float, tp_dp_cp_group: Any = None
    ) -> Any:
        """Stock's, counted in integers."""
        from megatron.core import parallel_state

        contract()
        if tokens_per_expert.max() >= EXACT_COUNTS:
            raise UnsupportedError(
                f"a router counted {int(tokens_per_expert.max())} tokens of one expert on one rank, and its counts "
                f"are exact below {EXACT_COUNTS} alone: use more ranks or a smaller global batch"
            )
        counts = tokens_per_expert.long()
        every = tp_dp_cp_group or parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        torch.distributed.all_reduce(counts, group=every)
        tokens_per_expert.copy_(counts)
        missing = counts.sum(-1, keepdim=True) - counts * counts.shape[-1]
        return expert_bias + missing.sign() * expert_bias_update_rate

    return get_updated_expert_bias


PATCHES = [
    attribute(
        "router-product",
        f"{MODULE}:Router.gating",
        "the router's weight gradient sums over tokens, which SP spreads over ranks",
        _gating,
        parameters="input",
        versions=VERSIONS,
        order_free=True,
    ),
    attribute(
        "router-choice",
        f"{MODULE}:TopKRouter.routing",
        "stock's capacity, balance and z losses are those of a rank's part of a micro-batch; ties have no rule",
        _routing,
        parameters="logits padding_mask",
        versions=VERSIONS,
        order_free=True,
    ),
    attribute(
        "expert-bias",
        "megatron.core.distributed.finalize_model_grads:get_updated_expert_bias",
        "tokens of the global batch are counted in float32, over ranks",
        _updated_bias,
        parameters="tokens_per_expert expert_bias expert_bias_update_rate tp_dp_cp_group",
        versions=VERSIONS,
        order_free=True,
    ),
]
