"""The tree's upper levels, across ranks: float32 partials travel, the rounded result comes back.

rank r's root ──all-to-all──▶ everybody's slice r ──tree sum, one rounding──▶ slice r ──all-gather──▶ all
                                                                 reduce-scatter semantics stop here ┘
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from patches.contract import UnsupportedError
from patches.order.exact.products import pieces, rounded, sum_of_squares
from patches.order.kernels import provenance
from patches.order.tree import tree_sum

__all__ = [
    "Pending",
    "all_gather",
    "begin_all_gather",
    "begin_all_reduce",
    "begin_reduce_scatter",
    "check_symmetric_memory",
    "gradient_norm",
    "tree_all_reduce",
    "tree_reduce_scatter",
]

# A collective that is under way: call it for its result. It holds its buffers until then, and ranks must begin
# collectives of a group in the same order.
Pending = Callable[[], Tensor]
WAY_OUT = "leave symmetric_memory=False, which gives the same bits"


def tree_all_reduce(root: Tensor, group: dist.ProcessGroup, dtype: torch.dtype, divide_by: int = 1) -> Tensor:
    """Tree sum over the group's ranks of float32 `root`, of any shape, rounded once to `dtype`; on every rank."""
    return begin_all_reduce(root, group, dtype, divide_by)()


def tree_reduce_scatter(root: Tensor, group: dist.ProcessGroup, dtype: torch.dtype, divide_by: int = 1) -> Tensor:
    """This rank's slice, along dimension 0, of the tree sum over ranks of float32 `root`, rounded once to `dtype`."""
    return begin_reduce_scatter(root, group, dtype, divide_by)()


def all_gather(x: Tensor, group: dist.ProcessGroup | None, dim: int = 0) -> Tensor:
    """Every rank's `x`, in rank order, side by side along `dim`; `x` itself without a group."""
    return begin_all_gather(x, group, dim)()


def begin_all_reduce(
    root: Tensor, group: dist.ProcessGroup, dtype: torch.dtype, divide_by: int = 1, symmetric: bool = False
) -> Pending:
    """`tree_all_reduce`, whose roots begin to travel."""
    flat = root.reshape(-1)
    padding = -flat.numel() % group.size()
    if padding:
        flat = torch.cat([flat, flat.new_zeros(padding)])
    own = begin_reduce_scatter(flat, group, dtype, divide_by, symmetric)
    return lambda: all_gather(own(), group)[: root.numel()].view(root.shape)


def begin_reduce_scatter(
    root: Tensor, group: dist.ProcessGroup, dtype: torch.dtype, divide_by: int = 1, symmetric: bool = False
) -> Pending:
    """`tree_reduce_scatter`, whose roots begin to travel.

    Args:
        symmetric: ranks read each other's roots in symmetric memory instead of sending them; the same bits.
    """
    size = group.size()
    if root.shape[0] % size:
        raise ValueError(f"dimension 0 of {tuple(root.shape)} cannot be scattered over {size} ranks")
    if size == 1:
        return lambda: _rounded_sum(root, 1, dtype, divide_by)
    if symmetric:
        check_symmetric_memory(root.device)
        from patches.order.kernels.collectives import begin_reading_peers

        return begin_reading_peers(root, group, dtype, divide_by)
    mine = root.contiguous()
    theirs = torch.empty_like(mine)
    work = dist.all_to_all_single(theirs, mine, group=group, async_op=True)
    return lambda: _rounded_sum(_arrived(work, theirs, mine), size, dtype, divide_by)


def begin_all_gather(x: Tensor, group: dist.ProcessGroup | None, dim: int = 0) -> Pending:
    """`all_gather`, whose parts begin to travel."""
    if group is None or group.size() == 1:
        return lambda: x
    mine = x.movedim(dim, 0).contiguous()
    out = mine.new_empty((mine.shape[0] * group.size(), *mine.shape[1:]))
    work = dist.all_gather_into_tensor(out, mine, group=group, async_op=True)
    return lambda: _arrived(work, out, mine).movedim(0, dim)


def check_symmetric_memory(device: torch.device) -> None:
    """Raise `UnsupportedError` where torch can tell that ranks cannot read each other's memory."""
    if device.type != "cuda":
        raise UnsupportedError(f"symmetric_memory=True needs GPUs, not a {device.type}: {WAY_OUT}")
    try:
        from torch.distributed import _symmetric_memory
    except ImportError as error:
        raise UnsupportedError(f"symmetric_memory=True: torch {torch.__version__} has none: {WAY_OUT}") from error
    if _symmetric_memory.get_backend(device) is None:
        raise UnsupportedError(f"symmetric_memory=True: torch has no backend of it for {device}: {WAY_OUT}")


def _arrived(work: dist.Work | None, received: Tensor, sent: Tensor) -> Tensor:
    """`received`, once the collective is done; `sent` is named so that it lives until then."""
    assert work is not None
    work.wait()
    return received


def _rounded_sum(parts: Tensor, size: int, dtype: torch.dtype, divide_by: int) -> Tensor:
    """Tree sum of the `size` parts that lie one after the other along dimension 0, divided, rounded once."""
    parts = parts.reshape(size, parts.shape[0] // size, *parts.shape[1:])
    if parts.is_cuda:
        from patches.order.kernels.collectives import rounded_tree_sum

        return rounded_tree_sum(parts.flatten(1), dtype, divide_by).view(parts.shape[1:])
    root = tree_sum(parts.unbind())
    return rounded(root / divide_by if divide_by > 1 else root, dtype)


def gradient_norm(grads: list[Tensor], groups: list[dist.ProcessGroup], device: torch.device) -> float:
    """‖grads‖₂ over all ranks of `groups`, to float64 accuracy: no shard layout, bucket or rank order can change it.

    Infinities and NaNs come through as they are.
    """
    if provenance.serve(device):
        from patches.order.kernels import squares

        bins = squares.squares(grads, device)
        for group in groups:
            dist.all_reduce(bins, group=group)
        return squares.root(bins)
    tops = [piece.abs().amax().float() for piece in pieces(grads)]
    top = torch.stack(tops).amax() if tops else torch.zeros((), device=device)
    nan = top.isnan()
    flags = torch.stack([torch.where(nan, torch.inf, top).double(), nan.double()]).to(device)
    for group in groups:
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=group)
    largest, any_nan = flags.tolist()
    if any_nan or largest == float("inf") or largest == 0:
        return float("nan") if any_nan else largest
    power = 2.0 ** torch.tensor(largest, dtype=torch.float64).frexp().exponent.item()
    slices = sum_of_squares(grads, power).to(device)
    for group in groups:
        dist.all_reduce(slices, group=group)
    return float(sum(slices.tolist())) ** 0.5
