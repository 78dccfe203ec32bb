"""Exact products, and trees over them: values that no grouping, shape, thread count or BLAS can change.

`slices` defines them; `brackets` gives nearly every one of them, once it is rounded, at the price of one ordinary
float64 product. Legend: M, N result, K the summed dimension, L leaves, P pieces (2 for a gated fc1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from patches.contract import DTYPES
from patches.order.exact.brackets import at_once, bracketed_product
from patches.order.exact.slices import rounded
from patches.order.grid import add_units
from patches.order.tree import cuts, sum_of_pairs, tree_sum

__all__ = [
    "add_product",
    "add_product_in_units",
    "check",
    "exact_product",
    "product",
    "provenance",
    "tree_of_products",
]


def check(device: torch.device) -> None:
    """Nothing to try: exact values are the same on every CPU."""


def provenance(device: torch.device) -> dict[str, object]:
    """Exact values depend on their operands alone."""
    return {"leaf": "exact"}


def product(
    a_MK: Tensor,
    b_KN: Tensor,
    leaves: int = 1,
    pieces: int = 1,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
    beside_collective: bool = False,
) -> Tensor:
    """The tree over `leaves` exact products, times `scale`, rounded once to `dtype`."""
    if scale != 1:
        return product(a_MK, b_KN, leaves, pieces).mul_(scale).to(dtype)
    if leaves == pieces == 1:
        return exact_product(a_MK, b_KN, dtype)
    return rounded(tree_of_products(a_MK, b_KN, leaves, pieces), dtype)


def add_product(into: Tensor, a_MK: Tensor, b_KN: Tensor, beside_collective: bool = False) -> None:
    """into += a·b."""
    into.add_(exact_product(a_MK, b_KN))


def add_product_in_units(
    total: Tensor, bound: Tensor, a_MK: Tensor, b_KN: Tensor, beside_collective: bool = False
) -> None:
    """total += a·b in units of the grid, bound += max|a·b|."""
    add_units(total, bound, exact_product(a_MK, b_KN))


def exact_product(a_MK: Tensor, b_KN: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """One leaf's product, a·b, as float32 [..., M, N], rounded once more to `dtype`.

    Args:
        a_MK: [..., M, K], float32, bfloat16 or float16, any strides.
        b_KN: [..., K, N], same dtypes and leading dimensions.

    Every element is a function of its own row of `a` and column of `b` alone. Error against the exact sum
    of products, before the final rounding to float32: at most 2^-48 · Σ|a_k·b_k|. Infinities and NaNs give
    what IEEE arithmetic gives, NaNs the canonical one; zeros are +0.
    """
    for x in (a_MK, b_KN):
        if x.dtype not in DTYPES:
            raise TypeError(f"exact products take float32, bfloat16 or float16, not {x.dtype}")
    if not (a_MK.numel() and b_KN.numel()):
        return a_MK.new_zeros((*a_MK.shape[:-1], b_KN.shape[-1]), dtype=dtype)
    return bracketed_product(a_MK, b_KN, dtype)


def tree_of_products(a_MK: Tensor, b_KN: Tensor, leaves: int, pieces: int = 1) -> Tensor:
    """float32 root [M, N] of the tree over `leaves` products; leaf j takes its share of each of K's `pieces`.

    Args:
        a_MK: [M, K]; with pieces=2, K holds [gate | up] and leaf j is gate[j] ∪ up[j].
        b_KN: [K, N], cut likewise.
    """
    a_MPK = a_MK.unflatten(1, (pieces, -1)) if a_MK.shape[1] else a_MK.unsqueeze(1)
    b_PKN = b_KN.unflatten(0, (pieces, -1)) if b_KN.shape[0] else b_KN.unsqueeze(0)
    if at_once(a_MPK.shape[2], leaves, len(a_MK) * b_KN.shape[1]):
        a_LMK = a_MPK.unflatten(2, (leaves, -1)).permute(2, 0, 1, 3).flatten(2)
        b_LKN = b_PKN.unflatten(1, (leaves, -1)).transpose(0, 1).flatten(1, 2)
        return sum_of_pairs(exact_product(a_LMK, b_LKN))
    return tree_sum(
        exact_product(a_MPK[:, :, lo:hi].flatten(1), b_PKN[:, lo:hi].flatten(0, 1))
        for lo, hi in cuts(a_MPK.shape[2], leaves)
    )
