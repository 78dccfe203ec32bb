"""The tree's upper levels, across ranks: float32 partials travel, the rounded result comes back.

rank r's root ──all-to-all──▶ everybody's slice r ──tree sum, one rounding──▶ slice r ──all-gather──▶ all
                                                                 reduce-scatter semantics stop here ┘
small roots   ──all-gather──▶ everybody's whole root ──the same sum on every rank
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from patches.order.backend import backend
from patches.order.handle import AsyncResult

__all__ = [
    "all_gather",
    "all_gather_uneven",
    "all_to_all",
    "begin_all_gather",
    "begin_all_reduce",
    "begin_reduce_scatter",
    "tree_all_reduce",
    "tree_reduce_scatter",
]

# Bytes of a root up to which a second collective costs more than the first one's excess: on gloo and two cores one
# takes 0.6 of the time of two up to here, and as much as two at four times the size.
SMALL = 1 << 18


def tree_all_reduce(root: Tensor, group: dist.ProcessGroup, dtype: torch.dtype, divide_by: int = 1) -> Tensor:
    """Tree sum over the group's ranks of float32 `root`, of any shape, rounded once to `dtype`; on every rank."""
    return begin_all_reduce(root, group, dtype, divide_by).wait()


def tree_reduce_scatter(root: Tensor, group: dist.ProcessGroup, dtype: torch.dtype, divide_by: int = 1) -> Tensor:
    """This rank's slice, along dimension 0, of the tree sum over ranks of float32 `root`, rounded once to `dtype`."""
    return begin_reduce_scatter(root, group, dtype, divide_by).wait()


def all_gather(x: Tensor, group: dist.ProcessGroup | None, dim: int = 0) -> Tensor:
    """Every rank's `x`, in rank order, side by side along `dim`; `x` itself without a group."""
    return begin_all_gather(x, group, dim).wait()


def all_to_all(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    """`rows`, of which `sent[r]` go to rank r, in that order, exchanged for the `received[r]` that come from it."""
    if group.size() == 1:
        return rows
    out = rows.new_empty((sum(received), *rows.shape[1:]))
    dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
    return out


def all_gather_uneven(rows: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
    """The rows of every rank, `sizes[r]` of rank r, in rank order, on all."""
    if group.size() == 1:
        return rows
    own = sizes[group.rank()]
    return all_to_all(torch.cat([rows] * group.size()), [own] * group.size(), sizes, group)


def begin_all_reduce(
    root: Tensor, group: dist.ProcessGroup, dtype: torch.dtype, divide_by: int = 1, symmetric: bool = False
) -> AsyncResult:
    """`tree_all_reduce`, whose roots begin to travel."""
    flat = root.reshape(-1)
    if flat.nbytes <= SMALL and not symmetric:
        roots = begin_all_gather(flat, group)
        return AsyncResult(lambda: _rounded_sum(roots.wait(), group.size(), dtype, divide_by).view(root.shape))
    padding = -flat.numel() % group.size()
    if padding:
        flat = torch.cat([flat, flat.new_zeros(padding)])
    own = begin_reduce_scatter(flat, group, dtype, divide_by, symmetric)
    return AsyncResult(lambda: all_gather(own.wait(), group)[: root.numel()].view(root.shape))


def begin_reduce_scatter(
    root: Tensor, group: dist.ProcessGroup, dtype: torch.dtype, divide_by: int = 1, symmetric: bool = False
) -> AsyncResult:
    """`tree_reduce_scatter`, whose roots begin to travel.

    Args:
        symmetric: ranks read each other's roots in symmetric memory instead of sending them; the same bits.
    """
    size = group.size()
    if root.shape[0] % size:
        raise ValueError(f"dimension 0 of {tuple(root.shape)} cannot be scattered over {size} ranks")
    if size == 1:
        return AsyncResult(lambda: _rounded_sum(root, 1, dtype, divide_by))
    if symmetric:
        return backend(root.device).begin_reading_peers(root, group, dtype, divide_by)
    mine = root.contiguous()
    theirs = torch.empty_like(mine)
    work = dist.all_to_all_single(theirs, mine, group=group, async_op=True)
    return AsyncResult(lambda: _rounded_sum(_arrived(work, theirs, mine), size, dtype, divide_by))


def begin_all_gather(x: Tensor, group: dist.ProcessGroup | None, dim: int = 0) -> AsyncResult:
    """`all_gather`, whose parts begin to travel."""
    if group is None or group.size() == 1:
        return AsyncResult.of(x)
    mine = x.movedim(dim, 0).contiguous()
    out = mine.new_empty((mine.shape[0] * group.size(), *mine.shape[1:]))
    work = dist.all_gather_into_tensor(out, mine, group=group, async_op=True)
    return AsyncResult(lambda: _arrived(work, out, mine).movedim(0, dim))


def _arrived(work: dist.Work | None, received: Tensor, sent: Tensor) -> Tensor:
    """`received`, once the collective is done; `sent` is named so that it lives until then."""
    assert work is not None
    work.wait()
    return received


def _rounded_sum(parts: Tensor, size: int, dtype: torch.dtype, divide_by: int) -> Tensor:
    """Tree sum of the `size` parts that lie one after the other along dimension 0, divided, rounded once."""
    parts_tN = parts.reshape(size, parts.numel() // size)
    total_N = backend(parts.device).rounded_tree_sum(parts_tN, dtype, divide_by)
    return total_N.view(parts.shape[0] // size, *parts.shape[1:])
