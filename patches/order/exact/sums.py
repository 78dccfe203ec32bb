"""Exact sums, and trees over them; see `slices` for what they are by definition."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from patches.order.exact.brackets import AT_ONCE, UNIT, at_once
from patches.order.exact.slices import sliced_sum
from patches.order.tree import cuts, sum_of_pairs, tree_sum

__all__ = ["exact_sum", "rounded_sum", "sum_bounds", "tree_of_sums"]


def tree_of_sums(x: Tensor, dim: int, leaves: int, exact_dims: tuple[int, ...] = ()) -> Tensor:
    """float32 root of the tree over `leaves` sums along `dim`; `exact_dims` are summed inside every leaf."""
    dim, *exact = (d % x.dim() for d in (dim, *exact_dims))
    size = x.shape[dim]
    if at_once(size, leaves, x.numel() // max(1, size)):
        x_L = x.unflatten(dim, (leaves, -1)).movedim(dim, 0)
        return sum_of_pairs(rounded_sum(x_L, [d + 1 for d in (dim, *exact)]))
    if 0 < x.numel() <= AT_ONCE:
        x_L = _padded_leaves(x.movedim(dim, 0), leaves)
        return sum_of_pairs(rounded_sum(x_L, [1, *(d + 1 + (d < dim) for d in exact)]))
    return tree_sum(rounded_sum(x.narrow(dim, lo, hi - lo), (dim, *exact)) for lo, hi in cuts(x.shape[dim], leaves))


def _padded_leaves(x: Tensor, leaves: int) -> Tensor:
    """The leaves of dimension 0, [leaves, length, ...], as long as the longest: the others end in zeros."""
    return torch.cat([x, x.new_zeros(1, *x.shape[1:])])[_places(len(x), leaves)]


@lru_cache
def _places(size: int, leaves: int) -> Tensor:
    """Which elements make up every leaf, [leaves, length]; `size` where it has no more."""
    edges = torch.tensor(cuts(size, leaves))
    places = edges[:, :1] + torch.arange(int((edges[:, 1] - edges[:, 0]).max()))
    return torch.where(places < edges[:, 1:], places, size)


def exact_sum(x: Tensor, dims: int | Sequence[int], keepdim: bool = False) -> Tensor:
    """Σx over `dims`, as float64 that depends on the summed elements alone.

    Args:
        x: float32, bfloat16, float16, or float64 with a dynamic range that float32 products can have.
        dims: one or several dimensions; an empty one sums to 0.
    """
    if x.dim() == 0:
        return x.double()
    summed = tuple(d % x.dim() for d in ([dims] if isinstance(dims, int) else dims))
    kept = [d for d in range(x.dim()) if d not in summed]
    rows = x.permute(*kept, *summed).reshape(*(x.shape[d] for d in kept), math.prod(x.shape[d] for d in summed))
    total = sliced_sum(rows.clone() if rows.dtype == torch.float64 else rows.double())
    if keepdim:
        total = total.reshape([1 if d in summed else x.shape[d] for d in range(x.dim())])
    return total


def rounded_sum(x: Tensor, dim: int | Sequence[int], keepdim: bool = False) -> Tensor:
    """`exact_sum` of float32, bfloat16 or float16, rounded to float32."""
    if not x.numel() or not x.dim():
        return exact_sum(x, dim, keepdim).float()
    dims = [d % x.dim() for d in ([dim] if isinstance(dim, int) else dim)]
    wide = x.double()
    low, high = (end.float() for end in sum_bounds(wide, dims, keepdim))
    if not torch.equal(low, high):
        doubt = low.ne(high).view([x.shape[d] for d in range(x.dim()) if d not in dims])
        rows = wide.movedim(dims, list(range(-len(dims), 0)))[doubt]
        low.view(doubt.shape)[doubt] = sliced_sum(rows.flatten(1)).float()
    return low.add_(0.0)


def sum_bounds(x: Tensor, dims: list[int], keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """Two float64 numbers around `exact_sum` of float64 `x`, which is not empty; NaN where that is not finite."""
    y = x.sum(dims, keepdim)
    # A plain sum is off by less than a unit per term; of the exact one, the additions of up to 18 slices round.
    magnitude = torch.linalg.vector_norm(x, 1, dims, keepdim) if x.dim() - 1 in dims else x.abs().sum(dims, keepdim)
    margin = magnitude.mul_(1.01 * UNIT * (x.numel() // y.numel() + 40))
    return y - margin, y.add_(margin)
