"""Attention by blocks of keys, and keys and values that several query heads share (GQA).

Their gradient is a sum over heads, in tree order:

    heads    q0 q1 | q2 q3 | q4 q5 | q6 q7      groups of heads share one k, v; leaves cut the heads, so that
    k, v      k0      k1      k2      k3        a group holds leaves/groups of them, or lies within one

With fewer groups than ranks, a group's heads lie on several ranks, its *sharers*. The last of them takes the
whole gradient, the others zero: what follows (rope, k-layernorm, the QKV gather) then sums one term and zeros.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patches.contract import UnsupportedError
from patches.ops.sharded import Shards
from patches.order.backend import attention_backend, backend, product_backend
from patches.order.collectives import all_gather
from patches.order.tree import tree_sum
from patches.order.visible import WIDEST, Visible

__all__ = ["blockwise_attention", "repeat_for_heads"]


def blockwise_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Visible, scale: float, groups: int, shards: Shards
) -> Tensor:
    """softmax(scale·q·kᵀ)·v [s, b, h, d], of this rank's heads.

    Args:
        q: [s, b, h, d], or [rows, 1, h, d] of packed sequences.
        k, v: [s, b, g, d]: this rank's groups, or the one that it shares with other ranks.
        groups: KV groups of the whole model.
        shards: how query heads are spread over ranks.

    Raises:
        UnsupportedError: heads of a width that is not covered.
    """
    if v.shape[-1] != k.shape[-1] or k.shape[-1] > WIDEST:
        raise UnsupportedError(
            f"attention='blockwise' takes keys and values of one width up to {WIDEST}, not {k.shape[-1]} and "
            f"{v.shape[-1]}: use attention='unfused'"
        )
    y: Tensor = _Blockwise.apply(q, k, v, visible, scale, groups, shards)
    return y


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, visible: Visible, scale: float, groups: int, shards: Shards
    ) -> Tensor:
        y, top, inverse = attention_backend(q, k, v, visible).attention(q, k, v, visible, scale)
        ctx.save_for_backward(q, k, v, y, top, inverse)
        ctx.visible, ctx.scale, ctx.groups, ctx.shards = visible, scale, groups, shards
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        q, k, v, y, top, inverse = ctx.saved_tensors
        compute = product_backend(dy, q)
        dq, *of_heads = compute.attention_gradient(dy, q, k, v, y, top, inverse, ctx.visible, ctx.scale)
        dk, dv = (_sum_over_heads(x.unflatten(2, (k.shape[2], -1)), ctx.groups, ctx.shards, k.dtype) for x in of_heads)
        return dq, dk, dv, None, None, None, None


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
        return _sum_over_heads(heads, ctx.groups, ctx.shards, grad.dtype), None, None, None


def _sum_over_heads(heads: Tensor, groups: int, shards: Shards, dtype: torch.dtype) -> Tensor:
    """What query heads [s, b, g, repeat, d] of this rank and its sharers give their groups' keys: [s, b, g, d]."""
    compute = backend(heads.device)
    sharers = max(1, shards.size // groups)
    if shards.contract.strategy == "gather":
        total = compute.row_sums(torch.cat(_from_sharers(heads, shards, sharers, 3), 3), (3,)).float()
    else:
        leaves = max(1, shards.contract.leaves // groups) // sharers
        total = tree_sum(_from_sharers(compute.tree_of_sums(heads, 3, leaves), shards, sharers, 2))
    if shards.rank % sharers != sharers - 1:
        total = torch.zeros_like(total)
    return compute.rounded(total, dtype)


def _from_sharers(x: Tensor, shards: Shards, sharers: int, dim: int) -> list[Tensor]:
    """The parts of `x` that this rank's sharers hold, in rank order."""
    if sharers == 1 or shards.group is None:
        return [x]
    first = shards.rank // sharers * sharers
    return list(all_gather(x, shards.group, dim).chunk(shards.size, dim)[first : first + sharers])
