"""A layer of several experts, each with a weight of its own for its run of rows, in the order of the contract.

    row     y_RN  = Σ_r x_RtK · w_NtKᵀ      K spread over the ranks of ETP: sharded sum; dgrad, wgrad local
    column  y_RtN = x_RK · w_tNKᵀ           dgrad dy_RtN · w_tNK: sharded sum over N; forward, wgrad local

Ranks hold the same rows. wgrad is one product for each batch leaf's rows of an expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patches.ops.sequences import added, batch_sum
from patches.ops.sharded import Shards
from patches.order.handle import AsyncResult
from patches.order.products import add_grouped_products_in_units, grouped_product

__all__ = ["Grouped", "grouped"]


@dataclass(frozen=True)
class Grouped:
    """What such a layer is.

    Args:
        column: output features are spread over the ranks of `shards`, not input features.
        runs: of each expert, the sizes of the runs of rows that make up a contribution to its weight's gradient.
        pieces: 2 where a column-parallel weight holds [gate_r | up_r] of a gated layer.
    """

    column: bool
    shards: Shards
    runs: tuple[tuple[int, ...], ...]
    pieces: int = 1

    @property
    def sizes(self) -> list[int]:
        """Rows of each expert."""
        return [sum(runs) for runs in self.runs]


def grouped(x: Tensor, weights: Sequence[Tensor], how: Grouped) -> Tensor:
    """x·weightᵀ, of every expert's rows.

    Args:
        x: [R, K], or [R, tK].
        weights: [tN, K], or [N, tK], all laid out alike.
    """
    result: Tensor = _Grouped.apply(x, how, *weights)
    return result


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, how: Grouped, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, *weights)
        ctx.weights, ctx.how = weights, how
        matrices = [weight.t() for weight in weights]
        if how.column:
            return grouped_product(x, matrices, how.sizes, dtype=x.dtype)
        return _begin_over_ranks(x, matrices, how, x.dtype).wait()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        (x, *weights), how, dx = ctx.saved_tensors, ctx.how, None
        if ctx.needs_input_grad[0] and how.column:
            dx = _begin_over_ranks(dy, weights, how, x.dtype, how.pieces)
        elif ctx.needs_input_grad[0]:
            dx = AsyncResult.of(grouped_product(dy, weights, how.sizes, dtype=x.dtype))
        dws = _weight_gradients(ctx.weights, ctx.needs_input_grad[2:], dy, x, how)
        return dx.wait() if dx is not None else None, None, *dws


def _begin_over_ranks(
    x: Tensor, matrices: Sequence[Tensor], how: Grouped, dtype: torch.dtype, pieces: int = 1
) -> AsyncResult:
    """The products, whose sum over ranks is under way."""
    shards = how.shards
    if shards.size == 1:
        return AsyncResult.of(grouped_product(x, matrices, how.sizes, shards.leaves, pieces, dtype))
    return shards.begin_reduce_root(grouped_product(x, matrices, how.sizes, shards.leaves, pieces), dtype)


def _weight_gradients(
    weights: Sequence[Any], needed: Sequence[bool], dy: Tensor, x: Tensor, how: Grouped
) -> list[Tensor | None]:
    """Adds dyᵀ·x of every run to the `BatchSum` of its expert's weight, if it is needed; what autograd gets."""
    learn = [number for number, wanted in enumerate(needed) if wanted]
    if len(learn) < len(weights):  # some are frozen
        dy, x = (torch.cat([t.split(how.sizes)[number] for number in learn]) if learn else t[:0] for t in (dy, x))
    sums = [batch_sum(weights[number]) for number in learn]
    if sums:
        runs = [how.runs[number] for number in learn]
        add_grouped_products_in_units([one.total for one in sums], [one.bound for one in sums], dy, x, runs)
    return [added(weight) if wanted else None for weight, wanted in zip(weights, needed, strict=True)]
