"""Vocab-parallel embedding: a row's gradient is the sum over its own tokens, in token order, on its own rank.

For a GPU, where ATen's kernel orders a rank's tokens by ids, and those of other ranks are id 0 with zero gradients;
and for any device where sums over the batch have no order: then every token is a contribution of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patches.ops.sequences import added, batch_sum
from patches.ops.sharded import Shards
from patches.order.backend import backend

__all__ = ["embedding"]


def embedding(weight_tVH: Tensor, ids: Tensor, shards: Shards) -> Tensor:
    """[.., H]: the rows of `ids` in the whole vocabulary that lie on this rank, +0 for the others."""
    result: Tensor = _Embedding.apply(weight_tVH, ids, shards)
    return result


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, shards: Shards) -> Tensor:
        rows = weight.shape[0]
        local, elsewhere = shards.local(ids, rows)
        ctx.save_for_backward(local, elsewhere)
        ctx.weight, ctx.order_free = weight, shards.contract.order_free
        found = weight[local.masked_fill(elsewhere, 0)].masked_fill_(elsewhere.unsqueeze(-1), 0.0)
        return found.add_(0.0)  # as the sum over ranks would make of -0

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        local, elsewhere = ctx.saved_tensors
        rows, dtype = ctx.weight.shape[0], ctx.weight.dtype
        if ctx.order_free:
            own = dy.masked_fill(elsewhere.unsqueeze(-1), 0.0).flatten(0, -2)
            batch_sum(ctx.weight).add_rows(local.masked_fill(elsewhere, 0).flatten(), own)
            return added(ctx.weight), None, None
        gradient = backend(dy.device).embedding_gradient
        assert gradient is not None, "ATen's own embedding is right here"
        return gradient(dy.flatten(0, -2), local.flatten(), rows, dtype), None, None
