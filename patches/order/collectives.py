"""The tree's upper levels, across ranks: float32 partials travel, the rounded result comes back.

rank r's root ──all-to-all──▶ everybody's slice r ──tree sum, one rounding──▶ slice r ──all-gather──▶ all
                                                                 reduce-scatter semantics stop here ┘
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from patches.order import kernels
from patches.order.exact import rounded, sum_of_squares
from patches.order.tree import tree_sum

__all__ = ["all_gather", "gradient_norm", "tree_all_reduce", "tree_reduce_scatter"]


def tree_all_reduce(root: Tensor, group: dist.ProcessGroup, dtype: torch.dtype, divide_by: int = 1) -> Tensor:
    """Tree sum over the group's ranks of float32 `root`, of any shape, rounded once to `dtype`; on every rank."""
    size = group.size()
    if size == 1:
        return rounded(root / divide_by if divide_by > 1 else root, dtype)
    flat = root.reshape(-1)
    padding = -flat.numel() % size
    if padding:
        flat = torch.cat([flat, flat.new_zeros(padding)])
    own = tree_reduce_scatter(flat, group, dtype, divide_by)
    return all_gather(own, group)[: root.numel()].view(root.shape)


def tree_reduce_scatter(root: Tensor, group: dist.ProcessGroup, dtype: torch.dtype, divide_by: int = 1) -> Tensor:
    """This rank's slice, along dimension 0, of the tree sum over ranks of float32 `root`, rounded once to `dtype`."""
    size = group.size()
    if root.shape[0] % size:
        raise ValueError(f"dimension 0 of {tuple(root.shape)} cannot be scattered over {size} ranks")
    if size > 1:
        theirs = torch.empty_like(root, memory_format=torch.contiguous_format)
        dist.all_to_all_single(theirs, root.contiguous(), group=group)
        root = tree_sum(theirs.chunk(size))
    return rounded(root / divide_by if divide_by > 1 else root, dtype)


def all_gather(x: Tensor, group: dist.ProcessGroup | None, dim: int = 0) -> Tensor:
    """Every rank's `x`, in rank order, side by side along `dim`; `x` itself without a group."""
    if group is None or group.size() == 1:
        return x
    x = x.movedim(dim, 0).contiguous()
    out = x.new_empty((x.shape[0] * group.size(), *x.shape[1:]))
    dist.all_gather_into_tensor(out, x, group=group)
    return out.movedim(0, dim)


def gradient_norm(grads: list[Tensor], groups: list[dist.ProcessGroup], device: torch.device) -> float:
    """‖grads‖₂ over all ranks of `groups`, to float64 accuracy: no shard layout, bucket or rank order can change it.

    Infinities and NaNs come through as they are.
    """
    if kernels.serve(device):
        from patches.order import squares_gpu

        bins = squares_gpu.squares(grads, device)
        for group in groups:
            dist.all_reduce(bins, group=group)
        return squares_gpu.root(bins)
    tops = [grad.detach().abs().amax() for grad in grads if grad.numel()]
    top = torch.stack([t.float() for t in tops]).amax() if tops else torch.zeros((), device=device)
    top = torch.where(top.isnan(), torch.inf, top)
    nan = torch.stack([t.isnan() for t in tops]).any() if tops else torch.zeros((), dtype=torch.bool, device=device)
    flags = torch.stack([top.double(), nan.double()]).to(device)
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
