"""A router: which experts a token goes to and with which weights, and what keeps the experts' loads alike.

Whatever is said of a token follows from its own scores alone; of equal scores the lower-numbered expert is taken.
What a definition says of several tokens, it says of those of one sequence: never of a rank's or a micro-batch's.

Legend: T tokens, [s, b] flat; E experts; b sequences of a micro-batch; S tokens of a whole sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import softplus

from patches.contract import UnsupportedError
from patches.ops.sequences import add_leaves, batch_leaves
from patches.ops.sharded import Shards
from patches.order.collectives import all_gather
from patches.order.products import product

__all__ = [
    "Choice",
    "balance_loss",
    "chosen_experts",
    "router_product",
    "separate_scores",
    "top_k",
    "within_capacity",
    "z_losses",
]

ScoreFunction = Literal["softmax", "sigmoid", "sqrtsoftplus"]


@dataclass(frozen=True)
class Choice:
    """How experts are chosen; Megatron's settings of the same names.

    Args:
        k: experts of a token.
        score_function: what makes scores of logits.
        pre_softmax: softmax over all experts, not over the chosen ones alone.
        groups, group_topk: experts are chosen from the `group_topk` best of `groups` groups; None for no groups.
        scaling: what weights are multiplied by, or None.
    """

    k: int
    score_function: ScoreFunction = "softmax"
    pre_softmax: bool = False
    groups: int | None = None
    group_topk: int | None = None
    scaling: float | None = None


def top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` largest along the last dimension, and where they are: of equal ones those that come first."""
    values, places = scores.sort(dim=-1, descending=True, stable=True)
    return values[..., :k], places[..., :k]


def chosen_experts(logits_TE: Tensor, choice: Choice, bias_E: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Weights [T, E], 0 where an expert is not chosen, and whether it is.

    Args:
        bias_E: added to an expert's own scores where experts are chosen, not to weights.
    """
    if choice.score_function != "softmax":
        scores = separate_scores(logits_TE.float(), choice.score_function).type_as(logits_TE)
        places = _best(scores if bias_E is None else scores + bias_E, choice)[1]
        found = scores.gather(1, places).type_as(logits_TE)
        weights = found / (found.sum(-1, keepdim=True) + 1e-20) if choice.k > 1 else found
    elif choice.pre_softmax:
        weights, places = _best(logits_TE.softmax(-1, dtype=torch.float32).type_as(logits_TE), choice)
    else:
        found, places = _best(logits_TE, choice)
        weights = found.softmax(-1, dtype=torch.float32).type_as(logits_TE)
    if choice.scaling:
        weights = weights * choice.scaling
    chosen = torch.zeros_like(logits_TE, dtype=torch.bool).scatter(1, places, True)
    return torch.zeros_like(logits_TE).scatter(1, places, weights), chosen


def separate_scores(logits: Tensor, score_function: ScoreFunction) -> Tensor:
    """Scores that each follow from one logit."""
    return logits.sigmoid() if score_function == "sigmoid" else softplus(logits).sqrt()


def _best(scores_TE: Tensor, choice: Choice) -> tuple[Tensor, Tensor]:
    if choice.groups and choice.group_topk:
        grouped_TGe = scores_TE.unflatten(1, (choice.groups, -1))
        of_groups = top_k(grouped_TGe, choice.k // choice.group_topk)[0].sum(-1)
        groups = top_k(of_groups, choice.group_topk)[1]
        inside = torch.zeros_like(of_groups, dtype=torch.bool).scatter(1, groups, True)
        scores_TE = grouped_TGe.masked_fill(~inside.unsqueeze(-1), float("-inf")).flatten(1)
    return top_k(scores_TE, choice.k)


@torch.no_grad()
def within_capacity(
    weights_TE: Tensor,
    chosen_TE: Tensor,
    sequences: int,
    capacity: int,
    by_position: bool,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """Which of the `chosen` stay where an expert takes at most `capacity` tokens of a sequence.

    Args:
        weights_TE: of the rank's part of every sequence; those of the largest weights stay, of equal ones the first.
        by_position: instead, the first tokens stay.
        group: ranks that have the other parts, in order; None where there are none.
    """
    parts = weights_TE if not by_position else chosen_TE.to(weights_TE.dtype)
    own_SbE = parts.masked_fill(~chosen_TE, -1.0).view(-1, sequences, parts.shape[1])
    whole_SbE = all_gather(own_SbE, group)
    places = top_k(whole_SbE.movedim(0, -1), min(capacity, len(whole_SbE)))[1].movedim(-1, 0)
    stay = torch.zeros_like(whole_SbE, dtype=torch.bool).scatter(0, places, True)
    own = stay if group is None else stay.chunk(group.size())[group.rank()]
    return own.flatten(0, 1) & chosen_TE


def balance_loss(
    scores_TE: Tensor, chosen_TE: Tensor, sequences: int, coefficient: float, k: int, group: dist.ProcessGroup
) -> Tensor:
    """This rank's part of Σ over sequences of S · coefficient · E/(k·S²) · Σ_E chosen · Σ_S scores.

    Its gradient, divided by the tokens of the global batch, is that of the sequences' mean loss.
    """
    scores_SbE, chosen_SbE = (x.view(-1, sequences, x.shape[1]) for x in (scores_TE, chosen_TE))
    counts_bE = chosen_SbE.sum(0)
    if group.size() > 1:
        dist.all_reduce(counts_bE, group=group)
    tokens, experts = len(scores_SbE) * group.size(), scores_TE.shape[1]
    weights_bE = counts_bE.float() * (experts * coefficient / (k * tokens))
    return (scores_SbE * weights_bE).sum((0, 1, 2))


def z_losses(logits_TE: Tensor) -> Tensor:
    """[T]: the square of each token's log Σ exp(logits)."""
    top = logits_TE.detach().amax(-1, keepdim=True)
    total = (logits_TE - top).exp().sum(-1)
    return (total.log() + top.squeeze(-1)).square()


def router_product(x: Tensor, weight: Tensor, dtype: torch.dtype, shards: Shards) -> Tensor:
    """[s, b, E] logits: x · weightᵀ, in `dtype`.

    Args:
        x: [s, b, H], or this rank's part [s/t, b, H].
        weight: [E, H], on every rank the same.
        shards: how the tokens of a sequence are spread over ranks.
    """
    if dtype not in (x.dtype, torch.float32):
        raise UnsupportedError(f"a router product in {dtype} is not covered: use float32")
    logits: Tensor = _RouterProduct.apply(x, weight, dtype, shards)
    return logits


class _RouterProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype, shards: Shards) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.weight, ctx.shards = weight, shards
        return product(x.flatten(0, -2), weight.t(), dtype=dtype).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, dlogits: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        roots = [
            ctx.shards.product(of_sequence.t(), x_sH.to(dlogits.dtype), torch.float32)
            for of_sequence, x_sH in zip(batch_leaves(dlogits, 1), batch_leaves(x, 1), strict=True)
        ]
        dx = product(dlogits.flatten(0, -2), weight.to(dlogits.dtype), dtype=x.dtype).view(x.shape)
        return dx, add_leaves(ctx.weight, roots), None, None
