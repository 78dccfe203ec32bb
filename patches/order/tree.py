"""The pairwise tree over leaves: where a sharded dimension is cut, and in which order its leaves are added.

    leaf   0   1   2   3   4   5   6   7        leaves = 8
            \\ /     \\ /     \\ /     \\ /
             +       +       +       +           TP=4: a rank owns one of these
               \\   /           \\   /
                 +               +               TP=2: a rank owns one of these
                     \\       /
                         +                       TP=1; rounded here, once, to the output dtype

A rank's leaves are a subtree, so every TP size that divides `leaves` walks the same tree. Legend: T tokens,
N result features, K the summed dimension, tK a rank's share of it, P pieces (2 for a gated fc1).
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from torch import Tensor

from patches.order.exact.brackets import AT_ONCE
from patches.order.exact.products import exact_product, rounded_sum

__all__ = ["cuts", "tree_of_products", "tree_of_sums", "tree_sum"]


def cuts(size: int, leaves: int) -> list[tuple[int, int]]:
    """Start and end of every leaf of a dimension; leaf j starts at ⌊j·size/leaves⌋.

    Cutting a rank's equal share into its leaves gives the same places as cutting the whole dimension.
    """
    edges = [j * size // leaves for j in range(leaves + 1)]
    return list(pairwise(edges))


def tree_sum(parts: Iterable[Tensor]) -> Tensor:
    """Sum of `parts` by adjacent pairs, then pairs of pairs, …: at most log2(n) sums are pending at a time."""
    pending: list[tuple[int, Tensor]] = []
    for part in parts:
        height = 0
        while pending and pending[-1][0] == height:
            part = pending.pop()[1] + part
            height += 1
        pending.append((height, part))
    total = pending.pop()[1]
    while pending:
        total = pending.pop()[1] + total
    return total


def tree_of_products(a_TK: Tensor, b_KN: Tensor, leaves: int, pieces: int = 1) -> Tensor:
    """float32 root [T, N] of the tree over `leaves` products; leaf j takes its share of each of K's `pieces`.

    Args:
        a_TK: [T, K]; with pieces=2, K holds [gate | up] and leaf j is gate[j] ∪ up[j].
        b_KN: [K, N], cut likewise.
    """
    a_TPK = a_TK.unflatten(1, (pieces, -1)) if a_TK.shape[1] else a_TK.unsqueeze(1)
    b_PKN = b_KN.unflatten(0, (pieces, -1)) if b_KN.shape[0] else b_KN.unsqueeze(0)
    if _at_once(a_TPK.shape[2], leaves, len(a_TK) * b_KN.shape[1]):
        a_LTK = a_TPK.unflatten(2, (leaves, -1)).permute(2, 0, 1, 3).flatten(2)
        b_LKN = b_PKN.unflatten(1, (leaves, -1)).transpose(0, 1).flatten(1, 2)
        return _sum_of_pairs(exact_product(a_LTK, b_LKN))
    return tree_sum(
        exact_product(a_TPK[:, :, lo:hi].flatten(1), b_PKN[:, lo:hi].flatten(0, 1))
        for lo, hi in cuts(a_TPK.shape[2], leaves)
    )


def tree_of_sums(x: Tensor, dim: int, leaves: int, exact_dims: tuple[int, ...] = ()) -> Tensor:
    """float32 root of the tree over `leaves` sums along `dim`; `exact_dims` are summed inside every leaf."""
    dim, *exact = (d % x.dim() for d in (dim, *exact_dims))
    if _at_once(x.shape[dim], leaves, x.numel() // max(1, x.shape[dim])):
        x_L = x.unflatten(dim, (leaves, -1)).movedim(dim, 0)
        return _sum_of_pairs(rounded_sum(x_L, [d + 1 for d in (dim, *exact)]))
    return tree_sum(rounded_sum(x.narrow(dim, lo, hi - lo), (dim, *exact)) for lo, hi in cuts(x.shape[dim], leaves))


def _at_once(size: int, leaves: int, results: int) -> bool:
    """Whether the leaves of a dimension of `size` are alike, and their `results` few enough to be held together."""
    return size > 0 and size % leaves == 0 and leaves * results <= AT_ONCE


def _sum_of_pairs(parts_L: Tensor) -> Tensor:
    """`tree_sum` along dimension 0, whose size is a power of two."""
    while len(parts_L) > 1:
        parts_L = parts_L[0::2] + parts_L[1::2]
    return parts_L[0]
