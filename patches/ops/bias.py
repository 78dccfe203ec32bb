"""A bias that every token shares: its gradient is the tree sum over tokens, whether SP spreads them or not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patches.ops.leaf_sums import TOKENS, begin_leaf_sums
from patches.ops.sequences import add_leaves
from patches.ops.sharded import Shards

__all__ = ["bias_per_token"]


def bias_per_token(bias: Tensor, shape: torch.Size, shards: Shards) -> Tensor:
    """`bias` [h] seen as [s, b, h], to be added to a linear layer's output of that shape.

    Args:
        shards: how dimension 0 (tokens) is spread over ranks.
    """
    result: Tensor = _BiasPerToken.apply(bias, shape, shards)
    return result


class _BiasPerToken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, bias: Tensor, shape: torch.Size, shards: Shards) -> Tensor:
        ctx.bias, ctx.shards = bias, shards
        return bias.expand(shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        if ctx.shards.contract.order_free:
            return add_leaves(ctx.bias, begin_leaf_sums(dy, TOKENS, ctx.shards).wait()), None, None
        return ctx.shards.sum_over(dy, 0, ctx.bias.dtype, tuple(range(1, dy.dim() - 1))), None, None
