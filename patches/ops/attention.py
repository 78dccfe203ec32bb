"""Attention by blocks of keys, and keys and values that several query heads share (GQA).

Their gradient is a sum over heads, in tree order:

    heads    q0 q1 | q2 q3 | q4 q5 | q6 q7      groups of heads share one k, v; leaves cut the heads, so that
    k, v      k0      k1      k2      k3        a group holds leaves/groups of them, or lies within one

With fewer groups than ranks, a group's heads lie on several ranks, its *sharers*. The last of them takes the
whole gradient, the others zero: what follows (rope, k-layernorm, the QKV gather) then sums one term and zeros.

A sequence that is cut into chunks (`order.chunks`) is computed by chunks of queries, of which context-parallel ranks
have some; each sees the keys of the whole sequence, gathered from all of them. What chunks give these keys is a tree
over chunks, of sums over heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from patches.contract import UnsupportedError
from patches.ops.sharded import Shards
from patches.order.backend import attention_backend, backend, product_backend
from patches.order.chunks import begin_gather, begin_sum_of_own, chunks_of_rank, tree_order
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
        k, v: [s, b, g, d]: this rank's groups, or the one that it shares with other ranks; of the queries' own tokens.
        groups: KV groups of the whole model.
        shards: how query heads are spread over ranks, and of which chunks the tokens are.

    Raises:
        UnsupportedError: heads of a width that is not covered, or sequences that have no such chunks.
    """
    if v.shape[-1] != k.shape[-1] or k.shape[-1] > WIDEST:
        raise UnsupportedError(
            f"attention='blockwise' takes keys and values of one width up to {WIDEST}, not {k.shape[-1]} and "
            f"{v.shape[-1]}: use attention='unfused'"
        )
    parts = _parts(len(q), len(k), visible, shards)
    y: Tensor = _Blockwise.apply(q, k, v, parts, scale, groups, shards)
    return y


def _parts(queries: int, keys: int, visible: Visible, shards: Shards) -> list[tuple[slice, Visible]]:
    """The chunks of this rank's queries: their rows, and what they see."""
    chunks = shards.chunks
    if shards.contract.chunks == 1:
        return [(slice(queries), visible)]
    if visible.packed is not None or queries != keys:
        what = "packed sequences are" if visible.packed is not None else f"attention of {queries} to {keys} tokens is"
        raise UnsupportedError(
            f"{what} not covered with chunks={shards.contract.chunks}: use chunks=1, without context parallelism"
        )
    if queries % chunks:
        raise UnsupportedError(
            f"a sequence of {queries * shards.contract.chunks // chunks} tokens has no {shards.contract.chunks} equal "
            "chunks: make its length a multiple of chunks"
        )
    rows, context = queries // chunks, shards.context
    place = (0, 1) if context is None else (context.rank(), context.size())
    return [
        (slice(i * rows, (i + 1) * rows), replace(visible, offset=number * rows))
        for i, number in enumerate(chunks_of_rank(shards.contract.chunks, *place))
    ]


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, parts: list[tuple[slice, Visible]], scale: float, groups: int,
        shards: Shards,
    ) -> Tensor:  # fmt: skip
        keys, values = _whole(k, v, shards)
        compute = attention_backend(q, keys, values, parts[0][1])
        found = [compute.attention(q[rows], keys, values, visible, scale) for rows, visible in parts]
        ys, tops, inverses = zip(*found, strict=True)
        y = _joined(ys)
        ctx.save_for_backward(q, k, v, y, *tops, *inverses)
        ctx.parts, ctx.scale, ctx.groups, ctx.shards = parts, scale, groups, shards
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        q, k, v, y, *kept = ctx.saved_tensors
        compute, count = product_backend(dy, q), len(ctx.parts)
        keys, values = _whole(k, v, ctx.shards)
        alone = count == 1 and ctx.shards.context is None
        dq: dict[int, Tensor] = {}

        def root(x: Tensor) -> Tensor:
            of_groups = _root_over_heads(x.unflatten(2, (k.shape[2], -1)), ctx.groups, ctx.shards)
            return compute.rounded(of_groups, k.dtype) if alone else of_groups

        def roots() -> Iterator[list[Tensor]]:
            """What every chunk of queries gives keys and values, float32 [s, b, g, d] each, in the tree's order."""
            for i in tree_order(count):
                rows, visible = ctx.parts[i]
                dq[i], *of_heads = compute.attention_gradient(
                    dy[rows], q[rows], keys, values, y[rows], kept[i], kept[count + i], visible, ctx.scale
                )
                yield [root(x) for x in of_heads]

        totals = tree_sum(roots(), lambda a, b: [x + y for x, y in zip(a, b, strict=True)])
        if alone:
            dk, dv = totals
        elif ctx.shards.context is None:
            dk, dv = (compute.rounded(total, k.dtype) for total in totals)
        else:
            begun = [begin_sum_of_own(total, ctx.shards.context, k.dtype) for total in totals]
            dk, dv = (one.wait() for one in begun)
        return _joined([dq[i] for i in range(count)]), dk, dv, None, None, None, None


def _whole(k: Tensor, v: Tensor, shards: Shards) -> tuple[Tensor, Tensor]:
    """Keys and values of the whole sequence: they are gathered again for backward rather than kept."""
    begun = [begin_gather(x, shards.context) for x in (k, v)]
    return begun[0].wait(), begun[1].wait()


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


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
        total = _root_over_heads(heads, ctx.groups, ctx.shards)
        return backend(grad.device).rounded(total, grad.dtype), None, None, None


def _root_over_heads(heads: Tensor, groups: int, shards: Shards) -> Tensor:
    """What query heads [s, b, g, repeat, d] of this rank and its sharers give their groups: float32 [s, b, g, d]."""
    compute = backend(heads.device)
    sharers = max(1, shards.size // groups)
    if shards.contract.strategy == "gather":
        total = compute.row_sums(torch.cat(_from_sharers(heads, shards, sharers, 3), 3), (3,)).float()
    else:
        leaves = max(1, shards.contract.leaves // groups) // sharers
        total = tree_sum(_from_sharers(compute.tree_of_sums(heads, 3, leaves), shards, sharers, 2))
    return total if shards.rank % sharers == sharers - 1 else torch.zeros_like(total)


def _from_sharers(x: Tensor, shards: Shards, sharers: int, dim: int) -> list[Tensor]:
    """The parts of `x` that this rank's sharers hold, in rank order."""
    if sharers == 1 or shards.group is None:
        return [x]
    first = shards.rank // sharers * sharers
    return list(all_gather(x, shards.group, dim).chunk(shards.size, dim)[first : first + sharers])
