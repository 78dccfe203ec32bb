"""Vocab-parallel cross-entropy: the sum of exponentials in the contract's order.

    loss = log Σ_v exp(z_v - max z) - (z_target - max z)      z: logits, v spread over ranks

The maximum is exact; the target's logit is one term among zeros, exact as well. Backward needs the softmax: a CPU keeps
it, a GPU computes it again from the logits and a few numbers per token and leaf.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from patches.ops.sharded import Shards
from patches.order.backend import CrossEntropy, backend
from patches.order.collectives import all_gather

__all__ = ["cross_entropy"]


def cross_entropy(logits_sbV: Tensor, target_sb: Tensor, shards: Shards) -> Tensor:
    """Loss per token, float32 [s, b].

    Args:
        logits_sbV: [s, b, V/t], this rank's share of the vocabulary.
        target_sb: [s, b], ids in the whole vocabulary.
    """
    again = backend(logits_sbV.device).cross_entropy
    if again is None:
        loss: Tensor = _KeptSoftmax.apply(logits_sbV, target_sb, shards)
    else:
        loss = _RecomputedSoftmax.apply(logits_sbV, target_sb, shards, again)
    return loss


def _over_ranks(top: Tensor, picked: Tensor, shards: Shards) -> tuple[Tensor, Tensor]:
    """Maximum and target's logit of every row in the whole vocabulary, in one collective.

    Args:
        top: maximum over this rank's share, float32.
        picked: the target's logit, 0 where it is another rank's: their sum is one number among zeros.
    """
    if shards.size == 1:
        return top, picked
    tops, picks = all_gather(torch.stack([top, picked]).unsqueeze(0), shards.group).unbind(1)
    return tops.amax(0), functools.reduce(torch.add, picks.unbind())


class _KeptSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, shards: Shards) -> Tensor:
        z = logits.float()
        local, elsewhere = shards.local(target, z.shape[-1])
        local = local.masked_fill(elsewhere, 0).unsqueeze(-1)
        picked = z.gather(-1, local).squeeze(-1).masked_fill(elsewhere, 0.0)
        top, picked = _over_ranks(z.amax(-1), picked, shards)
        weights = torch.exp(z - top.unsqueeze(-1))
        total = shards.sum_over(weights, -1, torch.float32)
        ctx.save_for_backward(weights.div_(total.unsqueeze(-1)), local, elsewhere)
        ctx.dtype = logits.dtype
        return torch.log(total) - (picked - top)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Any, ...]:
        softmax, local, elsewhere = ctx.saved_tensors
        hit = (~elsewhere).float().unsqueeze(-1)
        dz = softmax.scatter_add(-1, local, -hit) * dloss.unsqueeze(-1)
        return dz.to(ctx.dtype), None, None


class _RecomputedSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, shards: Shards, compute: CrossEntropy) -> Tensor:
        z_TV = logits.flatten(0, -2)
        local_T, elsewhere = shards.local(target.flatten(), z_TV.shape[1])
        picked = z_TV.gather(1, local_T.masked_fill(elsewhere, 0).unsqueeze(1)).squeeze(1)
        picked = picked.float().masked_fill_(elsewhere, 0.0)
        gather = shards.contract.strategy == "gather"
        tops, sums = compute.exponentials(all_gather(z_TV, shards.group, 1) if gather else z_TV, shards.leaves)
        top, picked = _over_ranks(tops.amax((1, 2)), picked, shards)
        root = compute.joined(tops, sums, top)[1]
        total = backend(root.device).rounded(root, torch.float32) if gather else shards.reduce_root(root, torch.float32)
        ctx.save_for_backward(z_TV, local_T, top, total)
        ctx.shape, ctx.compute = logits.shape, compute
        return compute.losses(top, total, picked).view(target.shape)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Any, ...]:
        z, local, top, total = ctx.saved_tensors
        dz = ctx.compute.logits_gradient(z, local, top, total, dloss.flatten())
        return dz.view(ctx.shape), None, None, None
