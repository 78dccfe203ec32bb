"""What an expert computed for each of its rows, times the row's weight: the router's probability.

A weight's gradient is a sum over the expert's width, which expert tensor parallelism spreads over ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patches.ops.sharded import Shards

__all__ = ["weighted"]


def weighted(x_RF: Tensor, weights_R: Tensor, shards: Shards) -> Tensor:
    """Row i of `x` times `weights[i]`, rounded once to the dtype of `x`.

    Args:
        x_RF: [R, tF].
        shards: how its width is spread over ranks.
    """
    y: Tensor = _Weighted.apply(x_RF, weights_R, shards)
    return y


class _Weighted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RF: Tensor, weights_R: Tensor, shards: Shards) -> Tensor:
        ctx.save_for_backward(x_RF, weights_R)
        ctx.shards = shards
        return (x_RF.float() * weights_R.float().unsqueeze(1)).to(x_RF.dtype)

    @staticmethod
    def backward(ctx: Any, dy_RF: Tensor) -> tuple[Any, ...]:
        x_RF, weights_R = ctx.saved_tensors
        dy = dy_RF.float()
        of_weights = ctx.shards.begin_sum_over(dy * x_RF.float(), 1, weights_R.dtype)
        dx = (dy * weights_R.float().unsqueeze(1)).to(x_RF.dtype)
        return dx, of_weights.wait(), None
