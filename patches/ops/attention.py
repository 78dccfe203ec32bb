"""Keys and values that several query heads share (GQA): their gradient is a sum over heads, in tree order.

    heads    q0 q1 | q2 q3 | q4 q5 | q6 q7      groups of heads share one k, v; leaves cut the heads, so that
    k, v      k0      k1      k2      k3        a group holds leaves/groups of them, or lies within one

With fewer groups than ranks, a group's heads lie on several ranks, its *sharers*. The last of them takes the
whole gradient, the others zero: what follows (rope, k-layernorm, the QKV gather) then sums one term and zeros.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patches.ops.sharded import Shards
from patches.order.backend import backend
from patches.order.collectives import all_gather
from patches.order.tree import tree_sum

__all__ = ["repeat_for_heads"]


def repeat_for_heads(kv: Tensor, repeat: int, groups: int, shards: Shards) -> Tensor:
    """`kv` [s, b, g, d] repeated for its query heads: [s, b, g·repeat, d].

    Args:
        repeat: query heads per group on this rank.
        groups: KV groups of the whole model.
        shards: how query heads are spread over ranks.
    """
    result: Tensor = _RepeatForHeads.apply(kv, repeat, groups, shards)
    return result


class _RepeatForHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kv: Tensor, repeat: int, groups: int, shards: Shards) -> Tensor:
        ctx.repeat, ctx.groups, ctx.shards = repeat, groups, shards
        return kv.repeat_interleave(repeat, dim=2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        heads = grad.unflatten(2, (-1, ctx.repeat))
        shards: Shards = ctx.shards
        compute = backend(grad.device)
        sharers = max(1, shards.size // ctx.groups)
        if shards.contract.strategy == "gather":
            total = compute.row_sums(torch.cat(_from_sharers(heads, shards, sharers, 3), 3), (3,)).float()
        else:
            leaves = max(1, shards.contract.leaves // ctx.groups) // sharers
            total = tree_sum(_from_sharers(compute.tree_of_sums(heads, 3, leaves), shards, sharers, 2))
        if shards.rank % sharers != sharers - 1:
            total = torch.zeros_like(total)
        return compute.rounded(total, grad.dtype), None, None, None


def _from_sharers(x: Tensor, shards: Shards, sharers: int, dim: int) -> list[Tensor]:
    """The parts of `x` that this rank's sharers hold, in rank order."""
    if sharers == 1 or shards.group is None:
        return [x]
    first = shards.rank // sharers * sharers
    return list(all_gather(x, shards.group, dim).chunk(shards.size, dim)[first : first + sharers])
