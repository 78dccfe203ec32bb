"""Tokens of all sequence-parallel ranks brought together, for a consumer that gives back a part of their gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from patches.order.collectives import all_gather, tree_reduce_scatter

__all__ = ["gather_tokens"]


def gather_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[s/t, …] of every rank as [s, …] on all; the gradient is the sum of the ranks' parts, in the tree's order.

    That sum has the same bits at every TP size where the parts don't overlap or are roots of subtrees.
    """
    y: Tensor = _GatherTokens.apply(x, group)
    return y


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        return tree_reduce_scatter(dy.float(), ctx.group, dy.dtype), None
