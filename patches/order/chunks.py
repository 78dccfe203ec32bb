"""Chunks of a sequence on context-parallel (CP) ranks, and the tree that adds what each of them gives.

    tokens     0 1 2 3 4 5 6 7         chunks = 8
    rank 0     0 1         6 7         CP=2: a run of chunks, and the run that mirrors it, as Megatron deals them out
    rank 1         2 3 4 5

    leaves     0 7   1 6   2 5   3 4   a chunk stands beside its mirror image,
               \\ /   \\ /   \\ /   \\ /    so that a rank's chunks are a subtree at every size
                +     +     +     +      CP=4: a rank owns one of these
                 \\   /       \\   /
                   +           +         CP=2
                     \\       /
                         +               CP=1

Dealt out so, every rank has as many scores to compute in causal attention.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from patches.order.collectives import begin_all_gather, begin_reduce_scatter
from patches.order.handle import AsyncResult

__all__ = ["begin_gather", "begin_sum_of_own", "chunks_of_rank", "own_tokens", "tree_order"]


def tree_order(chunks: int) -> list[int]:
    """The leaves of the tree over `chunks`, a power of two: 0, the last, 1, the last but one, …"""
    if chunks == 1:
        return [0]
    return [chunk for first in range(chunks // 2) for chunk in (first, chunks - 1 - first)]


def chunks_of_rank(chunks: int, rank: int, size: int) -> list[int]:
    """Which of all `chunks` of a sequence the `rank` of `size` has, in the order in which it has them."""
    return sorted(tree_order(chunks)[rank * chunks // size : (rank + 1) * chunks // size])


def own_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's part of `x` [s, …], which all of `group` hold whole: [s/c, …]."""
    runs = 2 * group.size()
    return _of(x, runs, chunks_of_rank(runs, group.rank(), group.size()))


def begin_gather(x: Tensor, group: dist.ProcessGroup | None) -> AsyncResult:
    """The whole sequence [s, …] of which every rank has its chunks, [s/c, …]; the parts begin to travel."""
    if group is None:
        return AsyncResult.of(x)
    runs, gathered = 2 * group.size(), begin_all_gather(x, group)
    place = sorted(range(runs), key=tree_order(runs).__getitem__)
    return AsyncResult(lambda: _of(gathered.wait(), runs, place))


def begin_sum_of_own(root: Tensor, group: dist.ProcessGroup, dtype: torch.dtype) -> AsyncResult:
    """This rank's chunks [s/c, …] of the tree's sum over ranks of float32 `root` [s, …], rounded once to `dtype`."""
    runs = 2 * group.size()
    return begin_reduce_scatter(_of(root, runs, tree_order(runs)), group, dtype)


def _of(x: Tensor, runs: int, numbers: list[int]) -> Tensor:
    """Those `numbers` of the `runs` that dimension 0 of `x` is made of, one after the other."""
    cut = x.unflatten(0, (runs, -1))
    return torch.cat([cut[number] for number in numbers])
