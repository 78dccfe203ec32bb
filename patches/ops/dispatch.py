"""Tokens on their way to experts and back, and the sums that are made of them there and here.

    x [T, H]  one row for every (expert, token) that a router chose, in the order of experts, sequences, positions
      ──all-to-all over expert-parallel (EP) ranks──▶ rows of this rank's experts from every EP rank
      ──all-gather over expert-tensor-parallel (ETP) ranks──▶ those of the ETP group, on all of its ranks
      ──sorted──▶ by expert, then by where they came from: what experts compute on

Back goes the same way: an ETP rank keeps its own rows, since the experts' results are whole on each. So the gradient
of either way is the other way, and nothing is added but a token's up to k rows, on the rank that has the token:
in the order of experts' numbers, in float32, rounded once.

    run    the rows of one expert that come from one leaf of one sequence: whole on a rank at every layout

Legend: T tokens of a rank, [s, b] flat; E experts; P rows that leave a rank; R rows that its experts get.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from patches.order.collectives import all_gather_uneven, all_to_all
from patches.order.tree import cuts

__all__ = ["Route", "route", "to_experts", "to_tokens", "weights_to_experts"]


@dataclass(frozen=True)
class Route:
    """Which rows go where, of one micro-batch in one layer.

    Args:
        tokens: [P] the token of each row that leaves this rank.
        experts: [P] its expert.
        places: [P] where it lies in [T, k], a token's rows in the order of their experts.
        shape: T and k.
        sent, received: rows for and from each EP rank.
        gathered: rows that each ETP rank brings.
        order: [R] where a sorted row lies among those that were gathered.
        runs: sizes of the runs of each of this rank's experts.
    """

    tokens: Tensor
    experts: Tensor
    places: Tensor
    shape: tuple[int, int]
    sent: list[int]
    received: list[int]
    gathered: list[int]
    order: Tensor
    runs: list[list[int]]
    ep_group: dist.ProcessGroup
    etp_group: dist.ProcessGroup

    @property
    def rows_of_experts(self) -> list[int]:
        """How many rows each of this rank's experts gets."""
        return [sum(runs) for runs in self.runs]

    def outward(self, rows: Tensor) -> Tensor:
        """[P, ..] of this rank's tokens as [R, ..] of its experts."""
        here = all_to_all(rows, self.sent, self.received, self.ep_group)
        return all_gather_uneven(here, self.gathered, self.etp_group)[self.order]

    def homeward(self, rows: Tensor) -> Tensor:
        """[R, ..] of its experts as [P, ..] of this rank's tokens."""
        unsorted = torch.empty_like(rows)
        unsorted[self.order] = rows
        own = unsorted.split(self.gathered)[self.etp_group.rank()].contiguous()
        return all_to_all(own, self.received, self.sent, self.ep_group)

    def summed(self, rows_PH: Tensor) -> Tensor:
        """[T, H]: the rows of each token added in the order of their experts."""
        tokens, k = self.shape
        slots = rows_PH.new_zeros(tokens * k, rows_PH.shape[1])
        slots[self.places] = rows_PH
        first, *others = slots.view(tokens, k, -1).unbind(1)
        total = first.float()
        for other in others:
            total = total + other.float()
        return total.add(0.0).to(rows_PH.dtype)


@torch.no_grad()
def route(
    chosen_TE: Tensor, sequences: int, leaves: int, k: int, ep_group: dist.ProcessGroup, etp_group: dist.ProcessGroup
) -> Route:
    """The ways of a rank's tokens, which all ranks of both groups ask for at once.

    Args:
        chosen_TE: boolean, which experts each token goes to, at most `k`.
        sequences: in the micro-batch.
        leaves: of every sequence that lie on this rank.
    """
    number = chosen_TE.shape[1]
    chosen_EbS = chosen_TE.view(-1, sequences, number).permute(2, 1, 0)
    experts, sequence, position = chosen_EbS.nonzero(as_tuple=True)
    tokens = position * sequences + sequence
    places = tokens * k + (chosen_TE.cumsum(1) - 1)[tokens, experts]

    leaf_sizes = [hi - lo for lo, hi in cuts(chosen_EbS.shape[2], leaves)]
    counts_EG = torch.stack([part.sum(2) for part in chosen_EbS.split(leaf_sizes, 2)], 2).flatten(1)
    per_rank = number // ep_group.size()
    counts_pXG = counts_EG.view(ep_group.size(), per_rank, -1).contiguous()
    even = [1] * ep_group.size()
    arrived_pXG = all_to_all(counts_pXG, even, even, ep_group)
    all_tpXG = all_gather_uneven(arrived_pXG.unsqueeze(0), [1] * etp_group.size(), etp_group)
    chunks_SX = all_tpXG.sum(3).flatten(0, 1)  # of every source, the rows for each expert here
    return Route(
        tokens, experts, places, (len(chosen_TE), k),
        counts_pXG.sum((1, 2)).tolist(), arrived_pXG.sum((1, 2)).tolist(), all_tpXG.sum((1, 2, 3)).tolist(),
        _by_expert(chunks_SX),
        [[n for n in runs if n] for runs in all_tpXG.permute(2, 0, 1, 3).flatten(1).tolist()],
        ep_group, etp_group,
    )  # fmt: skip


def _by_expert(chunks_SX: Tensor) -> Tensor:
    """Where the rows lie that are to be sorted by expert, given how many came from each source for each."""
    sizes = chunks_SX.flatten()
    starts = (sizes.cumsum(0) - sizes).view_as(chunks_SX).t().flatten()
    sorted_sizes = chunks_SX.t().flatten()
    within = torch.arange(int(sizes.sum()), device=sizes.device)
    within -= (sorted_sizes.cumsum(0) - sorted_sizes).repeat_interleave(sorted_sizes)
    return starts.repeat_interleave(sorted_sizes) + within


def to_experts(x_TH: Tensor, way: Route) -> Tensor:
    """[R, H]: tokens as this rank's experts get them; the gradient is the sum of a token's rows' gradients."""
    rows: Tensor = _ToExperts.apply(x_TH, way)
    return rows


def to_tokens(rows_RH: Tensor, way: Route) -> Tensor:
    """[T, H]: the sum of what a token's experts made of it."""
    x: Tensor = _ToTokens.apply(rows_RH, way)
    return x


def weights_to_experts(weights_TE: Tensor, way: Route) -> Tensor:
    """[R]: the weight of each row, which belongs to one token and one expert."""
    weights: Tensor = _WeightsToExperts.apply(weights_TE, way)
    return weights


class _ToExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, way: Route) -> Tensor:
        ctx.way = way
        return way.outward(x_TH[way.tokens])

    @staticmethod
    def backward(ctx: Any, drows: Tensor) -> tuple[Any, ...]:
        return ctx.way.summed(ctx.way.homeward(drows)), None


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RH: Tensor, way: Route) -> Tensor:
        ctx.way = way
        return way.summed(way.homeward(rows_RH))

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Any, ...]:
        return ctx.way.outward(dx[ctx.way.tokens]), None


class _WeightsToExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights_TE: Tensor, way: Route) -> Tensor:
        ctx.way, ctx.shape = way, weights_TE.shape
        return way.outward(weights_TE[way.tokens, way.experts])

    @staticmethod
    def backward(ctx: Any, dweights: Tensor) -> tuple[Any, ...]:
        gradient = dweights.new_zeros(ctx.shape)
        gradient[ctx.way.tokens, ctx.way.experts] = ctx.way.homeward(dweights)
        return gradient, None
