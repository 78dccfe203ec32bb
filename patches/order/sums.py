"""Sums that are not products, by the device that their summands lie on: exact on a CPU, by pairs on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from patches.order import tree
from patches.order.exact.products import exact_sum
from patches.order.kernels import provenance

__all__ = ["row_sums", "tree_of_sums"]


def tree_of_sums(x: Tensor, dim: int, leaves: int, exact_dims: tuple[int, ...] = ()) -> Tensor:
    """float32 root of the tree over `leaves` sums along `dim`; `exact_dims` are summed inside every leaf."""
    if provenance.serve(x.device):
        from patches.order.kernels import sums

        return sums.tree_of_sums(x, dim, leaves, exact_dims)
    return tree.tree_of_sums(x, dim, leaves, exact_dims)


def row_sums(x: Tensor, dims: Sequence[int], keepdim: bool = False) -> Tensor:
    """Σx over `dims`, not yet rounded to a tensor's dtype: float64 on a CPU, float32 on a GPU."""
    if provenance.serve(x.device):
        from patches.order.kernels import sums

        return sums.row_sums(x, dims, keepdim)
    return exact_sum(x, dims, keepdim)
